"""Poisson sampling of users, each with its records; the same on every rank."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from dist_dp.errors import ConfigError
from dist_dp.kernels import derive_key, uniforms
from dist_dp.sampling import Int64Array, PoissonSampler, SamplePart
from dist_dp.user_records import UserRecords


class UserSampler:
    """Draws each user independently with probability `sample_rate`, with at most so many records.

    A user with more records than `max_records` gives that many which follow each other in the data
    set (its first after its last), from a place drawn anew at every step: each is as likely.

    Guarantee:
        Users are Poisson-sampled, as `PoissonSampler` says of records. All that a step sees of a
        user comes to one rank, in one part of the batch, wherever the user's records lie: rank r
        owns the users [N r // W, N (r+1) // W). What a user gives depends on its own records and on
        a uniform of its own, and on no other user. Every rank knows every user's number of records,
        so ranks agree on the padded sizes without a word. Those sizes, and the number of parts, are
        as private as the sample.

    Args:
        secret: the run's 32 secret bytes.
        users: whose the records are.
        sample_rate: q, in (0, 1].
        max_records: most records of a user in a step.

    Raises:
        ConfigError: `sample_rate` or `max_records` is out of range.
    """

    def __init__(
        self, secret: bytes, users: UserRecords, sample_rate: float, max_records: int
    ) -> None:
        if max_records < 1:
            raise ConfigError(f"max_records_per_user: {max_records} given; give at least 1")
        self._users = users
        self._drawn = PoissonSampler(secret, users.num_users, sample_rate)
        self._window_key = derive_key(secret, "sampling", "windows")
        self.max_records = max_records

    def sample(self, step: int) -> tuple[Int64Array, Int64Array, Int64Array]:
        """The users drawn at a step, and which of their records.

        Returns:
            Users, ascending; the place of the first record each gives, among its own; and how many
            it gives: int64 `[users]` each.
        """
        users = self._drawn.sample(step)
        counts = self._users.counts(users)
        sizes = np.minimum(counts, self.max_records)
        first = np.zeros(len(users), dtype=np.int64)
        many = counts > sizes
        if many.any():
            # One uniform for each user drawn, by its place in the step's sample.
            places = uniforms(self._window_key, step, len(users)) * counts
            first[many] = np.minimum(places.astype(np.int64), counts - 1)[many]
        return users, first, sizes

    def parts(
        self, step: int, rank: int, world_size: int, most: int | None = None
    ) -> list[SamplePart]:
        """A rank's part of a step's sample, cut between users into parts of at most `most` records.

        Args:
            step: the step.
            rank: in [0, world_size).
            world_size: number of ranks.
            most: records of a rank in a part, at least `max_records`; None for one part.

        Returns:
            As many parts on every rank, of the same padded sizes; see `SamplePart`.

        Raises:
            ConfigError: a user with `max_records` records would not fit a part.
            ValueError: `rank` or `world_size` is out of range.
        """
        if world_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"rank: {rank} is outside [0, world_size = {world_size})")
        if most is not None and most < self.max_records:
            raise ConfigError(
                f"micro_batch_size {most} is below max_records_per_user {self.max_records}: a "
                "user's records are clipped together, so they come in one part. Raise "
                "micro_batch_size, or lower max_records_per_user"
            )
        users, first, sizes = self.sample(step)
        total = self._users.num_users
        owners = np.searchsorted(users, [total * r // world_size for r in range(world_size + 1)])
        spans = [slice(owners[r], owners[r + 1]) for r in range(world_size)]
        cuts = [_cuts(sizes[span], most) for span in spans]
        count = max(len(cut) - 1 for cut in cuts)
        cuts = [cut + [cut[-1]] * (count + 1 - len(cut)) for cut in cuts]
        records = [
            [int(sizes[s][a:b].sum()) for a, b in pairwise(c)]
            for s, c in zip(spans, cuts, strict=True)
        ]
        padded = [max(1, *(of_rank[part] for of_rank in records)) for part in range(count)]
        mine = spans[rank]
        return [
            SamplePart(
                self._users.windows(users[mine][a:b], first[mine][a:b], sizes[mine][a:b]),
                padded[part],
                sizes[mine][a:b],
            )
            for part, (a, b) in enumerate(pairwise(cuts[rank]))
        ]


def _cuts(sizes: Int64Array, most: int | None) -> list[int]:
    """Where to cut a sequence of users so that no part has more than `most` records; both ends."""
    if most is None or len(sizes) == 0:
        return [0, len(sizes)]
    ends = np.cumsum(sizes)
    cuts = [0]
    while cuts[-1] < len(sizes):
        done = int(ends[cuts[-1] - 1]) if cuts[-1] else 0
        cuts.append(int(np.searchsorted(ends, done + most, side="right")))
    return cuts
