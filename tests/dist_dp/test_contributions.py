"""Contribution maps: what units send for their rows, by Python sets, and how far one reaches."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import pytest
import torch

from dist_dp.clipping.user_groups import UserGroups
from dist_dp.contributions import contribution_maps
from tests.dist_dp import sparse_reference, unsharded
from tests.dist_dp.gradients import build
from tests.dist_dp.worlds import run_world

UNITS = [[0], [5], [9], [14], [20], [31]]
OF_USERS = [[0, 5, 9], [14], [20, 31]]


@pytest.fixture(scope="module")
def cuts() -> list[Any]:
    run_world(lambda: None, 1)
    whole = unsharded.model()
    return build(whole, kind="table_wise").cuts


def maps_of(cuts: list[Any], units: list[list[int]], max_norm: float, kept: Any = None) -> Any:
    """(table, row) to the sum of weights, by unit; padding behind."""
    data = unsharded.records()
    records = [r for unit in units for r in unit]
    padded = [*records, 2, 2]
    batch = data.select(padded)
    for cut, features in zip(cuts, batch.sparse, strict=True):
        cut.clear()
        cut.train()
        cut(features)
    users = None
    if any(len(unit) > 1 for unit in units):
        users = UserGroups(torch.tensor([len(u) for u in units]), len(padded))
    is_real = torch.arange(len(padded)) < len(records)
    maps = contribution_maps(cuts, is_real, users, max_norm, kept)
    owner = {place: n for n, unit in enumerate(units) for place, _ in _places(units, unit)}
    found: list[dict[tuple[str, int], float]] = [defaultdict(float) for _ in units]
    for cut, lookups in zip(cuts, maps, strict=True):
        for features in lookups:
            for config in cut.configs:
                table = cut.table_id(config.name)
                for name in config.feature_names:
                    bag = features[name]
                    ends = bag.offsets().tolist()
                    for example in range(len(padded)):
                        span = slice(ends[example], ends[example + 1])
                        rows, weights = bag.values()[span], bag.weights()[span]
                        for row, weight in zip(rows.tolist(), weights.tolist(), strict=True):
                            assert example in owner, "padding contributes"
                            if kept is None or table not in kept or row in kept[table]:
                                found[owner[example]][table, row] += weight
    for cut in cuts:
        cut.clear()
    return found


def _places(units: list[list[int]], unit: list[int]) -> list[tuple[int, int]]:
    start = sum(len(u) for u in units[: units.index(unit)])
    return [(start + n, record) for n, record in enumerate(unit)]


@pytest.mark.parametrize("kept", [None, sparse_reference.kept_rows()], ids=["all rows", "chosen"])
@pytest.mark.parametrize("units", [UNITS, OF_USERS], ids=["records", "users"])
@pytest.mark.parametrize("max_norm", [1.0, 2.5, 100.0])
def test_maps_are_those_of_python_sets(
    cuts: list[Any], units: list[list[int]], max_norm: float, kept: Any
) -> None:
    found = maps_of(cuts, units, max_norm, kept)
    rows = sparse_reference.KEPT if kept is not None else {}
    for unit, sent in zip(units, found, strict=True):
        assert dict(sent) == sparse_reference.contributions(unit, rows, max_norm)


@pytest.mark.parametrize("units", [UNITS, OF_USERS], ids=["records", "users"])
def test_no_unit_reaches_further_than_the_bound(cuts: list[Any], units: list[list[int]]) -> None:
    for max_norm in (0.3, 1.0, 1.7):
        for sent in maps_of(cuts, units, max_norm):
            norm = math.sqrt(sum(w * w for w in sent.values()))
            assert norm <= max_norm
            assert norm > 0.999 * max_norm or set(sent.values()) <= {1.0}


def test_weights_add_up_exactly_in_any_order(cuts: list[Any]) -> None:
    weights = [w for sent in maps_of(cuts, UNITS, 1.0) for w in sent.values()]
    assert all((w * 2**20).is_integer() for w in weights)


def test_a_batch_of_padding_alone_contributes_nothing(cuts: list[Any]) -> None:
    data = unsharded.records().select([2, 2])
    for cut, features in zip(cuts, data.sparse, strict=True):
        cut.clear()
        cut(features)
    maps = contribution_maps(cuts, torch.zeros(2, dtype=torch.bool), None, 1.0)
    assert all(f.values().numel() == 0 for lookups in maps for f in lookups)
    for cut in cuts:
        cut.clear()
