"""Costs that were planted in timings are found again."""

from __future__ import annotations

from dataclasses import fields

import pytest

from dist_dp.cluster.bench.table_benchmarks import (
    NARROW,
    WIDE,
    UnitCosts,
    access_costs,
    by_width,
    unit_costs,
)
from dist_dp.step_work import LONG_BAG, Access

LARGE = {
    1: Access(bags=1000, ids=1000, rows=1000, regions=900),
    LONG_BAG: Access(bags=1000, ids=32_000, rows=30_000, regions=4000),
}


def times(costs: UnitCosts) -> dict[tuple[str, int], float]:
    found = {}
    for pooling, a in LARGE.items():
        kept = a.bags * costs.bag + a.ids * costs.id
        found["small", pooling] = kept
        found["large", pooling] = kept + a.rows * costs.row + a.regions * costs.region
    return found


def test_four_timings_tell_four_costs() -> None:
    planted = UnitCosts(bag=60e-9, id=20e-9, row=180e-9, region=300e-9)
    found = unit_costs(times(planted), LARGE)
    for name, cost in vars(planted).items():
        assert getattr(found, name) == pytest.approx(cost), name


def test_noise_makes_no_cost_negative() -> None:
    planted = UnitCosts(bag=60e-9, id=20e-9, row=180e-9, region=300e-9)
    disturbed = times(planted)
    disturbed["large", LONG_BAG] *= 3  # so that sparse rows look cheaper than close ones
    disturbed["small", 1] *= 0.1
    found = unit_costs(disturbed, LARGE)
    assert min(vars(found).values()) == 0.0 == found.region
    assert found.row > planted.row


def test_two_widths_tell_a_row_from_its_bytes() -> None:
    narrow = UnitCosts(bag=1.0 + NARROW, id=2.0 + 3 * NARROW, row=0.5 * NARROW, region=8.0)
    wide = UnitCosts(bag=1.0 + WIDE, id=2.0 + 3 * WIDE, row=0.5 * WIDE, region=10.0)
    found = access_costs(wide, narrow)
    assert found["bags"] == pytest.approx(1.0) and found["bag_bytes"] == pytest.approx(0.25)
    assert found["ids"] == pytest.approx(2.0) and found["id_bytes"] == pytest.approx(0.75)
    assert found["rows"] == pytest.approx(0.0) and found["row_bytes"] == pytest.approx(0.125)
    assert found["regions"] == 9.0
    assert set(found) == {f.name for f in fields(Access)}


@pytest.mark.parametrize(("wide", "narrow"), [(1.0, 3.0), (3.0, 0.01), (0.0, 0.0)])
def test_widths_out_of_order(wide: float, narrow: float) -> None:
    fixed, slope = by_width(wide, narrow)
    assert fixed >= 0.0 and slope >= 0.0
