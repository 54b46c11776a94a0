"""Opens a run's account in the ledger: the last thing before a run, the first that costs budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dist_dp.accountant import LocalAccountant
from dist_dp.distributed import broadcast_object, rank
from dist_dp.errors import BudgetError, DistDpError, LedgerError
from dist_dp.figures import round_up
from dist_dp.ledger import Ledger
from dist_dp.ledger_address import LedgerAddress
from dist_dp.ledger_entry import Position
from dist_dp.plan import PrivacyPlan
from dist_dp.step_costs import max_steps


def check_whole_run_fits(accountant: Any, dataset: str, plan: PrivacyPlan) -> None:
    """Refuses, before anything is charged, a run that would end half-way.

    Args:
        accountant: Knows the data set.
        dataset: Its name in the ledger.
        plan: A plan with noise.

    Raises:
        BudgetError: What is left of the data set's budget does not cover every planned step, or
            counts another unit of privacy.
    """
    for budget in accountant.datasets():
        if budget.name == dataset and budget.unit != plan.unit:
            raise BudgetError(
                f"data set '{dataset}' is registered with unit of privacy '{budget.unit}', not "
                f"'{plan.unit}': one budget counts one unit; train with privacy.unit {budget.unit}"
            )
    spend = accountant.spent(dataset)
    costs = plan.step_costs()
    setup = 1 if costs.setup else 0  # step 0 comes before the others
    fits = max_steps(
        costs,
        1 - setup,
        plan.steps + setup,
        spend.steps_by_event,
        spend.budget_epsilon,
        spend.delta,
    )
    if setup and fits == 0:
        raise BudgetError(
            f"data set '{dataset}' has spent ε = {spend.epsilon:.4g} of "
            f"{spend.budget_epsilon:.4g} (δ = {spend.delta:g}); not even what the run does before "
            "its first step (its private choice of rows) still fits. Lower choice_epsilon, give "
            f"public frequencies, or raise the budget (dist-dp budget set {dataset} --epsilon … "
            "--reason …)"
        )
    fits -= setup
    if fits < plan.steps:
        raise BudgetError(
            f"data set '{dataset}' has spent ε = {round_up(spend.epsilon)} of "
            f"{spend.budget_epsilon:g} (δ = {spend.delta:g}); {fits} of the {plan.steps} "
            "planned steps still fit. Plan fewer or noisier steps, raise the budget (dist-dp "
            f"budget set {dataset} --epsilon … --reason …), or let the run stop when the "
            "budget is used up (privacy.stop_at_budget)"
        )


def _check_no_later_release(accountant: Any, run_id: str, step: int, settled: bool) -> None:
    """Refuses to go on from a checkpoint that a release has overtaken.

    The noise of a row is keyed by the interval between two settles. A release settles every row;
    a run that goes on from before it would settle over other intervals, and the steps in the
    release would be published twice with independent noise, but charged once.
    """
    released = accountant.released_step(run_id)
    if released > step or (released == step and released > 0 and not settled):
        raise LedgerError(
            f"run '{run_id}' released a model of step {released} after its checkpoint of step "
            f"{step}: going on would publish those steps again with other noise. Keep that "
            "release, or start a new run."
        )


def _check_same_costs(accountant: Any, run_id: str, plan: PrivacyPlan) -> None:
    """Refuses a plan whose steps have other noise than the run was opened with.

    The ledger charges a step as it was planned then. A plan of another noise, or another version's
    rounding of its schedule, would draw what nobody charges.
    """
    opened = accountant.run_costs(run_id)
    if opened != plan.step_costs():
        raise LedgerError(
            f"run '{run_id}' was opened in the ledger with other noise or another number of steps "
            "than it would now go on with: resume it with the configuration and the version of "
            "dist-dp that began it, or start a new run."
        )


def _check_steps_are_charged(accountant: Any, run_id: str, step: int) -> None:
    """Refuses a ledger that knows of fewer steps than the checkpoint holds.

    Every step is on the ledger's disk before it is taken, so such a ledger is another one, or an
    older copy: what it allows is not what is left.
    """
    charged = accountant.run_steps(run_id)
    if charged < step:
        raise LedgerError(
            f"the checkpoint of run '{run_id}' holds {step} steps, but the ledger has charged only "
            f"{charged}: it is another ledger, or an older copy. Use the ledger that the run was "
            "charged to."
        )


def open_account(
    accountant: Any,
    ledger: Path | LedgerAddress,
    plan: PrivacyPlan,
    *,
    dataset: str,
    run_id: str,
    budget: tuple[float, float] | None,
    fingerprint: str | None,
    stop_at_budget: bool,
    resumed_at: tuple[int, bool] | None,
    restarted: bool = False,
    owner: str = "",
    position: Position | None = None,
) -> Any:
    """Registers the data set if it is new and opens the run's account; every rank calls it.

    Guarantee:
        An account is gone on with only by the run that opened it: with its checkpoint, or with its
        ``owner``. So the leases of a run of the same name elsewhere are never taken over, and no
        steps are drawn on what that one was charged.

    Args:
        accountant: Rank 0's, or None for one on ``ledger`` in this process.
        ledger: Where the ledger is, used without an accountant.
        plan: The run's plan.
        dataset: Name of the data set.
        run_id: Name of the account.
        budget: Total (ε, δ) of a new data set; by default what the plan spends.
        fingerprint: Identifies the records; by default the name alone does.
        stop_at_budget: Open it although not all planned steps fit.
        resumed_at: For a run that goes on: the step of its checkpoint, and whether every row
            was settled in it. The account is open already.
        restarted: An earlier attempt at this run may have opened the account, and died before its
            first checkpoint: go on with it then, from step 0.
        owner: Of this run, the same in all its attempts; kept in the ledger.
        position: Of the ledger when the checkpoint was saved, if there is one.

    Returns:
        The accountant on rank 0, None elsewhere.

    Raises:
        BudgetError: The data set's budget does not allow the run.
        LedgerError: The run is in the ledger already, the ledger cannot be used, or a resumed
            run has released a model that its checkpoint knows nothing of, or was opened with
            other noise.
    """
    failure: DistDpError | None = None
    if rank() == 0:
        try:
            accountant = accountant or LocalAccountant(Ledger(ledger))
            costs = None if plan.mechanism == "none" else plan.step_costs()
            if restarted and resumed_at is None and accountant.knows_run(run_id):
                # Without the same owner it is one of that name elsewhere: refused below.
                resumed_at = (0, False) if accountant.run_owner(run_id) == owner else None
            if position is not None:
                accountant.check_contains(position)
            if resumed_at is not None:
                _check_no_later_release(accountant, run_id, *resumed_at)
                if costs is not None:
                    _check_same_costs(accountant, run_id, plan)
                    _check_steps_are_charged(accountant, run_id, resumed_at[0])
            else:
                if costs is not None:
                    accountant.register_dataset(
                        dataset,
                        fingerprint=fingerprint or f"named:{dataset}",
                        num_records=plan.num_units,
                        unit=plan.unit,
                        epsilon=budget[0] if budget else plan.target_epsilon or plan.epsilon(),
                        delta=budget[1] if budget else plan.delta,
                        explicit=budget is not None,
                        allow_large_delta=plan.allow_large_delta,
                    )
                    if not stop_at_budget:
                        check_whole_run_fits(accountant, dataset, plan)
                about = {
                    "non_private": costs is None,
                    "planned_steps": plan.steps,
                    "owner": owner,
                }
                accountant.open_run(run_id, dataset, costs, about)
        except DistDpError as error:
            failure = error
    message = broadcast_object(str(failure) if failure else None)
    if failure is not None:
        raise failure
    if message is not None:
        raise DistDpError(message)
    return accountant if rank() == 0 else None
