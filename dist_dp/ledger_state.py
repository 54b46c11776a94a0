"""What a ledger's entries add up to: pure bookkeeping, without disk and without Ray.

The ledger only ever appends. Its state is the fold of its entries in order, so every process that
reads the same entries arrives at the same spend.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dist_dp.errors import BudgetError, ConfigError, LedgerError
from dist_dp.events import GaussianEvent, PrivacyEvent
from dist_dp.ledger_entry import Entry, EntryKind, LedgerDamageError
from dist_dp.run_charges import Rounding, RunState
from dist_dp.step_costs import StepCosts, sum_of


@dataclass(frozen=True)
class DatasetBudget:
    """The total a data set may ever spend, over all runs that name it."""

    name: str
    unit: str
    num_records: int
    epsilon: float
    delta: float
    fingerprints: tuple[str, ...]


@dataclass(frozen=True)
class Lease:
    """Steps ``first_step .. first_step + steps - 1`` of a run, charged and ready for use.

    ``epsilon_after`` is an upper bound of the data set's spend with this lease counted whole. It
    never exceeds the budget; it moves in steps (each run's charge is rounded up on a grid of its
    plan) so that a lease costs no composition of its own. Ask the ledger for `spent` for the
    exact figure. ``run_epsilon`` is the same kind of bound for this run's charge alone; it is exact
    when the charge is what the run planned. Both are ``inf`` for a run without noise.
    """

    lease_id: str
    first_step: int
    steps: int
    epsilon_after: float
    run_epsilon: float


@dataclass(frozen=True)
class Reservation:
    """A request for steps ``first_step .. first_step + steps - 1`` of a run; see `Lease`."""

    run_id: str
    first_step: int
    steps: int
    request_id: str | None = None


# Ways to round whose totals are kept; a job asks for leases of one length, which takes three.
_MAX_TOTALS = 16


@dataclass(frozen=True)
class Spend:
    """What a data set has spent: ε at its δ, by all leases that were not given back."""

    epsilon: float
    delta: float
    steps_by_event: dict[PrivacyEvent, int]
    runs: tuple[str, ...]
    non_private_runs: tuple[str, ...]
    budget_epsilon: float

    @property
    def remaining_epsilon(self) -> float:
        """Budget minus spend (ε does not add up exactly: read it as a rough guide)."""
        return self.budget_epsilon - self.epsilon


@dataclass(frozen=True)
class OpenLease:
    """A lease that is not settled: which steps of which run."""

    run_id: str
    first_step: int
    steps: int


@dataclass
class DatasetState:
    """A data set: its budget, if it has one, and the runs on it.

    Attributes:
        budget: its total.
        run_ids: all runs, in the order in which they were opened.
        totals: what all runs are charged together, by how the charges of open ones are rounded;
            kept up to date once it was asked for, so that a lease costs as much beside a thousand
            other runs, open or not, as alone.
    """

    budget: DatasetBudget | None = None
    run_ids: list[str] = field(default_factory=list)
    totals: dict[Rounding | None, dict[PrivacyEvent, int]] = field(default_factory=dict)


@dataclass
class LedgerState:
    """The fold of all entries up to ``seq``."""

    seq: int = 0
    last_kind: EntryKind | None = None
    datasets: dict[str, DatasetState] = field(default_factory=dict)
    runs: dict[str, RunState] = field(default_factory=dict)
    leases: dict[str, OpenLease] = field(default_factory=dict)

    def budget(self, name: str) -> DatasetBudget:
        """Return the budget of a data set, or say which data sets there are."""
        item = self.datasets.get(name)
        if item is None or item.budget is None:
            known = sorted(key for key, value in self.datasets.items() if value.budget)
            raise LedgerError(
                f"data set {name!r} is not registered (registered: {', '.join(known) or 'none'}): "
                "register it with a budget first"
            )
        return item.budget

    def run(self, run_id: str) -> RunState:
        """Return the run, or say that it was never opened."""
        if run_id not in self.runs:
            raise LedgerError(f"run {run_id!r} is not in the ledger: open it before reserving")
        return self.runs[run_id]

    def owner_of(self, fingerprint: str) -> str | None:
        """Return the data set under which these records are registered, if any."""
        for name, item in self.datasets.items():
            if item.budget is not None and fingerprint in item.budget.fingerprints:
                return name
        return None

    def counts(
        self,
        dataset: str,
        run_id: str | None = None,
        extra: Mapping[PrivacyEvent, int] | None = None,
        rounding: Rounding | None = None,
    ) -> dict[PrivacyEvent, int]:
        """Return the steps charged to a data set by event, with ``extra`` ones of one of its runs.

        With ``rounding`` the charge of every open run is rounded up, event by event.
        Runs without noise have no event and do not compose: they are reported by name instead.
        """
        item = self.datasets[dataset]
        if rounding not in item.totals:
            if len(item.totals) >= _MAX_TOTALS:
                item.totals.clear()
            charges = (self.runs[known].charge_with({}, rounding) for known in item.run_ids)
            item.totals[rounding] = sum_of(*charges)
        total = item.totals[rounding]
        if run_id is None:
            return dict(total)
        run = self.runs[run_id]
        return _replaced(
            total, run.charge_with({}, rounding), run.charge_with(extra or {}, rounding)
        )

    def apply(self, entry: Entry) -> None:
        """Add one entry; entries must come in order.

        Raises:
            LedgerDamageError: the entry contradicts those before it.
        """
        try:
            self._apply(entry)
        except (KeyError, TypeError, ValueError, BudgetError, ConfigError, LedgerError) as error:
            raise LedgerDamageError(
                f"the ledger contradicts itself at entry {entry.seq} ({entry.kind}): {error}; "
                "restore the file from a back-up"
            ) from error
        self.seq, self.last_kind = entry.seq, entry.kind

    def _apply(self, entry: Entry) -> None:
        details = entry.details
        if entry.kind == "dataset_registered":
            item = self.datasets.setdefault(entry.dataset, DatasetState())
            if item.budget is not None:
                raise LedgerError(f"data set {entry.dataset!r} registered twice")
            item.budget = DatasetBudget(
                name=entry.dataset,
                unit=details["unit"],
                num_records=int(details["num_records"]),
                epsilon=float(details["epsilon"]),
                delta=float(details["delta"]),
                fingerprints=(details["fingerprint"],),
            )
        elif entry.kind in ("fingerprint_added", "budget_set"):
            budget = self.budget(entry.dataset)
            changes: dict[str, Any] = (
                {"fingerprints": (*budget.fingerprints, details["fingerprint"])}
                if entry.kind == "fingerprint_added"
                else {"epsilon": float(details["epsilon"]), "delta": float(details["delta"])}
            )
            self.datasets[entry.dataset].budget = replace(budget, **changes)
        elif entry.kind == "run_opened":
            run_id = str(entry.run_id)
            if run_id in self.runs:
                raise LedgerError(f"run {run_id!r} opened twice")
            owner = str((details.get("details") or {}).get("owner", ""))
            self.runs[run_id] = RunState(entry.dataset, _costs(details), owner=owner)
            item = self.datasets.setdefault(entry.dataset, DatasetState())
            item.run_ids.append(run_id)
        elif entry.kind == "steps_reserved":
            first, steps = _natural(entry.first_step), _natural(entry.steps)
            run = self.run(str(entry.run_id))
            with self._recounted(run):
                run.charge(first, steps)
            run.spans[str(entry.lease_id)] = (first, first + steps - 1)
            self.leases[str(entry.lease_id)] = OpenLease(str(entry.run_id), first, steps)
        elif entry.kind == "steps_settled":
            lease = self.leases.pop(str(entry.lease_id))
            used = _natural(entry.steps)
            if used > lease.steps:
                raise LedgerError(f"{used} steps used of {lease.steps} leased")
            # Steps begin in order, so those that never began are the lease's last.
            run = self.run(lease.run_id)
            run.spans[str(entry.lease_id)] = (lease.first_step, lease.first_step + used - 1)
            with self._recounted(run):
                run.give_back(lease.first_step + used, lease.steps - used)
        elif entry.kind == "model_released":
            run = self.run(str(entry.run_id))
            run.released_step = max(run.released_step, _natural(entry.first_step))
        elif entry.kind == "run_closed":
            run = self.run(str(entry.run_id))
            with self._recounted(run):  # what is charged to a closed run is not rounded
                run.status = str(details["status"])
        elif entry.kind not in ("ledger_migrated", "ledger_adopted"):
            raise LedgerError(f"kind {entry.kind!r} is unknown: it needs a newer version")

    @contextlib.contextmanager
    def _recounted(self, run: RunState) -> Iterator[None]:
        """Around a change of what a run is charged: the data set's totals follow it."""
        totals = self.datasets[run.dataset].totals
        before = {rounding: run.charge_with({}, rounding) for rounding in totals}
        yield
        for rounding, was in before.items():
            totals[rounding] = _replaced(totals[rounding], was, run.charge_with({}, rounding))


def _replaced(
    total: Mapping[PrivacyEvent, int],
    old: Mapping[PrivacyEvent, int],
    new: Mapping[PrivacyEvent, int],
) -> dict[PrivacyEvent, int]:
    """Return a total in which one part is another."""
    return sum_of(total, {event: -count for event, count in old.items()}, new)


def _natural(value: int | None) -> int:
    if value is None or value < 0:
        raise LedgerError(f"{value!r} is not a number of steps")
    return value


def _costs(details: Mapping[str, Any]) -> StepCosts | None:
    """What the steps of an opened run cost, as this version writes it or as earlier ones did."""
    if "event" in details:  # up to version 0.1: one event for all steps
        event = details["event"]
        if event is None:
            return None
        return StepCosts.constant(GaussianEvent(**event), int(details["planned_steps"]))
    return None if details["segments"] is None else StepCosts.from_json(details)
