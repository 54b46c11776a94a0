"""Noise on few rows: FEST, AdaFEST and both together (arXiv 2311.08357).

``fest``     the k most frequent rows of a table are chosen once; they alone are trained, and all of
             them are noised at every step
``adafest``  every step chooses rows anew, by noisy counts of the units that touch them; they alone
             are noised and trained in that step
``adafest+`` AdaFEST among the rows that FEST chose

Unlike ``lazydp``, no noise waits: every iterate is private, and any optimizer may follow, since
what it sees is noised already.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from dist_dp import kernels
from dist_dp.contributions import KeptRows, contribution_maps
from dist_dp.distributed import all_gather_cat, all_reduce_sum, rank
from dist_dp.errors import ConfigError, DistDpError
from dist_dp.id_distribution import IdDistribution
from dist_dp.mechanisms.base import Mechanism, Read, Schedule
from dist_dp.row_optimizers import RowOptimizer
from dist_dp.sparse_settings import ADAPTIVE, CHOOSES_ONCE
from dist_dp.survivors import SelectionNoise
from dist_dp.table_shard import TableShard

if TYPE_CHECKING:
    from dist_dp.clipping.user_groups import UserGroups
    from dist_dp.cut import CutEmbeddings
    from dist_dp.plan import PrivacyPlan


@dataclass(frozen=True)
class SelectionStats:
    """What a step's selection came to: post-processing of noised counts, so covered with them.

    Attributes:
        rows: Rows that were noised, over all ranks; a row in several column shards counts once.
        coordinates: Coordinates of tables that were noised.
    """

    rows: int
    coordinates: int


class SparseNoise(Mechanism):
    """FEST, AdaFEST, or both, by what the subclass says.

    Guarantee:
        Every iterate is (ε, δ)-DP for adding or removing one unit (record or user), at the ε the
        accountant composes, for any optimizer and learning rate; so are the released model and
        anything computed from the tables in memory between two steps. A step costs what a Gaussian
        mechanism with the plan's σ costs on the same Poisson sample: the counts have sensitivity C₁
        and noise σ₁C₁, the clipped gradients of all parameters together sensitivity C₂ and noise
        σ₂C₂, with σ₁⁻² + σ₂⁻² = σ⁻². Gradients are clipped before they are restricted to the
        survivors, which can only shorten them. Rows that do not survive are neither read nor
        written by the update. What a row's threshold is follows from public settings. The choice
        of FEST's rows, where it is private, is charged as the run's step 0.

        Like that of every mechanism here it does not cover someone who watches which rows a step
        *reads*; which rows it *writes* is private. Float arithmetic is taken for real numbers.

    Args:
        schedules: They count the steps; no noise is owed.
        plan: σ, C₁, C₂, the expected batch size, thresholds.
        optimizers: The update of each optimizer group of tables.
        kept: FEST's rows by unique table name, if they are known already; see :meth:`keep`.
        rounds: ChaCha rounds of the noise.
    """

    private = True
    takes_updates = True
    table_optimizers = frozenset({"sgd", "adagrad", "rowwise_adagrad", "adam"})
    chooses_once: ClassVar[bool]
    adaptive: ClassVar[bool]

    def __init__(
        self,
        schedules: Schedule | Sequence[Schedule],
        *,
        plan: PrivacyPlan,
        optimizers: Sequence[RowOptimizer],
        kept: KeptRows | None = None,
        rounds: int = 20,
    ) -> None:
        super().__init__(schedules, rounds=rounds)
        if plan.noise_grid is not None:
            raise ConfigError(
                f"noise.grid does not go with mechanism '{self.name}': remove it, or use lazydp"
            )
        assert plan.sparse is not None  # the plan saw to it
        if kept is not None and not self.chooses_once:
            raise ConfigError(f"mechanism '{self.name}' takes no chosen rows")
        self.plan = plan
        self.optimizers = list(optimizers)
        self.kept: dict[str, Tensor] = dict(kept or {})
        self._has_chosen = kept is not None or not self.chooses_once
        self.last_selection: SelectionStats | None = None
        self._settings = plan.sparse
        self._noise: dict[str, SelectionNoise] = {}
        self._local: dict[int, Tensor] = {}
        self._maps: list[list[Any]] = []
        self._survivors: dict[int, Tensor] = {}
        self._rates: list[tuple[float, float]] = []
        self._step = 0

    def prepare(self, shard: TableShard) -> None:
        """Notes which of the chosen rows are here; derives keys, and makes the empty state."""
        self.optimizers[shard.group].prepare(shard)
        if shard.table in self.kept:
            self._local[id(shard)] = self._local_part(shard)
        self._noise[shard.table] = SelectionNoise.of_table(shard.noise_key, self.rounds)

    @property
    def has_chosen(self) -> bool:
        """Whether it is known which rows are trained at all."""
        return self._has_chosen

    def keep(self, kept: KeptRows, shards: Iterable[TableShard]) -> None:
        """Takes over the rows that were chosen, before the first step.

        Args:
            kept: By unique table name, int64, sorted; tables that are not named keep all rows.
            shards: The shards here.
        """
        self.kept.clear()
        self.kept.update(kept)
        self._has_chosen = True
        self._local = {id(s): self._local_part(s) for s in shards if s.table in self.kept}

    def before_lookup(self, reads: Sequence[Read], *, training: bool = True) -> None:
        """Nothing waits."""

    def after_update(self, shards: Iterable[TableShard]) -> None:
        """Nothing: the noise came with the gradient."""
        self._survivors.clear()

    def settle(self, shard: TableShard, first_row: int = 0, last_row: int | None = None) -> None:
        """Nothing waits."""

    def contribute(
        self, cuts: Sequence[CutEmbeddings], is_real: Tensor, users: UserGroups | None
    ) -> None:
        """Notes what the units of a micro-batch contribute to the selection; sends nothing.

        Args:
            cuts: The cut collections, with the lookups of the batch in flight.
            is_real: bool ``[batch]``.
            users: Whose the examples are.
        """
        if self.adaptive:
            norm = self._settings.contribution_norm
            maps = contribution_maps(cuts, is_real, users, norm, self.kept or None)
            before: list[list[Any]] = self._maps or [[] for _ in cuts]
            self._maps = [[*some, *more] for some, more in zip(before, maps, strict=True)]

    def select(
        self, cuts: Sequence[CutEmbeddings], step: int, rates: Sequence[tuple[float, float]]
    ) -> None:
        """Chooses the rows that the step noises and trains; a collective.

        Args:
            cuts: The cut collections.
            step: The step in flight.
            rates: Learning rate and weight decay of each group of tables.
        """
        if not self._has_chosen:
            raise DistDpError(
                f"mechanism '{self.name}' has no rows to train yet: they are chosen when the model "
                "is made private by an engine, or given by keep()"
            )
        self._step, self._rates = step, list(rates)
        maps, self._maps = self._maps, []
        self._survivors = {}
        if not self.adaptive:
            for cut in cuts:
                for shard in cut.shards:
                    self._survivors[id(shard)] = self._candidates(shard)
            self._note(cuts)
            return
        sigma = self.plan.noise_multiplier_at(step)
        thresholds = self._settings.thresholds(sigma, self._eligible(cuts))
        deviation = self._settings.selection_multiplier(sigma) * self._settings.contribution_norm
        for cut, lookups in zip(cuts, maps, strict=True):
            touched = _counted(cut, lookups)
            for shard in cut.shards:
                rows, counts = touched[id(shard)]
                self._survivors[id(shard)] = self._chosen(
                    shard, rows, counts, step, thresholds[shard.table], deviation
                )
        self._note(cuts)

    def survivors(self, shard: TableShard) -> Tensor:
        """Local rows of a shard that the step in flight noises and trains, int64, ascending."""
        return self._survivors[id(shard)]

    def apply(self, shard: TableShard, rows: Tensor, gradient: Tensor) -> None:
        """Noises the survivors' gradient and updates them; no other row is touched.

        Args:
            shard: The shard.
            rows: int64 ``[n]``, distinct local rows, ascending, all of them survivors.
            gradient: float32 ``[n, local columns]``, the clipped sum over the expected batch size.
        """
        survivors = self._survivors[id(shard)]
        if not survivors.numel():
            return
        total = gradient.new_zeros(survivors.numel(), shard.weight.shape[1])
        if rows.numel():
            total[torch.searchsorted(survivors, rows)] = gradient
        deviation = self.plan.noise_on_sum_at(self._step) / self.plan.expected_batch_size
        if deviation > 0:
            noise = kernels.normal(
                shard.noise_key,
                survivors + shard.row_offset,
                self._step - 1,
                self._step,
                column_offset=shard.column_offset,
                num_columns=shard.weight.shape[1],
                rounds=self.rounds,
            )
            total.add_(noise, alpha=_rounded_up(deviation))
        learning_rate, weight_decay = self._rates[shard.group]
        self.optimizers[shard.group].update(
            shard, survivors, total, learning_rate=learning_rate, weight_decay=weight_decay
        )

    def _eligible(self, cuts: Sequence[CutEmbeddings]) -> dict[str, int]:
        """Rows of each table that may survive."""
        return {
            cut.table_id(c.name): (
                self.kept[cut.table_id(c.name)].numel()
                if cut.table_id(c.name) in self.kept
                else c.num_embeddings
            )
            for cut in cuts
            for c in cut.configs
        }

    def _candidates(self, shard: TableShard) -> Tensor:
        """Local rows that may survive, where they were chosen once."""
        if id(shard) in self._local:
            return self._local[id(shard)]
        return torch.arange(shard.weight.shape[0], device=shard.weight.device)

    def _local_part(self, shard: TableShard) -> Tensor:
        first, last = self._range_of_kept(shard)
        return (self.kept[shard.table][first:last] - shard.row_offset).to(shard.weight.device)

    def _range_of_kept(self, shard: TableShard) -> tuple[int, int]:
        """Where the chosen rows of a shard begin and end among the table's."""
        kept = self.kept[shard.table]
        bounds = [shard.row_offset, shard.row_offset + shard.weight.shape[0]]
        first, last = torch.searchsorted(kept, torch.tensor(bounds, device=kept.device)).tolist()
        return first, last

    def _chosen(
        self,
        shard: TableShard,
        rows: Tensor,
        counts: Tensor,
        step: int,
        threshold: tuple[float, float],
        deviation: float,
    ) -> Tensor:
        """Surviving local rows of a shard, int64, ascending."""
        tau, probability = threshold
        noise = self._noise[shard.table]
        device = shard.weight.device
        kept = self._local.get(id(shard))
        if kept is not None and rows.numel():
            inside = torch.isin(rows, kept)
            rows, counts = rows[inside], counts[inside]
        alive = noise.of_touched(
            rows + shard.row_offset, counts, step=step, threshold=tau, deviation=deviation
        )
        if kept is None:
            first, last = shard.row_offset, shard.row_offset + shard.weight.shape[0]
            drawn = noise.of_untouched(
                step=step, probability=probability, num_rows=shard.num_rows, first=first, last=last
            )
            others = (drawn - shard.row_offset).to(device)
        else:
            first, last = self._range_of_kept(shard)
            drawn = noise.of_untouched(
                step=step,
                probability=probability,
                num_rows=self.kept[shard.table].numel(),
                first=first,
                last=last,
            )
            others = kept[(drawn - first).to(device)]
        if rows.numel() and others.numel():
            places = torch.searchsorted(rows, others).clamp_max_(rows.numel() - 1)
            others = others[rows[places] != others]
        return torch.sort(torch.cat([rows[alive], others])).values

    def _note(self, cuts: Sequence[CutEmbeddings]) -> None:
        found = [0, 0]
        for cut in cuts:
            for shard in cut.shards:
                if shard.replicated and rank() != 0:
                    continue
                count = self._survivors[id(shard)].numel()
                found[0] += count if shard.column_offset == 0 else 0
                found[1] += count * shard.weight.shape[1]
        device = next((s.weight.device for cut in cuts for s in cut.shards), None)
        total = all_reduce_sum(torch.tensor(found, dtype=torch.int64, device=device))
        self.last_selection = SelectionStats(*total.tolist())


