"""Charges steps to the ledger ahead of their use, several at a time, off the hot path."""

from __future__ import annotations

from typing import Protocol

from dist_dp.distributed import broadcast_object, rank
from dist_dp.errors import BudgetError, DistDpError
from dist_dp.ledger import Lease


class Accountant(Protocol):
    """What a run needs of an accountant (the central one on Ray, or one in this process)."""

    def reserve(self, run_id: str, first_step: int, steps: int) -> Lease:
        """Charges up to ``steps`` steps; durable before it returns."""

    def settle(self, lease_id: str, used_steps: int) -> None:
        """Gives back the steps of a lease that never began."""


class StepLeases:
    """Makes sure that every step is charged before it runs. Same calls on every rank.

    Guarantee:
        A step's batch is drawn only after the ledger holds its charge on disk. What is leased
        and lost (a crash) stays charged; :meth:`close` gives back only steps that never began.

    Args:
        accountant: Used on rank 0; other ranks pass None.
        run_id: The run's account.
        total_steps: Steps the run plans.
        lease_steps: Steps charged at a time.
    """

    def __init__(
        self, accountant: Accountant | None, run_id: str, total_steps: int, lease_steps: int = 50
    ) -> None:
        if rank() == 0 and accountant is None:
            raise ValueError("rank 0 needs an accountant: no step may go uncharged")
        self._accountant = accountant
        self._run_id = run_id
        self._total = total_steps
        self._lease_steps = max(1, lease_steps)
        self._lease: Lease | None = None
        self._until = 0
        self.epsilon_charged = 0.0
        self.refusal: str | None = None

    @property
    def charged_until(self) -> int:
        """Last step of the latest lease; 0 before the first."""
        return self._until

    def cover(self, step: int) -> bool:
        """Charges a step if it is not yet; False when the budget does not allow it.

        Args:
            step: Number of the step about to be drawn, from 1.
        """
        if self._lease is not None and step <= self._until:
            return True
        outcome: tuple[Lease | None, str] = (None, "")
        failure: DistDpError | None = None
        if rank() == 0:
            assert self._accountant is not None
            try:
                if self._lease is not None:
                    self._accountant.settle(self._lease.lease_id, self._lease.steps)
                wanted = min(self._lease_steps, self._total - step + 1)
                outcome = (self._accountant.reserve(self._run_id, step, wanted), "")
            except BudgetError as error:
                outcome = (None, str(error))
            except DistDpError as error:
                failure = error
                outcome = (None, f"accountant: {error}")
        lease, refusal = broadcast_object(outcome)
        if failure is not None:
            raise failure
        if lease is None:
            if refusal.startswith("accountant: "):
                raise DistDpError(refusal)
            self._lease, self.refusal = None, refusal
            return False
        self._lease, self._until = lease, lease.first_step + lease.steps - 1
        self.epsilon_charged = lease.run_epsilon
        return True

    def close(self, last_begun_step: int) -> None:
        """Gives back the leased steps after the last one that began.

        Args:
            last_begun_step: The last step whose batch was drawn.
        """
        if self._lease is not None and rank() == 0:
            assert self._accountant is not None
            used = max(0, min(last_begun_step, self._until) - self._lease.first_step + 1)
            self._accountant.settle(self._lease.lease_id, used)
        self._lease = None
