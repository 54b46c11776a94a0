"""The privacy ledger: budgets of data sets, and every step charged to them, before it is run.

Composition over runs. All events charged to a data set are composed in one privacy loss
distribution. That bound is proven for events fixed in advance. Steps left out because a run stopped
early, and leases cut short, only remove events from what was charged. When someone picks the noise
or batch size of a later run *because of* an earlier run's result, the composition is a privacy
filter with adaptive parameters, for which the same figure is common practice but not a theorem.
"""

from __future__ import annotations

import json
import math
from typing import Any

from dist_dp.accountant import LocalAccountant
from dist_dp.accounting import epsilon_of
from dist_dp.errors import BudgetError, LedgerError
from dist_dp.events import PrivacyEvent
from dist_dp.ledger_entry import MAX_STEP, Entry, Position, canonical, whole_number
from dist_dp.ledger_file import check_name, repeatable
from dist_dp.ledger_grant import Forecast, forecast
from dist_dp.ledger_leases import LeaseLedger, lease_of
from dist_dp.ledger_state import DatasetBudget, Lease, Reservation, Spend
from dist_dp.step_costs import StepCosts

__all__ = [
    "DatasetBudget", "Entry", "Lease", "Ledger", "LocalAccountant", "Position", "Reservation",
    "Spend",
]  # fmt: skip


