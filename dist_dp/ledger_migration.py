"""From schema version 1, whose entries had no hashes, to version 2.

In one transaction of SQLite's own, so that a process killed at any point leaves the old ledger or
the new one; a copy of the old one is kept beside it, as ``NAME.version-1``. A program of the old
version that still has the file open cannot write to it afterwards (an entry without a hash is
refused by the table) and says so.

The new chain vouches for the entries from the migration on: its last entry says that, and when.
Until something follows that entry the ledger may be without a witness, because a process may have
died before it made one.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy as sa

from dist_dp.durable import sync_folder
from dist_dp.errors import LedgerError
from dist_dp.ledger_entry import RESTORE, Entry, LedgerDamageError, Position, bound, canonical
from dist_dp.ledger_sqlite_file import append_only
from dist_dp.ledger_state import LedgerState
from dist_dp.ledger_tables import SCHEMA_VERSION, Transaction, entries, meta, read_meta
from dist_dp.limits import parse_json

_AT_A_TIME = 1000


def migrate(path: Path, engine: sa.Engine) -> None:
    """Give every entry of a version-1 ledger its hash; what the entries say stays as it is.

    Guarantee:
        Afterwards the ledger holds every entry that it held, in their order, and no other charge.

    Raises:
        LedgerError: entries are missing or contradict each other, or there is no room. The ledger
            is then as it was.
    """
    with engine.begin() as connection:
        if read_meta(connection).get("schema_version") != "1":
            return  # Another process was first.
        _keep_copy(path)
        for index in ("ix_entries_dataset", "one_entry_of_a_kind_per_lease"):
            connection.exec_driver_sql(f"DROP INDEX IF EXISTS {index}")
        for change in ("update", "delete"):
            connection.exec_driver_sql(f"DROP TRIGGER IF EXISTS entries_no_{change}")
        connection.exec_driver_sql("ALTER TABLE entries RENAME TO entries_of_version_1")
        entries.create(connection)
        append_only(connection, entries)
        tx = Transaction(connection, secrets.token_hex(16))
        rows = []
        for entry in _chained(connection, tx.head, path):
            tx.head = Position(tx.head.ledger_id, entry.seq, entry.hash)
            rows.append({**vars(entry), "details": canonical(entry.details)})
            if len(rows) == _AT_A_TIME:
                connection.execute(entries.insert(), rows)
                rows = []
        if rows:
            connection.execute(entries.insert(), rows)
        about = {"from": "1", "to": str(SCHEMA_VERSION), "entries": tx.head.seq}
        tx.append("ledger_migrated", details=about)
        tx.flush()
        connection.exec_driver_sql("DROP TABLE entries_of_version_1")
        connection.execute(
            meta.update().where(meta.c.key == "schema_version").values(value=str(SCHEMA_VERSION))
        )
        connection.execute(meta.insert().values(key="ledger_id", value=tx.head.ledger_id))


def _chained(connection: sa.Connection, head: Position, path: Path) -> Iterator[Entry]:
    """Yield the old entries with hashes, once they have been checked to make sense together."""
    state = LedgerState()
    query = sa.text("SELECT * FROM entries_of_version_1 ORDER BY seq")
    for row in connection.execute(query):
        fields = dict(row._mapping)
        seq = fields.pop("seq")
        if seq != head.seq + 1:
            raise LedgerDamageError(
                f"entry {head.seq + 1} of the ledger {path} is missing: {RESTORE}"
            )
        try:
            fields["details"] = parse_json(fields["details"])
            entry = bound(head, fields)
        except (TypeError, ValueError) as error:
            raise LedgerDamageError(
                f"entry {seq} of the ledger {path} cannot be read ({error}): {RESTORE}"
            ) from error
        state.apply(entry)
        head = Position(head.ledger_id, entry.seq, entry.hash)
        yield entry


def _keep_copy(path: Path) -> None:
    """Copy the old ledger aside, whole or not at all; nobody writes to it meanwhile."""
    copy = path.with_name(f"{path.name}.version-1")
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.copy")
    try:
        os.close(os.open(aside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        with (
            contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as source,
            contextlib.closing(sqlite3.connect(aside)) as target,
        ):
            source.backup(target)
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, copy)
        sync_folder(path.parent)
    except (OSError, sqlite3.Error) as error:
        raise LedgerError(
            f"the ledger {path} is of schema version 1, and cannot be copied to {copy} before it "
            f"is changed ({error}): make room there, or the folder writable"
        ) from error
    finally:
        for leftover in (aside, Path(f"{aside}-wal"), Path(f"{aside}-shm")):
            with contextlib.suppress(OSError):
                leftover.unlink(missing_ok=True)
