"""Exponential selection, which benchmarks compare with: its law, and what a step costs."""

from __future__ import annotations

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution
from scipy import stats

from dist_dp.accounting import epsilon_of
from dist_dp.errors import ConfigError
from dist_dp.events import GaussianEvent, TopKEvent
from dist_dp.mechanisms import mechanism_class
from dist_dp.mechanisms.exponential import largest_noisy
from dist_dp.sampled_selection import SampledSelection, calibrated, sampled

DELTA = 1e-6


@pytest.mark.parametrize(
    ("sigma", "rate", "steps"), [(1.0, 0.01, 1000), (0.8, 0.002, 500), (2.0, 1.0, 1)]
)
def test_a_sampled_gaussian_costs_what_dp_accounting_says(
    sigma: float, rate: float, steps: int
) -> None:
    whole = privacy_loss_distribution.from_gaussian_mechanism(
        sigma, value_discretization_interval=2e-3
    )
    pmf = whole._pmf_remove.to_dense_pmf()
    losses = (pmf._lower_loss + np.arange(len(pmf._probs))) * pmf._discretization
    found = sampled(losses, np.asarray(pmf._probs), rate).self_compose(steps)
    wanted = epsilon_of({GaussianEvent(sigma, rate): steps}, DELTA)
    assert wanted * (1 - 1e-6) <= found.get_epsilon_for_delta(DELTA) <= wanted * 1.001


def test_a_step_on_everybody_costs_selection_and_noise() -> None:
    step = SampledSelection(2.0, 0.3, 20, 1.0)
    parts = {TopKEvent(step.epsilon0, 20): 1, GaussianEvent(step.gradient_multiplier): 1}
    assert step.epsilon(1, DELTA) == pytest.approx(epsilon_of(parts, DELTA), rel=2e-3)


def test_selection_costs_beside_the_noise() -> None:
    step = SampledSelection(0.7, 0.5, 1, 0.01)
    assert step.epsilon(200, DELTA) > epsilon_of(
        {GaussianEvent(step.gradient_multiplier, 0.01): 200}, DELTA
    )
    assert step.epsilon(200, DELTA) < step.epsilon(201, DELTA)


def test_calibrated_to_a_target() -> None:
    step = calibrated(1.0, DELTA, 0.005, 300, share=0.2, selections=50)
    assert 0.999 <= step.epsilon(300, DELTA) <= 1.0
    # With many selections they are as good as normal, and cost what AdaFEST's noise would.
    alone = {GaussianEvent(step.noise_multiplier, 0.005): 300}
    assert step.epsilon(300, DELTA) == pytest.approx(epsilon_of(alone, DELTA), rel=0.02)


@pytest.mark.parametrize("touched", [[], [1, 4, 5], list(range(8))])
def test_the_set_has_the_law_of_the_largest_noisy_counts(touched: list[int]) -> None:
    """Against noise on every row; by chi-squared at level 1e-4, fixed seeds."""
    height, most, scale, draws = 8, 2, 0.7, 20_000
    counts = np.zeros(height)
    counts[touched] = [1.0, 3.0, 1.0, 2.0, 1.0, 1.0, 2.0, 1.0][: len(touched)]
    random = np.random.default_rng(1)
    direct = counts + np.random.default_rng(2).gumbel(size=(draws, height)) * scale
    wanted = np.sort(np.argsort(-direct, axis=1)[:, :most], axis=1) @ [height, 1]
    found = [
        int(
            largest_noisy(
                np.array(touched, dtype=np.int64),
                counts[touched],
                height,
                selections=most,
                scale=scale,
                random=random,
            )
            @ [height, 1]
        )
        for _ in range(draws)
    ]
    table = np.stack([np.bincount(x, minlength=height**2) for x in (wanted, np.array(found))])
    table = table[:, table.sum(axis=0) >= 10]
    assert stats.chi2_contingency(table).pvalue > 1e-4


def test_it_is_refused_for_a_run() -> None:
    with pytest.raises(ConfigError, match=r"exponential.*comparison only"):
        mechanism_class("exponential")


@pytest.mark.parametrize(
    "values", [(0.0, 0.5, 1, 0.1), (1.0, 1.0, 1, 0.1), (1.0, 0.5, 0, 0.1), (1.0, 0.5, 1, 0.0)]
)
def test_values_out_of_range(values: tuple[float, float, int, float]) -> None:
    with pytest.raises(ConfigError):
        SampledSelection(*values)
