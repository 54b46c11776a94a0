"""Whole runs on users: sampling, clipping and noise are those of one user at a time, unsharded.

Users of 1 to 9 records scattered over the data set, of which at most 4 take part in a step; every
sharding kind, one worker and two; in parts, with look-ahead, eagerly and with momentum. Against the
unsharded reference, to 1e-5 of each parameter's largest number.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from dist_dp.errors import ConfigError, DistDpError
from dist_dp.loader import PoissonLoader
from tests.dist_dp import group_runs, sharding_runs, unsharded, user_runs
from tests.dist_dp.gradients import build
from tests.dist_dp.sharding_runs import STEPS, loader_of, together
from tests.dist_dp.test_accumulation import SAME, TOLERANCE, far
from tests.dist_dp.worlds import run_world

KEYS = [("lazydp", kind, None) for kind in sharding_runs.KINDS]
KEYS += [("lazydp", kind, size) for kind in ("row_wise", "mixed") for size in user_runs.SIZES[1:]]
KEYS += [("momentum", "mixed too", size) for size in user_runs.SIZES[:2]]


@cache
def wanted(what: str) -> unsharded.Run:
    if what == "momentum":
        return unsharded.plain(STEPS, group_runs.with_momentum, by_user=True)
    return unsharded.reference(STEPS, by_user=True)


@pytest.fixture(scope="module")
def runs() -> dict[int, dict[Any, list[dict[str, Any]]]]:
    found = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for size in (1, 2):
            ranks = run_world(user_runs.all_runs, size, list(user_runs.FAULTS))
            found[size] = {key: [r[key] for r in ranks] for key in ranks[0]}
    finally:
        torch.set_num_threads(threads)
    return found


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("key", KEYS, ids=str)
def test_runs_equal_the_reference(runs: Any, key: Any, workers: int) -> None:
    if key not in runs[workers]:
        pytest.skip("one worker holds a table in one piece, whatever the kind")
    ranks, run = runs[workers][key], wanted(key[0])
    assert far(together(ranks), run.state) <= TOLERANCE
    for step, norms in enumerate(run.norms):
        # Norms of users; each rank's are in the order of the users.
        seen = torch.cat([r["norms"][step] for r in ranks]).double()
        assert float(((seen - norms) / norms).abs().max()) <= TOLERANCE
    assert all(r["steps"] == STEPS for r in ranks)


def test_the_reference_has_what_it_is_for() -> None:
    """Users of several records, above the bound too; norms on both sides of the clip norm."""
    drawn = [unsharded.drawn_users(step) for step in range(1, STEPS + 1)]
    sizes = [len(user) for users in drawn for user in users]
    assert max(sizes) == unsharded.MOST_RECORDS and 1 in sizes
    norms = torch.cat(wanted("lazydp").norms)
    assert 0 < int((norms > unsharded.CLIP * 1.01).sum()) < norms.numel()
    spread = [max(user) - min(user) for users in drawn for user in users if len(user) > 2]
    assert max(spread) > unsharded.RECORDS // 2


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("size", user_runs.SIZES[:2])
def test_looking_ahead_changes_no_bit(runs: Any, size: int | None, workers: int) -> None:
    ahead = together(runs[workers]["look ahead", "mixed too", size])
    if size is None:
        plain = together(runs[workers]["lazydp", "mixed too", None])
        assert all(torch.equal(ahead[name], value) for name, value in plain.items())
    assert far(ahead, wanted("lazydp").state) <= TOLERANCE


@pytest.mark.parametrize("workers", [1, 2])
def test_eager_runs_in_parts_equal_the_whole(runs: Any, workers: int) -> None:
    whole, parts = (runs[workers]["dpsgd", "mixed too", size] for size in user_runs.SIZES[:2])
    assert far(together(parts), together(whole)) <= SAME


def test_parts_cut_between_users(runs: Any) -> None:
    for key in (("lazydp", "row_wise", 4), ("lazydp", "row_wise", 9)):
        assert max(n for r in runs[2][key] for n in r["real"]) <= key[2]
        assert len(runs[2][key][0]["real"]) == len(runs[2][key][1]["real"]) > STEPS


@pytest.mark.parametrize(
    ("fault", "workers"), [("ranks own records", 2), ("divided by records", 1)]
)
def test_a_fault_is_caught(runs: Any, fault: str, workers: int) -> None:
    state = together(runs[workers][fault, "row_wise", None])
    assert far(state, wanted("lazydp").state) > 100 * TOLERANCE


def test_a_batch_must_say_whose_its_records_are() -> None:
    """And only where users are protected: the optimizer never falls back to the other unit."""
    data = unsharded.records()
    for most, users in ((4, False), (None, True)):
        whole = unsharded.model()
        private = build(whole, max_records_per_user=most)
        plain: PoissonLoader = loader_of(private, 1)
        plain._sampler = (
            unsharded.user_sampler()
            if users
            else unsharded.PoissonSampler(unsharded.SECRET, len(data), 0.3)
        )
        for batch in plain:
            unsharded.LOSSES(whole(*batch.inputs), batch.labels).backward()
            with pytest.raises(DistDpError, match=r"one (user|record), but the batch of step 1"):
                private.optimizer.step()
            break


def test_a_part_too_small_for_a_user_is_refused() -> None:
    private = build(unsharded.model(), max_records_per_user=4)
    with pytest.raises(ConfigError, match="micro_batch_size 3 is below max_records_per_user 4"):
        next(iter(loader_of(private, 1, micro_batch_size=3)))
