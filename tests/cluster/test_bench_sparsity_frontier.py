"""The frontier of ``dist-dp bench sparsity``, its table and its plot, on figures made up."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import pytest

from dist_dp.cluster.bench.sparsity_chart import sparsity_svg
from dist_dp.cluster.bench.sparsity_frontier import (
    frontier,
    frontiers,
    reduction,
    result_of,
    worth_repeating,
)
from dist_dp.cluster.bench.sparsity_settings import (
    ADAFEST,
    ADAFEST_PLUS,
    EXPONENTIAL_SELECTIONS,
    KEPT_ROWS,
    Point,
    chosen,
)
from dist_dp.cluster.bench.sparsity_table import reduction_text, settings_text
from dist_dp.cluster.bench.sparsity_training import Rates, Trained
from dist_dp.errors import ConfigError

SVG = "{http://www.w3.org/2000/svg}"


def row(reduction: float | None, auc: float, **changes: Any) -> dict[str, Any]:
    """An entry of `results`."""
    found = {
        "mechanism": "fest",
        "epsilon": 1.0,
        "auc": auc,
        "public_auc": auc,
        "auc_loss": 0.8 - auc,
        "auc_loss_low": 0.79 - auc,
        "auc_loss_high": 0.81 - auc,
        "reduction_vs_dpsgd": reduction,
        "noised_rows_per_step": 10.0,
        "settings": {"rows": 3},
        "seeds": [0, 1],
    }
    return {**found, **changes}


def trained(auc: float, noised: float = 80.0) -> Trained:
    return Trained(auc, auc, noised, noised / 8, 8000, 50, 1.0)


def test_the_frontier_is_the_pareto_set() -> None:
    rows = [row(1, 0.80), row(10, 0.82), row(10, 0.81), row(100, 0.79), row(50, 0.78)]
    assert frontier(rows) == [1, 3], "beaten: less reduction or as much, and no better"


def test_of_equal_points_one_is_on_the_frontier() -> None:
    assert frontier([row(10, 0.8), row(10, 0.8)]) == [0]


def test_a_point_that_noised_nothing_is_on_no_frontier() -> None:
    """It trained no table, so it is no gradient that could be small."""
    assert frontier([row(10, 0.7), row(None, 0.9)]) == [0]


def test_one_lucky_run_is_no_frontier() -> None:
    rows = [row(10, 0.799), row(1000, 0.85, seeds=[0])]
    (found,) = frontiers(rows, seeds=2)
    assert found["largest_reduction"] == 10 == found["largest_comparable_reduction"]


def test_a_large_loss_is_not_comparable() -> None:
    (found,) = frontiers([row(10, 0.796), row(1000, 0.794)], seeds=2)
    assert found["largest_comparable_reduction"] == 10 and found["largest_reduction"] == 1000
    (found,) = frontiers([row(1000, 0.7)], seeds=2)
    assert found["largest_comparable_reduction"] is None


def test_public_records_choose_what_is_run_again() -> None:
    """A fault planted: the test AUC says otherwise, and has no say."""
    rows = [
        row(None, 0.8, mechanism="none", epsilon=None),
        row(1, 0.8, mechanism="lazydp"),
        row(10, 0.9, public_auc=0.7),
        row(10, 0.7, public_auc=0.9),
    ]
    assert worth_repeating(rows) == [0, 1, 3]


def test_a_loss_is_a_mean_of_differences_at_one_seed() -> None:
    mine = {0: trained(0.70), 1: trained(0.60)}
    reference = {0: trained(0.71, 8000), 1: trained(0.63, 8000), 2: trained(0.9, 8000)}
    found = result_of(Point("fest", 3), 1.0, Rates(1.0, 1.0), mine, reference)
    assert found["auc_loss"] == pytest.approx(0.02)
    assert found["auc_loss_low"] == pytest.approx(0.01)
    assert found["auc_loss_high"] == pytest.approx(0.03)
    assert found["reduction_vs_dpsgd"] == 100
    assert found["noised_dense_coordinates_per_step"] == 50, "counted apart"


def test_reduction_is_of_measured_coordinates() -> None:
    assert reduction(1000, 8.0) == 125 and reduction(1000, 0.0) is None


def test_the_default_grid_has_every_mechanism_at_each_epsilon() -> None:
    settings = chosen()
    names = [p.mechanism for p in settings.points]
    assert settings.epsilons == (1.0, 3.0, 8.0) and max(settings.cardinalities) > 10**7
    assert names.count("fest") == len(KEPT_ROWS)
    assert names.count("adafest") == len(ADAFEST)
    assert names.count("adafest+") == len(ADAFEST_PLUS)
    assert names.count("exponential") == len(EXPONENTIAL_SELECTIONS)
    assert {(p.threshold, p.contribution_norm, p.share) for p in settings.points} > set(ADAFEST)


def test_a_given_grid_has_all_combinations() -> None:
    points = chosen(mechanisms=("adafest",), thresholds=(2.0, 4.0), shares=(0.1, 0.2)).points
    assert len(points) == 4 and {p.contribution_norm for p in points} == {1.0}


def test_a_threshold_is_in_units_of_the_contribution_norm() -> None:
    sparse = Point("adafest", None, 8.0, 10.0, 0.3).sparse("counts.parquet")
    assert sparse is not None and sparse.threshold == 80.0
    assert sparse.max_contribution_norm == 10.0 and sparse.frequencies is None


def drawn(rows: list[dict[str, Any]]) -> list[ElementTree.Element]:
    svg = sparsity_svg({"results": rows, "data": {"source": "generated"}})
    root = ElementTree.fromstring(svg)
    return [c for c in root.iter(f"{SVG}circle") if c.get("class") != "legend"]


def test_the_plot_has_reduction_to_the_right_on_a_log_scale_and_loss_upwards() -> None:
    marks = drawn([row(10, 0.80), row(100, 0.79), row(1000, 0.77, seeds=[0])])
    (x0, x1, x2), (y0, y1, y2) = ([float(m.attrib[k]) for m in marks] for k in ("cx", "cy"))
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and x1 > x0
    assert y1 - y2 == pytest.approx(2 * (y0 - y1), abs=0.3) and y1 < y0
    fills = [m.attrib["fill"] for m in marks]
    assert fills[0] == fills[1] != fills[2] == "#fff", "empty: one seed"


def test_each_epsilon_has_its_panel() -> None:
    first, second = drawn([row(10, 0.8), row(10, 0.8, epsilon=3.0)])
    assert float(second.attrib["cx"]) - float(first.attrib["cx"]) > 250


def test_what_noised_nothing_is_not_plotted() -> None:
    assert len(drawn([row(10, 0.8), row(None, 0.8)])) == 1


def test_a_plot_without_points_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no point"):
        drawn([row(1, 0.8, mechanism="lazydp")])


def test_words_of_the_table() -> None:
    assert reduction_text(131_234.0) == "1.3e5 ×" and reduction_text(None) == "-"
    assert settings_text({"rows": 3, "threshold": 8.0}) == "k 3, τ 8"


def test_rates_are_tried_at_a_point_of_the_grid() -> None:
    for settings in (chosen(), chosen(kept_rows=(1, 5, 9), thresholds=(3.0,))):
        for name in ("fest", "adafest"):
            assert settings.tuned_at(name) in settings.points
    assert settings.tuned_at("fest").rows == 5
    assert settings.tuned_at("adafest").mechanism == "adafest"
    alone = chosen(mechanisms=("adafest+",))
    assert alone.tuned_at("adafest").mechanism == "adafest+", "it takes AdaFEST's rates"
    assert settings.tuned_at("lazydp") == Point("lazydp")