class Ledger(LeaseLedger):
    """A ledger, usable from several threads, processes and (on a server) machines at once.

    Every method that writes takes an optional ``request_id``: a second call with the same one
    changes nothing and returns what the first did, so a call may be repeated when its answer was
    lost. A connection that is lost is mended, and the call repeated in this way, for half a minute.

    Guarantee:
        A lease is on the disk before `reserve` returns, and the composition of all leases of a
        data set (settled ones with the steps used, others whole) is within its budget (ε, δ) for
        add-or-remove-one record. So if each step's result is made only after a lease for it, the
        results of all runs together are (ε, δ)-differentially private, whatever crashes.

    Args:
        address: a file on a local disk, made with its parents if missing (mode 0600), or a
            ``postgresql://`` URL. See `dist_dp.ledger_file.LedgerFile` for the other arguments.

    Raises:
        LedgerError: it cannot be reached, made or read, is damaged, or is not a ledger.
    """

    @repeatable
    def open_run(
        self,
        run_id: str,
        dataset: str,
        costs: StepCosts | None,
        details: dict[str, Any] | None = None,
        *,
        request_id: str | None = None,
    ) -> None:
        """Open a run that will be charged to a data set; ``costs`` is what each step costs.

        A run without noise (``costs`` None) has no ε and so no budget could bound it: it is
        recorded and shown in `spent`, and needs ``details={"non_private": True}``.

        Raises:
            LedgerError: the run exists, or the data set is not registered (a run without noise may
                name one that is not).
            BudgetError: a run without noise that does not say so.
        """
        check_name("run", run_id)
        check_name("data set", dataset)
        try:
            details = json.loads(canonical(dict(details or {})))
        except (TypeError, ValueError) as error:
            raise LedgerError(
                f"details of run {run_id!r} do not fit in JSON ({error}): use simple, finite values"
            ) from error
        if costs is None and details.get("non_private") is not True:
            raise BudgetError(
                f"run {run_id!r} on data set {dataset!r} adds no noise: choose a private "
                "mechanism, or say that the run is not private (details: non_private = true)"
            )
        if costs is not None and costs.planned_steps > MAX_STEP:
            raise LedgerError(
                f"run {run_id!r} plans {costs.planned_steps} steps: plan at most {MAX_STEP}"
            )
        said = {**({"segments": None} if costs is None else costs.to_json()), "details": details}
        with self._transaction(write=True) as tx:
            if tx.repeated(request_id, "run_opened", run_id=run_id, dataset=dataset, **said):
                return
            if costs is not None:
                self._state.budget(dataset)
            if run_id in self._state.runs:
                raise LedgerError(
                    f"run {run_id!r} is in the ledger already: choose another run name"
                )
            tx.append(
                "run_opened",
                dataset,
                run_id=run_id,
                request_id=request_id,
                details=said,
            )

    @repeatable
    def record_release(self, run_id: str, step: int, *, request_id: str | None = None) -> None:
        """Record that a model settled to ``step`` is about to be released.

        A run that is resumed from before that step would draw other noise for the steps that the
        release holds already; `released_step` lets it be refused.

        Raises:
            LedgerError: the run is unknown.
        """
        step = whole_number(f"released step of run {run_id!r}", step)
        with self._transaction(write=True) as tx:
            dataset = self._state.run(run_id).dataset
            if tx.repeated(request_id, "model_released", run_id=run_id, first_step=step) is None:
                tx.append(
                    "model_released",
                    dataset,
                    run_id=run_id,
                    first_step=step,
                    request_id=request_id,
                    details={},
                )

    def released_step(self, run_id: str) -> int:
        """Return the last step that a recorded release of a run holds, 0 if there is none.

        Raises:
            LedgerError: the run is unknown.
        """
        with self._transaction(write=False):
            return self._state.run(run_id).released_step

    @repeatable
    def close_run(self, run_id: str, status: str, *, request_id: str | None = None) -> None:
        """Close a run (``status`` such as finished, stopped or failed); it reserves no more.

        Raises:
            LedgerError: the run is unknown or closed already.
        """
        if not isinstance(status, str) or not status or status == "open":
            raise LedgerError(f"run {run_id!r} cannot be closed as {status!r}: name how it ended")
        with self._transaction(write=True) as tx:
            if tx.repeated(request_id, "run_closed", run_id=run_id, status=status) is not None:
                return
            run = self._state.run(run_id)
            if run.status != "open":
                raise LedgerError(f"run {run_id!r} is closed already ({run.status})")
            tx.append(
                "run_closed",
                run.dataset,
                run_id=run_id,
                request_id=request_id,
                details={"status": status},
            )

    def run_epsilon(self, run_id: str, delta: float | None = None) -> float:
        """Return ε of one run's charge alone, at ``delta`` (the data set's by default).

        Raises:
            LedgerError: the run is unknown.
        """
        with self._transaction(write=False):
            run = self._state.run(run_id)
            is_private, charged = run.costs is not None, run.by_event
            if delta is None:
                delta = self._state.budget(run.dataset).delta
        return epsilon_of(charged, delta) if is_private else math.inf

    def knows_run(self, run_id: str) -> bool:
        """Return whether a run was ever opened."""
        with self._transaction(write=False):
            return run_id in self._state.runs

    def run_status(self, run_id: str) -> str:
        """Return `open`, or how a run ended.

        Raises:
            LedgerError: the run is unknown.
        """
        with self._transaction(write=False):
            return self._state.run(run_id).status

    def run_owner(self, run_id: str) -> str:
        """Return who opened a run (``owner`` in its details), empty if that was not said.

        Raises:
            LedgerError: the run is unknown.
        """
        with self._transaction(write=False):
            return self._state.run(run_id).owner

    def forecast(self, run_id: str) -> Forecast | None:
        """Return at which step the budget ends for a run; see `dist_dp.ledger_grant.forecast`.

        Raises:
            LedgerError: the run is unknown.
        """
        with self._transaction(write=False):
            return forecast(self._state, run_id)

    def charged_to(self, run_id: str) -> int:
        """Return the last step that a run is charged for by its latest lease, 0 if none.

        Raises:
            LedgerError: the run is unknown.
        """
        with self._transaction(write=False):
            return self._state.run(run_id).charged_to

    def open_leases(self, run_id: str) -> list[Lease]:
        """Return the leases of a run that are not settled, in the order they were granted.

        A run that goes on after a crash takes them over instead of charging their steps again.
        """
        with self._transaction(write=False) as tx:
            found = (
                tx.by_lease(lease_id, "steps_reserved")
                for lease_id, lease in self._state.leases.items()
                if lease.run_id == run_id
            )
            return [lease_of(entry) for entry in found if entry is not None]

    def run_steps(self, run_id: str) -> int:
        """Return how many steps are charged to a run; a lease that was never settled counts whole.

        Raises:
            LedgerError: the run is unknown.
        """
        with self._transaction(write=False):
            return self._state.run(run_id).charged

    def run_charges(self, run_id: str) -> dict[PrivacyEvent, int]:
        """Return the steps charged to a run by event; without noise there are none.

        Raises:
            LedgerError: the run is unknown.
        """
        with self._transaction(write=False):
            return dict(self._state.run(run_id).by_event)

    def run_costs(self, run_id: str) -> StepCosts | None:
        """Return what each step of a run costs, as it was opened; None for a run without noise.

        Raises:
            LedgerError: the run is unknown.
        """
        with self._transaction(write=False):
            return self._state.run(run_id).costs
