"""Leases: steps charged before they are run, one lease at a time or many in one transaction."""

from __future__ import annotations

import contextlib
import math
import secrets
from collections.abc import Sequence
from dataclasses import replace

from dist_dp.errors import DistDpError, LedgerError
from dist_dp.ledger_datasets import DatasetLedger
from dist_dp.ledger_entry import MAX_STEP, Entry, LedgerDamageError, whole_number
from dist_dp.ledger_file import repeatable, until_answered
from dist_dp.ledger_grant import grant
from dist_dp.ledger_state import Lease, Reservation


class LeaseLedger(DatasetLedger):
    """Leases on a ledger; see `dist_dp.ledger.Ledger` for the runs that hold them."""

    @repeatable
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
        first_step = whole_number(f"first step of a lease of run {run_id!r}", first_step)
        steps = whole_number(f"number of steps of a lease of run {run_id!r}", steps)
        if steps < 1 or first_step + steps - 1 > MAX_STEP:
            raise LedgerError(
                f"run {run_id!r}: cannot reserve {steps} steps from step {first_step}: give 1 step "
                f"or more, the last one at most {MAX_STEP}"
            )
        with self._lock:
            if self._shared is None:
                self._compose_ahead([Reservation(run_id, first_step, steps)])
            with self._transaction(write=True) as tx:
                before = tx.repeated(
                    request_id,
                    "steps_reserved",
                    run_id=run_id,
                    first_step=first_step,
                    requested=steps,
                )
                if before is not None:
                    return lease_of(before)
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

    def reserve_many(self, requests: Sequence[Reservation]) -> list[Lease | DistDpError]:
        """Carry out several reservations in one transaction, in order; each has its own outcome.

        A reservation that is refused leaves the others alone; a later one may still fit.

        Guarantee:
            All that were granted are durable together when this returns. If it raises, nobody
            may be told of any: either none is in the ledger, or (a lost connection) all are, and
            the same requests with the same ids get the same leases.

        Returns:
            For each request its lease, or the error that `reserve` would have raised.

        Raises:
            LedgerError: the ledger cannot be used.
        """
        named = [
            item if item.request_id else replace(item, request_id=secrets.token_hex(16))
            for item in requests
        ]
        return until_answered(lambda: self._reserve_together(named))

    def _reserve_together(self, requests: Sequence[Reservation]) -> list[Lease | DistDpError]:
        outcomes: list[Lease | DistDpError] = []
        with self._lock:
            self._compose_ahead(requests)
            with self.together():
                with self._transaction(write=True) as tx:
                    tx.look_up_requests([str(item.request_id) for item in requests])
                for item in requests:
                    try:
                        outcomes.append(
                            self.reserve(
                                item.run_id, item.first_step, item.steps, request_id=item.request_id
                            )
                        )
                    except LedgerDamageError:
                        raise
                    except DistDpError as error:
                        outcomes.append(error)
        return outcomes

    def _compose_ahead(self, requests: Sequence[Reservation]) -> None:
        """Compose before taking the write lock, so that other processes need not wait for it.

        Afterwards the cache answers, unless someone else was charged in between.
        """
        with self._transaction(write=False):
            pass
        for item in {item.run_id: item for item in requests}.values():
            with contextlib.suppress(DistDpError):
                grant(self._state, item.run_id, item.first_step, item.steps)

    @repeatable
    def settle(self, lease_id: str, used_steps: int, *, request_id: str | None = None) -> None:
        """Record how many steps of a lease were begun, and give the others, its last, back.

        Guarantee:
            Giving back is sound only for steps that never began: no batch of theirs was drawn and
            no noise added, so nothing that depends on the records exists, and whether they would
            run was decided from results already charged. A step that began counts, even if it
            failed. A lease that is never settled counts whole.

        Raises:
            LedgerError: the lease is unknown or settled, fewer steps were leased, or the request
                was another one.
        """
        used_steps = whole_number(f"number of used steps of lease {lease_id!r}", used_steps)
        with self._transaction(write=True) as tx:
            if tx.repeated(request_id, "steps_settled", lease_id=lease_id, steps=used_steps):
                return
            lease = self._state.leases.get(lease_id)
            if lease is None:
                if tx.by_lease(lease_id, "steps_settled") is None:
                    raise LedgerError(
                        f"lease {lease_id!r} is not in the ledger: reserve steps first"
                    )
                raise LedgerError(f"lease {lease_id!r} is settled already: settle a lease once")
            if used_steps > lease.steps:
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


def lease_of(entry: Entry) -> Lease:
    """Return the lease that an entry granted."""
    bounds = (entry.details["epsilon_after"], entry.details["run_epsilon"])
    total, alone = (math.inf if bound is None else float(bound) for bound in bounds)
    return Lease(
        lease_id=str(entry.lease_id),
        first_step=int(entry.first_step or 0),
        steps=int(entry.steps or 0),
        epsilon_after=total,
        run_epsilon=alone,
    )
