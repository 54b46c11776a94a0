"""What the ledger needs of the place where its entries are, whatever kind of database that is."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import sqlalchemy as sa

from dist_dp.errors import LedgerAwayError, LedgerError
from dist_dp.ledger_address import LedgerAddress
from dist_dp.ledger_tables import SCHEMA_VERSION, Transaction
from dist_dp.ledger_witness import Witness


class LostConnectionError(LedgerAwayError):
    """The database went away; whether a transaction that was ending was kept is not known."""


class LedgerStore(ABC):
    """A database with one ledger.

    Args:
        address: where it is.

    Attributes:
        ledger_id: the ledger's name for itself, random.
        witness: the last position that was seen here.
        may_have_no_witness: whether a ledger with entries may be met for the first time. Not where
            the witness lies beside the ledger and moves with it.
    """

    ledger_id: str
    witness: Witness
    may_have_no_witness: bool

    def __init__(self, address: LedgerAddress) -> None:
        self.address = address
        self._pid = 0

    @contextmanager
    def transaction(self, *, write: bool) -> Iterator[Transaction]:
        """Run a transaction; a writing one excludes every other writer from its start.

        Guarantee:
            What was appended is durable when this ends without an error, and is not in the ledger
            when it ends with one, unless that is a `LostConnectionError`. A reading one sees one
            state of the ledger, which holds every transaction that had ended before it began.

        Raises:
            LedgerError: the database was damaged, removed, replaced, or is full.
            LedgerAwayError: it was locked for a minute.
            LostConnectionError: it cannot be reached any more.
        """
        if self._pid != os.getpid():
            # A connection must not be carried over a fork.
            self._connect()
            self._pid = os.getpid()
        with self._explained(), self._begin(write=write) as connection:
            yield Transaction(connection, self.ledger_id)

    @abstractmethod
    def close(self) -> None:
        """Close the connections; a later transaction opens them again."""

    @abstractmethod
    def check_integrity(self) -> None:
        """Let the database check itself as a whole; the chain of hashes is checked elsewhere.

        Raises:
            LedgerError: it found damage.
        """

    @abstractmethod
    def note_adoption(self) -> None:
        """Forget what else was known here of another ledger at this address."""

    @abstractmethod
    def _connect(self) -> None:
        """Open the database and set `ledger_id` and `witness`; leave other processes' alone."""

    @abstractmethod
    def _begin(self, *, write: bool) -> AbstractContextManager[sa.Connection]:
        """Begin a transaction that is committed at the end, or rolled back on an error."""

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn errors of the database into a `LedgerError` with a remedy, and no password."""
        try:
            yield
        except sa.exc.SQLAlchemyError as error:
            cause = str(error.orig) if isinstance(error, sa.exc.DBAPIError) else str(error)
            explained = self._explain(error, self._without_secrets(cause))
            raise explained from (None if self.address.secrets else error)
        except OSError as error:
            raise self._explain(error, str(error)) from error

    @abstractmethod
    def _explain(self, error: Exception, cause: str) -> LedgerError:
        """Return the error to raise, with what to do about it."""

    def _without_secrets(self, text: str) -> str:
        for secret in self.address.secrets:
            text = text.replace(secret, "***")
        return " ".join(text.split())

    def _check_version(self, version: str | None) -> None:
        if version != str(SCHEMA_VERSION):
            raise LedgerError(
                f"the ledger {self.address} has schema version {version}, this program knows "
                f"{SCHEMA_VERSION}: use the version of dist-dp that wrote it, or a newer one"
            )


def open_store(address: LedgerAddress, *, create: bool, adopting: bool = False) -> LedgerStore:
    """Open a ledger's database.

    Args:
        address: where it is.
        create: make it if there is none.
        adopting: whoever opens it is about to accept it as it is: say nothing of witnesses.

    Raises:
        LedgerError: it cannot be reached, made or read, is damaged, or is not a ledger.
    """
    if address.is_file:
        from dist_dp.ledger_sqlite import SQLiteStore

        return SQLiteStore(address, create=create, adopting=adopting)
    from dist_dp.ledger_postgres import PostgresStore

    return PostgresStore(address, create=create, adopting=adopting)
