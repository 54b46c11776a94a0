"""One worker or two, row-wise, table-wise, column-wise, replicated: the same model comes out.

With the same secret and data, final tables and dense weights agree to 1e-5; with zero gradients
they agree bit for bit: the noise does not know where a row lies. An evaluation in the middle
reads rows, so it settles them; it must not make a difference either.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.dist_dp import placement
from tests.dist_dp.worlds import run_world

TOLERANCE = 1e-5
KINDS: list[tuple[str, Any]] = [
    ("table_wise", "table_wise"),
    ("row_wise", "row_wise"),
    ("column_wise", "column_wise"),
    ("data_parallel", "data_parallel"),
    ("mixed", {"a": "row_wise", "b": "data_parallel", "s": "column_wise"}),
]
EAGER = [KINDS[0], KINDS[1], KINDS[3]]
Runs = dict[tuple[Any, ...], dict[str, Any]]


def whole(ranks: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Tables put together from all ranks' pieces, and rank 0's dense weights."""
    state: dict[str, Tensor] = dict(ranks[0]["dense"])
    sizes = {"a": 13, "b": 9, "s": 6}
    for rank in ranks:
        for (name, row, column), piece in rank["pieces"].items():
            count = sizes[name.split(".")[-2]]
            table = state.setdefault(name, torch.full((count, 8), float("nan")))
            table[row : row + piece.shape[0], column : column + piece.shape[1]] = piece
    state["seen in the middle"] = ranks[0]["seen"]
    assert not any(bool(t.isnan().any()) for t in state.values())
    return state


@pytest.fixture(scope="module")
def runs() -> dict[int, dict[tuple[Any, ...], list[dict[str, Any]]]]:
    found = {}
    for size in (1, 2):
        ranks: list[Runs] = run_world(placement.all_runs, size, KINDS, EAGER)
        found[size] = {key: [r[key] for r in ranks] for key in ranks[0]}
    return found


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, float]:
    assert a.keys() == b.keys()
    return {n: float((a[n] - b[n]).abs().max() / b[n].abs().max()) for n in a}


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(
    ("mechanism", "kind"),
    [("lazydp", k) for k, _ in KINDS] + [("dpsgd", k) for k, _ in EAGER],
)
def test_placement_does_not_matter(runs: Any, mechanism: str, kind: str, size: int) -> None:
    reference = whole(runs[1][mechanism, "table_wise", False])
    found = difference(whole(runs[size][mechanism, kind, False]), reference)
    assert max(found.values()) <= TOLERANCE, found


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(
    ("mechanism", "kind"),
    [("lazydp", k) for k, _ in KINDS] + [("dpsgd", k) for k, _ in EAGER],
)
def test_noise_alone_agrees_bit_for_bit(runs: Any, mechanism: str, kind: str, size: int) -> None:
    reference = whole(runs[1][mechanism, "table_wise", True])
    found = whole(runs[size][mechanism, kind, True])
    for name, value in reference.items():
        if name != "seen in the middle":  # a sum over dense layers, in the order of the kernels
            assert torch.equal(found[name], value), name


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", ["table_wise", "row_wise"])
def test_tables_on_the_meta_device_start_alike(runs: Any, kind: str, size: int) -> None:
    reference = whole(runs[1]["meta", "table_wise", False])
    found = difference(whole(runs[size]["meta", kind, False]), reference)
    assert max(found.values()) <= TOLERANCE, found


def test_replicas_stay_equal(runs: Any) -> None:
    for key in (("lazydp", "data_parallel", False), ("dpsgd", "data_parallel", False)):
        first, second = runs[2][key]
        for name, piece in first["pieces"].items():
            assert torch.equal(piece, second["pieces"][name])


def test_the_runs_are_what_they_should_be(runs: Any) -> None:
    """Noise moves every row, gradients matter, lazy rows wait and eager ones do not."""
    noise = whole(runs[1]["lazydp", "table_wise", True])
    trained = whole(runs[1]["lazydp", "table_wise", False])
    eager = whole(runs[1]["dpsgd", "table_wise", True])
    assert not any(torch.equal(noise[name], trained[name]) for name in noise)
    # Lazy noise is another draw of the same law, except for rows that are read at every step.
    table = "pooled.embedding_bags.a.weight"
    assert not torch.equal(noise[table], eager[table])
    assert sum(r["unsettled"] for r in runs[2]["lazydp", "row_wise", False]) > 0
    assert sum(r["unsettled"] for r in runs[2]["dpsgd", "row_wise", False]) == 0
    assert runs[2]["lazydp", "mixed", False][0]["kinds"] == [
        "column_wise",
        "data_parallel",
        "row_wise",
    ]
