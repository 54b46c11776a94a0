"""Every sharding kind, for every kind of lookup, against an unsharded reference.

The reference goes through one example at a time and knows no shards. Norms, tables and dense
weights agree with it to 1e-5 on one worker, on two, and on four that are two hosts of two; with
zero gradients the tables agree bit for bit.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_dp.errors import ConfigError
from dist_dp.sharding import TableOptimizer, plan_sharding
from tests.dist_dp import sharding_runs, unsharded
from tests.dist_dp.sharding_runs import KINDS, STEPS, together
from tests.dist_dp.worlds import run_world

TOLERANCE = 1e-5
WORLDS: dict[str, tuple[int, int | None]] = {
    "1 worker": (1, None),
    "2 workers": (2, None),
    "2 hosts of 2": (4, 2),
}
# (fault, kind, gradients are zero)
FAULTS = [
    ("row offset ignored", "grid", True),
    ("row offset ignored", "table_row_wise", True),
    ("column offset ignored", "grid", True),
    ("gradient division", "grid", False),
    ("gradient division", "table_row_wise", False),
    ("rows left out", "grid", False),
]


@cache
def reference(zero: bool) -> unsharded.Run:
    return unsharded.reference(STEPS, zero=zero)


@pytest.fixture(scope="module")
def runs() -> dict[str, dict[Any, list[dict[str, Any]]]]:
    found = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name, (size, local_size) in WORLDS.items():
            faults = FAULTS if size == 4 else []
            ranks = run_world(sharding_runs.all_runs, size, local_size, faults)
            found[name] = {key: [r[key] for r in ranks] for key in ranks[0]}
    finally:
        torch.set_num_threads(threads)
    return found


def difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    assert found.keys() == wanted.keys()
    far = {n: float((found[n] - w).abs().max() / w.abs().max()) for n, w in wanted.items()}
    return {n: d for n, d in far.items() if not d <= TOLERANCE}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_equals_the_unsharded_one(runs: Any, kind: str, world: str) -> None:
    found = runs[world]["lazydp", kind, False]
    assert not difference(together(found), reference(False).state)
    for step, norms in enumerate(reference(False).norms):
        seen = torch.cat([r["norms"][step] for r in found]).double()
        assert seen.shape == norms.shape
        assert float(((seen - norms) / norms).abs().max()) <= TOLERANCE


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("kind", KINDS)
def test_noise_alone_agrees_bit_for_bit(runs: Any, kind: str, world: str) -> None:
    state = together(runs[world]["lazydp", kind, True])
    wanted = reference(True).state
    for table in unsharded.TABLES:
        name = unsharded.parameter_of(table)
        assert torch.equal(state[name], wanted[name]), name


@pytest.mark.parametrize("kind", ["table_row_wise", "grid"])
def test_eager_noise_does_not_know_the_placement(runs: Any, kind: str) -> None:
    first, *others = [together(runs[world]["dpsgd", kind, False]) for world in WORLDS]
    for state in others:
        assert not difference(state, first)


def test_column_pieces_of_the_same_rows_have_the_same_history(runs: Any) -> None:
    pieces: dict[tuple[str, int], list[Tensor]] = {}
    for rank in runs["2 hosts of 2"]["lazydp", "grid", False]:
        for (table, row, _), last_step in rank["history"].items():
            pieces.setdefault((table, row), []).append(last_step)
    grids = {k: v for k, v in pieces.items() if not k[0].startswith("sequence")}
    assert all(len(found) == 2 for found in grids.values())
    assert all(torch.equal(*found) for found in grids.values())


def test_the_shards_are_where_they_should_be(runs: Any) -> None:
    """Two hosts of two: four pieces of a grid, two of a table_row_wise table, some without rows."""
    hosts = runs["2 hosts of 2"]
    name = unsharded.parameter_of("pooled.a")
    places = [[p[1:] for p in r["pieces"] if p[0] == name] for r in hosts["lazydp", "grid", True]]
    assert places == [[(0, 0)], [(7, 0)], [(0, 8)], [(7, 8)]]
    places = [
        [p[1:] for p in r["pieces"] if p[0] == name]
        for r in hosts["lazydp", "table_row_wise", True]
    ]
    assert [(0, 0)] in places and [(7, 0)] in places and places.count([]) == 2
    rows = [
        piece.shape[0]
        for r in hosts["lazydp", "row_wise", True]
        for p, piece in r["pieces"].items()
        if p[0] == unsharded.parameter_of("weighted.v")
    ]
    assert rows == [2, 2, 1, 0]
    kinds = {k for r in hosts["lazydp", "mixed", True] for k in r["kinds"].items()}
    wanted = KINDS["mixed"]
    assert kinds == {(table, wanted[table.split(".")[1]]) for table in unsharded.TABLES}


def test_the_runs_are_what_they_should_be() -> None:
    """Noise moves every row, gradients matter, and some records are clipped, others not."""
    noise, trained = reference(True), reference(False)
    start = dict(unsharded.model().named_parameters())
    for name, value in noise.state.items():
        assert not torch.equal(value, trained.state[name])
        assert bool((value != start[name]).all())
    norms = torch.cat(trained.norms)
    assert 0 < int((norms > unsharded.CLIP * 1.01).sum()) < norms.numel()


@pytest.mark.parametrize(("fault", "kind", "zero"), FAULTS)
def test_a_fault_is_caught(runs: Any, fault: str, kind: str, zero: bool) -> None:
    state = together(runs["2 hosts of 2"][fault, kind, zero])
    wanted = reference(zero).state
    far = {n: float((state[n] - w).abs().max() / w.abs().max()) for n, w in wanted.items()}
    assert max(far.values()) > 100 * TOLERANCE


def plan(sharding: Any, world_size: int, local_size: int | None = None) -> dict[str, Any]:
    return plan_sharding(
        unsharded.model(),
        sharding,
        world_size=world_size,
        device_type="cpu",
        batch_size=8,
        optimizer=TableOptimizer(),
        local_size=local_size,
    )


@pytest.mark.parametrize("kind", ["table_row_wise", "grid"])
def test_a_sequence_table_says_what_works(kind: str) -> None:
    with pytest.raises(ConfigError, match=r"sequence\.s.*data_parallel, table_wise, row_wise"):
        plan({"s": kind}, 4, 2)


def test_a_grid_needs_columns_for_every_host() -> None:
    with pytest.raises(ConfigError, match=r"table 'a': grid over 8 nodes.*multiple of 32, not 16"):
        plan({"a": "grid"}, 8, 1)


def test_hosts_must_be_equal() -> None:
    with pytest.raises(ConfigError, match="5 workers cannot be 2 to a host"):
        plan("row_wise", 5, 2)


def test_the_planner_fills_up_around_what_is_named() -> None:
    planned = plan({"a": "grid", "b": "table_row_wise"}, 4, 2)
    kinds = {t: p.sharding_type for collection in planned.values() for t, p in collection.items()}
    assert kinds["a"] == "grid_shard" and kinds["b"] == "table_row_wise"
    assert {kinds[t] for t in "cdvwxs"} <= {"table_wise", "row_wise"}


def test_host_wise_tables_go_where_least_lies() -> None:
    planned = plan({t: "table_row_wise" for t in "abcvwx"} | {"s": "table_wise"}, 4, 2)
    nodes = {t: p.ranks[0] // 2 for c in planned.values() for t, p in c.items()}
    assert nodes["a"] != nodes["b"]
    assert {nodes[t] for t in "vwx"} == {0, 1}


def test_a_wrong_number_of_local_workers_is_named(monkeypatch: Any) -> None:
    from dist_dp.distributed import agree_on_hosts, ensure_process_group

    ensure_process_group()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="LOCAL_WORLD_SIZE is '3'"):
        agree_on_hosts()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ConfigError, match="same number of workers on every host"):
        agree_on_hosts()
