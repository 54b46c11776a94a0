"""Where the ledger's entries live: an append-only SQLite table that survives a crash at any point.

Appends are serialised by ``BEGIN IMMEDIATE`` over all processes of the machine, and are on the
disk before they are acknowledged (write-ahead log, ``synchronous = FULL``). The file must be on a
local file system: SQLite's write-ahead log does not work over a network.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import sqlalchemy as sa

from dist_dp.errors import LedgerError
from dist_dp.ledger_state import Entry, EntryKind

SCHEMA_VERSION = 1
_LOCK_WAIT_S = 60.0

_metadata = sa.MetaData()
_meta = sa.Table(
    "ledger_meta",
    _metadata,
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)
_datasets = sa.Table("datasets", _metadata, sa.Column("name", sa.Text, primary_key=True))
_runs = sa.Table(
    "runs",
    _metadata,
    sa.Column("run_id", sa.Text, primary_key=True),
    sa.Column("dataset", sa.ForeignKey("datasets.name"), nullable=False),
)
_entries = sa.Table(
    "entries",
    _metadata,
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("at", sa.Text, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("dataset", sa.ForeignKey("datasets.name"), nullable=False, index=True),
    sa.Column("run_id", sa.ForeignKey("runs.run_id")),
    sa.Column("lease_id", sa.Text),
    sa.Column("first_step", sa.Integer),
    sa.Column("steps", sa.Integer),
    sa.Column("request_id", sa.Text, unique=True),
    sa.Column("details", sa.Text, nullable=False),
    # A lease is granted once and settled once.
    sa.Index("one_entry_of_a_kind_per_lease", "kind", "lease_id", unique=True),
    sqlite_autoincrement=True,
)


class LedgerStore:
    """The entries of one ledger file.

    Args:
        path: the SQLite file; made, with its parent folders, if it does not exist (mode 0600).

    Raises:
        LedgerError: the file cannot be read or made, is damaged, or is not a ledger.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path).expanduser().resolve()
        if not self.path.exists():
            _create(self.path)
        self._pid = 0
        self._connect()

    @contextlib.contextmanager
    def transaction(self, *, write: bool) -> Iterator[Transaction]:
        """Run a transaction; a writing one excludes every other writer from its start.

        Raises:
            LedgerError: the file was damaged, removed, replaced, locked for a minute, or the
                disk is full. Nothing of the transaction is then in the ledger.
        """
        if self._pid != os.getpid():
            # A SQLite connection must not be carried over a fork.
            self._connect()
        self._check_same_file()
        engine = self._engine if write else self._reader
        with _explained(self.path), engine.begin() as connection:
            yield Transaction(connection)

    def close(self) -> None:
        """Close the file; a later transaction opens it again."""
        self._engine.dispose()
        self._pid = 0

    def _connect(self) -> None:
        if self.path.is_dir():
            raise LedgerError(f"the ledger {self.path} is a folder: name a file")
        with _explained(self.path):
            info = self.path.stat()
            if info.st_size == 0:
                # SQLite would take an empty file for a new database, and the spend for zero.
                raise LedgerError(
                    f"the ledger {self.path} is empty, so what was spent is lost: restore it from "
                    "a back-up (remove it only if it never held anything)"
                )
            if stat.S_IMODE(info.st_mode) & 0o077:
                self.path.chmod(0o600)
            self._file = (info.st_dev, info.st_ino)
            self._engine = _engine(self.path)
            self._reader = self._engine.execution_options(ledger_begin="BEGIN")
            with self._reader.begin() as connection:
                _check(connection, self.path)
        self._pid = os.getpid()

    def _check_same_file(self) -> None:
        try:
            info = self.path.stat()
        except OSError as error:
            raise LedgerError(
                f"the ledger {self.path} is gone while in use ({error.strerror}): put it back; "
                "nothing more is charged or released until then"
            ) from error
        if (info.st_dev, info.st_ino) != self._file:
            raise LedgerError(
                f"the ledger {self.path} was replaced while in use: put the right file back and "
                "start again"
            )


