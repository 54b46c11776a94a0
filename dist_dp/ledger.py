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
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dist_dp.accountant import LocalAccountant
from dist_dp.accounting import GaussianEvent, epsilon_of, max_steps
from dist_dp.errors import BudgetError, LedgerError
from dist_dp.ledger_state import (
    DatasetBudget,
    Entry,
    Lease,
    LedgerState,
    Rounding,
    Spend,
    multiple_of,
    part_of_plan,
)
from dist_dp.ledger_store import LedgerStore, Transaction

__all__ = ["DatasetBudget", "Entry", "Lease", "Ledger", "LocalAccountant", "Spend"]

# When the whole plans of the open runs pass the budget, ε is tried so many leases ahead.
_LEASES_AHEAD = 16


class Ledger:
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

    def __init__(self, path: Path | str) -> None:
        self._store = LedgerStore(Path(path))
        self._state = LedgerState()
        self._last_seen = 0
        self._lock = threading.RLock()
        with self._transaction(write=False):
            pass

    @property
    def path(self) -> Path:
        """The ledger file, resolved."""
        return self._store.path

    def close(self) -> None:
        """Close the file. A later call opens it again."""
        self._store.close()

    def register_dataset(
        self,
        name: str,
        *,
        fingerprint: str,
        num_records: int,
        epsilon: float | None = None,
        delta: float | None = None,
        unit: str = "record",
        explicit: bool = True,
        allow_large_delta: bool = False,
        request_id: str | None = None,
    ) -> DatasetBudget:
        """Register a data set with its total budget, or return it if it is registered.

        The first call fixes the budget. New records under a known name are charged to the same
        budget (which is safe); known records under a new name are refused, because they would get
        a second budget. With ``explicit`` false, the budget given is only what a new data set
        gets: a registered one keeps its own without complaint.

        Raises:
            BudgetError: no budget was given at first, another one later, or the records are
                registered under another name.
        """
        _check_name("data set", name)
        with self._transaction(write=True) as tx:
            owner = self._state.owner_of(fingerprint)
            if owner is not None and owner != name:
                raise BudgetError(
                    f"the records of data set {name!r} are registered as {owner!r}: the same "
                    f"records cannot have two budgets; use the name {owner!r}"
                )
            registered = self._state.datasets.get(name)
            if registered is not None and registered.budget is not None:
                if explicit and (epsilon, delta) != self._first_budget(tx, name):
                    _check_same_budget(registered.budget, epsilon, delta)
                _check_same_unit(registered.budget, unit)
                if owner is None:
                    tx.append(
                        "fingerprint_added",
                        name,
                        request_id=request_id,
                        details={"fingerprint": fingerprint, "num_records": num_records},
                    )
            else:
                if epsilon is None or delta is None:
                    raise BudgetError(
                        f"data set {name!r} is new: give its total budget, epsilon and delta"
                    )
                if num_records < 1:
                    raise BudgetError(
                        f"data set {name!r} has {num_records} records: give 1 or more"
                    )
                _check_budget(name, epsilon, delta, num_records, allow_large_delta)
                tx.append(
                    "dataset_registered",
                    name,
                    request_id=request_id,
                    details={
                        "fingerprint": fingerprint,
                        "num_records": num_records,
                        "epsilon": epsilon,
                        "delta": delta,
                        "unit": unit,
                    },
                )
        with self._transaction(write=False):
            return self._state.budget(name)

    def set_budget(
        self,
        name: str,
        epsilon: float,
        delta: float,
        reason: str,
        *,
        allow_large_delta: bool = False,
        request_id: str | None = None,
    ) -> DatasetBudget:
        """Change a data set's total budget, with a reason that stays in the history.

        Raises:
            BudgetError: more is spent already, or no reason is given.
            LedgerError: the data set is not registered.
        """
        if not reason.strip():
            raise BudgetError(f"budget of data set {name!r}: give a reason for the change")
        with self._transaction(write=True) as tx:
            records = self._state.budget(name).num_records
            _check_budget(name, epsilon, delta, records, allow_large_delta)
            if tx.by_request(request_id) is None:
                spent = epsilon_of(self._state.counts(name), delta)
                if spent > epsilon:
                    raise BudgetError(
                        f"data set {name!r} has spent ε {spent:.4g} at δ {delta:g}: its budget "
                        f"cannot be lowered to {epsilon:g}"
                    )
                tx.append(
                    "budget_set",
                    name,
                    request_id=request_id,
                    details={"epsilon": epsilon, "delta": delta, "reason": reason},
                )
        with self._transaction(write=False):
            return self._state.budget(name)

    def open_run(
        self,
        run_id: str,
        dataset: str,
        event: GaussianEvent | None,
        planned_steps: int,
        details: dict[str, Any] | None = None,
        *,
        request_id: str | None = None,
    ) -> None:
        """Open a run that will be charged to a data set; `event` is what one step costs.

        A run without noise (``event`` None) has no ε and so no budget could bound it: it is
        recorded and shown in `spent`, and needs ``details={"non_private": True}``.

        Raises:
            LedgerError: the run exists, or the data set is not registered (a run without noise may
                name one that is not).
            BudgetError: a run without noise that does not say so.
        """
        _check_name("run", run_id)
        details = dict(details or {})
        if planned_steps < 1:
            raise LedgerError(f"run {run_id!r} plans {planned_steps} steps: give 1 or more")
        try:
            json.dumps(details, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise LedgerError(
                f"details of run {run_id!r} do not fit in JSON ({error}): use simple, finite values"
            ) from error
        if event is None and details.get("non_private") is not True:
            raise BudgetError(
                f"run {run_id!r} on data set {dataset!r} adds no noise: choose a private "
                "mechanism, or say that the run is not private (details: non_private = true)"
            )
        with self._transaction(write=True) as tx:
            if tx.by_request(request_id) is not None:
                return
            if event is not None:
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
                    "event": None if event is None else vars(event),
                    "planned_steps": planned_steps,
                    "details": details,
                },
            )

    def reserve(
        self, run_id: str, first_step: int, steps: int, *, request_id: str | None = None
    ) -> Lease:
        """Charge ``steps`` steps of a run from ``first_step`` on, before they are run.

        The charge is durable when this returns and counts against the data set's budget over all
        its runs. If only some of the steps fit, so many are granted. Steps reserved again (a
        replay after a crash) are charged again.

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
                self._grant(run_id, steps)
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
                granted, epsilon, alone = self._grant(run_id, steps)
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
        """Record how many steps of a lease were begun, and give the others back.

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
            run_id, leased = self._state.leases[lease_id]
            if not 0 <= used_steps <= leased:
                raise LedgerError(
                    f"lease {lease_id!r} of run {run_id!r} has {leased} steps, {used_steps} used "
                    "cannot be: reserve every step before it begins"
                )
            tx.append(
                "steps_settled",
                self._state.run(run_id).dataset,
                run_id=run_id,
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

    def spent(self, dataset: str) -> Spend:
        """Return what a data set has spent, exactly, over all its runs.

        Raises:
            LedgerError: the data set is not registered.
        """
        with self._transaction(write=False):
            budget = self._state.budget(dataset)
            counts = self._state.counts(dataset)
            run_ids = self._state.datasets[dataset].run_ids
            runs = {run_id: self._state.runs[run_id].event for run_id in run_ids}
        return Spend(
            epsilon=epsilon_of(counts, budget.delta),
            delta=budget.delta,
            steps_by_event=counts,
            runs=tuple(runs),
            non_private_runs=tuple(run for run, event in runs.items() if event is None),
            budget_epsilon=budget.epsilon,
        )

    def run_epsilon(self, run_id: str, delta: float | None = None) -> float:
        """Return ε of one run's charge alone, at ``delta`` (the data set's by default).

        Raises:
            LedgerError: the run is unknown.
        """
        with self._transaction(write=False):
            run = self._state.run(run_id)
            event, charged = run.event, run.charged
            if delta is None:
                delta = self._state.budget(run.dataset).delta
        if event is None:
            return math.inf
        return epsilon_of({event: charged}, delta)

    def run_steps(self, run_id: str) -> int:
        """Return how many steps are charged to a run; a lease that was never settled counts whole.

        Raises:
            LedgerError: the run is unknown.
        """
        with self._transaction(write=False):
            return self._state.run(run_id).charged

    def _first_budget(self, tx: Transaction, name: str) -> tuple[float, float] | None:
        """The budget a data set was registered with: what configurations go on naming."""
        for entry in tx.entries_after(0, name):
            if entry.kind == "dataset_registered":
                return float(entry.details["epsilon"]), float(entry.details["delta"])
        return None

    def history(self, dataset: str) -> list[Entry]:
        """Return every entry of a data set, oldest first.

        Raises:
            LedgerError: the ledger does not know the data set.
        """
        with self._transaction(write=False) as tx:
            if dataset not in self._state.datasets:
                self._state.budget(dataset)
            return tx.entries_after(0, dataset)

    def datasets(self) -> list[DatasetBudget]:
        """Return all registered data sets, by name."""
        with self._transaction(write=False):
            states = self._state.datasets
            return [item.budget for _, item in sorted(states.items()) if item.budget is not None]

    def _grant(self, run_id: str, steps: int) -> tuple[int, float, float]:
        """Return how many of ``steps`` fit, and bounds of ε with them: data set's and run's."""
        run = self._state.run(run_id)
        if run.status != "open":
            raise LedgerError(f"run {run_id!r} is closed ({run.status}): open a new run")
        if run.event is None:
            return steps, math.inf, math.inf
        event, budget = run.event, self._state.budget(run.dataset)

        def bounds(extra: int, rounding: Rounding | None) -> tuple[float, float]:
            counts = self._state.counts(run.dataset, {run_id: extra}, rounding)
            alone = {event: run.charge_with(extra, rounding)}
            return epsilon_of(counts, budget.delta), epsilon_of(alone, budget.delta)

        # Rounded up, many leases ask for the same composition, which is remembered. What fits
        # rounded up fits; only the last attempt is exact.
        for rounding in (part_of_plan, multiple_of(_LEASES_AHEAD * steps), None):
            total, alone = bounds(steps, rounding)
            if total <= budget.epsilon:
                return steps, total, alone
        already = self._state.counts(run.dataset)
        granted = max_steps(event, already, budget.epsilon, budget.delta, steps)
        if granted == 0:
            spent = epsilon_of(already, budget.delta)
            raise BudgetError(
                f"budget of data set {run.dataset!r} is used up: spent ε {spent:.4g} of "
                f"{budget.epsilon:g} at δ {budget.delta:g}, and one more step would pass it; end "
                f"the run here, or raise it with: dist-dp budget set {run.dataset} --epsilon …"
            )
        return granted, *bounds(granted, None)

    @contextlib.contextmanager
    def _transaction(self, *, write: bool) -> Iterator[Transaction]:
        """Open a transaction with the state caught up to every entry before it."""
        with self._lock:
            with self._store.transaction(write=write) as tx:
                if tx.last_seq() < self._last_seen:
                    raise LedgerError(
                        f"the ledger {self.path} lost entries while in use: it was replaced by an "
                        "older copy; restore the newest one and start again"
                    )
                for entry in tx.entries_after(self._state.seq):
                    self._state.apply(entry)
                yield tx
                last_seq = tx.last_seq()
            # Own entries are applied by the next transaction; only now are they on the disk.
            self._last_seen = last_seq


def _check_same_unit(budget: DatasetBudget, unit: str) -> None:
    if unit != budget.unit:
        raise BudgetError(
            f"data set {budget.name!r} is registered with unit of privacy {budget.unit!r}, not "
            f"{unit!r}: the unit cannot change"
        )


def _check_same_budget(budget: DatasetBudget, epsilon: float | None, delta: float | None) -> None:
    wanted = (
        budget.epsilon if epsilon is None else epsilon,
        budget.delta if delta is None else delta,
    )
    if wanted != (budget.epsilon, budget.delta):
        raise BudgetError(
            f"data set {budget.name!r} has the total budget ε {budget.epsilon:g} at δ "
            f"{budget.delta:g}, not ε {wanted[0]:g} at δ {wanted[1]:g}: leave the budget out to "
            f"use it, or change it with: dist-dp budget set {budget.name} --epsilon {wanted[0]:g}"
        )


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


def _check_name(what: str, name: str) -> None:
    if not name.strip() or len(name) > 200 or not name.isprintable():
        raise LedgerError(f"{what} name {name!r}: give 1 to 200 printable characters")


def _check_budget(
    name: str, epsilon: float, delta: float, num_records: int, allow_large_delta: bool
) -> None:
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise BudgetError(
            f"budget of data set {name!r}: epsilon is {epsilon}, give a number above 0"
        )
    if not 0 < delta < 1:
        raise BudgetError(
            f"budget of data set {name!r}: delta is {delta}, give a number between 0 and 1"
        )
    if delta * num_records >= 1 and not allow_large_delta:
        raise BudgetError(
            f"budget of data set {name!r}: delta {delta:g} is not below 1/records = "
            f"{1 / num_records:.3g}: a mechanism that publishes one whole record would pass; lower "
            "delta, or force it (allow_large_delta, --force-delta)"
        )
