"""The event of a choice: within what it may cost, and close to it; what is left for the steps."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dist_dp.accounting import epsilon_of
from dist_dp.calibration import calibrate_noise_multiplier
from dist_dp.choice_budget import choice_event
from dist_dp.errors import ConfigError
from dist_dp.events import GaussianEvent, PrivacyEvent, TopKEvent

DELTA = 1e-6


@pytest.mark.parametrize(
    ("epsilon", "selections"), [(1.0, 26), (0.1, 100_000), (0.5, 10**6), (3.0, 1), (0.05, 40)]
)
def test_gumbel_choice_costs_what_it_may(epsilon: float, selections: int) -> None:
    event = choice_event(epsilon, DELTA, selections=selections)
    assert isinstance(event, TopKEvent) and event.selections == selections
    cost = epsilon_of({event: 1}, DELTA)
    assert 0.999 * epsilon <= cost <= epsilon
    assert epsilon_of({TopKEvent(event.epsilon0 * 1.01, selections): 1}, DELTA) > epsilon
    # More noise than (k ε₀, 0) would ask for is never needed.
    assert event.epsilon0 >= 0.99 * epsilon / selections


@pytest.mark.parametrize("epsilon", [0.05, 1.0])
def test_gaussian_choice_costs_what_it_may(epsilon: float) -> None:
    event = choice_event(epsilon, DELTA, selections=5, noise="gaussian")
    assert isinstance(event, GaussianEvent) and event.sample_rate == 1.0
    assert 0.999 * epsilon <= epsilon_of({event: 1}, DELTA) <= epsilon


def test_by_renyi_accounting_it_is_noisier() -> None:
    tight = choice_event(0.5, DELTA, selections=1000)
    loose = choice_event(0.5, DELTA, selections=1000, accountant="rdp")
    assert isinstance(tight, TopKEvent) and isinstance(loose, TopKEvent)
    assert 0.8 * tight.epsilon0 < loose.epsilon0 < tight.epsilon0
    assert epsilon_of({loose: 1}, DELTA, accountant="rdp") <= 0.5


@pytest.mark.parametrize("noise", ["gumbel", "gaussian"])
def test_a_choice_and_training_together_meet_the_target(noise: Any) -> None:
    choice = choice_event(0.2, DELTA, selections=2600, noise=noise)
    also = {choice: 1}
    sigma = calibrate_noise_multiplier(1.0, DELTA, 0.01, 500, also=also)
    events: dict[PrivacyEvent, int] = {GaussianEvent(sigma, 0.01): 500, **also}
    assert 0.9995 <= epsilon_of(events, DELTA) <= 1.0
    alone = calibrate_noise_multiplier(1.0, DELTA, 0.01, 500)
    # Less than if the two ε simply added up, more than if the choice were free.
    assert alone < sigma < calibrate_noise_multiplier(0.8, DELTA, 0.01, 500)


def test_the_same_event_in_choice_and_steps_is_counted_twice() -> None:
    event = GaussianEvent(calibrate_noise_multiplier(1.0, DELTA, 1.0, 2))
    sigma = calibrate_noise_multiplier(1.0, DELTA, 1.0, 1, also={event: 1})
    assert sigma == pytest.approx(event.noise_multiplier, rel=1e-3)


def test_what_leaves_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"leaves nothing for the steps: .* costs 1"):
        calibrate_noise_multiplier(1.0, DELTA, 0.01, 500, also={TopKEvent(1.2, 1): 1})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"epsilon": 0.0}, "choice_epsilon is 0"),
        ({"epsilon": math.inf}, "choice_epsilon is inf"),
        ({"delta": 1.0}, "delta is 1"),
        ({"selections": 0}, "selections is 0"),
        ({"noise": "laplace"}, "choose 'gumbel' or 'gaussian'"),
    ],
)
def test_what_makes_no_sense_is_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        choice_event(**{"epsilon": 1.0, "delta": DELTA, "selections": 5, **changes})