def _rounded_up(value: float) -> float:
    """The least float32 that is not below a value: noise is never weakened."""
    nearest = np.float32(value)
    return float(nearest if nearest >= value else np.nextafter(nearest, np.float32(np.inf)))


def _counted(cut: CutEmbeddings, lookups: Sequence[Any]) -> dict[int, tuple[Tensor, Tensor]]:
    """Touched local rows of each shard, ascending, and their counts, float64; a collective."""
    parts: dict[int, list[tuple[Tensor, Tensor]]] = {id(s): [] for s in cut.shards}
    for features in lookups:
        arrived = IdDistribution(cut.sharded, features).wait()
        for shard, rows, weights in cut.local.weighted_reads_of(arrived):
            parts[id(shard)].append((rows.to(torch.int64), weights))
    found = {}
    for shard in cut.shards:
        device = shard.weight.device
        none = torch.empty(0, dtype=torch.int64, device=device)
        rows = torch.cat([none, *(r for r, _ in parts[id(shard)])])
        weights = torch.cat(
            [none.to(torch.float64), *(w.to(torch.float64) for _, w in parts[id(shard)])]
        )
        if shard.replicated:
            rows, weights = all_gather_cat(rows), all_gather_cat(weights)
        distinct, places = torch.unique(rows, return_inverse=True)
        counts = torch.zeros(distinct.numel(), dtype=torch.float64, device=device)
        found[id(shard)] = (distinct, counts.index_add_(0, places, weights))
    return found


class FEST(SparseNoise):
    """The k most frequent rows of a table, chosen once; see :class:`SparseNoise`."""

    name = "fest"
    chooses_once = True
    adaptive = False


class AdaFEST(SparseNoise):
    """Rows chosen anew at every step by noisy counts; see :class:`SparseNoise`."""

    name = "adafest"
    chooses_once = False
    adaptive = True


class AdaFESTPlus(SparseNoise):
    """Rows chosen at every step among those chosen once; see :class:`SparseNoise`."""

    name = "adafest+"
    chooses_once = True
    adaptive = True


assert {m.name for m in (FEST, AdaFESTPlus)} == CHOOSES_ONCE
assert {m.name for m in (AdaFEST, AdaFESTPlus)} == ADAPTIVE
