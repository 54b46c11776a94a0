"""FEST, AdaFEST and both on every placement, against an unsharded reference.

The reference (:mod:`tests.dist_dp.sparse_reference`) goes through one example at a time and knows
no shards. Norms, tables and dense weights agree with it to 1e-5; with zero gradients the tables of
all placements agree bit for bit.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from tests.dist_dp import sparse_reference, sparse_runs, unsharded
from tests.dist_dp.sharding_runs import STEPS, together
from tests.dist_dp.sparse_runs import KINDS_OF, SETTINGS, SOME_KINDS
from tests.dist_dp.worlds import run_world

TOLERANCE = 1e-5
WORLDS: dict[str, tuple[int, int | None]] = {
    "1 worker": (1, None),
    "2 workers": (2, None),
    "2 hosts of 2": (4, 2),
}
PLACEMENTS = [(world, kind) for world, (size, _) in WORLDS.items() for kind in KINDS_OF[size]]


@cache
def reference(mechanism: str, what: str) -> sparse_reference.SparseRun:
    return sparse_reference.reference(
        STEPS,
        mechanism,
        SETTINGS[mechanism],
        sigma=unsharded.SIGMA,
        zero=what == "zero",
        by_user=what == "users",
    )


@pytest.fixture(scope="module")
def runs() -> dict[str, dict[Any, list[dict[str, Any]]]]:
    found = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name, (size, local_size) in WORLDS.items():
            ranks = run_world(sparse_runs.all_runs, size, local_size)
            found[name] = {key: [r[key] for r in ranks] for key in ranks[0]}
    finally:
        torch.set_num_threads(threads)
    return found


def agrees(ranks: list[dict[str, Any]], mechanism: str, what: str) -> None:
    wanted = reference(mechanism, "records" if what == "parts" else what)
    state = together(ranks)
    assert state.keys() == wanted.state.keys()
    far = {
        name: float((state[name] - value).abs().max() / value.abs().max())
        for name, value in wanted.state.items()
    }
    assert not {name: d for name, d in far.items() if not d <= TOLERANCE}
    if what in ("zero", "parts"):
        return
    for step, norms in enumerate(wanted.norms):
        seen = torch.cat([r["norms"][step] for r in ranks]).double()
        assert seen.shape == norms.shape
        if norms.numel():
            assert float(((seen - norms) / norms.clamp_min(1e-12)).abs().max()) <= TOLERANCE


@pytest.mark.parametrize(("world", "kind"), PLACEMENTS)
def test_adafest_equals_the_unsharded_run(runs: Any, kind: str, world: str) -> None:
    agrees(runs[world]["adafest", kind, "records"], "adafest", "records")


@pytest.mark.parametrize(("world", "kind"), PLACEMENTS)
def test_noise_and_selection_alone_agree_bit_for_bit(runs: Any, kind: str, world: str) -> None:
    state = together(runs[world]["adafest", kind, "zero"])
    agrees(runs[world]["adafest", kind, "zero"], "adafest", "zero")
    wanted = together(runs["1 worker"]["adafest", "table_wise", "zero"])
    for table in unsharded.TABLES:
        name = unsharded.parameter_of(table)
        assert torch.equal(state[name], wanted[name]), name


@pytest.mark.parametrize("kind", SOME_KINDS)
@pytest.mark.parametrize(
    ("mechanism", "what"),
    [("fest", "records"), ("adafest+", "records"), ("adafest+", "users"), ("adafest", "parts")],
)
def test_the_others_equal_the_unsharded_run(
    runs: Any, mechanism: str, what: str, kind: str
) -> None:
    agrees(runs["2 workers"][mechanism, kind, what], mechanism, what)


def test_the_reference_selects_some_rows_and_not_others() -> None:
    """Else nothing of the above would mean much."""
    for mechanism in ("adafest", "adafest+"):
        for alive in reference(mechanism, "records").survivors:
            kept = sum(map(len, alive.values()))
            assert 0 < kept < sum(rows for rows, _ in unsharded.TABLES.values())


@pytest.mark.parametrize("mechanism", SETTINGS)
def test_losers_are_bit_identical(runs: Any, mechanism: str) -> None:
    """Rows that survive no step end as they began, whoever touched them."""
    before = {n: p.detach() for n, p in unsharded.model().named_parameters()}
    state = together(runs["2 workers"][mechanism, "row_wise", "records"])
    losers = 0
    for table, (rows, _) in unsharded.TABLES.items():
        steps = reference(mechanism, "records").survivors
        lost = sorted(set(range(rows)) - {r for alive in steps for r in alive[table]})
        name = unsharded.parameter_of(table)
        assert torch.equal(state[name][lost], before[name][lost])
        losers += len(lost)
    assert losers > 0
