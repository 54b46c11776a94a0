"""What a selection of rows will come to, and the warning where it selects nearly all."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from dist_dp.plan import PrivacyPlan
from dist_dp.selection_forecast import (
    DenseSelectionWarning,
    SelectionForecast,
    forecast_selection,
    warn_if_dense,
)

TABLES = {"a": (1_000, 8), "b": (100_000, 8)}


def forecast(sparse: dict[str, Any], ids: float = 0.0, **changes: Any) -> SelectionForecast:
    values: dict[str, Any] = {
        "mechanism": "adafest",
        "noise_multiplier": 2.0,
        "max_grad_norm": 1.0,
        "num_records": 10_000,
        "expected_batch_size": 100,
        "steps": 200,
        "delta": 1e-6,
    }
    plan = PrivacyPlan(**values | changes, sparse=sparse)
    found = forecast_selection(plan, TABLES, dict.fromkeys(TABLES, ids))
    assert found is not None
    return found


def test_one_dense_table_among_sparse_ones_is_named_with_its_memory() -> None:
    found = forecast({"threshold": {"a": -100.0, "b": 50.0}})
    with pytest.warns(DenseSelectionWarning, match=r"table 'a': 1,000 of 1,000 rows") as caught:
        warn_if_dense(found)
    said = str(caught[0].message)
    assert "0.0 MB a step" in said and "raise sparse.threshold" in said
    everything = forecast({"threshold": -100.0})
    assert "2 tables: 101,000 of 101,000 rows" in (everything.warning or "")
    assert "3.2 MB a step" in (everything.warning or "")


def test_the_remedy_is_that_of_the_setting_which_was_given() -> None:
    found = forecast({"false_positives": 20_000.0})
    assert "lower sparse.false_positives" in (found.warning or "")
    assert found.false_positives == pytest.approx(20_000)


@pytest.mark.parametrize("sparse", [{"threshold": 50.0}, {"false_positives": 100.0}])
def test_a_selection_that_selects_says_nothing(sparse: dict[str, float]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_dense(forecast(sparse))
        warn_if_dense(None)


def test_noise_that_changes_is_forecast_where_it_is_greatest() -> None:
    rising = {"kind": "constant", "base": 1.0, "warmup_steps": 100}
    constant = forecast({"threshold": 12.0})
    found = forecast({"threshold": 12.0}, noise_multiplier_schedule=rising)
    assert found.false_positives == pytest.approx(constant.false_positives, rel=1e-6)
    assert found.false_positives > 1


def test_rows_chosen_once_are_all_noised() -> None:
    found = forecast({"rows": 50, "frequencies": "counts.parquet"}, 500.0, mechanism="fest")
    assert found.eligible_rows == found.false_positives == found.most_rows == 100
    assert found.most_coordinates == 800 and found.all_coordinates == 808_000
    assert found.thresholds == {} and found.warning is None


def test_rows_looked_up_may_survive_up_to_the_table() -> None:
    found = forecast({"threshold": 50.0}, 2_000.0)
    assert found.most_rows == pytest.approx(3_000)
