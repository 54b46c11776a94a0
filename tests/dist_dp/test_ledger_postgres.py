"""Ledgers on a real PostgreSQL server: made once, durable, append-only, and lost connections."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from dist_dp import ledger_file, ledger_postgres
from dist_dp.errors import BudgetError, LedgerError
from dist_dp.ledger import Lease, Ledger, Reservation
from dist_dp.ledger_entry import LedgerDamageError
from dist_dp.step_costs import StepCosts
from tests.dist_dp.ledgers import EVENT, filled, register
from tests.postgres_server import PASSWORD, USER, PostgresServer


@pytest.fixture
def server(postgres_server: PostgresServer, tmp_path: Path) -> Iterator[PostgresServer]:
    """The server, and a data folder of the test's own for witnesses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
        yield postgres_server


@pytest.fixture
def database(server: PostgresServer) -> str:
    return server.new_database()


def reserved(ledger: Ledger) -> int:
    return sum(entry.kind == "steps_reserved" for entry in ledger.history())


# --- as a place -------------------------------------------------------------------------------


def test_several_creators_make_one_ledger(server: PostgresServer, database: str) -> None:
    barrier = threading.Barrier(6)

    def create(_: int) -> str:
        barrier.wait()
        ledger = Ledger(server.socket_url(database))
        register(ledger, 1.0)
        return ledger.position().ledger_id

    with ThreadPoolExecutor(6) as pool:
        assert len(set(pool.map(create, range(6)))) == 1
    assert len(Ledger(server.socket_url(database)).history("clicks")) == 1


def test_nothing_is_made_by_who_only_looks(server: PostgresServer, database: str) -> None:
    with pytest.raises(LedgerError, match="no ledger at"):
        Ledger(server.socket_url(database), create=False)
    assert not server.sql("SELECT 1 FROM pg_namespace WHERE nspname = 'dist_dp'", database)


@pytest.mark.parametrize("table", ["entries", "runs", "datasets"])
def test_rows_cannot_be_changed_or_removed(
    server: PostgresServer, database: str, table: str
) -> None:
    filled(server.socket_url(database), 1)
    column = {"entries": "steps", "runs": "dataset", "datasets": "name"}[table]
    for statement in (
        f"UPDATE dist_dp.{table} SET {column} = {column}",
        f"DELETE FROM dist_dp.{table}",
        f"TRUNCATE dist_dp.{table} CASCADE",
    ):
        with pytest.raises(Exception, match="append-only"):
            server.sql(statement, database)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("UPDATE dist_dp.entries SET steps = 1 WHERE seq = 6", "entry 6 .*not what was written"),
        ("DELETE FROM dist_dp.entries WHERE seq = 6", "entry 6 is missing"),
        ("DELETE FROM dist_dp.entries WHERE seq > 6", "ends at entry 6, and entry 8 was seen"),
        ("DROP TABLE dist_dp.runs CASCADE", "no table runs"),
    ],
)
def test_an_altered_ledger_serves_nobody(
    server: PostgresServer, database: str, change: str, complaint: str
) -> None:
    filled(server.socket_url(database))
    server.sql("ALTER TABLE dist_dp.entries DISABLE TRIGGER USER", database)
    server.sql(change, database)
    with pytest.raises(LedgerError, match=complaint):
        Ledger(server.socket_url(database))


def test_a_restored_older_database_is_refused(server: PostgresServer, database: str) -> None:
    url = server.socket_url(database)
    ledger = filled(url)
    position = ledger.position()
    ledger.close()
    server.sql(f"CREATE DATABASE {database}_old TEMPLATE {database}")
    ledger.reserve("a", 60, 10)
    ledger.close()
    server.sql(f"DROP DATABASE {database}")
    server.sql(f"ALTER DATABASE {database}_old RENAME TO {database}")
    for call in (lambda: Ledger(url), lambda: ledger.reserve("a", 70, 1)):
        with pytest.raises(LedgerDamageError, match="lost entries"):
            call()
    adopted = Ledger(url, adopt="restored from last night")
    adopted.check_contains(position)
    assert Ledger(url).reserve("a", 60, 1).steps == 1


