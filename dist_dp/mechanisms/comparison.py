"""Mechanisms that exist to be compared with, and are refused for real runs.

``eana``         noise on the rows a batch touched, and on no others: not private
``dpsgd-torch``  DP-SGD with torch's generator, as other libraries do it: not a secret generator

No configuration, plan or engine reaches them by name (:func:`dist_dp.mechanisms.mechanism_class`
says why), and neither can be settled, so nothing trained with them can be released. Benchmarks
put them into an optimizer by hand, to time their steps.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from dist_dp import kernels
from dist_dp.errors import ReleaseError
from dist_dp.mechanisms.base import Mechanism, Read
from dist_dp.noise_schedule import NoiseSchedule
from dist_dp.table_shard import TableShard


class ComparisonMechanism(Mechanism):
    """A mechanism to be timed and never to be released.

    Guarantee:
        None: each class says what it lacks. ``private`` is true all the same, since it makes the
        step clip and add noise, which is what is to be timed. ``settle`` always fails, and a
        release settles before it writes, so nothing that such a mechanism trained gets out.

    Attributes:
        refusal: Why it is refused, to follow "mechanism 'name'".
    """

    private = True
    table_optimizers = frozenset({"sgd"})
    refusal: ClassVar[str]

    def settle(self, shard: TableShard, first_row: int = 0, last_row: int | None = None) -> None:
        """Refused: what it would bring up to date has no guarantee.

        Raises:
            ReleaseError: Always.
        """
        raise ReleaseError(
            f"table '{shard.table}' was trained with mechanism '{self.name}', which "
            f"{self.refusal}: it can be neither settled nor released"
        )

    def is_settled(
        self, shard: TableShard, first_row: int = 0, last_row: int | None = None
    ) -> bool:
        """Never: see :meth:`settle`."""
        return False

    @property
    @abstractmethod
    def state_bytes(self) -> int:
        """Bytes of memory that it keeps between steps on this worker."""


class EANA(ComparisonMechanism):
    """Embedding-aware noise addition (Ning et al., RecSys 2022): noise on touched rows alone.

    Guarantee:
        None. Rows without noise were touched by no example, so the released table shows which
        rows the training data names, a lone record's too.

    Its kernels are those of ``lazydp``: distinct rows by one pass over a mark a row, one draw a
    row, all tables together.
    """

    name = "eana"
    refusal = (
        "is for comparison only and not private (rows that stay without noise show which rows "
        "the training records name)"
    )

    def __init__(
        self,
        schedules: NoiseSchedule | Sequence[NoiseSchedule],
        *,
        grid: float | None = None,
        rounds: int = 20,
    ) -> None:
        super().__init__(schedules, grid=grid, rounds=rounds)
        self._marks: dict[int, Tensor] = {}
        self._sets: dict[tuple[int, ...], kernels.TableSet] = {}
        self._touched: list[tuple[kernels.TableSet, list[TableShard], kernels.Stale]] = []

    def prepare(self, shard: TableShard) -> None:
        """The marks: 4 bytes a row."""
        self._mark(shard)

    def _mark(self, shard: TableShard) -> Tensor:
        """int32 ``[local rows]``: the step that touched each row last."""
        if id(shard) not in self._marks:
            self._marks[id(shard)] = torch.full(
                (shard.weight.shape[0],),
                self.schedule.step,
                dtype=torch.int32,
                device=shard.weight.device,
            )
        return self._marks[id(shard)]

    @property
    def state_bytes(self) -> int:
        """The marks: 4 bytes a row."""
        return sum(m.numel() * m.element_size() for m in self._marks.values())

    def before_lookup(self, reads: Sequence[Read], *, training: bool = True) -> None:
        """Notes the distinct rows that the batch touches."""
        if not training:
            return
        shards = [shard for shard, _ in reads]
        tables = self._table_set(shards)
        step = self.schedule.step + 1
        self._touched.append((tables, shards, tables.take_stale([rows for _, rows in reads], step)))

    def _table_set(self, shards: list[TableShard]) -> kernels.TableSet:
        places = tuple(id(shard) for shard in shards)
        if places not in self._sets:
            self._sets[places] = kernels.TableSet(
                [s.weight for s in shards],
                [self._mark(s) for s in shards],
                [s.noise_key for s in shards],
                [s.row_offset for s in shards],
                [s.column_offset for s in shards],
            )
        return self._sets[places]

    def after_update(self, shards: Iterable[TableShard]) -> None:
        """Adds the step's decay and noise to the touched rows."""
        step = self.schedule.step
        touched, self._touched = self._touched, []
        for tables, read, stale in touched:
            factors = [self.schedule_of(shard).one_step(step) for shard in read]
            each = torch.tensor(factors, dtype=torch.float64).repeat_interleave(
                stale.counts, dim=0, output_size=stale.rows.numel()
            )
            one_step = stale._replace(from_steps=torch.full_like(stale.from_steps, step - 1))
            tables.settle(
                one_step, to_step=step, decay=each[:, 0], scale=each[:, 1], rounds=self.rounds
            )


class TorchDPSGD(ComparisonMechanism):
    """DP-SGD whose noise is a tensor of ``torch.normal`` for each table, added at every step.

    This is what DP libraries do to a parameter (Opacus 1.6, ``_generate_noise``), spared the dense
    gradient that they would build first.

    Guarantee:
        None: torch's generator (Mersenne Twister on a CPU) is not cryptographic. Its state can be
        computed from outputs, and with it all the noise.
    """

    name = "dpsgd-torch"
    refusal = (
        "is for comparison only (torch's generator is not cryptographic: whoever sees enough of "
        "the noise can compute the rest)"
    )

    @property
    def state_bytes(self) -> int:
        """Nothing is kept."""
        return 0

    def before_lookup(self, reads: Sequence[Read], *, training: bool = True) -> None:
        """Nothing waits."""

    @torch.no_grad()
    def after_update(self, shards: Iterable[TableShard]) -> None:
        """Adds the step's decay and noise to all rows."""
        step = self.schedule.step
        for shard in shards:
            decay, scale = self.schedule_of(shard).one_step(step)
            noise = torch.normal(
                0.0, scale, shard.weight.shape, device=shard.weight.device, dtype=torch.float32
            )
            if decay != 1.0:
                shard.weight.mul_(decay)
            shard.weight.add_(noise)


COMPARISONS: dict[str, type[ComparisonMechanism]] = {m.name: m for m in (EANA, TorchDPSGD)}
"""The mechanisms of this module by name."""
