"""The ledger: what is charged, what is refused, what survives."""

from __future__ import annotations

import math
import multiprocessing
import os
import shutil
import signal
import sqlite3
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dist_dp.accounting import GaussianEvent, epsilon_of
from dist_dp.errors import BudgetError, LedgerError
from dist_dp.ledger import Ledger, LocalAccountant
from dist_dp.step_costs import StepCosts, max_steps
from tests.dist_dp.ledgers import append_raw

DELTA = 1e-5
EVENT = GaussianEvent(4.0, 0.02)
OTHER = GaussianEvent(8.0, 0.1)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "new" / "ledger.db")


def register(ledger: Ledger, epsilon: float, name: str = "clicks") -> None:
    ledger.register_dataset(
        name, fingerprint=f"sha of {name}", num_records=10_000, epsilon=epsilon, delta=DELTA
    )


def epsilon_for(steps: int, event: GaussianEvent = EVENT) -> float:
    return epsilon_of({event: steps}, DELTA)


# --- files ------------------------------------------------------------------------------------


def test_file_is_private_and_whole(ledger: Ledger) -> None:
    register(ledger, 1.0)
    for file in ledger.path.parent.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    assert {file.name for file in ledger.path.parent.iterdir()} <= {
        "ledger.db",
        "ledger.db-wal",
        "ledger.db-shm",
        "ledger.db.witness",
    }
    ledger.path.chmod(0o644)
    Ledger(ledger.path)
    assert stat.S_IMODE(ledger.path.stat().st_mode) == 0o600


def test_durable_settings(ledger: Ledger) -> None:
    with ledger._store._engine.connect() as connection:
        for pragma, value in (("journal_mode", "wal"), ("synchronous", 2), ("foreign_keys", 1)):
            assert connection.exec_driver_sql(f"PRAGMA {pragma}").scalar() == value


def test_entries_cannot_be_changed_or_removed(ledger: Ledger) -> None:
    register(ledger, 1.0)
    with sqlite3.connect(ledger.path) as raw:
        for statement in ("UPDATE entries SET steps = 0", "DELETE FROM entries"):
            with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                raw.execute(statement)


@pytest.mark.parametrize("damage", ["noise", "empty", "cut", "folder", "other", "version"])
def test_unusable_file_is_refused(ledger: Ledger, tmp_path: Path, damage: str) -> None:
    register(ledger, 1.0)
    ledger.close()
    path = ledger.path
    if damage == "noise":
        path.write_bytes(os.urandom(20_000))
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "folder":
        path = tmp_path
    elif damage == "other":
        path = tmp_path / "other.db"
        with sqlite3.connect(path) as raw:
            raw.execute("CREATE TABLE recipes (name)")
    else:
        with sqlite3.connect(path) as raw:
            raw.execute("UPDATE ledger_meta SET value = '99'")
    before = path.read_bytes() if path.is_file() else b""
    with pytest.raises(LedgerError, match=r"(back-up|another file|name a file|version 99)"):
        Ledger(path)
    assert not path.is_file() or path.read_bytes() == before


def test_ledger_that_goes_away_or_back_is_noticed(ledger: Ledger, tmp_path: Path) -> None:
    register(ledger, 1.0)
    ledger.open_run("a", "clicks", StepCosts.constant(EVENT, 100))
    copy = tmp_path / "copy.db"
    ledger.close()
    shutil.copy(ledger.path, copy)
    ledger.reserve("a", 0, 10)
    ledger.close()
    kept = ledger.path.read_bytes()
    ledger.path.write_bytes(copy.read_bytes())  # the same file, an older content
    with pytest.raises(LedgerError, match="lost entries"):
        ledger.reserve("a", 10, 10)
    ledger.close()
    ledger.path.write_bytes(kept)
    ledger.reserve("a", 10, 10)
    ledger.path.unlink()
    with pytest.raises(LedgerError, match="gone while in use"):
        ledger.reserve("a", 20, 10)
    assert not ledger.path.exists()  # and it is not made anew, with nothing spent
    ledger.path.write_bytes(kept)
    with pytest.raises(LedgerError, match="replaced while in use"):
        ledger.reserve("a", 20, 10)


