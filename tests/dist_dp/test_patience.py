"""A ledger that is away for a while is waited for, and nothing is charged twice."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dist_dp import ledger_file, ledger_sqlite_file, patience
from dist_dp.accountant import Accountant, LocalAccountant
from dist_dp.accounting import GaussianEvent, epsilon_of
from dist_dp.errors import BudgetError, LedgerAwayError, LedgerError
from dist_dp.ledger import Ledger
from dist_dp.patience import PatientAccountant
from dist_dp.step_costs import StepCosts
from tests.postgres_server import PostgresServer

EVENT, DELTA, STEPS = GaussianEvent(1.0, 0.01), 1e-5, 20


def opened(address: Path | str) -> LocalAccountant:
    ledger = Ledger(address)
    budget = epsilon_of({EVENT: STEPS}, DELTA) * (1 + 1e-9)
    ledger.register_dataset("clicks", fingerprint="f", num_records=10, epsilon=budget, delta=DELTA)
    ledger.open_run("run", "clicks", StepCosts.constant(EVENT, STEPS))
    return LocalAccountant(ledger)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ledger itself waits only for a moment."""
    monkeypatch.setattr(ledger_sqlite_file, "_LOCK_WAIT_S", 0.1)
    monkeypatch.setattr(ledger_file, "RECONNECT_S", 0.1)
    monkeypatch.setattr(patience, "_SAY_AFTER_S", 0.3)


@contextmanager
def locked(path: Path, seconds: float) -> Iterator[None]:
    """Held exclusively by somebody else, for so long."""
    held, over = threading.Event(), threading.Event()

    def hold() -> None:
        connection = sqlite3.connect(path, isolation_level=None)
        connection.execute("BEGIN EXCLUSIVE")
        held.set()
        over.wait(seconds)
        connection.execute("ROLLBACK")
        connection.close()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.usefixtures("quick")
def test_a_locked_file_is_waited_for(tmp_path: Path) -> None:
    accountant, said = opened(tmp_path / "ledger.sqlite"), list[str]()
    patient = PatientAccountant(accountant, said.append)
    with locked(tmp_path / "ledger.sqlite", 1.5):
        with pytest.raises(LedgerAwayError, match="another process holds it"):
            accountant.reserve("run", 1, 5)
        lease = patient.reserve("run", 1, 5)
    patient.settle(lease.lease_id, 4)
    assert accountant.run_steps("run") == 4
    (word,) = said
    assert "no answer from the ledger" in word and "reserve" in word and "120 s" in word


@pytest.mark.usefixtures("quick")
def test_patience_has_an_end(tmp_path: Path) -> None:
    accountant = opened(tmp_path / "ledger.sqlite")
    patient = PatientAccountant(accountant, patience_s=0.5)
    with locked(tmp_path / "ledger.sqlite", 60.0):
        began = time.monotonic()
        with pytest.raises(LedgerAwayError, match="another process holds it"):
            patient.reserve("run", 1, 5)
        assert 0.5 <= time.monotonic() - began < 5
    assert accountant.run_steps("run") == 0


def test_a_refusal_and_damage_are_errors_at_once(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    accountant = opened(path)
    patient = PatientAccountant(accountant)
    patient.reserve("run", 1, STEPS)
    began = time.monotonic()
    with pytest.raises(BudgetError):
        patient.reserve("run", 1, 1)
    with pytest.raises(LedgerError, match="nobody"):
        patient.reserve("nobody", 1, 1)
    path.rename(tmp_path / "elsewhere")
    with pytest.raises(LedgerError, match="gone while in use") as caught:
        patient.reserve("run", 1, 1)
    assert not isinstance(caught.value, LedgerAwayError)
    assert time.monotonic() - began < 5


class LosesAnswers(Accountant):
    """Carries every call out, and loses the first answer of each."""

    def __init__(self, accountant: LocalAccountant) -> None:
        self.accountant = accountant
        self.lost: set[str] = set()

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        answer = self.accountant._call(method, *args, **kwargs)
        if method not in self.lost:
            self.lost.add(method)
            raise LedgerAwayError("the answer was lost")
        return answer


def test_a_call_whose_answer_was_lost_is_carried_out_once(tmp_path: Path) -> None:
    accountant = opened(tmp_path / "ledger.sqlite")
    patient = PatientAccountant(LosesAnswers(accountant))
    lease = patient.reserve("run", 1, 5)
    assert accountant.run_steps("run") == 5 and len(accountant.open_leases("run")) == 1
    patient.settle(lease.lease_id, 2)
    patient.record_release("run", 2)
    patient.close_run("run", "completed")
    assert accountant.run_steps("run") == 2 and accountant.released_step("run") == 2


@pytest.mark.usefixtures("quick")
def test_a_server_that_is_down_is_waited_for(
    postgres_server: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    accountant = opened(postgres_server.socket_url(postgres_server.new_database()))
    said: list[str] = []
    postgres_server.stop()
    restart = threading.Timer(2.0, postgres_server.start)
    restart.start()
    patient = PatientAccountant(accountant, said.append)
    lease = patient.reserve("run", 1, 5)
    restart.join()
    patient.settle(lease.lease_id, 4)
    assert accountant.run_steps("run") == 4 and len(said) == 1
