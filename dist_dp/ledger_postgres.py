"""The ledger in a PostgreSQL database, for programs on several machines.

Its tables are in the schema `dist_dp` of the database. Writers are serialised by one advisory
lock, taken as a writing transaction begins, so that nobody needs more than the right to read and
to insert. Every transaction asks for its own durability, whatever the server or the role says.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa

from dist_dp.errors import LedgerAwayError, LedgerError
from dist_dp.ledger_address import INSTEAD_OF_A_PASSWORD, LedgerAddress
from dist_dp.ledger_store import LedgerStore, LostConnectionError
from dist_dp.ledger_tables import APPEND_ONLY, metadata, read_meta, write_meta
from dist_dp.ledger_witness import ADOPT
from dist_dp.ledger_witness_folder import WitnessFolder

SCHEMA = "dist_dp"
CONNECT_S = 10
_LOCK_KEY = 0x646973745F6470  # "dist_dp"
_LOCK_WAIT_S, _STATEMENT_S, _IDLE_S = 60, 300, 120
# What a server says when it goes down, is down, or has ended our session.
_GONE = ("08", "57P01", "57P02", "57P03", "57P05", "25P03")

_FOR_ALL = f"""
    set_config('lock_timeout', '{_LOCK_WAIT_S}s', true),
    set_config('statement_timeout', '{_STATEMENT_S}s', true),
    set_config('idle_in_transaction_session_timeout', '{_IDLE_S}s', true)
