"""Reservations of many threads: one write for several, each with its own outcome."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dist_dp.accounting import epsilon_of
from dist_dp.errors import BudgetError, LedgerError
from dist_dp.events import GaussianEvent
from dist_dp.group_commit import GroupedLedger
from dist_dp.ledger import Ledger
from dist_dp.step_costs import StepCosts

EVENT, DELTA = GaussianEvent(1.0, 0.01), 1e-5


def ledger_of(folder: Path, affordable: int, runs: int) -> Ledger:
    ledger = Ledger(folder / "ledger.sqlite")
    epsilon = epsilon_of({EVENT: affordable}, DELTA) * (1 + 1e-9)
    ledger.register_dataset(
        "clicks", fingerprint="f", num_records=1000, epsilon=epsilon, delta=DELTA
    )
    for number in range(runs):
        ledger.open_run(f"run-{number}", "clicks", StepCosts.constant(EVENT, 100))
    return ledger


def test_those_that_wait_share_a_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = ledger_of(tmp_path, 10**4, 9)
    grouped, sizes = GroupedLedger(ledger), []
    many, first_is_in, go_on = Ledger.reserve_many, threading.Event(), threading.Event()

    def held_up(self: Ledger, requests: Any) -> Any:
        sizes.append(len(requests))
        first_is_in.set()
        assert go_on.wait(10)
        return many(self, requests)

    monkeypatch.setattr(Ledger, "reserve_many", held_up)
    with ThreadPoolExecutor(9) as pool:
        first = pool.submit(grouped.reserve, "run-0", 1, 5)
        assert first_is_in.wait(10)
        others = [pool.submit(grouped.reserve, f"run-{n}", 1, 5) for n in range(1, 9)]
        while len(grouped._waiting) < 8:
            pass
        go_on.set()
        assert {lease.result().steps for lease in (first, *others)} == {5}
    assert sizes == [1, 8]
    assert ledger.spent("clicks").steps_by_event == {EVENT: 45}
    assert grouped.run_steps("run-3") == 5  # everything else is the ledger's


def test_a_refusal_is_its_own_callers(tmp_path: Path) -> None:
    """Eight runs, a budget for 50 steps: never passed, and used to the last step."""
    grouped = GroupedLedger(ledger_of(tmp_path, 50, 8))

    def greedy(number: int) -> int:
        taken = 0
        for first in range(1, 100, 3):
            try:
                taken += grouped.reserve(f"run-{number}", first, 3).steps
            except BudgetError:
                break
        return taken

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(greedy, range(8))) == 50
    with pytest.raises(LedgerError, match="not in the ledger"):
        grouped.reserve("nobody", 1, 1)


def test_a_repeated_request_is_charged_once(tmp_path: Path) -> None:
    grouped = GroupedLedger(ledger_of(tmp_path, 100, 1))
    one, again = (grouped.reserve("run-0", 1, 5, request_id="r") for _ in range(2))
    assert one == again and grouped.run_steps("run-0") == 5


def test_an_error_of_the_disk_reaches_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grouped = GroupedLedger(ledger_of(tmp_path, 100, 1))

    def broken(_self: Ledger, _requests: Any) -> Any:
        raise LedgerError("no room")

    monkeypatch.setattr(Ledger, "reserve_many", broken)
    with pytest.raises(LedgerError, match="no room"):
        grouped.reserve("run-0", 1, 5)