def test_contradiction_in_the_file_is_refused(ledger: Ledger) -> None:
    register(ledger, 1.0)
    ledger.open_run("a", "clicks", StepCosts.constant(EVENT, 100))
    lease = ledger.reserve("a", 0, 10)
    ledger.close()
    append_raw(ledger.path, "steps_settled", run_id="a", lease_id=lease.lease_id, steps=11)
    with pytest.raises(LedgerError, match="contradicts itself at entry 4"):
        Ledger(ledger.path)


def test_a_failed_write_charges_nothing(ledger: Ledger) -> None:
    register(ledger, 1.0)
    ledger.open_run("a", "clicks", StepCosts.constant(EVENT, 100))
    with ledger._store._engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(LedgerError, match="make room on the disk"):  # as if the disk were full
        for _ in range(500):
            ledger.reserve("a", 0, 1, request_id=None)
    charged = sum(entry.steps or 0 for entry in Ledger(ledger.path).history("clicks"))
    assert ledger.spent("clicks").steps_by_event.get(EVENT, 0) == charged


# --- data sets --------------------------------------------------------------------------------


def test_first_registration_fixes_the_budget(ledger: Ledger) -> None:
    with pytest.raises(BudgetError, match="give its total budget"):
        ledger.register_dataset("clicks", fingerprint="f", num_records=10)
    budget = ledger.register_dataset(
        "clicks", fingerprint="f", num_records=10, epsilon=3.0, delta=DELTA
    )
    assert (budget.epsilon, budget.delta, budget.fingerprints) == (3.0, DELTA, ("f",))
    assert ledger.register_dataset("clicks", fingerprint="f", num_records=10) == budget
    again = ledger.register_dataset(
        "clicks", fingerprint="f", num_records=10, epsilon=3.0, delta=DELTA
    )
    assert again == budget and len(ledger.history("clicks")) == 1
    with pytest.raises(BudgetError, match="dist-dp budget set clicks --epsilon 4"):
        ledger.register_dataset("clicks", fingerprint="f", num_records=10, epsilon=4.0)
    kept = ledger.register_dataset(
        "clicks", fingerprint="f", num_records=10, epsilon=4.0, delta=DELTA, explicit=False
    )
    assert kept == budget
    with pytest.raises(BudgetError, match="unit"):
        ledger.register_dataset("clicks", fingerprint="f", num_records=10, unit="user")


def test_same_records_get_no_second_budget(ledger: Ledger) -> None:
    register(ledger, 1.0)
    with pytest.raises(BudgetError, match=r"registered as 'clicks'"):
        ledger.register_dataset(
            "fresh", fingerprint="sha of clicks", num_records=1, epsilon=9.0, delta=DELTA
        )
    # New records under the old name share its budget, and cannot be had under another name then.
    budget = ledger.register_dataset("clicks", fingerprint="more", num_records=20_000)
    assert budget.fingerprints == ("sha of clicks", "more") and budget.epsilon == 1.0
    with pytest.raises(BudgetError, match="'clicks'"):
        ledger.register_dataset(
            "fresh", fingerprint="more", num_records=1, epsilon=9.0, delta=DELTA
        )
    register(ledger, 2.0, "views")
    assert [item.name for item in ledger.datasets()] == ["clicks", "views"]


@pytest.mark.parametrize(
    ("epsilon", "delta"), [(0.0, DELTA), (-1.0, DELTA), (math.inf, DELTA), (1.0, 0.0), (1.0, 1.0)]
)
def test_impossible_budgets(ledger: Ledger, epsilon: float, delta: float) -> None:
    with pytest.raises(BudgetError):
        ledger.register_dataset(
            "clicks", fingerprint="f", num_records=1, epsilon=epsilon, delta=delta
        )
    assert ledger.datasets() == []