"""
_BEGIN_READING = sa.text(f"SELECT {_FOR_ALL}")
_BEGIN_WRITING = sa.text(
    f"SELECT {_FOR_ALL}, set_config('synchronous_commit', 'on', true), "
    f"pg_advisory_xact_lock({_LOCK_KEY})"
)


class PostgresStore(LedgerStore):
    """One PostgreSQL database; see `LedgerStore`.

    The witness is in the user's data folder, one on each machine. A ledger with entries may be new
    to a machine; but where one was seen at an address, another one there is refused.

    Raises:
        LedgerError: the server cannot be reached, is not durable, or the database holds no ledger
            that can be used.
    """

    may_have_no_witness = True
    _engine: sa.Engine

    def __init__(self, address: LedgerAddress, *, create: bool, adopting: bool = False) -> None:
        super().__init__(address)
        self._create, self._adopting = create, adopting
        self._witnesses = WitnessFolder(address)
        self._connect()
        self._pid = os.getpid()

    def close(self) -> None:
        """Close the connections; a later transaction opens them again."""
        self._engine.dispose()
        self._pid = 0

    def check_integrity(self) -> None:
        """Nothing: the server checks its pages where it was told to (data checksums)."""

    def note_adoption(self) -> None:
        """Expect this ledger at this address from now on."""
        self._witnesses.expect(self.ledger_id)

    def _connect(self) -> None:
        if self._pid not in (0, os.getpid()):
            self._engine.dispose(close=False)
        self._engine = _engine(self.address)
        self._reader = self._engine.execution_options(
            isolation_level="REPEATABLE READ", postgresql_readonly=True
        )
        # In this order: a new ledger is there before anybody notes it.
        expected = self._witnesses.expected()
        with self._explained():
            about = self._about()
        if about is None:
            if expected is not None and not self._adopting:
                raise LedgerError(
                    f"the ledger {self.address} is gone: there was one on this database "
                    f"({expected}). Restore it from a back-up, or remove "
                    f"{self._witnesses.address_file} if nothing that was charged is to count"
                )
            if not self._create:
                raise LedgerError(
                    f"there is no ledger at '{self.address}'; name another, or train first"
                )
            with self._explained():
                about = self._made()
        self._check_version(about.get("schema_version"))
        self.ledger_id = about["ledger_id"]
        self.witness = self._witnesses.witness(self.ledger_id)
        if not self._adopting and self._witnesses.expected(self.ledger_id) != self.ledger_id:
            raise LedgerError(
                f"the ledger {self.address} is another one than was seen there before: it was made "
                f"anew or replaced. Restore the right one, or accept this one with: {ADOPT}"
            )

    def _about(self) -> dict[str, str] | None:
        """Return what the ledger says about itself, None if there is none."""
        with self._reader.begin() as connection:
            for setting in ("fsync", "full_page_writes"):
                if connection.exec_driver_sql(f"SHOW {setting}").scalar() != "on":
                    raise LedgerError(
                        f"the server of ledger {self.address} runs with {setting} = off: a power "
                        f"cut would take charges that were acknowledged; set {setting} = on in "
                        "postgresql.conf and reload it"
                    )
            tables = set(sa.inspect(connection).get_table_names(schema=SCHEMA))
            if not tables & set(metadata.tables):
                return None
            missing = set(metadata.tables) - tables
            if missing:
                raise LedgerError(
                    f"the ledger {self.address} is damaged (no table {', '.join(sorted(missing))} "
                    f"in schema {SCHEMA}): restore it from a back-up"
                )
            return read_meta(connection)

    def _made(self) -> dict[str, str]:
        """Make the tables, unless another process has just done so; all of them or none."""
        with self._engine.begin() as connection:
            connection.execute(_BEGIN_WRITING)
            inspector = sa.inspect(connection)
            if not inspector.has_table("ledger_meta", schema=SCHEMA):
                if SCHEMA not in inspector.get_schema_names():
                    connection.exec_driver_sql(f"CREATE SCHEMA {SCHEMA}")
                metadata.create_all(connection)
                _append_only(connection)
                write_meta(connection, secrets.token_hex(16))
            return read_meta(connection)

    @contextlib.contextmanager
    def _begin(self, *, write: bool) -> Iterator[sa.Connection]:
        with (self._engine if write else self._reader).begin() as connection:
            # The first snapshot of the entries is taken after this, hence under the lock.
            connection.execute(_BEGIN_WRITING if write else _BEGIN_READING)
            yield connection

    def _explain(self, error: Exception, cause: str) -> LedgerError:
        state = getattr(getattr(error, "orig", None), "sqlstate", None) or ""
        lowered = cause.lower()
        where = f"the ledger {self.address} cannot be used ({cause})"
        if _is_gone(error, state):
            return LostConnectionError(
                f"{where}: see that the server runs and can be reached from here, and that the "
                "address, the user and the password are right (a password is not part of an "
                f"address: {INSTEAD_OF_A_PASSWORD}); what was acknowledged is in the ledger"
            )
        if state in ("55P03", "57014"):
            return LedgerAwayError(
                f"{where}: another process holds it: wait for it to end, then try again"
            )
        if state == "25006":
            remedy = "this server is a copy that cannot be written: name the primary server"
        elif state in ("42501", "3F000"):
            remedy = (
                f"let its user make the schema {SCHEMA} (GRANT CREATE ON DATABASE …), or read and "
                "insert in its tables"
            )
        elif state == "53100" or "no space" in lowered:
            remedy = "nothing was charged: make room on the server's disk, then try again"
        else:
            remedy = "look into the server's log; nothing was charged by this call"
        return LedgerError(f"{where}: {remedy}")


def _is_gone(error: Exception, state: str) -> bool:
    if not isinstance(error, sa.exc.DBAPIError):
        return False
    unreached = isinstance(error, sa.exc.OperationalError) and not state
    return error.connection_invalidated or unreached or state.startswith(_GONE)


def _engine(address: LedgerAddress) -> sa.Engine:
    assert address.url is not None
    try:
        import psycopg  # noqa: F401
    except ImportError as error:
        raise LedgerError(
            f"the ledger {address} needs psycopg: pip install 'dist-dp[postgresql]' ({error})"
        ) from error
    given = address.url.query
    options: dict[str, Any] = {
        "connect_timeout": CONNECT_S,
        "application_name": "dist-dp",
        # A server that vanished without a word is noticed.
        "keepalives_idle": 30,
        "tcp_user_timeout": 30_000,
    }
    engine = sa.create_engine(
        address.url,
        connect_args={key: value for key, value in options.items() if key not in given},
        hide_parameters=True,
        # Whatever the server or the role says: each statement of a writer has to see what was
        # committed while the one before waited for the lock.
        isolation_level="READ COMMITTED",
    )
    return engine.execution_options(schema_translate_map={None: SCHEMA})


def _append_only(connection: sa.Connection) -> None:
    """Let the database refuse to change or remove what was written."""
    connection.exec_driver_sql(
        f"CREATE FUNCTION {SCHEMA}.append_only() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION 'append-only'; END $$"
    )
    for table in APPEND_ONLY:
        connection.exec_driver_sql(
            f"CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE "
            f"ON {SCHEMA}.{table.name} FOR EACH STATEMENT EXECUTE FUNCTION {SCHEMA}.append_only()"
        )
