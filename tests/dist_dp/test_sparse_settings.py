"""Settings of the mechanisms with noise on few rows: what follows from them, and wrong ones."""

from __future__ import annotations

import math
from typing import Any

import pytest
from scipy.stats import norm

from dist_dp.errors import ConfigError
from dist_dp.events import gaussians_together
from dist_dp.mechanisms import MECHANISMS
from dist_dp.mechanisms.sparse import SparseNoise
from dist_dp.plan import PrivacyPlan
from dist_dp.sparse_settings import ADAPTIVE, CHOOSES_ONCE, SPARSE_MECHANISMS, SparseSettings

ROWS = {"pooled.a": 1000, "pooled.b": 9000}


def plan(**changes: Any) -> PrivacyPlan:
    values: dict[str, Any] = {
        "mechanism": "adafest",
        "noise_multiplier": 1.5,
        "max_grad_norm": 2.0,
        "num_records": 10_000,
        "expected_batch_size": 100,
        "steps": 200,
        "delta": 1e-6,
        "sparse": {"threshold": 3.0, "selection_share": 0.2},
    }
    return PrivacyPlan(**values | changes)


def test_the_names_are_those_of_the_mechanisms() -> None:
    sparse = {n: m for n, m in MECHANISMS.items() if issubclass(m, SparseNoise)}
    assert tuple(sparse) == SPARSE_MECHANISMS
    assert {n for n, m in sparse.items() if m.adaptive} == ADAPTIVE
    assert {n for n, m in sparse.items() if m.chooses_once} == CHOOSES_ONCE


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9])
def test_selection_and_gradients_together_cost_the_steps_event(share: float) -> None:
    settings = SparseSettings(threshold=1.0, selection_share=share)
    parts = [settings.selection_multiplier(1.7), settings.gradient_multiplier(1.7)]
    both = gaussians_together(parts, 0.01)
    assert math.isclose(both.noise_multiplier, 1.7, rel_tol=1e-12)


def test_epsilon_is_that_of_dp_accounting_composed_by_hand() -> None:
    """Two Gaussians on one Poisson sample are one with both sensitivities stacked."""
    import dp_accounting as dp
    from dp_accounting.pld import PLDAccountant

    made = plan()
    assert made.sparse is not None
    first = made.sparse.selection_multiplier(1.5)
    second = made.sparse.gradient_multiplier(1.5)
    # A unit moves (counts / C₁, gradients / C₂) by at most (1, 1); scaled by 1/σ₁ and 1/σ₂ that is
    # a vector of length √(σ₁⁻² + σ₂⁻²) under noise 1.
    together = 1.0 / math.hypot(1.0 / first, 1.0 / second)
    event = dp.PoissonSampledDpEvent(0.01, dp.GaussianDpEvent(together))
    accountant = PLDAccountant(dp.NeighboringRelation.ADD_OR_REMOVE_ONE)
    accountant.compose(dp.SelfComposedDpEvent(event, 200))
    wanted = accountant.get_epsilon(1e-6)
    assert wanted * (1 - 1e-6) <= made.epsilon() <= wanted * 1.002


def test_noise_on_the_sum_has_the_gradients_part() -> None:
    made = plan()
    assert math.isclose(made.noise_on_sum_at(1), 1.5 / math.sqrt(0.8) * 2.0)
    assert made.noise_multiplier_at(1) == 1.5
    assert made.noise_on_sum == made.noise_on_sum_at(7)
    fest = plan(mechanism="fest", sparse={"rows": 10, "frequencies": "x"})
    assert fest.noise_on_sum_at(1) == 1.5 * 2.0


def test_a_calibrated_plan_meets_its_target() -> None:
    made = plan(noise_multiplier=None).calibrate(2.0, 1e-6)
    assert 1.99 < made.epsilon() <= 2.0
    assert made.sparse == plan().sparse


