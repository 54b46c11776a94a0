"""Norms and clipped sums of users equal brute force, to 1e-5 relative, and bound one user's part.

The models and sharding kinds of ``test_gradients``; users of 1 to 9 records that read the same rows
and repeat each other's; one worker, and two with unequal batches.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from dist_dp.distributed import ensure_process_group
from tests.dist_dp import gradients, user_gradients
from tests.dist_dp.models import BATCH, CASES
from tests.dist_dp.worlds import run_world

TOLERANCE = 1e-5
ALONE = ("row_wise", "data_parallel")
Users = list[list[int]]
FAULT_CASE = "mixed-sum-mean-1"
# Caught by the norms of users; the others move the sums alone, or the number of norms.
IN_NORMS = ("rows not added", "padding counted", "absent counted")


def users_of(seed: int) -> Users:
    """One user of each size from 1 to 9, and two more of one record, in random order."""
    g = torch.Generator().manual_seed(seed)
    sizes = [1, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    order = torch.randperm(len(sizes), generator=g).tolist()
    return [torch.randperm(BATCH, generator=g)[: sizes[n]].tolist() for n in order]


# With another seed a bias of one number has a sum that cancels to a thousandth of the others.
USERS = users_of(1)
SPLITS: dict[str, list[Users]] = {"unequal": [USERS[:4], USERS[4:]], "one empty": [[], USERS]}
# (case, kind, split): every case in two kinds, two cases in all.
PLACES = [(case, kind, "unequal") for case in CASES for kind in ("row_wise", "auto")]
PLACES += [
    (case, kind, split)
    for case in ("mixed-weighted-3", "oddities")
    for kind, split in (
        ("column_wise", "unequal"),
        ("data_parallel", "unequal"),
        ("row_wise", "one empty"),
    )
]


@cache
def wanted(case: str) -> tuple[gradients.Found, float]:
    return user_gradients.brute_force(case, USERS)


@pytest.fixture(scope="module")
def alone() -> dict[Any, list[dict[str, Any]]]:
    work: list[tuple[Any, ...]] = [
        ((case, kind), case, kind, wanted(case)[1], [USERS], None)
        for case in CASES
        for kind in ALONE
    ]
    results = run_world(user_gradients.all_cases, 1, work)
    return {key: [r[key] for r in results] for key in results[0]}


@pytest.fixture(scope="module")
def together() -> dict[Any, list[dict[str, Any]]]:
    work: list[tuple[Any, ...]] = [
        ((case, kind, split), case, kind, wanted(case)[1], SPLITS[split], None)
        for case, kind, split in PLACES
    ]
    clip = wanted(FAULT_CASE)[1]
    for fault in user_gradients.FAULTS:
        users = SPLITS["unequal"]
        work.append((("fault", fault), FAULT_CASE, "row_wise", clip, users, fault))
    halves = [[u[::2] for u in USERS], [u[1::2] for u in USERS if len(u) > 1]]
    work.append((("fault", "split over ranks"), FAULT_CASE, "row_wise", clip, halves, None))
    results = run_world(user_gradients.all_cases, 2, work)
    return {key: [r[key] for r in results] for key in results[0]}


def check(ranks: list[dict[str, Any]], case: str) -> None:
    found, clip = wanted(case)
    wrong = {k: e for k, e in gradients.errors(ranks, found).items() if not e <= TOLERANCE}
    assert not wrong
    assert sum(r["clipped"] for r in ranks) == int((found.norms > clip).sum())


@pytest.mark.parametrize("kind", ALONE)
@pytest.mark.parametrize("case", CASES)
def test_one_worker(alone: Any, case: str, kind: str) -> None:
    check(alone[case, kind], case)


@pytest.mark.parametrize(("case", "kind", "split"), PLACES)
def test_two_workers(together: Any, case: str, kind: str, split: str) -> None:
    check(together[case, kind, split], case)


def test_the_cases_clip_users_and_do_not_clip_them() -> None:
    for case in CASES:
        found, clip = wanted(case)
        clipped = found.norms > clip * 1.01
        assert 0 < int(clipped.sum()) < len(USERS)
        assert any(len(user) > 1 for user, c in zip(USERS, clipped, strict=True) if c)


@pytest.mark.parametrize("fault", [*user_gradients.FAULTS, "split over ranks"])
def test_a_fault_is_caught(together: Any, fault: str) -> None:
    found, _ = wanted(FAULT_CASE)
    wrong = gradients.errors(together["fault", fault], found)
    if fault in IN_NORMS:
        assert wrong["norms"] > 100 * TOLERANCE
    del wrong["norms"]
    assert max(wrong.values()) > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("case", "seed"),
    [("mixed-weighted-3", 0), ("mixed-weighted-3", 1), ("oddities", 2), ("dlrm-dcn", 3)],
)
def test_one_user_moves_the_sum_by_at_most_the_clip_norm(case: str, seed: int) -> None:
    ensure_process_group()
    users = users_of(seed)
    found, clip = user_gradients.brute_force(case, users)
    whole = user_gradients.vector(user_gradients.private_step(case, "row_wise", clip, [users]))
    for gone in range(seed, len(users), 3):
        rest = users[:gone] + users[gone + 1 :]
        without = user_gradients.private_step(case, "row_wise", clip, [rest])
        moved = float((whole - user_gradients.vector(without)).norm())
        assert moved <= clip * (1 + TOLERANCE)
        assert moved == pytest.approx(min(clip, float(found.norms[gone])), rel=3 * TOLERANCE)


def test_users_of_one_record_are_clipped_as_records() -> None:
    """The path of records is taken: bit for bit the same."""
    ensure_process_group()
    examples = list(range(BATCH))
    clip = gradients.brute_force("oddities", examples)[1]
    by_record = gradients.private_step("oddities", "row_wise", clip, [examples])
    by_user = user_gradients.private_step("oddities", "row_wise", clip, [[[e] for e in examples]])
    assert torch.equal(by_record["norms"], by_user["norms"])
    assert torch.equal(user_gradients.vector(by_record), user_gradients.vector(by_user))