class Transaction:
    """Reading and appending within one transaction."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def last_seq(self) -> int:
        """Return the number of the last entry, 0 if there is none."""
        return int(self._connection.execute(sa.select(sa.func.max(_entries.c.seq))).scalar() or 0)

    def entries_after(self, seq: int, dataset: str | None = None) -> list[Entry]:
        """Return the entries that follow ``seq``, in order."""
        query = sa.select(_entries).where(_entries.c.seq > seq).order_by(_entries.c.seq)
        if dataset is not None:
            query = query.where(_entries.c.dataset == dataset)
        return [_entry(row) for row in self._connection.execute(query)]

    def by_request(self, request_id: str | None) -> Entry | None:
        """Return the entry that an earlier call with the same request wrote, if any."""
        if request_id is None:
            return None
        query = sa.select(_entries).where(_entries.c.request_id == request_id)
        row = self._connection.execute(query).one_or_none()
        return None if row is None else _entry(row)

    def by_lease(self, lease_id: str, kind: EntryKind) -> Entry | None:
        """Return the entry that granted or settled a lease, if any."""
        query = sa.select(_entries).where(_entries.c.lease_id == lease_id, _entries.c.kind == kind)
        row = self._connection.execute(query).one_or_none()
        return None if row is None else _entry(row)

    def append(
        self,
        kind: EntryKind,
        dataset: str,
        *,
        run_id: str | None = None,
        lease_id: str | None = None,
        first_step: int | None = None,
        steps: int | None = None,
        request_id: str | None = None,
        details: dict[str, Any],
    ) -> None:
        """Append one entry; it is durable when the transaction has ended."""
        if kind in ("dataset_registered", "run_opened"):
            # A run without noise may name a data set before anyone registers it.
            known = sa.select(_datasets).where(_datasets.c.name == dataset)
            if self._connection.execute(known).first() is None:
                self._connection.execute(_datasets.insert().values(name=dataset))
        if kind == "run_opened":
            self._connection.execute(_runs.insert().values(run_id=run_id, dataset=dataset))
        self._connection.execute(
            _entries.insert().values(
                at=datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
                kind=kind,
                dataset=dataset,
                run_id=run_id,
                lease_id=lease_id,
                first_step=first_step,
                steps=steps,
                request_id=request_id,
                details=json.dumps(details, allow_nan=False, sort_keys=True),
            )
        )


def _engine(path: Path) -> sa.Engine:
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


def _create(path: Path) -> None:
    """Make a new ledger so that no one ever sees half of it: build it aside, then link it in."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(aside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        with _explained(path):
            engine = _engine(aside)
            with contextlib.closing(engine.raw_connection()) as raw:
                raw.cursor().execute("PRAGMA journal_mode = WAL")  # stays with the file
            with engine.begin() as connection:
                _metadata.create_all(connection)
                for table in (_datasets, _runs, _entries):
                    for change in ("UPDATE", "DELETE"):
                        connection.exec_driver_sql(
                            f"CREATE TRIGGER {table.name}_no_{change.lower()} BEFORE {change} ON "
                            f"{table.name} BEGIN SELECT RAISE(ABORT, 'append-only'); END"
                        )
                connection.execute(
                    _meta.insert().values(key="schema_version", value=str(SCHEMA_VERSION))
                )
            engine.dispose()  # The last connection writes the log back into the file.
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):  # Another process was first: use its file.
            os.link(aside, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise LedgerError(
            f"cannot make the ledger {path}: {error.strerror or error}; choose a place on a local "
            "disk where you may write"
        ) from error
    finally:
        for leftover in (aside, Path(f"{aside}-wal"), Path(f"{aside}-shm")):
            leftover.unlink(missing_ok=True)


def _check(connection: sa.Connection, path: Path) -> None:
    result = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
    if result != "ok":
        raise LedgerError(f"the ledger {path} is damaged ({result}): restore it from a back-up")
    tables = set(sa.inspect(connection).get_table_names())
    if not set(_metadata.tables) <= tables:
        raise LedgerError(f"{path} is a database but not a ledger: name another file")
    version = connection.execute(
        sa.select(_meta.c.value).where(_meta.c.key == "schema_version")
    ).scalar()
    if version != str(SCHEMA_VERSION):
        raise LedgerError(
            f"the ledger {path} has schema version {version}, this program knows "
            f"{SCHEMA_VERSION}: use the version of dist-dp that wrote it, or a newer one"
        )


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except sa.exc.DBAPIError as error:
        raise LedgerError(_explain(path, str(error.orig))) from error
    except (sa.exc.SQLAlchemyError, OSError) as error:
        raise LedgerError(_explain(path, str(error))) from error


def _explain(path: Path, cause: str) -> str:
    lowered = cause.lower()
    if "not a database" in lowered or "malformed" in lowered:
        remedy = (
            "it is damaged or is no ledger: restore it from a back-up (do not delete it: the "
            "privacy that was spent would be forgotten)"
        )
    elif "locked" in lowered or "busy" in lowered:
        remedy = "another process holds it: wait for it to end, then try again"
    elif "full" in lowered:
        remedy = "nothing was charged: make room on the disk, then try again"
    elif "readonly" in lowered or "unable to open" in lowered or "permission" in lowered:
        remedy = "make the file and its folder writable for this user"
    else:
        remedy = "check the disk; nothing was charged by this call"
    return f"the ledger {path} cannot be used ({cause}): {remedy}"


def _entry(row: sa.Row[Any]) -> Entry:
    values = dict(row._mapping)
    try:
        details = json.loads(values.pop("details"))
    except (TypeError, ValueError) as error:
        raise LedgerError(
            f"entry {values['seq']} of the ledger cannot be read ({error}): restore the file from "
            "a back-up"
        ) from error
    return Entry(**values, details=cast("dict[str, Any]", details))
