"""Several runs on one data set under one budget: the noise that they need together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dist_dp.accounting import epsilon_of
from dist_dp.calibration import smallest_noise
from dist_dp.errors import ConfigError
from dist_dp.events import PrivacyEvent
from dist_dp.plan import PrivacyPlan
from dist_dp.step_costs import sum_of


def joint_epsilon(plans: Sequence[PrivacyPlan], delta: float) -> float:
    """Return ε of all runs together, as a ledger composes them on one data set."""
    return epsilon_of(_events(plans), delta, accountant=plans[0].accountant)


def calibrate_together(plans: Sequence[PrivacyPlan], epsilon: float, delta: float) -> float:
    """Return the smallest noise multiplier that keeps all runs together within (ε, δ).

    All have the same one, whatever their sample rates and steps: a unit that is in all of them is
    the one that the guarantee must hold for, and the composition is of all their events.

    Guarantee:
        With the result as each plan's noise multiplier `joint_epsilon` is at most ``epsilon``. It
        is fixed before the first of the runs, from public numbers, so nothing in it was chosen in
        the light of a result.

    Args:
        plans: at least one, of one accountant, with the costs of their private choices of rows
            resolved; their noise multipliers do not matter.
        epsilon: the ε that all runs together may reach.
        delta: at which δ.

    Raises:
        ConfigError: the target cannot be reached, or private choices of rows alone cost more.
    """
    if not plans:
        raise ConfigError("no runs to share a budget: give one plan or more")

    def events_at(sigma: float) -> Mapping[PrivacyEvent, int]:
        return _events([with_noise(plan, sigma) for plan in plans])

    factors = [with_noise(plan, 1.0).noise_multiplier_range()[0] for plan in plans]
    setup = sum_of(*({e: 1} for plan in plans for e in with_noise(plan, 1.0).step_costs().setup))
    what = f"by {len(plans)} runs of {sum(plan.steps for plan in plans)} steps together"
    return smallest_noise(events_at, epsilon, delta, plans[0].accountant, min(factors), setup, what)


def with_noise(plan: PrivacyPlan, noise_multiplier: float) -> PrivacyPlan:
    """Return a plan with another noise multiplier."""
    return PrivacyPlan(**{**plan.model_dump(), "noise_multiplier": noise_multiplier})


def _events(plans: Sequence[PrivacyPlan]) -> dict[PrivacyEvent, int]:
    return sum_of(*(plan.events() for plan in plans))
