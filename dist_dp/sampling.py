"""Poisson sampling of records, the same on every rank.

Every rank draws the whole sample from the run's secret and the step, and keeps its own part. So
the sample does not depend on the number of workers, a replayed step sees the same batch, and
ranks agree on the padded batch size without communication.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from dist_dp.errors import ConfigError
from dist_dp.kernels import derive_key, uniforms
from dist_dp.kernels.portable import log, log_complement

Int64Array = NDArray[np.int64]


@dataclass(frozen=True)
class SamplePart:
    """What a rank reads of a step's sample, at once or as one micro-batch of several.

    Attributes:
        records: global record numbers, int64 [records]; may be empty.
        padded_size: the size to which every rank pads this part, at least 1.
        user_sizes: how many of the records, in their order, belong to each user, int64 [users];
            None where records are drawn, and not users.
    """

    records: Int64Array
    padded_size: int
    user_sizes: Int64Array | None = None


class PoissonSampler:
    """Draws each record independently with probability `sample_rate`, anew at every step.

    The gaps between drawn records are geometric, floor(log u / log(1 - q)), so a step costs in
    proportion to the records drawn, not to all records.

    Guarantee:
        Poisson subsampling, as the accountant assumes for the add-or-remove neighbouring relation
        (one record more or less). Given the fate of all records before it, a record is drawn with
        probability q up to 2^-46 + 2^-64 / (1-q)^g, where g counts the records since the last one
        drawn: gaps come from uniforms with 64 bits in float64 arithmetic. Steps are independent.
        Assumes that ChaCha20 is a pseudorandom function and the secret unknown. Adding a record at
        the end of the data leaves the fate of all others as it is. The size of a sample is
        private: divide gradients by `expected_batch_size`, never by the actual size, which would
        leak it and break the sensitivity.
    """

    def __init__(self, secret: bytes, num_records: int, sample_rate: float) -> None:
        """Prepare the sampler.

        Args:
            secret: the run's 32 secret bytes.
            num_records: records of all ranks together, at least 1.
            sample_rate: q, in (0, 1].

        Raises:
            ConfigError: `num_records` or `sample_rate` is out of range.
            ValueError: the secret has another length.
        """
        if num_records < 1:
            raise ConfigError(f"num_records: {num_records} given; at least one record is needed")
        if not 0.0 < sample_rate <= 1.0:
            raise ConfigError(
                f"sample_rate: {sample_rate} is outside (0, 1]; "
                "choose an expected batch size between 1 and the number of records"
            )
        self._key = derive_key(secret, "sampling", "records")
        self.num_records = operator.index(num_records)
        self.sample_rate = float(sample_rate)

    @property
    def expected_batch_size(self) -> float:
        """q times the number of records: what summed gradients are divided by."""
        return self.sample_rate * self.num_records

    def sample(self, step: int) -> Int64Array:
        """The records drawn at a step.

        Returns:
            int64, ascending global record numbers in [0, num_records); may be empty.

        Raises:
            ValueError: `step` is negative or not below 2^31.
        """
        if self.sample_rate == 1.0:
            return np.arange(self.num_records, dtype=np.int64)
        log_rest = log_complement(self.sample_rate)
        # 6 standard deviations above the expected size: a second block is rarely needed
        size = self.expected_batch_size
        block = math.ceil(size + 6.0 * math.sqrt(size)) + 8
        parts: list[Int64Array] = []
        position, drawn = -1, 0
        while position < self.num_records:
            gaps = np.floor(log(uniforms(self._key, step, block, first=drawn)) / log_rest)
            # a gap past the end ends the sample, whatever its length
            steps = np.minimum(gaps, float(self.num_records)).astype(np.int64) + 1
            part = position + np.cumsum(steps)
            parts.append(part)
            position, drawn = int(part[-1]), drawn + block
        records = np.concatenate(parts)
        return records[: np.searchsorted(records, self.num_records)]

    def local(self, step: int, rank: int, world_size: int) -> tuple[Int64Array, int]:
        """The part of a step's sample that a rank owns.

        Rank r owns the contiguous records [N r // W, N (r+1) // W).

        Args:
            step: the step.
            rank: in [0, world_size).
            world_size: number of ranks.

        Returns:
            The rank's records, int64, ascending *global* numbers (may be empty), and the largest
            number of records any rank has at this step, at least 1: the size to which every rank
            pads its batch.

        Raises:
            ValueError: `rank` or `world_size` is out of range.
        """
        if world_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"rank: {rank} is outside [0, world_size = {world_size})")
        records = self.sample(step)
        bounds = [self.num_records * r // world_size for r in range(world_size + 1)]
        cuts = np.searchsorted(records, bounds)
        padded_size = max(1, int(np.diff(cuts).max()))
        return records[cuts[rank] : cuts[rank + 1]], padded_size

    def parts(
        self, step: int, rank: int, world_size: int, most: int | None = None
    ) -> list[SamplePart]:
        """A rank's part of a step's sample, in parts of nearly equal size.

        Args:
            step: the step.
            rank: in [0, world_size).
            world_size: number of ranks.
            most: records of a rank in a part, padding counted; None for one part.

        Returns:
            As many parts on every rank, of the same padded sizes.
        """
        records, padded = self.local(step, rank, world_size)
        count = 1 if most is None else -(-padded // most)
        cuts = [padded * n // count for n in range(count + 1)]
        return [SamplePart(records[a:b], b - a) for a, b in pairwise(cuts)]
