"""SQLite files of ledgers: how they are opened, and made."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from dist_dp.durable import sync_folder
from dist_dp.errors import LedgerError
from dist_dp.ledger_tables import APPEND_ONLY, metadata, write_meta

_LOCK_WAIT_S = 60.0


def append_only(connection: sa.Connection, *tables: sa.Table) -> None:
    """Let the database refuse to change or remove what was written."""
    for table in tables:
        for change in ("UPDATE", "DELETE"):
            connection.exec_driver_sql(
                f"CREATE TRIGGER {table.name}_no_{change.lower()} BEFORE {change} ON "
                f"{table.name} BEGIN SELECT RAISE(ABORT, 'append-only'); END"
            )


def sqlite_engine(path: Path) -> sa.Engine:
    """Return connections to an existing file, each durable and with transactions of ours."""
    # The URL names an existing file: a ledger that vanished must not come back empty.
    url = sa.URL.create("sqlite", database=path.as_uri(), query={"uri": "true", "mode": "rw"})
    engine = sa.create_engine(
        url, connect_args={"timeout": _LOCK_WAIT_S, "check_same_thread": False}
    )

    @sa.event.listens_for(engine, "connect")
    def _set_up(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # Transactions are begun below, not by the driver.
        for pragma in ("synchronous = FULL", "foreign_keys = ON"):
            connection.execute(f"PRAGMA {pragma}")

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        options = connection.get_execution_options()
        connection.exec_driver_sql(str(options.get("ledger_begin", "BEGIN IMMEDIATE")))

    return engine


def create_file(path: Path) -> None:
    """Make a new ledger so that no one ever sees half of it: build it aside, then link it in.

    Raises:
        LedgerError: it cannot be made there.
    """
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(aside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        engine = sqlite_engine(aside)
        with contextlib.closing(engine.raw_connection()) as raw:
            raw.cursor().execute("PRAGMA journal_mode = WAL")  # stays with the file
        with engine.begin() as connection:
            metadata.create_all(connection)
            append_only(connection, *APPEND_ONLY)
            write_meta(connection, secrets.token_hex(16))
        engine.dispose()  # The last connection writes the log back into the file.
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):  # Another process was first: use its file.
            os.link(aside, path)
        sync_folder(path.parent)
    except (OSError, sa.exc.SQLAlchemyError) as error:
        cause = getattr(error, "strerror", None) or getattr(error, "orig", None) or error
        raise LedgerError(
            f"cannot make the ledger {path}: {cause}; choose a place on a local disk where you may "
            "write and that has room"
        ) from error
    finally:
        for leftover in (aside, Path(f"{aside}-wal"), Path(f"{aside}-shm")):
            with contextlib.suppress(OSError):
                leftover.unlink(missing_ok=True)
