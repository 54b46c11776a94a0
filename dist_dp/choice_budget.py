"""What a private choice of rows may cost, and the event that costs it."""

from __future__ import annotations

import math
from typing import Literal

from dist_dp.accounting import AccountantKind, check_delta, epsilon_of
from dist_dp.calibration import calibrate_noise_multiplier
from dist_dp.errors import ConfigError
from dist_dp.events import GaussianEvent, PrivacyEvent, TopKEvent

ChoiceNoise = Literal["gumbel", "gaussian"]

_TOLERANCE = 1e-5
_EPSILON_MARGIN = 1e-9
_FACTOR = 0.2


def choice_event(
    epsilon: float,
    delta: float,
    *,
    selections: int,
    noise: ChoiceNoise = "gumbel",
    accountant: AccountantKind = "pld",
) -> PrivacyEvent:
    """Return the event of a choice with the least noise that costs no more than (ε, δ).

    Guarantee:
        ``epsilon_of({result: 1}, delta)`` is at most ``epsilon``: checked on the event returned,
        whose ε₀ (or noise multiplier) is within 1e-5 (relative) of the best.

    Args:
        epsilon: the ε that the choice may cost.
        delta: at which δ.
        selections: rows to choose, over all tables together.
        noise: `gumbel` (its cost grows with the rows chosen) or `gaussian` (with the rows of a
            unit, and the tables).
        accountant: see `dist_dp.accounting.epsilon_of`.

    Raises:
        ConfigError: an argument is out of its range, or the ε is too small to reckon with.
    """
    from scipy.optimize import brentq

    if noise not in ("gumbel", "gaussian"):
        raise ConfigError(f"choice_noise is {noise!r}: choose 'gumbel' or 'gaussian'")
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise ConfigError(f"choice_epsilon is {epsilon}: give a finite number above 0")
    check_delta(delta)
    if noise == "gaussian":
        return GaussianEvent(calibrate_noise_multiplier(epsilon, delta, 1.0, 1, accountant))
    TopKEvent(1.0, selections)  # checks their number
    goal = epsilon * (1 - _EPSILON_MARGIN)

    def excess(log_epsilon0: float) -> float:
        event = TopKEvent(math.exp(log_epsilon0), selections)
        found = epsilon_of({event: 1}, delta, accountant=accountant)
        return math.log(min(max(found, 1e-12), 1e12) / goal)

    # Where the closed forms of zCDP and of plain addition put it.
    log_inverse = -math.log(delta)
    root_of_rho = math.sqrt(log_inverse + epsilon) - math.sqrt(log_inverse)
    guess = max(epsilon / selections, math.sqrt(8 / selections) * root_of_rho)
    low = high = math.log(guess)
    while excess(low) > 0:
        low, high = low - _FACTOR, low
        if low < math.log(guess) - 20:
            raise ConfigError(
                f"choice_epsilon {epsilon:g} at delta {delta:g} is too small for {selections} "
                "rows: raise it, choose fewer rows, or give public frequencies"
            )
    while high <= low or excess(high) <= 0:
        low, high = high, high + _FACTOR
    root = float(brentq(excess, low, high, xtol=_TOLERANCE / 2))
    while excess(root) > 0:
        root -= _TOLERANCE / 2
    return TopKEvent(math.exp(root), selections)
