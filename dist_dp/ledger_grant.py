"""How many of a run's next steps fit into a data set's budget, and what ε is with them."""

from __future__ import annotations

import math
from collections.abc import Mapping

from dist_dp.accounting import epsilon_of
from dist_dp.errors import BudgetError, LedgerError
from dist_dp.events import PrivacyEvent
from dist_dp.ledger_state import LedgerState
from dist_dp.run_charges import Rounding, multiple_of, part_of_plan
from dist_dp.step_costs import max_steps

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
        counts = state.counts(run.dataset, {run_id: extra}, rounding)
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
            f"budget of data set {run.dataset!r} is used up: spent ε {spent:.4g} of "
            f"{budget.epsilon:g} at δ {budget.delta:g}, and one more step would pass it; end "
            f"the run here, or raise it with: dist-dp budget set {run.dataset} --epsilon …"
        )
    return granted, *bounds(run.costs.between(first_step, granted), None)