def test_budget_changes_stay_in_the_history(ledger: Ledger) -> None:
    register(ledger, epsilon_for(20))
    ledger.open_run("a", "clicks", StepCosts.constant(EVENT, 20))
    ledger.reserve("a", 0, 20)
    with pytest.raises(BudgetError):
        ledger.reserve("a", 20, 1)
    with pytest.raises(BudgetError, match="cannot be lowered"):
        ledger.set_budget("clicks", epsilon_for(19), DELTA, "less")
    with pytest.raises(BudgetError, match="reason"):
        ledger.set_budget("clicks", 1.0, DELTA, " ")
    with pytest.raises(LedgerError, match="registered: clicks"):
        ledger.set_budget("click", 1.0, DELTA, "typo")
    assert ledger.set_budget("clicks", 1.0, DELTA, "agreed by the board").epsilon == 1.0
    ledger.reserve("a", 20, 1)
    changes = [entry for entry in ledger.history("clicks") if entry.kind == "budget_set"]
    assert [entry.details["reason"] for entry in changes] == ["agreed by the board"]


# --- runs and leases --------------------------------------------------------------------------


def test_runs_must_be_new_and_known(ledger: Ledger) -> None:
    with pytest.raises(LedgerError, match="not registered"):
        ledger.open_run("a", "clicks", StepCosts.constant(EVENT, 10))
    register(ledger, 1.0)
    ledger.open_run("a", "clicks", StepCosts.constant(EVENT, 10), {"mechanism": "lazydp"})
    with pytest.raises(LedgerError, match="already"):
        ledger.open_run("a", "clicks", StepCosts.constant(EVENT, 10))
    with pytest.raises(LedgerError, match="not in the ledger"):
        ledger.reserve("b", 0, 1)
    with pytest.raises(LedgerError, match="JSON"):
        ledger.open_run("c", "clicks", StepCosts.constant(EVENT, 10), {"x": math.nan})
    for first, steps in ((-1, 1), (0, 0), (0, -5)):
        with pytest.raises(LedgerError, match=r"cannot reserve|give a whole number"):
            ledger.reserve("a", first, steps)
    ledger.close_run("a", "finished")
    with pytest.raises(LedgerError, match="closed"):
        ledger.reserve("a", 0, 1)
    with pytest.raises(LedgerError, match="closed already"):
        ledger.close_run("a", "failed")
    assert [entry.kind for entry in ledger.history("clicks")] == [
        "dataset_registered",
        "run_opened",
        "run_closed",
    ]


def test_charge_is_that_of_the_steps_leased_and_used(ledger: Ledger) -> None:
    register(ledger, 1.0)
    ledger.open_run("a", "clicks", StepCosts.constant(EVENT, 100))
    first, second, lost = (ledger.reserve("a", start, 30) for start in (0, 30, 60))
    assert (first.first_step, second.first_step, first.steps) == (0, 30, 30)
    assert ledger.spent("clicks").steps_by_event == {EVENT: 90}
    ledger.settle(first.lease_id, 30)
    ledger.settle(second.lease_id, 12)
    # The third is never settled: it counts whole, also for whoever opens the file later.
    spent = Ledger(ledger.path).spent("clicks")
    assert spent.steps_by_event == {EVENT: 72}
    assert spent.epsilon == epsilon_for(72) == ledger.run_epsilon("a")
    assert ledger.run_epsilon("a", 1e-7) == epsilon_of({EVENT: 72}, 1e-7)
    with pytest.raises(LedgerError, match="settled already"):
        ledger.settle(second.lease_id, 12)
    with pytest.raises(LedgerError, match="has 30 steps"):
        ledger.settle(lost.lease_id, 31)
    with pytest.raises(LedgerError, match="give a whole number"):
        ledger.settle(lost.lease_id, -1)
    with pytest.raises(LedgerError, match="not in the ledger"):
        ledger.settle("nonsense", 1)
    ledger.close_run("a", "stopped")
    assert ledger.spent("clicks").steps_by_event == {EVENT: 72}


