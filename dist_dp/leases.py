"""Charges steps to the ledger ahead of their use, several at a time, off the hot path.

The next lease is asked for when half of the one in use is gone, in a thread, so that a step never
waits for the ledger unless the ledger is slow for half a lease.

After a crash the run takes the steps since its last checkpoint again. With a trail
(`dist_dp.trail`) those that come out bit for bit as before are the same draws and are not charged
again; the leases that the crash left open are settled, and what of them was never begun is leased
anew. Without one, or from the first step that comes out otherwise, every replayed step is charged
again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from dist_dp.distributed import broadcast_object, rank
from dist_dp.errors import BudgetError, DistDpError, LedgerError
from dist_dp.fence import Fence
from dist_dp.ledger import Lease
from dist_dp.trail import StepTrail, digest_of

PAID = "paid"


class Accountant(Protocol):
    """What a run needs of an accountant (the central one on Ray, or one in this process)."""

    def reserve(self, run_id: str, first_step: int, steps: int) -> Lease:
        """Charges up to ``steps`` steps; durable before it returns."""

    def settle(self, lease_id: str, used_steps: int) -> None:
        """Gives back the steps of a lease that never began."""

    def open_leases(self, run_id: str) -> list[Lease]:
        """The leases of a run that are not settled."""

    def run_epsilon(self, run_id: str) -> float:
        """ε of what a run is charged."""

    def run_steps(self, run_id: str) -> int:
        """Steps charged to a run."""

    def charged_to(self, run_id: str) -> int:
        """The last step of a run's latest lease."""


