"""Reservations that wait for each other's disk write share the next one."""

from __future__ import annotations

import secrets
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from dist_dp.errors import DistDpError
from dist_dp.ledger import Lease, Ledger, Reservation


class GroupedLedger:
    """A ledger for many threads: while one transaction is written, requests gather for the next.

    Everything but `reserve` goes straight to the ledger.

    Guarantee:
        As for `Ledger.reserve`: a lease is on the disk before any caller hears of it.

    Args:
        ledger: the ledger.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._gathering = threading.Lock()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="ledger-writer")
        self._waiting: list[tuple[Reservation, Future[Lease]]] = []

    def __getattr__(self, name: str) -> Any:
        """The ledger's own."""
        return getattr(self._ledger, name)

    def reserve(
        self, run_id: str, first_step: int, steps: int, *, request_id: str | None = None
    ) -> Lease:
        """Charge steps of a run; see `Ledger.reserve`."""
        answer: Future[Lease] = Future()
        request = Reservation(run_id, first_step, steps, request_id or secrets.token_hex(16))
        with self._gathering:
            self._waiting.append((request, answer))
        self._writer.submit(self._write_those_waiting)
        return answer.result()

    def _write_those_waiting(self) -> None:
        with self._gathering:
            batch, self._waiting = self._waiting, []
        if not batch:
            return  # written with one before
        try:
            outcomes = self._ledger.reserve_many([request for request, _ in batch])
        except BaseException as error:
            for _, answer in batch:
                answer.set_exception(error)
            return
        for (_, answer), outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, DistDpError):
                answer.set_exception(outcome)
            else:
                answer.set_result(outcome)