def test_a_database_made_anew_is_refused(server: PostgresServer, database: str) -> None:
    url = server.socket_url(database)
    filled(url).close()
    server.sql(f"DROP DATABASE {database}")
    server.sql(f"CREATE DATABASE {database}")
    with pytest.raises(LedgerError, match="is gone: there was one"):
        Ledger(url)
    with pytest.MonkeyPatch.context() as patch:  # somebody elsewhere begins another one
        patch.setenv("XDG_DATA_HOME", os.environ["XDG_DATA_HOME"] + "-elsewhere")
        filled(url, 2).close()
    with pytest.raises(LedgerError, match="another one than was seen there"):
        Ledger(url)
    Ledger(url, adopt="agreed with the others").close()
    assert Ledger(url).history()[-1].kind == "ledger_adopted"


def test_a_machine_may_meet_a_ledger_for_the_first_time(
    server: PostgresServer, database: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ledger = filled(server.socket_url(database))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "other"))
    other = Ledger(server.socket_url(database))
    assert other._store.witness.read() == ledger.position()
    assert (tmp_path / "other" / "dist-dp" / "witnesses").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("setting", ["fsync", "full_page_writes"])
def test_a_server_that_is_not_durable_is_refused(
    server: PostgresServer, database: str, setting: str
) -> None:
    server.stop()
    server.start(f"{setting}=off")
    try:
        with pytest.raises(LedgerError, match=f"set {setting} = on"):
            Ledger(server.socket_url(database))
    finally:
        server.stop()
        server.start()
    Ledger(server.socket_url(database))


def test_a_commit_is_durable_whatever_the_server_says(
    server: PostgresServer, database: str
) -> None:
    server.sql(f"ALTER DATABASE {database} SET synchronous_commit = off")
    ledger = filled(server.socket_url(database), 1)
    found = []
    for write in (True, False):
        with ledger._store.transaction(write=write) as tx:
            for setting in ("synchronous_commit", "transaction_isolation", "statement_timeout"):
                found.append(tx._connection.exec_driver_sql(f"SHOW {setting}").scalar())
    assert found[0] == "on" and found[2] == "5min"
    assert found[4] == "repeatable read"


def test_a_role_that_may_only_read_and_insert_is_enough(
    server: PostgresServer, database: str
) -> None:
    filled(server.socket_url(database))
    role = f"{database}_clerk"
    for statement in (
        f"CREATE ROLE {role} LOGIN",
        f"GRANT USAGE ON SCHEMA dist_dp TO {role}",
        f"GRANT SELECT, INSERT ON ALL TABLES IN SCHEMA dist_dp TO {role}",
    ):
        server.sql(statement, database)
    url = server.socket_url(database).replace(USER, role)
    assert Ledger(url).reserve("a", 60, 10).steps == 10
    server.sql(f"REVOKE INSERT ON dist_dp.entries FROM {role}", database)
    with pytest.raises(LedgerError, match="read and insert in its tables"):
        Ledger(url).reserve("a", 70, 10)


