"""The privacy ledger: budgets of data sets, and every step charged to them, before it is run.

Composition over runs. All events charged to a data set are composed in one privacy loss
distribution. That bound is proven for events fixed in advance. Steps left out because a run stopped
early, and leases cut short, only remove events from what was charged. When someone picks the noise
or batch size of a later run *because of* an earlier run's result, the composition is a privacy
filter with adaptive parameters, for which the same figure is common practice but not a theorem.
"""

from __future__ import annotations

import contextlib
import json
import math
import secrets
from typing import Any

from dist_dp.accountant import LocalAccountant
from dist_dp.accounting import epsilon_of
from dist_dp.errors import BudgetError, LedgerError
from dist_dp.events import PrivacyEvent
from dist_dp.ledger_datasets import DatasetLedger
from dist_dp.ledger_file import check_name
from dist_dp.ledger_grant import grant
from dist_dp.ledger_state import DatasetBudget, Entry, Lease, Spend
from dist_dp.step_costs import StepCosts

__all__ = ["DatasetBudget", "Entry", "Lease", "Ledger", "LocalAccountant", "Spend"]


class Ledger(DatasetLedger):
    """A ledger file, usable from several threads and processes at once.

    Every method that writes takes an optional ``request_id``: a second call with the same one
    changes nothing and returns what the first did, so a call may be repeated when its answer was
    lost.

    Guarantee:
        A lease is on the disk before `reserve` returns, and the composition of all leases of a
        data set (settled ones with the steps used, others whole) is within its budget (ε, δ) for
        add-or-remove-one record. So if each step's result is made only after a lease for it, the
        results of all runs together are (ε, δ)-differentially private, whatever crashes.

    Args:
        path: the SQLite file, on a local disk; made with its parents if missing (mode 0600).

    Raises:
        LedgerError: the file cannot be made or read, is damaged, or is not a ledger.
    """

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
        details = dict(details or {})
        try:
            json.dumps(details, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise LedgerError(
                f"details of run {run_id!r} do not fit in JSON ({error}): use simple, finite values"
            ) from error
        if costs is None and details.get("non_private") is not True:
            raise BudgetError(
                f"run {run_id!r} on data set {dataset!r} adds no noise: choose a private "
                "mechanism, or say that the run is not private (details: non_private = true)"
            )
        with self._transaction(write=True) as tx:
            if tx.by_request(request_id) is not None:
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
                details={
                    **({"segments": None} if costs is None else costs.to_json()),
                    "details": details,
                },
            )

    def reserve(
        self, run_id: str, first_step: int, steps: int, *, request_id: str | None = None
    ) -> Lease:
        """Charge ``steps`` steps of a run from ``first_step`` on, before they are run.

        The charge is durable when this returns and counts against the data set's budget over all
        its runs. What a step costs follows from its number (see `dist_dp.step_costs`): one that
        is reserved again (a replay after a crash) is charged again at what it costs, and one that
        was not planned at no less than any that was. If only some of the steps fit, so
        many of the first ones are granted.

        Raises:
            BudgetError: not even one more step fits.
            LedgerError: the run is unknown or closed, or the request was another one.
        """
        if first_step < 0 or steps < 1:
            raise LedgerError(
                f"run {run_id!r}: cannot reserve {steps} steps from step {first_step}: give a "
                "first step of 0 or more and 1 step or more"
            )
        with self._lock:
            # Compose before taking the write lock, so that other processes need not wait for it;
            # below, the cache answers unless someone else was charged in between.
            with self._transaction(write=False):
                pass
            with contextlib.suppress(BudgetError, LedgerError):
                grant(self._state, run_id, first_step, steps)
            with self._transaction(write=True) as tx:
                before = tx.by_request(request_id)
                if before is not None:
                    asked = (before.kind, before.run_id, before.first_step)
                    if (*asked, before.details.get("requested")) != (
                        "steps_reserved", run_id, first_step, steps
                    ):  # fmt: skip
                        raise LedgerError(
                            f"request {request_id!r} was made before with other arguments: "
                            "use a new request_id"
                        )
                    return _lease(before)
                granted, epsilon, alone = grant(self._state, run_id, first_step, steps)
                lease = Lease(secrets.token_hex(16), first_step, granted, epsilon, alone)
                tx.append(
                    "steps_reserved",
                    self._state.run(run_id).dataset,
                    run_id=run_id,
                    lease_id=lease.lease_id,
                    first_step=first_step,
                    steps=granted,
                    request_id=request_id,
                    details={
                        "requested": steps,
                        "epsilon_after": None if math.isinf(epsilon) else epsilon,
                        "run_epsilon": None if math.isinf(alone) else alone,
                    },
                )
        return lease

    def settle(self, lease_id: str, used_steps: int, *, request_id: str | None = None) -> None:
        """Record how many steps of a lease were begun, and give the others, its last, back.

        Guarantee:
            Giving back is sound only for steps that never began: no batch of theirs was drawn and
            no noise added, so nothing that depends on the records exists, and whether they would
            run was decided from results already charged. A step that began counts, even if it
            failed. A lease that is never settled counts whole.

        Raises:
            LedgerError: the lease is unknown or settled, or fewer steps were leased.
        """
        with self._transaction(write=True) as tx:
            settled = tx.by_lease(lease_id, "steps_settled")
            if settled is not None:
                if request_id is not None and settled.request_id == request_id:
                    return
                raise LedgerError(f"lease {lease_id!r} is settled already: settle a lease once")
            if lease_id not in self._state.leases:
                raise LedgerError(f"lease {lease_id!r} is not in the ledger: reserve steps first")
            lease = self._state.leases[lease_id]
            if not 0 <= used_steps <= lease.steps:
                raise LedgerError(
                    f"lease {lease_id!r} of run {lease.run_id!r} has {lease.steps} steps, "
                    f"{used_steps} used cannot be: reserve every step before it begins"
                )
            tx.append(
                "steps_settled",
                self._state.run(lease.run_id).dataset,
                run_id=lease.run_id,
                lease_id=lease_id,
                steps=used_steps,
                request_id=request_id,
                details={},
            )

    def record_release(self, run_id: str, step: int, *, request_id: str | None = None) -> None:
        """Record that a model settled to ``step`` is about to be released.

        A run that is resumed from before that step would draw other noise for the steps that the
        release holds already; `released_step` lets it be refused.

        Raises:
            LedgerError: the run is unknown.
        """
        with self._transaction(write=True) as tx:
            dataset = self._state.run(run_id).dataset
            if tx.by_request(request_id) is None:
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

    def close_run(self, run_id: str, status: str, *, request_id: str | None = None) -> None:
        """Close a run (``status`` such as finished, stopped or failed); it reserves no more.

        Raises:
            LedgerError: the run is unknown or closed already.
        """
        if not status or status == "open":
            raise LedgerError(f"run {run_id!r} cannot be closed as {status!r}: name how it ended")
        with self._transaction(write=True) as tx:
            if tx.by_request(request_id) is not None:
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
            return [_lease(entry) for entry in found if entry is not None]

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


def _lease(entry: Entry) -> Lease:
    bounds = (entry.details["epsilon_after"], entry.details["run_epsilon"])
    total, alone = (math.inf if bound is None else float(bound) for bound in bounds)
    return Lease(
        lease_id=str(entry.lease_id),
        first_step=int(entry.first_step or 0),
        steps=int(entry.steps or 0),
        epsilon_after=total,
        run_epsilon=alone,
    )
