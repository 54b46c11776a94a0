"""DP-SGD with exponential selection (Zhang, Mironov and Hejazinia 2021), to be compared with.

Every step takes the m rows with the largest counts of touching units plus Gumbel noise, out of all
tables' rows, and noises and trains those alone. Unlike a threshold this takes the same number of
rows at every step, however many units agree on them, and m exponential mechanisms for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_dp import kernels
from dist_dp.contributions import contribution_maps
from dist_dp.cut import CutEmbeddings
from dist_dp.distributed import world_size
from dist_dp.errors import ConfigError
from dist_dp.mechanisms.comparison import ComparisonMechanism
from dist_dp.mechanisms.sparse import AdaFEST, counted
from dist_dp.sampled_selection import SampledSelection
from dist_dp.table_shard import TableShard

_UNCLIPPED = 2.0**30  # No unit touches so many rows: each contributes 1 to every row it touches.


class ExponentialSelection(ComparisonMechanism, AdaFEST):
    """The m rows of the largest noisy counts, one-shot, at every step.

    Guarantee:
        None that could be released: selection by numpy's generator, which is not cryptographic.
        Otherwise it would be that of `SampledSelection`: the m largest counts with Gumbel noise of
        scale 1/ε₀ are m exponential mechanisms, each with an ε₀-bounded range, since a unit more
        raises each row's count by 1 or not at all; gradients are clipped, restricted and noised as
        AdaFEST's.

    Args:
        cost: Of a step.
        seed: 32 bytes.
        arguments: As of :class:`~dist_dp.mechanisms.sparse.SparseNoise`.

    Raises:
        ConfigError: There are several workers: the rows are chosen by one.
    """

    name = "exponential"
    refusal = (
        "is for comparison only (its selection is drawn by a generator that is not cryptographic)"
    )

    def __init__(
        self, *arguments: Any, cost: SampledSelection, seed: bytes, **settings: Any
    ) -> None:
        super().__init__(*arguments, **settings)
        if world_size() > 1:
            raise ConfigError("mechanism 'exponential' runs on one worker: start one")
        self.cost = cost
        self._random = np.random.default_rng(list(kernels.derive_key(seed, "exponential", "")))

    @property
    def state_bytes(self) -> int:
        """Nothing is kept."""
        return 0

    def contribute(self, cuts: Sequence[CutEmbeddings], is_real: Tensor, users: Any) -> None:
        """Notes which rows each unit of a micro-batch touches."""
        maps = contribution_maps(cuts, is_real, users, _UNCLIPPED)
        before: list[list[Any]] = self._maps or [[] for _ in cuts]
        self._maps = [[*some, *more] for some, more in zip(before, maps, strict=True)]

    def select(
        self, cuts: Sequence[CutEmbeddings], step: int, rates: Sequence[tuple[float, float]]
    ) -> None:
        """Chooses the rows that the step noises and trains."""
        self._step, self._rates = step, list(rates)
        maps, self._maps = self._maps, []
        shards, rows, counts, first = [], [], [], []
        height = 0
        for cut, lookups in zip(cuts, maps, strict=True):
            touched = counted(cut, lookups)
            for shard in cut.shards:
                here, count = touched[id(shard)]
                shards.append(shard)
                rows.append(here.numpy() + height)
                counts.append(count.numpy())
                first.append(height)
                height += shard.weight.shape[0]
        chosen = largest_noisy(
            np.concatenate(rows),
            np.concatenate(counts),
            height,
            selections=self.cost.selections,
            scale=1 / self.cost.epsilon0,
            random=self._random,
        )
        self._survivors = _by_shard(shards, first, chosen)
        self._note(cuts)


def largest_noisy(
    rows: NDArray[np.int64],
    counts: NDArray[np.float64],
    height: int,
    *,
    selections: int,
    scale: float,
    random: np.random.Generator,
) -> NDArray[np.int64]:
    """Of rows 0 … ``height - 1``, those with the largest noisy counts, ascending.

    The noise of the untouched, whose counts are 0, is needed only as far as it is among the m
    largest: the smallest of n exponential variables are sums of E/n, E/(n - 1), … So it takes
    O(touched + m).

    Args:
        rows: The touched ones, distinct.
        counts: Theirs.
        height: Rows there are.
        selections: m.
        scale: Of the Gumbel noise.
        random: Its source.
    """
    most = min(selections, height)
    noisy = counts + random.gumbel(size=len(counts)) * scale
    left = height - len(rows)
    taken = min(most, left)
    rest = np.cumsum(random.exponential(size=taken) / (left - np.arange(taken)))
    values = np.concatenate([noisy, -np.log(rest) * scale])
    best = np.argsort(-values, kind="stable")[:most]
    touched = rows[best[best < len(rows)]]
    others = _untouched(rows, int((best >= len(rows)).sum()), height, random)
    return np.sort(np.concatenate([touched, others]))


def _untouched(
    touched: NDArray[np.int64], count: int, height: int, random: np.random.Generator
) -> NDArray[np.int64]:
    """Distinct rows that no unit touches, each set of so many with the same probability."""
    places = random.choice(height - len(touched), size=count, replace=False, shuffle=False)
    places = np.sort(places)
    # The p-th of the untouched is p and as many as there are touched ones before it.
    gaps = np.sort(touched) - np.arange(len(touched))
    return places + np.searchsorted(gaps, places, side="right")


def _by_shard(
    shards: Sequence[TableShard], first: Sequence[int], chosen: NDArray[np.int64]
) -> dict[int, Tensor]:
    found = {}
    for shard, begin in zip(shards, first, strict=True):
        bounds = np.searchsorted(chosen, [begin, begin + shard.weight.shape[0]])
        found[id(shard)] = torch.from_numpy(chosen[bounds[0] : bounds[1]] - begin)
    return found
