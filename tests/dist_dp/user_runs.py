"""The private runs of ``test_user_runs``: users over many placements, in parts and ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np

from dist_dp.distributed import world_size
from dist_dp.sampling import SamplePart
from dist_dp.user_sampling import UserSampler
from tests.dist_dp import group_runs, sharding_runs, unsharded

SIZES: list[int | None] = [None, 4, 9]


def all_runs(faults: list[str]) -> dict[Any, dict[str, Any]]:
    """Every kind; three of them in parts, ahead, eager, with momentum; the faults asked for."""
    run, kinds = sharding_runs.private_run, sharding_runs.KINDS
    found: dict[Any, dict[str, Any]] = {}
    for name in kinds if world_size() > 1 else ("row_wise", "mixed", "mixed too"):
        found["lazydp", name, None] = run(kinds[name], by_user=True)
    for size in SIZES[1:]:
        for name in ("row_wise", "mixed"):
            found["lazydp", name, size] = run(kinds[name], by_user=True, micro_batch_size=size)
    mixed = kinds["mixed too"]
    for size in SIZES[:2]:
        options = {"micro_batch_size": size, "by_user": True}
        found["look ahead", "mixed too", size] = run(mixed, look_ahead=True, **options)
        found["dpsgd", "mixed too", size] = run(mixed, mechanism="dpsgd", **options)
        momentum = group_runs.with_momentum
        found["momentum", "mixed too", size] = run(mixed, optimizer=momentum, sigma=0.0, **options)
    for fault in faults:
        with FAULTS[fault]():
            found[fault, "row_wise", None] = run("row_wise", by_user=True)
    return found


@contextmanager
def _ranks_own_records() -> Iterator[None]:
    """Each rank reads the records of its own range, whosever they are: a user is on several."""
    parts = UserSampler.parts

    def wrong(
        self: UserSampler, step: int, rank: int, world_size: int, most: int | None = None
    ) -> list[SamplePart]:
        (whole,) = parts(self, step, 0, 1)
        total = self._users.num_records
        owner = np.repeat(np.arange(len(whole.user_sizes)), whole.user_sizes)
        of_rank = whole.records * world_size // total
        padded = max(1, int(np.bincount(of_rank, minlength=world_size).max()))
        mine = of_rank == rank
        sizes = np.unique(owner[mine], return_counts=True)[1]
        return [SamplePart(whole.records[mine], padded, sizes.astype(np.int64))]

    with mock.patch.object(UserSampler, "parts", wrong):
        yield


@contextmanager
def _divided_by_records() -> Iterator[None]:
    """The sum divided by the expected number of records."""
    with mock.patch.object(unsharded, "USERS_EXPECTED", unsharded.EXPECTED):
        yield


FAULTS: dict[str, Callable[[], Any]] = {
    "ranks own records": _ranks_own_records,
    "divided by records": _divided_by_records,
}