def test_a_password_file_is_used(
    server: PostgresServer, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = server.tcp_url(database)
    file = tmp_path / "pgpass"
    file.touch(0o600)
    file.write_text(f"*:*:*:*:{PASSWORD}\n")
    assert Ledger(f"{url}?passfile={file}").datasets() == []
    monkeypatch.setenv("PGPASSFILE", str(file))
    assert Ledger(url).datasets() == []
    monkeypatch.setenv("PGPASSWORD", "wrong-" + PASSWORD)
    with pytest.raises(LedgerError, match=r"password authentication failed.*PGPASSFILE") as caught:
        Ledger(url)
    assert PASSWORD not in str(caught.value)


def test_one_writer_at_a_time(
    server: PostgresServer, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waits too long for another one is told so; who reads need not wait."""
    url = server.socket_url(database)
    ledger, other = filled(url), Ledger(url)
    short = str(ledger_postgres._BEGIN_WRITING).replace("'60s'", "'200ms'")
    monkeypatch.setattr(ledger_postgres, "_BEGIN_WRITING", sa.text(short))
    with ledger._store.transaction(write=True):
        assert other.run_steps("a") == 47
        with pytest.raises(LedgerError, match="another process holds it"):
            other.reserve("a", 60, 1)
    assert other.reserve("a", 60, 1).steps == 1


@pytest.mark.parametrize("isolation", ["repeatable read", "serializable"])
def test_writers_take_turns_whatever_isolation_the_database_says(
    server: PostgresServer, database: str, isolation: str
) -> None:
    """With a snapshot from before the wait for the lock, every second writer failed."""
    server.sql(f"ALTER DATABASE {database} SET default_transaction_isolation = '{isolation}'")
    url = server.socket_url(database)
    filled(url)
    ledgers = [Ledger(url) for _ in range(4)]

    def take(number: int) -> int:
        return sum(ledgers[number].reserve("a", 100 + n, 1).steps for n in range(10))

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(take, range(4))) == 40
    assert Ledger(url).run_steps("a") == 47 + 40


def _backend(ledger: Ledger) -> int:
    """The server's process at the other end of the connection."""
    with ledger._store.transaction(write=False) as tx:
        return int(tx._connection.exec_driver_sql("SELECT pg_backend_pid()").scalar() or 0)


def _use(ledger: Ledger, step: int, pipe: Any) -> None:
    assert ledger.reserve("a", step, 1).steps == 1
    pipe.send(_backend(ledger))
    ledger.close()


def test_a_forked_process_has_connections_of_its_own(server: PostgresServer, database: str) -> None:
    ledger = filled(server.socket_url(database))
    context, own = multiprocessing.get_context("fork"), _backend(ledger)
    for step in range(60, 63):
        ours, theirs = context.Pipe()
        child = context.Process(target=_use, args=(ledger, step, theirs))
        child.start()
        assert ours.recv() != own
        child.join()
        assert child.exitcode == 0
        ledger.reserve("a", step + 10, 1)
        assert _backend(ledger) == own  # on the connection it had before
    assert ledger.run_steps("a") == 47 + 6


# --- a server that goes away -------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [False, True])
def test_a_server_that_was_restarted_is_found_again(
    server: PostgresServer, database: str, at_once: bool
) -> None:
    ledger = filled(server.socket_url(database))
    lease = ledger.reserve("a", 60, 10)
    server.stop(at_once=at_once)
    server.start()
    assert ledger.run_steps("a") == 57
    server.stop(at_once=at_once)
    restart = threading.Timer(0.5, server.start)
    restart.start()
    ledger.settle(lease.lease_id, 2)
    restart.join()
    assert ledger.run_steps("a") == 49


def test_a_server_that_stays_away_is_an_error(
    server: PostgresServer, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_file, "RECONNECT_S", 0.5)
    ledger = filled(server.socket_url(database))
    server.stop()
    try:
        for call in (lambda: ledger.spent("clicks"), lambda: ledger.reserve("a", 60, 1)):
            start = time.monotonic()
            with pytest.raises(LedgerError, match="see that the server runs and can be reached"):
                call()
            assert time.monotonic() - start < 5
    finally:
        server.start()
    assert ledger.reserve("a", 60, 1).steps == 1 and reserved(ledger) == 6


class Proxy:
    """Stands before the server, and can lose a COMMIT on its way, or the answer to it."""

    def __init__(self, port: int) -> None:
        self._server_port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.lose: str | None = None
        self.lost = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._server_port))
                for one in (client, server):
                    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                state = {"drop": False}
                for source, target, up in ((client, server, True), (server, client, False)):
                    threading.Thread(
                        target=self._pass, args=(source, target, up, state), daemon=True
                    ).start()

    def _pass(self, source: socket.socket, target: socket.socket, up: bool, state: Any) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if up and b"COMMIT" in data and self.lose is not None:
                    self.lost += 1
                    if self.lose == "question":
                        break
                    state["drop"] = True
                elif not up and state["drop"]:
                    break
                target.sendall(data)
        if up and state["drop"]:
            return  # The server answers first; then the other direction closes both.
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


