"""Records that are computed from their number: random access without a file or memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

UInt64Array = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_POOL = 1 << 12


def mixed(words: UInt64Array) -> UInt64Array:
    """Words with all bits mixed, in place: the finaliser of SplitMix64 (Steele et al., 2014)."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        words ^= words >> np.uint64(shift)
        words *= np.uint64(factor)
    words ^= words >> np.uint64(31)
    return words


class HashedClicks:
    """A data set whose ids are hashes of the record number; see ``datasets.batch.ClickBatch``.

    Every record has ``pooling`` ids in each feature. Row popularity follows a power law over a
    scattered order of the rows (exponent 0: all rows alike).

    Args:
        rows: Rows of each table; feature ``f<i>`` reads table i.
        pooling: Ids in each bag.
        exponent: s; the r-th most popular row is read about in proportion to r^-s.
        records: Number of records.
        dense_features: Width of the dense input.
    """

    def __init__(
        self,
        rows: Sequence[int],
        *,
        pooling: int,
        exponent: float,
        records: int,
        dense_features: int,
    ) -> None:
        self.names = [f"f{i}" for i in range(len(rows))]
        self._rows = np.asarray(rows, dtype=np.uint64)[:, None]
        self._pooling = pooling
        self._exponent = exponent
        self._records = records
        # A factor without a common divisor scatters the popular rows over the table.
        self._scatter = np.asarray([_coprime(r) for r in rows], dtype=np.uint64)[:, None]
        rng = np.random.default_rng(0)
        self._dense = rng.standard_normal((_POOL, dense_features), dtype=np.float32)
        self._labels = rng.integers(0, 2, _POOL).astype(np.float32)

    def __len__(self) -> int:
        """Number of records."""
        return self._records

    def ids(self, records: NDArray[np.int64]) -> NDArray[np.int64]:
        """Ids of some records, int64 ``[features, records * pooling]``."""
        features, pooling = len(self.names), self._pooling
        words = np.arange(features * pooling, dtype=np.uint64).reshape(features, 1, pooling)
        numbers = records.astype(np.uint64)[None, :, None] * np.uint64(features * pooling)
        hashes = mixed((numbers + words + np.uint64(1)) * _GOLDEN).reshape(features, -1)
        if self._exponent == 0.0:
            # the upper 32 bits, scaled to the table: no division
            return (((hashes >> np.uint64(32)) * self._rows) >> np.uint64(32)).astype(np.int64)
        return self._skewed((hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53)

    def _skewed(self, uniform: NDArray[np.float64]) -> NDArray[np.int64]:
        """Ranks by inversion of the continuous power law on [1, rows + 1), then scattered."""
        power, top = 1.0 - self._exponent, self._rows.astype(np.float64) + 1.0
        if abs(power) < 1e-9:
            ranks = top**uniform
        else:
            ranks = ((top**power - 1.0) * uniform + 1.0) ** (1.0 / power)
        rank = np.minimum(ranks.astype(np.uint64), self._rows) - np.uint64(1)
        return (rank * self._scatter % self._rows).astype(np.int64)

    def most_popular(self, table: int, count: int) -> NDArray[np.int64]:
        """The rows of a table that are read most, int64, sorted; all of them if there are fewer."""
        rows = self._rows[table]
        ranks = np.arange(min(count, int(rows[0])), dtype=np.uint64)
        return np.sort(ranks * self._scatter[table] % rows).astype(np.int64)

    def batch(self, indices: NDArray[np.int64], padded_size: int | None = None) -> Any:
        """A :class:`~dist_dp.datasets.batch.ClickBatch`; padding has empty bags.

        Args:
            indices: int64 record numbers.
            padded_size: Examples of the batch, padding included.
        """
        import torch
        from torchrec import KeyedJaggedTensor

        from dist_dp.datasets.batch import ClickBatch

        count = len(indices)
        size = count if padded_size is None else padded_size
        lengths = torch.zeros(len(self.names), size, dtype=torch.int32)
        lengths[:, :count] = self._pooling
        dense = torch.zeros(size, self._dense.shape[1])
        labels = torch.zeros(size)
        chosen = indices % _POOL
        dense[:count] = torch.from_numpy(self._dense[chosen])
        labels[:count] = torch.from_numpy(self._labels[chosen])
        sparse = KeyedJaggedTensor(
            keys=self.names,
            values=torch.from_numpy(self.ids(indices).reshape(-1)),
            lengths=lengths.reshape(-1),
        )
        return ClickBatch(dense, sparse, labels, torch.arange(size) < count)


def _coprime(rows: int) -> int:
    """A number near 0.618 rows (but at most 2^31) without a common divisor with rows."""
    number = max(1, min(int(rows * 0.6180339887498949), (1 << 31) - 1))
    while math.gcd(number, rows) != 1:
        number += 1
    return number
