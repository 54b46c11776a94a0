"""The ledger in a file: SQLite with a write-ahead log, on a local disk.

Appends are serialised by ``BEGIN IMMEDIATE`` over all processes of the machine, and are on the
disk before they are acknowledged (``synchronous = FULL``). The file must be on a local file
system: SQLite's write-ahead log does not work over a network.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator

import sqlalchemy as sa

from dist_dp.errors import LedgerAwayError, LedgerError
from dist_dp.ledger_address import LedgerAddress
from dist_dp.ledger_entry import RESTORE
from dist_dp.ledger_migration import migrate
from dist_dp.ledger_sqlite_file import create_file, sqlite_engine
from dist_dp.ledger_store import LedgerStore
from dist_dp.ledger_tables import metadata, read_meta
from dist_dp.ledger_witness import ADOPT, Witness

# Connections of the process that this one was forked from: not ours to close.
_INHERITED: list[sa.Engine] = []


class SQLiteStore(LedgerStore):
    """One SQLite file (mode 0600), with its witness beside it; see `LedgerStore`.

    Raises:
        LedgerError: the file cannot be read or made, is damaged, or is not a ledger.
    """

    may_have_no_witness = False
    _engine: sa.Engine

    def __init__(self, address: LedgerAddress, *, create: bool, adopting: bool = False) -> None:
        super().__init__(address)
        self.path = address.path
        self.witness = Witness(self.path.with_name(f"{self.path.name}.witness"))
        # In this order: a new ledger's file is there before its witness.
        seen = None if adopting else self.witness.read()
        if not self.path.exists():
            if seen is not None:
                raise LedgerError(
                    f"the ledger {self.path} is gone, and {self.witness.path} says that it held "
                    f"{seen.seq} entries: put it back, or restore it from a back-up (remove the "
                    "witness only if nothing that was charged is to count)"
                )
            if not create:
                raise LedgerError(
                    f"there is no ledger at '{self.path}'; name another, or train first"
                )
            create_file(self.path)
        self._has_witness = seen is not None
        self._connect()
        self._pid = os.getpid()

    def close(self) -> None:
        """Close the file; a later transaction opens it again."""
        self._engine.dispose()
        self._pid = 0

    def check_integrity(self) -> None:
        """Let SQLite check the file, its indexes too."""
        with self._explained(), self._reader.begin() as connection:
            result = connection.exec_driver_sql("PRAGMA integrity_check(1)").scalar()
        if result != "ok":
            raise LedgerError(f"the ledger {self.path} is damaged ({result}): {RESTORE}")

    def note_adoption(self) -> None:
        """Nothing: what is known of the ledger lies beside it, in the witness."""

    def _connect(self) -> None:
        if self.path.is_dir():
            raise LedgerError(f"the ledger {self.path} is a folder: name a file")
        with self._explained():
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
            if self._pid not in (0, os.getpid()):
                _INHERITED.append(self._engine)
            self._engine = sqlite_engine(self.path)
            self._reader = self._engine.execution_options(ledger_begin="BEGIN")
            version = self._check()
            if version == "1":
                if self._has_witness:
                    raise LedgerError(
                        f"the ledger {self.path} has schema version 1, but its witness is of a "
                        f"later one: it is an older copy; {RESTORE}, or accept it as it is with: "
                        f"{ADOPT}"
                    )
                migrate(self.path, self._engine)
                version = None
            with self._reader.begin() as connection:
                about = read_meta(connection)
        self._check_version(about.get("schema_version"))
        if "ledger_id" not in about:
            raise LedgerError(f"the ledger {self.path} is damaged (it has no name): {RESTORE}")
        self.ledger_id = about["ledger_id"]

    def _check(self) -> str | None:
        with self._reader.begin() as connection:
            result = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
            if result != "ok":
                raise LedgerError(
                    f"the ledger {self.path} is damaged ({result}): restore it from a back-up"
                )
            tables = set(sa.inspect(connection).get_table_names())
            if not set(metadata.tables) <= tables:
                raise LedgerError(f"{self.path} is a database but not a ledger: name another file")
            return read_meta(connection).get("schema_version")

    @contextlib.contextmanager
    def _begin(self, *, write: bool) -> Iterator[sa.Connection]:
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
        with (self._engine if write else self._reader).begin() as connection:
            yield connection

    def _explain(self, error: Exception, cause: str) -> LedgerError:
        lowered = cause.lower()
        where = f"the ledger {self.path} cannot be used ({cause})"
        if "not a database" in lowered or "malformed" in lowered:
            remedy = (
                "it is damaged or is no ledger: restore it from a back-up (do not delete it: the "
                "privacy that was spent would be forgotten)"
            )
        elif "locked" in lowered or "busy" in lowered:
            return LedgerAwayError(
                f"{where}: another process holds it: wait for it to end, then try again"
            )
        elif "full" in lowered:
            remedy = "nothing was charged: make room on the disk, then try again"
        elif "readonly" in lowered or "unable to open" in lowered or "permission" in lowered:
            remedy = "make the file and its folder writable for this user"
        elif "not null constraint" in lowered or "no such column" in lowered:
            remedy = "a newer dist-dp has changed it meanwhile: start again with that version"
        else:
            remedy = "check the disk; nothing was charged by this call"
        return LedgerError(f"{where}: {remedy}")
