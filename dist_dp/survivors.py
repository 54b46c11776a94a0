"""Which rows survive a step's selection: noisy counts above a threshold, on the rows' owner.

AdaFEST (arXiv 2311.08357, algorithm 1) noises the count of *every* row and keeps those above τ. A
row that no unit touches has count 0, so all such rows survive with one probability
p = P(σ₁C₁z ≥ τ), independently: how many and which are drawn by geometric gaps, in O(survivors), as
Poisson samples are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dist_dp import kernels
from dist_dp.kernels.portable import log, log_complement

_DRAWS_OF_A_BLOCK = 1 << 20
"""Uniform numbers that belong to a block of rows; it takes a thousand or so."""
_MEAN_OF_A_BLOCK = 1024.0
_MOST_BLOCKS = 1 << 27


@dataclass(frozen=True)
class SelectionNoise:
    """The randomness of one table's selections.

    Attributes:
        key: 32 bytes, of this table and stream alone.
        rounds: ChaCha rounds.
    """

    key: bytes
    rounds: int = 20

    @classmethod
    def of_table(cls, noise_key: bytes, rounds: int = 20) -> SelectionNoise:
        """From the key of the table's gradient noise."""
        return cls(kernels.derive_key(noise_key, "selection", "rows"), rounds)

    @property
    def _gaps_key(self) -> bytes:
        return kernels.derive_key(self.key, "false positives", "gaps")

    def of_touched(
        self, rows: Tensor, counts: Tensor, *, step: int, threshold: float, deviation: float
    ) -> Tensor:
        """Which of the touched rows survive, bool ``[n]``.

        Args:
            rows: int64 ``[n]``, global rows, distinct.
            counts: float64 ``[n]``, sums of the units' contributions.
            step: The step, from 1.
            threshold: τ.
            deviation: σ₁C₁.

        Guarantee:
            Row r survives if count + σ₁C₁z ≥ τ with z standard normal, a function of (key, r, step)
            that is independent over rows and steps.
        """
        noisy = counts.to(torch.float64)
        if deviation > 0 and rows.numel():
            drawn = kernels.normal(
                self.key, rows, step - 1, step, num_columns=1, rounds=self.rounds
            )
            noisy = noisy + deviation * drawn[:, 0].to(torch.float64)
        return noisy >= threshold

    def of_untouched(
        self, *, step: int, probability: float, num_rows: int, first: int, last: int
    ) -> Tensor:
        """Rows in ``[first, last)`` that survive if no unit touches them, int64, ascending.

        Rows are drawn in blocks whose size follows from `probability` alone, so what comes out for
        a row does not depend on the range asked for, and costs O(survivors) and no more.

        Args:
            step: The step, from 1.
            probability: p, of each row by itself.
            num_rows: Rows of the whole table that may survive.
            first: First row of the range.
            last: One past its last row.

        Guarantee:
            Each row is in with probability p up to 2^-46, independently of all others and of
            :meth:`of_touched` (whose key is another one). Rows that are touched must be taken out
            by the caller, who decides those by their counts.
        """
        if probability <= 0.0 or first >= last:
            return torch.empty(0, dtype=torch.int64)
        if probability >= 1.0:
            return torch.arange(first, last)
        size = max(
            1,
            min(num_rows, math.ceil(_MEAN_OF_A_BLOCK / probability)),
            -(-num_rows // _MOST_BLOCKS),
        )
        log_rest = log_complement(probability)
        key = self._gaps_key
        parts = []
        for block in range(first // size, -(-last // size)):
            start = block * size
            parts.append(start + self._gaps(key, step, block, probability, log_rest, size))
        rows = np.concatenate(parts)
        kept = rows[np.searchsorted(rows, first) : np.searchsorted(rows, last)]
        return torch.from_numpy(kept)

    def _gaps(
        self, key: bytes, step: int, block: int, probability: float, log_rest: float, size: int
    ) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Rows of a block, counted from its start, int64, ascending, below `size`."""
        mean = probability * size
        count = min(math.ceil(mean + 6.0 * math.sqrt(mean)) + 4, size + 1)
        first = block * _DRAWS_OF_A_BLOCK
        position, parts = -1, []
        while position < size:
            drawn = kernels.uniforms(key, step, count, first=first, rounds=self.rounds)
            gaps = np.floor(log(drawn) / log_rest)
            steps = np.minimum(gaps, float(size)).astype(np.int64) + 1
            part = position + np.cumsum(steps)
            parts.append(part)
            position, first = int(part[-1]), first + count
        rows = np.concatenate(parts)
        return rows[: np.searchsorted(rows, size)]