class StepLeases:
    """Makes sure that every step is charged before it runs. Same calls on every rank.

    Guarantee:
        A step's batch is drawn only after the ledger holds its charge on disk. What is leased
        and lost (a crash) stays charged; :meth:`close` gives back only steps that never began.
        A step that is taken again is charged again, unless a trail shows that it came out as the
        first time: then nobody can have seen two draws of it. The charge for a replay that came
        out otherwise is on disk before the next step begins, and before :meth:`close` returns, so
        before anything is released.

    Args:
        accountant: Used on rank 0; other ranks pass None.
        run_id: The run's account.
        total_steps: Steps the run plans.
        lease_steps: Steps charged at a time.
        done: Steps that a resumed run need not take again.
        trail: File of the run's trail, for a run that may go on after a crash; used on rank 0.
        fence: Rank 0's attempt at the run, asked before a step is noted in the trail.
    """

    def __init__(
        self,
        accountant: Accountant | None,
        run_id: str,
        total_steps: int,
        lease_steps: int = 50,
        *,
        done: int = 0,
        trail: Path | None = None,
        fence: Fence | None = None,
    ) -> None:
        if rank() == 0 and accountant is None:
            raise ValueError("rank 0 needs an accountant: no step may go uncharged")
        self._accountant = accountant
        self._run_id = run_id
        self._total = total_steps
        self._lease_steps = max(1, lease_steps)
        self._trail = StepTrail(trail) if trail is not None and rank() == 0 else None
        self._fence = fence
        self._held: list[Lease] = []
        self._ahead: Future[Lease] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="leases")
        self._until = done
        self._done = done
        self._replayed_to = done  # the last step that an earlier attempt took
        self._otherwise: tuple[int, bytes] | None = None  # a replayed step, until that is paid
        self.epsilon_charged = 0.0
        self.refusal: str | None = None
        if trail is not None:
            found = self._on_rank_0(self._take_over)
            self._replayed_to, self._until, self.epsilon_charged = found

    def _take_over(self) -> tuple[int, int, float]:
        """Rank 0: goes on with what an earlier attempt was charged, as far as its trail leads.

        Returns:
            The last step it is known to have taken, the last one charged, and the run's ε.
        """
        assert self._accountant is not None and self._trail is not None
        if self._trail.owed is not None:  # the attempt before ended between the step and its charge
            first, last = self._trail.owed
            self._charge_again(first, last)
            self._trail.note_paid()
        known = self._trail.last_step_after(self._done)
        charged = self._accountant.run_steps(self._run_id)
        if charged < known:
            raise LedgerError(
                f"run '{self._run_id}' has taken {known} steps, but the ledger has charged only "
                f"{charged}: it is another ledger, or an older copy. Use the ledger that the run "
                "was charged to."
            )
        for lease in self._accountant.open_leases(self._run_id):
            # Settled and not kept: the attempt that held them may be alive, and could give back
            # what is used here. The step after the known ones may have begun. Where the machine
            # went down nobody knows how far those got: they stay charged, whole.
            begun = known + 1 - lease.first_step + 1 if self._trail.is_whole else lease.steps
            self._accountant.settle(lease.lease_id, max(0, min(lease.steps, begun)))
        until = known
        if self._trail.is_whole:
            # No step after the known ones had its noise added, so what they were charged is unused.
            until = max(known, self._accountant.charged_to(self._run_id))
        return known, until, self._accountant.run_epsilon(self._run_id) if until else 0.0

    @property
    def charged_until(self) -> int:
        """Last step of the latest lease; 0 before the first."""
        return self._until

    def cover(self, step: int) -> bool:
        """Charges a step if it is not yet; False when the budget does not allow it.

        Args:
            step: Number of the step about to be drawn, from 1.
        """
        if self._replayed_to > self._done:
            answer = self._on_rank_0(self._pay_replay)
            if answer not in ("", PAID):
                self.refusal = answer
                return False
            if answer == PAID or step > self._replayed_to:
                self._replayed_to = self._done  # settled: paid, or all came out as before
        if step <= self._until:
            self._ask_ahead(step)
            return True
        outcome = self._on_rank_0(lambda: self._next(step))
        if isinstance(outcome, str):
            self.refusal = outcome
            return False
        self._until = outcome.first_step + outcome.steps - 1
        self.epsilon_charged = outcome.run_epsilon
        return True

    def confirm(self, step: int, noised_sums: Tensor) -> None:
        """Notes how a step came out; every rank may call it, rank 0 keeps the trail.

        Args:
            step: The step, from 1.
            noised_sums: See `dist_dp.trail.digest_of`.
        """
        if self._trail is None:
            return
        if self._fence is not None:
            self._fence.check()
        digest = digest_of(noised_sums)
        if step <= self._replayed_to and not self._trail.agrees(step, digest):
            # What it replaces stays in the trail until the charge is on disk.
            self._otherwise = (step, digest)
            self._trail.note_owed(self._done + 1, self._replayed_to)
            return
        self._trail.note(step, digest)

    def _pay_replay(self) -> str:
        """Rank 0: charges the whole stretch again once a step of it came out otherwise.

        Returns:
            ``PAID``, nothing if there is nothing to pay, or why it cannot be paid.
        """
        if self._otherwise is None:
            return ""
        assert self._trail is not None
        try:
            self._charge_again(self._done + 1, self._replayed_to)
        except BudgetError as error:
            return str(error)
        self._trail.note(*self._otherwise)
        self._trail.note_paid()
        self._otherwise = None
        return PAID

    def _charge_again(self, first: int, last: int) -> None:
        """Charges steps that were charged before.

        Raises:
            BudgetError: The budget does not cover them all; what it covers is charged.
        """
        assert self._accountant is not None
        count = last - first + 1
        lease = self._accountant.reserve(self._run_id, first, count)
        self._accountant.settle(lease.lease_id, lease.steps)
        if lease.steps < count:
            raise BudgetError(
                f"{count} steps since the last checkpoint were taken again and came out otherwise; "
                f"the budget covers {lease.steps} of them a second time"
            )

    def _ask_ahead(self, step: int) -> None:
        """Half-way through the last lease: asks for the next, in a thread."""
        if rank() != 0 or self._ahead is not None or not self._held:
            return
        last = self._held[-1]
        first = self._until + 1
        if first <= self._total and step >= last.first_step + last.steps // 2:
            self._ahead = self._thread.submit(self._reserve, first)

    def _reserve(self, first: int) -> Lease:
        assert self._accountant is not None
        wanted = min(self._lease_steps, self._total - first + 1)
        return self._accountant.reserve(self._run_id, first, wanted)

    def _next(self, step: int) -> Lease | str:
        """Rank 0: the lease that holds a step, or why there is none; settles those used up."""
        assert self._accountant is not None
        ahead, self._ahead = self._ahead, None
        lease: Lease | None = None
        try:
            if ahead is not None:
                with contextlib.suppress(LedgerError):  # it was out of reach: ask again
                    lease = ahead.result()
            lease = lease or self._reserve(step)
        except BudgetError as error:
            return str(error)
        finally:
            self._settle(step - 1)
        self._held.append(lease)
        return lease

    def _settle(self, last_begun: int) -> None:
        assert self._accountant is not None
        while self._held:
            lease = self._held[0]
            used = max(0, min(lease.steps, last_begun - lease.first_step + 1))
            self._accountant.settle(lease.lease_id, used)
            self._held.pop(0)

    def close(self, last_begun_step: int) -> None:
        """Gives back the leased steps after the last one that began, in this attempt or before.

        Args:
            last_begun_step: The last step whose batch was drawn.

        Raises:
            BudgetError: A replay came out otherwise and cannot be paid: release nothing.
        """
        self._until = last_begun_step
        if rank() != 0:
            return
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            with contextlib.suppress(DistDpError):
                self._held.append(ahead.result())
        self._settle(last_begun_step)
        if self._replayed_to > self._done and self.refusal is None:
            answer = self._pay_replay()
            if answer not in ("", PAID):
                raise BudgetError(answer)

    def _on_rank_0(self, action: Callable[[], Any]) -> Any:
        """What rank 0's action gives, on every rank; its errors too."""
        result: Any = None
        failure: DistDpError | None = None
        if rank() == 0:
            try:
                result = action()
            except DistDpError as error:
                failure = error
        said = (type(failure), str(failure)) if failure else None
        result, said = broadcast_object((result, said))
        if failure is not None:
            raise failure
        if said is not None:
            kind, message = said
            raise kind(f"accountant: {message}")
        return result
