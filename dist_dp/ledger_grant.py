"""How many of a run's next steps fit into a data set's budget, and what ε is with them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from dist_dp.accounting import epsilon_of
from dist_dp.errors import BudgetError, LedgerError
from dist_dp.events import PrivacyEvent
from dist_dp.figures import round_up
from dist_dp.ledger_state import LedgerState
from dist_dp.run_charges import Rounding, multiple_of, part_of_plan
from dist_dp.step_costs import max_steps, sum_of

# When the whole plans of the open runs pass the budget, ε is tried so many leases ahead.
_LEASES_AHEAD = 16


def grant(state: LedgerState, run_id: str, first_step: int, steps: int) -> tuple[int, float, float]:
    """Find how many of a run's steps from ``first_step`` on fit, at most ``steps``.

    Returns:
        Their number, and upper bounds of ε with them: the data set's, within its budget, and the
        run's alone. Both are ``inf`` for a run without noise, which no budget bounds.

    Raises:
        BudgetError: not even one fits.
        LedgerError: the run is unknown or closed.
    """
    run = state.run(run_id)
    if run.status != "open":
        raise LedgerError(f"run {run_id!r} is closed ({run.status}): open a new run")
    if run.costs is None:
        return steps, math.inf, math.inf
    budget = state.budget(run.dataset)

    def bounds(extra: Mapping[PrivacyEvent, int], rounding: Rounding | None) -> tuple[float, float]:
        counts = state.counts(run.dataset, run_id, extra, rounding)
        alone = run.charge_with(extra, rounding)
        return epsilon_of(counts, budget.delta), epsilon_of(alone, budget.delta)

    # Rounded up, many leases ask for the same composition, which is remembered. What fits
    # rounded up fits; only the last attempt is exact.
    for rounding in (part_of_plan, multiple_of(_LEASES_AHEAD * steps), None):
        total, alone = bounds(run.costs.between(first_step, steps), rounding)
        if total <= budget.epsilon:
            return steps, total, alone
    already = state.counts(run.dataset)
    granted = max_steps(run.costs, first_step, steps, already, budget.epsilon, budget.delta)
    if granted == 0:
        spent = epsilon_of(already, budget.delta)
        raise BudgetError(
            f"budget of data set {run.dataset!r} is used up: spent ε {round_up(spent)} of "
            f"{budget.epsilon:g} at δ {budget.delta:g}, and one more step would pass it; end "
            f"the run here, or raise it with: dist-dp budget set {run.dataset} --epsilon …"
        )
    return granted, *bounds(run.costs.between(first_step, granted), None)


@dataclass(frozen=True)
class Forecast:
    """How far a run will come, should nobody else be charged meanwhile.

    Attributes:
        charged_to: the last step it is charged for.
        planned: its planned steps.
        last_step: the last step that the data set's budget allows, at most ``planned``.
        epsilon: the data set's ε when the run is at that step.
    """

    charged_to: int
    planned: int
    last_step: int
    epsilon: float

    @property
    def ends_early(self) -> bool:
        """Whether the budget ends before the plan does."""
        return self.last_step < self.planned


def forecast(state: LedgerState, run_id: str) -> Forecast | None:
    """Tell at which step the budget ends for a run; None for a run without noise.

    A forecast, not a promise: it holds if no other run on the data set is charged meanwhile.

    Raises:
        LedgerError: the run is unknown.
    """
    run = state.run(run_id)
    if run.costs is None:
        return None
    budget, already = state.budget(run.dataset), state.counts(run.dataset)
    first, planned = run.charged_to + 1, run.costs.planned_steps
    more = 0
    if first <= planned:
        more = max_steps(
            run.costs, first, planned - first + 1, already, budget.epsilon, budget.delta
        )
    then = sum_of(already, run.costs.between(first, more))
    return Forecast(run.charged_to, planned, run.charged_to + more, epsilon_of(then, budget.delta))
