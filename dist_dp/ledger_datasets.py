"""The data sets of a ledger: their total budgets, and what all runs together spent."""

from __future__ import annotations

import math
import operator
from typing import Any

from dist_dp.accounting import epsilon_of
from dist_dp.errors import BudgetError
from dist_dp.figures import round_up
from dist_dp.ledger_entry import Entry, EntryKind
from dist_dp.ledger_file import LedgerFile, check_name, repeatable
from dist_dp.ledger_state import DatasetBudget, Spend
from dist_dp.ledger_tables import Transaction

UNITS = ("record", "user")


class DatasetLedger(LedgerFile):
    """Data sets and their budgets; see `dist_dp.ledger.Ledger` for the runs on them."""

    @repeatable
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
        check_name("data set", name)
        check_name(f"fingerprint of data set {name!r}: its", fingerprint)
        if unit not in UNITS:
            raise BudgetError(
                f"data set {name!r} has unit of privacy {unit!r}: give {' or '.join(UNITS)}"
            )
        num_records = _number_of_records(name, num_records)
        epsilon = None if epsilon is None else _number(name, "epsilon", epsilon)
        delta = None if delta is None else _number(name, "delta", delta)
        with self._transaction(write=True) as tx:
            kinds: tuple[EntryKind, EntryKind] = ("dataset_registered", "fingerprint_added")
            before = tx.by_request(request_id)
            kind = kinds[before is not None and before.kind == kinds[1]]
            tx.repeated(request_id, kind, dataset=name, fingerprint=fingerprint)
            owner = self._state.owner_of(fingerprint)
            if owner is not None and owner != name:
                raise BudgetError(
                    f"the records of data set {name!r} are registered as {owner!r}: the same "
                    f"records cannot have two budgets; use the name {owner!r}"
                )
            registered = self._state.datasets.get(name)
            if registered is not None and registered.budget is not None:
                if explicit and (epsilon, delta) != _first_budget(tx, name):
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

    @repeatable
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
        epsilon, delta = _number(name, "epsilon", epsilon), _number(name, "delta", delta)
        with self._transaction(write=True) as tx:
            records = self._state.budget(name).num_records
            _check_budget(name, epsilon, delta, records, allow_large_delta)
            asked = {"epsilon": epsilon, "delta": delta, "reason": reason}
            if tx.repeated(request_id, "budget_set", dataset=name, **asked) is None:
                spent = epsilon_of(self._state.counts(name), delta)
                if spent > epsilon:
                    raise BudgetError(
                        f"data set {name!r} has spent ε {round_up(spent)} at δ {delta:g}: its "
                        f"budget cannot be lowered to {epsilon:g}"
                    )
                tx.append(
                    "budget_set",
                    name,
                    request_id=request_id,
                    details=asked,
                )
        with self._transaction(write=False):
            return self._state.budget(name)

    def spent(self, dataset: str) -> Spend:
        """Return what a data set has spent, exactly, over all its runs.

        Raises:
            LedgerError: the data set is not registered.
        """
        with self._transaction(write=False):
            budget = self._state.budget(dataset)
            counts = self._state.counts(dataset)
            run_ids = self._state.datasets[dataset].run_ids
            runs = {run_id: self._state.runs[run_id].costs for run_id in run_ids}
        return Spend(
            epsilon=epsilon_of(counts, budget.delta),
            delta=budget.delta,
            steps_by_event=counts,
            runs=tuple(runs),
            non_private_runs=tuple(run for run, costs in runs.items() if costs is None),
            budget_epsilon=budget.epsilon,
        )

    def history(self, dataset: str | None = None) -> list[Entry]:
        """Return every entry of a data set, or of the whole ledger, oldest first.

        Raises:
            LedgerError: the ledger does not know the data set.
        """
        with self._transaction(write=False) as tx:
            if dataset is not None and dataset not in self._state.datasets:
                self._state.budget(dataset)
            return list(tx.entries(dataset))

    def datasets(self) -> list[DatasetBudget]:
        """Return all registered data sets, by name."""
        with self._transaction(write=False):
            states = self._state.datasets
            return [item.budget for _, item in sorted(states.items()) if item.budget is not None]


def _number_of_records(name: str, given: Any) -> int:
    try:
        number = 0 if isinstance(given, bool) else operator.index(given)
    except TypeError:
        number = 0
    if number < 1:
        raise BudgetError(f"data set {name!r} has {given!r} records: give a whole number above 0")
    return number


def _number(name: str, what: str, given: Any) -> float:
    try:
        if isinstance(given, str | bool):
            raise TypeError
        return float(given)
    except (TypeError, ValueError, OverflowError):
        raise BudgetError(
            f"budget of data set {name!r}: {what} is {given!r}, give a number"
        ) from None


def _first_budget(tx: Transaction, name: str) -> tuple[float, float] | None:
    """The budget a data set was registered with: what configurations go on naming."""
    for entry in tx.entries(name):
        if entry.kind == "dataset_registered":
            return float(entry.details["epsilon"]), float(entry.details["delta"])
    return None


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
