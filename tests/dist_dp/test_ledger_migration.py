"""Ledgers of schema version 1 become version 2: with all they hold, whole at any moment."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest

from dist_dp.accounting import GaussianEvent
from dist_dp.errors import LedgerError
from dist_dp.ledger import Ledger
from dist_dp.ledger_entry import LedgerDamageError
from tests.dist_dp.ledgers import DELTA, register, version_1, without_triggers

QUIET, LOUD = GaussianEvent(4.0, 0.02), GaussianEvent(8.0, 0.02)
OLD = "seq, at, kind, dataset, run_id, lease_id, first_step, steps, request_id"


def rows(path: Path, columns: str = OLD) -> list[Any]:
    with sqlite3.connect(path) as raw:
        return raw.execute(f"SELECT {columns} FROM entries ORDER BY seq").fetchall()


def test_what_an_old_ledger_holds_stays(tmp_path: Path) -> None:
    path = version_1(tmp_path / "ledger.db")
    before = rows(path)
    assert len(before) == 12
    ledger = Ledger(path)
    assert rows(path)[:12] == before
    migrated = ledger.history()[-1]
    assert (migrated.seq, migrated.kind, migrated.dataset) == (13, "ledger_migrated", "")
    assert migrated.details == {"from": "1", "to": "2", "entries": 12}
    # Entries of both ages fold: segments, and one event for all steps.
    spent = ledger.spent("clicks")
    assert spent.steps_by_event == {LOUD: 30, QUIET: 5 + 10 + 20}
    assert (spent.budget_epsilon, spent.delta) == (9.0, DELTA)
    assert spent.runs == ("a", "plain", "old") and spent.non_private_runs == ("plain",)
    assert ledger.released_step("a") == 45
    assert ledger.reserve("old", 1, 20, request_id="q11").lease_id == "0123456789abcdef" * 2
    ledger.settle("0123456789abcdef" * 2, 5)
    assert Ledger(path).run_steps("old") == 5
    # The old one is kept, private, and is what it was.
    copy = tmp_path / "ledger.db.version-1"
    assert rows(copy) == before and copy.stat().st_mode & 0o777 == 0o600
    with sqlite3.connect(path) as raw:
        for statement in ("UPDATE entries SET steps = 0", "DELETE FROM runs"):
            with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                raw.execute(statement)
    assert {file.name.removeprefix("ledger.db") for file in tmp_path.iterdir()} <= {
        "", "-wal", "-shm", ".witness", ".version-1", ".version-1-wal", ".version-1-shm"
    }  # fmt: skip


def test_the_old_program_cannot_write_any_more(tmp_path: Path) -> None:
    """It looked at the version when it opened the file: the table itself refuses it."""
    path = version_1(tmp_path / "ledger.db")
    old = sqlite3.connect(path, isolation_level=None)
    insert = (
        "INSERT INTO entries (at, kind, dataset, run_id, lease_id, first_step, steps, details) "
        "VALUES ('', 'steps_reserved', 'clicks', 'old', ?, 30, 1, '{}')"
    )
    old.execute(insert, ["one"])
    assert Ledger(path).run_steps("old") == 21
    with pytest.raises(sqlite3.IntegrityError, match=r"entries\.previous"):
        old.execute(insert, ["two"])
    assert Ledger(path).run_steps("old") == 21


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        ("DELETE FROM entries WHERE seq = 6", "entry 6 of the ledger .*is missing"),
        ("UPDATE entries SET steps = 41 WHERE seq = 5", "contradicts itself at entry 5"),
        ("UPDATE entries SET details = '[' WHERE seq = 8", "entry 8 of the ledger .*cannot"),
    ],
)
def test_a_damaged_old_ledger_stays_as_it_is(tmp_path: Path, damage: str, complaint: str) -> None:
    path = version_1(tmp_path / "ledger.db")
    without_triggers(path).execute(damage)
    before = rows(path)
    for _ in range(2):
        with pytest.raises(LedgerDamageError, match=complaint):
            Ledger(path)
    assert rows(path) == before


def test_an_old_copy_put_back_is_refused(tmp_path: Path) -> None:
    path = version_1(tmp_path / "ledger.db")
    ledger = Ledger(path)
    ledger.reserve("old", 30, 1)
    ledger.close()
    shutil.copy(f"{path}.version-1", path)
    with pytest.raises(LedgerError, match=r"schema version 1, but its witness.*--adopt"):
        Ledger(path)
    adopted = Ledger(path, adopt="the new one was lost")
    assert [e.kind for e in adopted.history()[-2:]] == ["ledger_migrated", "ledger_adopted"]
    assert Ledger(path).run_steps("old") == 20


def test_no_room_for_the_copy_leaves_the_old_ledger(tmp_path: Path) -> None:
    path = version_1(tmp_path / "ledger.db")
    (tmp_path / "ledger.db.version-1").mkdir()
    with pytest.raises(LedgerError, match=r"cannot be copied to .*version-1"):
        Ledger(path)
    (tmp_path / "ledger.db.version-1").rmdir()
    assert len(Ledger(path).history()) == 13


def _open(path: Path, barrier: Any) -> None:
    barrier.wait()
    assert len(Ledger(path).history("clicks")) >= 12


def test_several_migrate_at_once(tmp_path: Path) -> None:
    path = version_1(tmp_path / "ledger.db")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dist_dp.ledger", "tests.dist_dp.ledgers"])
    barrier = context.Barrier(4)
    children = [context.Process(target=_open, args=(path, barrier)) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0
    assert [entry.kind for entry in Ledger(path).history()].count("ledger_migrated") == 1


def _migrate(path: Path, pipe: Any) -> None:
    pipe.send("ready")
    pipe.recv()
    Ledger(path)
    pipe.send("done")
    pipe.recv()


@pytest.mark.chaos
def test_a_migration_killed_anywhere_is_done_by_the_next(tmp_path: Path) -> None:
    """At random moments of it: afterwards there is the old ledger or the new one, and all of it."""
    rng = random.Random(8)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dist_dp.ledger_sqlite", "tests.dist_dp.test_ledger_migration"])
    whole, ended = 0.03, set()
    for turn in range(20):
        folder = tmp_path / str(turn)
        folder.mkdir()
        path = version_1(folder / "ledger.db")
        ours, theirs = context.Pipe()
        child = context.Process(target=_migrate, args=(path, theirs))
        child.start()
        assert ours.recv() == "ready"
        start = time.monotonic()
        ours.send("go")
        if turn < 2:
            assert ours.recv() == "done"
            whole = time.monotonic() - start
        else:
            time.sleep(rng.random() * whole)
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join()
        with sqlite3.connect(path) as raw:
            version = raw.execute("SELECT value FROM ledger_meta WHERE key = 'schema_version'")
            ended.add(version.fetchone()[0])
        ledger = Ledger(path)
        assert [e.kind for e in ledger.history()[12:]] == ["ledger_migrated"]
        assert ledger.spent("clicks").steps_by_event == {LOUD: 30, QUIET: 35}
        ledger.reserve("old", 30, 1)
        assert Ledger(path).run_steps("old") == 21
        assert len(rows(Path(f"{path}.version-1"))) == 12
    assert ended == {"1", "2"}


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.db")
    register(ledger, 1.0)
    ledger.close()
    with sqlite3.connect(ledger.path) as raw:
        raw.execute("UPDATE ledger_meta SET value = '3' WHERE key = 'schema_version'")
    with pytest.raises(LedgerError, match="schema version 3, this program knows 2"):
        Ledger(ledger.path)
