"""Per-example norms and clipped sums of one private step equal brute force, to 1e-5 relative.

Random models with ragged and empty bags, repeated ids, shared tables, three poolings and many
dense layers; every sharding kind; one worker and two with unequal batches.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from tests.dist_dp import gradients
from tests.dist_dp.models import BATCH, CASES
from tests.dist_dp.worlds import run_world

TOLERANCE = 1e-5
KINDS = ("row_wise", "table_wise", "column_wise", "data_parallel", "auto")
ALL = list(range(BATCH))
SPLITS: dict[str, list[list[int]]] = {
    "unequal": [ALL[:6], ALL[6:]],
    "one empty": [[], ALL],
}
# In a world of one, padding comes from a rank that does not exist.
ALONE = {"plain": [ALL]}
TWO_FAULTS = (
    ("gradient division", "table_wise"),
    ("gradient division", "row_wise"),
    ("dense averaged", "table_wise"),
    ("replicas averaged", "data_parallel"),
    ("padding counted", "row_wise"),
)
Key = tuple[str, ...]


@cache
def wanted(case: str) -> tuple[gradients.Found, float]:
    return gradients.brute_force(case, ALL)


def jobs(splits: dict[str, list[list[int]]]) -> list[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = []
    for case in CASES:
        clip = wanted(case)[1]
        for kind in KINDS:
            for split, examples in splits.items():
                found.append(((case, kind, split), case, kind, clip, examples, "mean", None))
    clip = wanted("oddities")[1]
    last = list(splits.values())[-1]
    found.append((("sum",), "oddities", "row_wise", clip, last, "sum", None))
    return found


@pytest.fixture(scope="module")
def alone() -> dict[Key, list[dict[str, Any]]]:
    results = run_world(gradients.all_cases, 1, jobs(ALONE))
    return {key: [r[key] for r in results] for key in results[0]}


@pytest.fixture(scope="module")
def together() -> dict[Key, list[dict[str, Any]]]:
    work = jobs(SPLITS)
    clip = wanted("mixed-sum-mean-1")[1]
    for fault, kind in TWO_FAULTS:
        key = ("fault", fault, kind)
        work.append((key, "mixed-sum-mean-1", kind, clip, SPLITS["unequal"], "mean", fault))
    results = run_world(gradients.all_cases, 2, work)
    return {key: [r[key] for r in results] for key in results[0]}


def check(ranks: list[dict[str, Any]], case: str) -> None:
    found, clip = wanted(case)
    wrong = {k: e for k, e in gradients.errors(ranks, found).items() if not e <= TOLERANCE}
    assert not wrong
    assert sum(r["clipped"] for r in ranks) == int((found.norms > clip).sum())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_one_worker(alone: Any, case: str, kind: str) -> None:
    check(alone[case, kind, "plain"], case)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_two_workers(together: Any, case: str, kind: str, split: str) -> None:
    check(together[case, kind, split], case)


def test_a_summed_loss(alone: Any, together: Any) -> None:
    check(alone["sum",], "oddities")
    check(together["sum",], "oddities")


def test_the_cases_clip_and_do_not_clip() -> None:
    for case in CASES:
        found, clip = wanted(case)
        assert 0 < int((found.norms > clip * 1.01).sum()) < BATCH


@pytest.mark.parametrize(("fault", "kind"), TWO_FAULTS)
def test_a_fault_between_workers_is_caught(together: Any, fault: str, kind: str) -> None:
    found, _ = wanted("mixed-sum-mean-1")
    wrong = gradients.errors(together["fault", fault, kind], found)
    assert max(wrong.values()) > 100 * TOLERANCE


@pytest.mark.parametrize("fault", ["repeats ignored", "bias forgotten"])
def test_a_fault_in_the_norms_is_caught(fault: str) -> None:
    for case in ("mixed-sum-mean-1", "mixed-weighted-3"):
        found, clip = wanted(case)
        key = (fault,)
        work = [(key, case, "row_wise", clip, [ALL], "mean", fault)]
        ranks = [r[key] for r in run_world(gradients.all_cases, 1, work)]
        assert gradients.errors(ranks, found)["norms"] > 100 * TOLERANCE