WRITES: dict[str, Callable[[Ledger], Any]] = {
    "register_dataset": lambda ledger: register(ledger, 1.0, "views"),
    "set_budget": lambda ledger: ledger.set_budget("clicks", 60.0, 1e-5, "more"),
    "open_run": lambda ledger: ledger.open_run("b", "clicks", StepCosts.constant(EVENT, 10)),
    "reserve": lambda ledger: ledger.reserve("a", 60, 10),
    "reserve_many": lambda ledger: ledger.reserve_many(
        [Reservation("a", 60, 10), Reservation("nobody", 1, 1), Reservation("a", 70, 5)]
    ),
    "settle": lambda ledger: ledger.settle(
        str(next(e.lease_id for e in ledger.history() if e.first_step == 11)), 3
    ),
    "record_release": lambda ledger: ledger.record_release("a", 40),
    "close_run": lambda ledger: ledger.close_run("a", "finished"),
}
APPENDED = {"reserve_many": 2}


@pytest.mark.parametrize("lose", ["question", "answer"])
@pytest.mark.parametrize("write", WRITES)
def test_a_lost_commit_is_made_once(
    server: PostgresServer,
    database: str,
    write: str,
    lose: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whether the connection broke before or after the server committed: one charge, one answer."""
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    direct = filled(server.tcp_url(database), 3)
    proxy = Proxy(server.port)
    ledger = Ledger(server.tcp_url(database, proxy.port))
    before = direct.position().seq

    def once() -> None:
        while proxy.lost == 0:
            time.sleep(0.001)
        proxy.lose = None

    begin = ledger._store.transaction

    @contextlib.contextmanager
    def armed(*, write: bool) -> Iterator[Any]:
        with begin(write=write) as tx:
            yield tx
            if write and tx.appended and proxy.lost == 0:
                proxy.lose = lose
                threading.Thread(target=once, daemon=True).start()

    monkeypatch.setattr(ledger._store, "transaction", armed)
    outcome = WRITES[write](ledger)
    assert proxy.lost == 1
    assert direct.position().seq == before + APPENDED.get(write, 1)
    assert direct.position() == ledger.position()
    if write == "reserve":
        assert direct.history()[-1].lease_id == outcome.lease_id
    if write == "reserve_many":
        assert [type(item) for item in outcome] == [Lease, LedgerError, Lease]
    proxy.close()


def test_killed_backends_lose_and_double_nothing(server: PostgresServer, database: str) -> None:
    """Sessions are ended at any moment while two threads lease; each answer is one entry."""
    url = server.socket_url(database)
    filled(url, 0)
    done = threading.Event()
    kills = 0

    def lease(start: int) -> list[str]:
        own, got = Ledger(url), []
        for step in range(start, start + 30):
            got.append(own.reserve("a", step, 1).lease_id)
        return got

    def kill() -> None:
        nonlocal kills
        while not done.is_set():
            time.sleep(0.05)
            kills += len(
                server.sql(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    f"WHERE datname = '{database}' AND pid <> pg_backend_pid()"
                )
            )

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        with ThreadPoolExecutor(2) as pool:
            acknowledged = [one for got in pool.map(lease, (1, 101)) for one in got]
    finally:
        done.set()
        killer.join()
    assert kills > 3
    entries = Ledger(url).history()
    written = [str(entry.lease_id) for entry in entries if entry.kind == "steps_reserved"]
    assert sorted(acknowledged) == sorted(written) and len(set(written)) == 60


def test_a_refusal_is_not_repeated(server: PostgresServer, database: str) -> None:
    ledger = Ledger(server.socket_url(database))
    register(ledger, 0.01)
    ledger.open_run("a", "clicks", StepCosts.constant(EVENT, 10))
    with pytest.raises(BudgetError, match="used up"):
        ledger.reserve("a", 1, 10)
    with pytest.raises(LedgerError, match="already"):
        ledger.open_run("a", "clicks", StepCosts.constant(EVENT, 10))
    assert len(ledger.history()) == 2