def test_a_settlement_after_a_run_has_ended_counts(ledger: Ledger) -> None:
    """As when a worker's answer comes late; other runs have been charged meanwhile."""
    register(ledger, 1.0)
    for run_id in "ab":
        ledger.open_run(run_id, "clicks", StepCosts.constant(EVENT, 100))
    late = ledger.reserve("a", 1, 30)
    ledger.close_run("a", "failed")
    ledger.reserve("b", 1, 10)
    assert ledger.spent("clicks").steps_by_event == {EVENT: 40}
    ledger.settle(late.lease_id, 5)
    for opened in (ledger, Ledger(ledger.path)):
        assert opened.spent("clicks").steps_by_event == {EVENT: 15}
    ledger.close_run("b", "finished")
    assert ledger.spent("clicks").steps_by_event == {EVENT: 15}


def test_grants_what_fits_and_then_refuses(ledger: Ledger) -> None:
    budget = (epsilon_for(57) + epsilon_for(58)) / 2
    register(ledger, budget)
    ledger.open_run("a", "clicks", StepCosts.constant(EVENT, 100))
    granted, start = [], 0
    while True:
        try:
            lease = ledger.reserve("a", start, 25)
        except BudgetError as error:
            refused = str(error)
            break
        granted.append(lease.steps)
        start += lease.steps
        assert ledger.spent("clicks").epsilon <= lease.epsilon_after <= budget
        assert ledger.run_epsilon("a") <= lease.run_epsilon <= budget
    assert granted == [25, 25, 7]
    assert "budget of data set 'clicks' is used up: spent ε" in refused
    assert "dist-dp budget set clicks --epsilon" in refused
    # Steps given back can be had again, no more.
    ledger.settle(lease.lease_id, 2)
    assert ledger.reserve("a", 52, 25).steps == 5


def test_calibrated_run_gets_all_its_steps_and_its_epsilon(ledger: Ledger) -> None:
    register(ledger, epsilon_for(100))
    ledger.open_run("a", "clicks", StepCosts.constant(EVENT, 100))
    leases = [ledger.reserve("a", start, 10) for start in range(0, 100, 10)]
    assert [lease.steps for lease in leases] == [10] * 10
    assert leases[-1].epsilon_after == leases[-1].run_epsilon == epsilon_for(100)
    bounds = [lease.epsilon_after for lease in leases]
    assert bounds == sorted(bounds)
    with pytest.raises(BudgetError):
        ledger.reserve("a", 100, 1)


def test_runs_share_one_budget_and_compose_exactly(ledger: Ledger) -> None:
    both = {EVENT: 200, OTHER: 40}
    budget = epsilon_of(both, DELTA)
    register(ledger, budget)
    register(ledger, 1.0, "views")
    ledger.open_run("a", "clicks", StepCosts.constant(EVENT, 200))
    ledger.open_run("b", "clicks", StepCosts.constant(OTHER, 1000))
    ledger.open_run("c", "views", StepCosts.constant(OTHER, 10))
    ledger.reserve("c", 0, 10)
    ledger.reserve("a", 0, 200)
    ledger.close_run("a", "finished")
    assert ledger.reserve("b", 0, 30).steps == 30
    assert ledger.reserve("b", 30, 30).steps == 10
    spent = ledger.spent("clicks")
    assert spent.steps_by_event == both and spent.epsilon == budget
    assert spent.runs == ("a", "b") and spent.delta == DELTA
    assert ledger.run_epsilon("a") == epsilon_for(200) < spent.epsilon
    assert max_steps(StepCosts.constant(OTHER, 1000), 41, 5, both, budget, DELTA) == 0
    assert ledger.spent("views").steps_by_event == {OTHER: 10}


