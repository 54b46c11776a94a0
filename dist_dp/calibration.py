"""How much noise a guarantee takes: the noise multiplier that just meets (ε, δ)."""

from __future__ import annotations

import math
from collections.abc import Mapping

from dist_dp.accounting import (
    AccountantKind,
    GaussianEvent,
    check_delta,
    check_sample_rate,
    epsilon_of,
)
from dist_dp.errors import ConfigError
from dist_dp.events import PrivacyEvent

_SMALLEST_SIGMA = 2.0**-4
_LARGEST_SIGMA = 2.0**17
_SIGMA_TOLERANCE = 1e-5
_LEAST_FACTOR = 2.0**-10
# A calibrated run must fit its budget on another machine too, whatever its last bits.
_EPSILON_MARGIN = 1e-9


def calibrate_noise_multiplier(
    target_epsilon: float,
    target_delta: float,
    sample_rate: float,
    steps: int,
    accountant: AccountantKind = "pld",
    factors: Mapping[float, int] | None = None,
    also: Mapping[PrivacyEvent, int] | None = None,
) -> float:
    """Return the smallest noise multiplier whose ``steps`` steps stay within the target.

    Args:
        target_epsilon: the ε that all steps together may reach.
        target_delta: at which δ.
        sample_rate: of every step.
        steps: how many there are.
        accountant: see `epsilon_of`.
        factors: where the noise changes with the step: how many of the steps have which factor of
            the result as their noise multiplier; by default all have 1.
        also: what else the run does that counts against the target, such as a private choice of
            rows before the first step: a count by event.

    Guarantee:
        ``epsilon_of({GaussianEvent(result, sample_rate): steps, **also}, target_delta)`` (with
        factors, an event for each) is at most ``target_epsilon``: this is checked on the value
        returned, which is within 1e-5 (relative) of the smallest one possible, and never below
        1/16.

    Raises:
        ConfigError: an argument is out of its range, ``also`` leaves nothing of the target, or no
            noise multiplier below 131072 suffices.
    """
    from scipy.optimize import brentq

    if not (math.isfinite(target_epsilon) and target_epsilon > 0):
        raise ConfigError(f"epsilon is {target_epsilon}: give a finite number above 0")
    check_delta(target_delta)
    check_sample_rate(sample_rate)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ConfigError(f"steps is {steps!r}: give an integer of 1 or more")
    parts = {1.0: steps} if factors is None else dict(factors)
    if sum(parts.values()) != steps:
        raise ConfigError(f"factors of {sum(parts.values())} steps given: give those of {steps}")
    goal = target_epsilon * (1 - _EPSILON_MARGIN)

    others = dict(also or {})
    if others and (spent := epsilon_of(others, target_delta, accountant=accountant)) >= goal:
        raise ConfigError(
            f"epsilon {target_epsilon} at delta {target_delta} leaves nothing for the steps: what "
            f"comes before them costs {spent:.4g}; raise epsilon, or lower choice_epsilon"
        )

    def excess(log_sigma: float) -> float:
        events = dict(others)
        for factor, count in parts.items():
            event = GaussianEvent(math.exp(log_sigma) * factor, sample_rate)
            events[event] = events.get(event, 0) + count
        epsilon = epsilon_of(events, target_delta, accountant=accountant)
        # Nearly linear in these coordinates, so few steps; brentq needs finite values.
        return math.log(min(max(epsilon, 1e-12), 1e12) / goal)

    # From where the least noise of any step is near 1: with less, a composition takes long.
    least = max(min(parts), _LEAST_FACTOR)
    high = -math.ceil(math.log2(least)) * math.log(2)
    low = high - math.log(2)
    while excess(high) > 0:
        low, high = high, high + math.log(2)
        if high > math.log(_LARGEST_SIGMA):
            raise ConfigError(
                f"epsilon {target_epsilon} at delta {target_delta} cannot be reached in {steps} "
                f"steps at sample rate {sample_rate}: raise epsilon or delta, or take fewer steps"
            )
    while excess(low) <= 0:
        low, high = low - math.log(2), low
        if high < math.log(_SMALLEST_SIGMA) + 1e-9:
            return math.exp(high)
    root = float(brentq(excess, low, high, xtol=_SIGMA_TOLERANCE / 2))
    while excess(root) > 0:
        root += _SIGMA_TOLERANCE / 2
    return math.exp(root)
