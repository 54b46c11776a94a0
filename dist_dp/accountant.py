"""One face for every accountant: straight on a ledger here, or through an actor on Ray."""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, cast

from dist_dp.events import PrivacyEvent
from dist_dp.ledger_entry import Entry, Position
from dist_dp.ledger_grant import Forecast
from dist_dp.ledger_state import DatasetBudget, Lease, Spend
from dist_dp.step_costs import StepCosts

if TYPE_CHECKING:
    from dist_dp.ledger import Ledger

WRITING = frozenset(
    {
        "register_dataset",
        "set_budget",
        "open_run",
        "reserve",
        "settle",
        "record_release",
        "close_run",
    }
)
READING = frozenset(
    {
        "spent",
        "run_epsilon",
        "run_steps",
        "knows_run",
        "open_leases",
        "charged_to",
        "forecast",
        "run_status",
        "run_charges",
        "run_costs",
        "run_owner",
        "released_step",
        "history",
        "datasets",
        "position",
        "check_contains",
    }
)


class Accountant(ABC):
    """The methods of a `dist_dp.ledger.Ledger`, wherever that ledger is.

    Every writing call carries a fresh request id, so that a transport may repeat it without
    charging twice. See the ledger's methods for arguments, errors and guarantees.
    """

    @abstractmethod
    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the ledger and return its result."""

    def _write(self, method: str, *args: Any, request_id: str | None, **kwargs: Any) -> Any:
        return self._call(method, *args, request_id=request_id or secrets.token_hex(16), **kwargs)

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
        """Register a data set with its total budget, or return the budget it has."""
        result = self._write(
            "register_dataset",
            name,
            fingerprint=fingerprint,
            num_records=num_records,
            epsilon=epsilon,
            delta=delta,
            unit=unit,
            explicit=explicit,
            allow_large_delta=allow_large_delta,
            request_id=request_id,
        )
        return cast(DatasetBudget, result)

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
        """Change a data set's total budget."""
        result = self._write(
            "set_budget",
            name,
            epsilon,
            delta,
            reason,
            allow_large_delta=allow_large_delta,
            request_id=request_id,
        )
        return cast(DatasetBudget, result)

    def open_run(
        self,
        run_id: str,
        dataset: str,
        costs: StepCosts | None,
        details: dict[str, Any] | None = None,
        *,
        request_id: str | None = None,
    ) -> None:
        """Open a run that will be charged to a data set."""
        self._write("open_run", run_id, dataset, costs, details, request_id=request_id)

    def reserve(
        self, run_id: str, first_step: int, steps: int, *, request_id: str | None = None
    ) -> Lease:
        """Charge steps of a run before they are run."""
        return cast(Lease, self._write("reserve", run_id, first_step, steps, request_id=request_id))

    def settle(self, lease_id: str, used_steps: int, *, request_id: str | None = None) -> None:
        """Record how many steps of a lease were begun, and give the others back."""
        self._write("settle", lease_id, used_steps, request_id=request_id)

    def record_release(self, run_id: str, step: int, *, request_id: str | None = None) -> None:
        """Record that a model settled to ``step`` is about to be released."""
        self._write("record_release", run_id, step, request_id=request_id)

    def released_step(self, run_id: str) -> int:
        """Return the last step that a recorded release of a run holds."""
        return int(self._call("released_step", run_id))

    def close_run(self, run_id: str, status: str, *, request_id: str | None = None) -> None:
        """Close a run; it reserves no more."""
        self._write("close_run", run_id, status, request_id=request_id)

    def spent(self, dataset: str) -> Spend:
        """Return what a data set has spent over all its runs."""
        return cast(Spend, self._call("spent", dataset))

    def run_epsilon(self, run_id: str, delta: float | None = None) -> float:
        """Return ε of one run's charge alone."""
        return float(self._call("run_epsilon", run_id, delta))

    def knows_run(self, run_id: str) -> bool:
        """Return whether a run was ever opened."""
        return bool(self._call("knows_run", run_id))

    def run_status(self, run_id: str) -> str:
        """Return `open`, or how a run ended."""
        return str(self._call("run_status", run_id))

    def forecast(self, run_id: str) -> Forecast | None:
        """Return at which step the budget ends for a run."""
        return cast("Forecast | None", self._call("forecast", run_id))

    def charged_to(self, run_id: str) -> int:
        """Return the last step that a run is charged for by its latest lease."""
        return int(self._call("charged_to", run_id))

    def open_leases(self, run_id: str) -> list[Lease]:
        """Return the leases of a run that are not settled."""
        return cast("list[Lease]", self._call("open_leases", run_id))

    def run_steps(self, run_id: str) -> int:
        """Return how many steps are charged to a run."""
        return int(self._call("run_steps", run_id))

    def run_charges(self, run_id: str) -> dict[PrivacyEvent, int]:
        """Return the steps charged to a run by event."""
        return cast("dict[PrivacyEvent, int]", self._call("run_charges", run_id))

    def run_costs(self, run_id: str) -> StepCosts | None:
        """Return what each step of a run costs, as it was opened."""
        return cast("StepCosts | None", self._call("run_costs", run_id))

    def run_owner(self, run_id: str) -> str:
        """Return who opened a run, empty if that was not said."""
        return str(self._call("run_owner", run_id))

    def history(self, dataset: str | None = None) -> list[Entry]:
        """Return every entry of a data set, or of the whole ledger, oldest first."""
        return cast("list[Entry]", self._call("history", dataset))

    def datasets(self) -> list[DatasetBudget]:
        """Return all registered data sets, by name."""
        return cast("list[DatasetBudget]", self._call("datasets"))

    def position(self) -> Position:
        """Return where the ledger stands: its last entry, and the hash that covers all of them."""
        return cast(Position, self._call("position"))

    def check_contains(self, position: Position) -> None:
        """Refuse a ledger that has lost what somebody saw in it."""
        self._call("check_contains", position)


class LocalAccountant(Accountant):
    """An accountant in this process, straight on a ledger, without Ray.

    Args:
        ledger: the ledger to charge.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.ledger, method)(*args, **kwargs)