def test_runs_without_noise_are_seen(ledger: Ledger) -> None:
    with pytest.raises(BudgetError, match="non_private"):
        ledger.open_run("early", "clicks", None)
    ledger.open_run("early", "clicks", None, {"non_private": True})
    register(ledger, 1.0)
    ledger.open_run("plain", "clicks", None, {"non_private": True})
    ledger.open_run("a", "clicks", StepCosts.constant(EVENT, 10))
    lease = ledger.reserve("plain", 0, 10)
    assert lease.steps == 10 and math.isinf(lease.epsilon_after)
    ledger.reserve("a", 0, 10)
    ledger.settle(lease.lease_id, 4)
    spent = ledger.spent("clicks")
    assert spent.non_private_runs == ("early", "plain")
    assert spent.runs == ("early", "plain", "a")
    assert spent.steps_by_event == {EVENT: 10} and spent.epsilon == epsilon_for(10)
    assert math.isinf(ledger.run_epsilon("plain"))


def test_noise_of_zero_passes_every_budget(ledger: Ledger) -> None:
    register(ledger, 100.0)
    ledger.open_run("a", "clicks", StepCosts.constant(GaussianEvent(0.0, 0.1), 10))
    with pytest.raises(BudgetError, match="used up"):
        ledger.reserve("a", 0, 1)


def test_a_repeated_request_changes_nothing(ledger: Ledger) -> None:
    register(ledger, 1.0)
    for _ in range(2):
        ledger.open_run("a", "clicks", StepCosts.constant(EVENT, 100), request_id="open")
    leases = [ledger.reserve("a", 0, 30, request_id="r1") for _ in range(2)]
    assert leases[0] == leases[1]
    assert Ledger(ledger.path).reserve("a", 0, 30, request_id="r1") == leases[0]
    with pytest.raises(LedgerError, match="other arguments"):
        ledger.reserve("a", 0, 31, request_id="r1")
    for _ in range(2):
        ledger.settle(leases[0].lease_id, 20, request_id="s1")
        ledger.set_budget("clicks", 2.0, DELTA, "why not", request_id="b1")
    for _ in range(2):
        ledger.close_run("a", "finished", request_id="c1")
    # Even when the budget is used up by now or the run is closed, the answer is the first one.
    assert ledger.reserve("a", 0, 30, request_id="r1") == leases[0]
    assert ledger.spent("clicks").steps_by_event == {EVENT: 20}
    kinds = [entry.kind for entry in ledger.history("clicks")]
    assert len(kinds) == len(set(kinds)) == 6


def test_local_accountant_is_the_ledger(ledger: Ledger) -> None:
    accountant = LocalAccountant(ledger)
    accountant.register_dataset("clicks", fingerprint="f", num_records=10, epsilon=1.0, delta=DELTA)
    accountant.open_run("a", "clicks", StepCosts.constant(EVENT, 10), {"k": 1})
    lease = accountant.reserve("a", 0, 10)
    accountant.settle(lease.lease_id, 9)
    accountant.close_run("a", "finished")
    assert accountant.spent("clicks") == ledger.spent("clicks")
    assert accountant.run_epsilon("a") == epsilon_for(9)
    assert accountant.history("clicks") == ledger.history("clicks")
    assert accountant.datasets() == ledger.datasets()
    assert accountant.set_budget("clicks", 2.0, DELTA, "r").epsilon == 2.0
    assert all(entry.request_id for entry in accountant.history("clicks"))


# --- several at once, crashes, speed ----------------------------------------------------------


def _take_until_refused(path: Path, run_id: str) -> int:
    ledger, total = Ledger(path), 0
    while True:
        try:
            total += ledger.reserve(run_id, total, 7).steps
        except BudgetError:
            return total


def _process(path: Path, run_id: str) -> None:
    _take_until_refused(path, run_id)


def test_processes_and_threads_cannot_overspend_together(ledger: Ledger) -> None:
    budget = (epsilon_for(100) + epsilon_for(101)) / 2
    register(ledger, budget)
    for run_id in ("a", "b", "c"):
        ledger.open_run(run_id, "clicks", StepCosts.constant(EVENT, 100))
    context = multiprocessing.get_context("spawn")
    child = context.Process(target=_process, args=(ledger.path, "a"))
    child.start()
    with ThreadPoolExecutor(2) as pool:
        taken = list(pool.map(_take_until_refused, [ledger.path] * 2, ["b", "c"]))
    child.join()
    assert child.exitcode == 0
    assert ledger.spent("clicks").steps_by_event == {EVENT: 100}
    assert 0 < sum(taken) <= 100