def test_thresholds_follow_from_expected_false_positives() -> None:
    """For all tables together they share the false positives by their rows: one τ for all."""
    settings = SparseSettings(false_positives=50.0, selection_share=0.25, max_contribution_norm=3.0)
    found = settings.thresholds(2.0, ROWS)
    deviation = 2.0 / math.sqrt(0.25) * 3.0
    for tau, probability in found.values():
        assert math.isclose(probability, 50 / 10_000, rel_tol=1e-9)
        assert math.isclose(tau, norm.isf(50 / 10_000) * deviation, rel_tol=1e-9)


def test_thresholds_by_table_with_or_without_the_path() -> None:
    settings = SparseSettings(threshold={"a": 2.0, "pooled.b": 5.0}, selection_share=0.25)
    found = settings.thresholds(1.0, ROWS)
    assert found["pooled.a"] == (2.0, pytest.approx(norm.sf(1.0), rel=1e-12))
    assert found["pooled.b"] == (5.0, pytest.approx(norm.sf(2.5), rel=1e-12))
    by_table = SparseSettings(false_positives={"a": 1.0, "b": 9.0}, selection_share=0.25)
    assert len({p for _, p in by_table.thresholds(1.0, ROWS).values()}) == 1


def test_without_noise_nothing_survives_untouched() -> None:
    for settings in (SparseSettings(threshold=0.5), SparseSettings(false_positives=10.0)):
        for tau, probability in settings.thresholds(0.0, ROWS).values():
            assert tau > 0 and probability == 0.0


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 1.5])
def test_a_share_outside_0_and_1_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match=r"selection_share is .*between 0 and 1"):
        SparseSettings(selection_share=share, threshold=1.0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sparse": None}, "sparse is missing"),
        ({"sparse": {"selection_share": 0.1}}, "sparse.threshold is missing"),
        ({"sparse": {"threshold": 1.0, "rows": 5}}, "sparse.rows is set, but mechanism 'adafest'"),
        ({"mechanism": "lazydp"}, "sparse is set, but mechanism 'lazydp'"),
        ({"mechanism": "fest"}, "sparse.selection_share is set, but mechanism 'fest'"),
        ({"mechanism": "fest", "sparse": {"frequencies": "x"}}, "sparse.rows is missing"),
        ({"mechanism": "fest", "sparse": {"rows": 5}}, "sparse.choice_epsilon is missing"),
        ({"mechanism": "fest", "sparse": {"rows": 0, "frequencies": "x"}}, "rows is 0: give 1"),
        (
            {"mechanism": "fest", "sparse": {"rows": 3, "frequencies": "x", "choice_epsilon": 1}},
            "choice_epsilon is set, but the rows are chosen from public frequencies",
        ),
        ({"sparse": {"threshold": 1.0, "false_positives": 5}}, "both given"),
        ({"sparse": {"false_positives": 0.0}}, "false_positives is 0"),
        ({"sparse": {"threshold": True}}, "not true or false"),
        ({"noise_grid": 2.0**-20}, "noise_grid does not go with mechanism 'adafest'"),
    ],
)
def test_wrong_settings_say_what_and_how_to_mend_it(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        plan(**changes)


def test_wrong_tables_are_named() -> None:
    unknown = SparseSettings(threshold={"a": 1.0, "c": 1.0})
    with pytest.raises(ConfigError, match="'c' is no table of the model; the tables are"):
        unknown.thresholds(1.0, ROWS)
    missing = SparseSettings(threshold={"a": 1.0})
    with pytest.raises(ConfigError, match=r"names no value for table 'pooled.b'"):
        missing.thresholds(1.0, ROWS)
    both = {"one.a": 10, "two.a": 10}
    with pytest.raises(ConfigError, match=r"'a' means one\.a, two\.a"):
        unknown.thresholds(1.0, both)


def test_half_a_table_of_false_positives_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"half of table 'pooled\.a'"):
        SparseSettings(false_positives=5000.0).thresholds(1.0, ROWS)


@pytest.mark.parametrize("name", ["lazydp", "dpsgd"])
def test_adagrad_with_merged_noise_names_the_way_out(name: str) -> None:
    with pytest.raises(ConfigError, match="'adafest', 'fest' or 'adafest\\+'"):
        MECHANISMS[name].check_optimizer("adagrad")
    for sparse in SPARSE_MECHANISMS:
        MECHANISMS[sparse].check_optimizer("adagrad")