def _create(path: Path, barrier: object) -> None:
    barrier.wait()  # type: ignore[attr-defined]
    register(Ledger(path), 1.0)


def test_two_creators_share_one_file(tmp_path: Path) -> None:
    path, barrier = tmp_path / "ledger.db", threading.Barrier(8)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(_create, [path] * 8, [barrier] * 8))
    assert len(Ledger(path).history("clicks")) == 1


def _acknowledge(path: Path, pipe: object) -> None:
    ledger = Ledger(path)
    for step in range(10_000):
        lease = ledger.reserve("a", step, 1)
        pipe.send(lease.lease_id)  # type: ignore[attr-defined]


def test_kill_loses_nothing_acknowledged(ledger: Ledger) -> None:
    register(ledger, 5.0)
    ledger.open_run("a", "clicks", StepCosts.constant(EVENT, 10_000))
    epsilon_for(625)
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_acknowledge, args=(ledger.path, sender))
    child.start()
    sender.close()
    acknowledged = [receiver.recv() for _ in range(20)]
    os.kill(child.pid or 0, signal.SIGKILL)
    child.join()
    while True:
        try:
            acknowledged.append(receiver.recv())
        except EOFError:
            break
    entries = Ledger(ledger.path).history("clicks")
    written = {entry.lease_id for entry in entries if entry.kind == "steps_reserved"}
    assert set(acknowledged) <= written and len(written) <= len(acknowledged) + 1


def test_twenty_leases_of_a_long_run_are_quick(ledger: Ledger) -> None:
    """Of a calibrated run: each lease alone would cost a composition of 0.1 s or more."""
    event = GaussianEvent(1.0, 0.01)
    register(ledger, epsilon_of({event: 5000}, DELTA))
    ledger.open_run("a", "clicks", StepCosts.constant(event, 5000))
    start = time.process_time()
    for step in range(0, 5000, 250):
        assert ledger.reserve("a", step, 250).steps == 250
    assert time.process_time() - start < 2


def test_a_budget_with_a_delta_of_one_record_is_refused(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    about = {"fingerprint": "f", "num_records": 1000, "epsilon": 8.0}
    with pytest.raises(BudgetError, match=r"not below 1/records.*--force-delta"):
        ledger.register_dataset("clicks", delta=1e-3, **about)
    ledger.register_dataset("clicks", delta=1e-4, **about)
    with pytest.raises(BudgetError, match="not below 1/records"):
        ledger.set_budget("clicks", 8.0, 0.9, "why not")
    forced = ledger.set_budget("clicks", 8.0, 2e-3, "on purpose", allow_large_delta=True)
    assert forced.delta == 2e-3


def test_a_configuration_may_go_on_naming_the_first_budget(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    about = {"fingerprint": "f", "num_records": 1000, "delta": 1e-4}
    ledger.register_dataset("clicks", epsilon=8.0, **about)
    ledger.set_budget("clicks", 12.0, 1e-4, "more room")
    assert ledger.register_dataset("clicks", epsilon=8.0, **about).epsilon == 12.0
    with pytest.raises(BudgetError, match="not ε 9"):
        ledger.register_dataset("clicks", epsilon=9.0, **about)


def test_releases_are_remembered(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.register_dataset("clicks", fingerprint="f", num_records=1000, epsilon=8.0, delta=1e-4)
    ledger.open_run("run", "clicks", StepCosts.constant(GaussianEvent(1.0, 0.01), 10))
    assert ledger.released_step("run") == 0
    ledger.record_release("run", 7)
    ledger.record_release("run", 3)
    ledger.close()
    assert Ledger(tmp_path / "ledger.sqlite").released_step("run") == 7
