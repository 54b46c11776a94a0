"""A ledger's state, always caught up with its entries before it is looked at or added to."""

from __future__ import annotations

import contextlib
import functools
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from dist_dp.errors import LedgerError
from dist_dp.ledger_address import LedgerAddress, ledger_address
from dist_dp.ledger_entry import RESTORE, Entry, LedgerDamageError, Position
from dist_dp.ledger_state import LedgerState
from dist_dp.ledger_store import LostConnectionError, open_store
from dist_dp.ledger_tables import Transaction
from dist_dp.ledger_witness import ADOPT

RECONNECT_S = 30.0

P = ParamSpec("P")
R = TypeVar("R")


class LedgerFile:
    """A ledger and the fold of its entries; for several threads and processes at once.

    Guarantee:
        Nothing is said or charged on the ground of entries that are not, one by one, those that
        were written: every entry is checked against its hash and the one before when it is read,
        and the ledger has to lead through every position that this object or the witness saw.

    Args:
        address: a file on a local disk, made with its parents if missing (mode 0600), or a
            ``postgresql://`` URL, whose tables are made if missing.
        create: make the ledger if there is none.
        adopt: open a ledger whose witness is missing, damaged, or has seen what the ledger does
            not hold; the reason is appended to it. The chain must be whole all the same.

    Raises:
        LedgerError: it cannot be reached, made or read, is damaged, or is not a ledger.
    """

    def __init__(
        self,
        address: Path | str | LedgerAddress,
        *,
        create: bool = True,
        adopt: str | None = None,
    ) -> None:
        if adopt is not None and not adopt.strip():
            raise LedgerError("a ledger is adopted for a reason: give it")
        self.address = ledger_address(address)
        create = create and adopt is None
        self._store = open_store(self.address, create=create, adopting=adopt is not None)
        self._lock = threading.RLock()
        self._shared: Transaction | None = None
        self._seen = Position.beginning(self._store.ledger_id)
        self._state, self._known = LedgerState(), self._seen
        if adopt is not None:
            self._adopt(adopt)
        with self._transaction(write=False):
            pass

    @property
    def path(self) -> Path:
        """The ledger file, resolved.

        Raises:
            LedgerError: the ledger is a database.
        """
        return self.address.path

    def close(self) -> None:
        """Close the file or the connections. A later call opens them again."""
        self._store.close()

    def position(self) -> Position:
        """Return where the ledger stands: its last entry, and the hash that covers all of them."""
        with self._transaction(write=False) as tx:
            return tx.head

    def check_contains(self, position: Position) -> None:
        """Refuse a ledger that has lost what somebody saw in it.

        Raises:
            LedgerDamageError: the ledger does not lead through ``position``.
        """
        with self._transaction(write=False) as tx:
            self._check_contains(tx, position, "what was noted elsewhere")

    @contextlib.contextmanager
    def reading(self) -> Iterator[tuple[Position, Iterator[Entry]]]:
        """Give the ledger's position and its entries up to there, one by one, from one snapshot."""
        with self._transaction(write=False) as tx:
            yield tx.head, tx.entries()

    def check_integrity(self) -> None:
        """Let the database check itself; every entry's hash was checked when it was read.

        Raises:
            LedgerError: it found damage.
        """
        self._store.check_integrity()

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Carry out several operations in one transaction: all are durable when this ends, or none.

        An operation that is refused (it raises, and the caller goes on) leaves nothing behind.
        Nothing may be told to anybody before this has ended.

        Raises:
            LedgerError: as one operation would; nothing is charged then.
        """
        with self._transaction(write=True) as tx:
            self._shared = tx
            try:
                yield
            finally:
                self._shared = None

    @contextlib.contextmanager
    def _transaction(self, *, write: bool) -> Iterator[Transaction]:
        """Open a transaction with the state caught up to every entry before it."""
        with self._lock:
            if self._shared is not None:
                yield self._shared
                self._apply_appended(self._shared)
                return
            stack, tx = self._begin(write)
            try:
                with stack:
                    yield tx
                    self._apply_appended(tx)
                    tx.flush()
            except BaseException:
                if tx.appended:
                    self._forget()  # It counts what is not in the ledger, or may not be.
                raise
            self._seen = tx.head
            if tx.appended:
                self._store.witness.advance(tx.head)

    def _apply_appended(self, tx: Transaction) -> None:
        new = tx.head.seq - self._known.seq
        for entry in tx.appended[len(tx.appended) - new :]:
            self._state.apply(entry)
        self._known = tx.head

    def _begin(self, write: bool) -> tuple[contextlib.ExitStack, Transaction]:
        """Begin a transaction and catch up; again, if the database was away for a while."""
        patience = _Patience()
        while True:
            # Before the transaction begins, so that the latter sees all that the witness saw.
            seen_here = self._store.witness.read()
            try:
                with contextlib.ExitStack() as stack:
                    tx = stack.enter_context(self._store.transaction(write=write))
                    self._catch_up(tx)
                    if self._is_vouched_for(tx, seen_here):
                        return stack.pop_all(), tx
            except LostConnectionError:
                if not patience.wait():
                    raise

    def _catch_up(self, tx: Transaction) -> None:
        if tx.head.ledger_id != self._known.ledger_id:
            raise LedgerDamageError(
                f"the ledger {self.address} was replaced by another one while in use: put the "
                "right one back and start again"
            )
        try:
            for entry in tx.follow(self._known):
                self._state.apply(entry)
                self._known = Position(self._known.ledger_id, entry.seq, entry.hash)
        except LedgerDamageError as error:
            self._forget()
            raise LedgerDamageError(f"the ledger {self.address} is damaged: {error}") from error
        self._check_contains(tx, self._seen, "what this process saw")

    def _is_vouched_for(self, tx: Transaction, seen_here: Position | None) -> bool:
        """Check the ledger against its witness; False to begin anew, where one was made just now.

        Guarantee:
            A ledger that lost entries which the witness saw is refused, and so is one that has
            entries and no witness, where the witness belongs beside it.
        """
        witness = self._store.witness
        if seen_here is not None:
            self._check_contains(tx, seen_here, f"its witness {witness.path}")
            return True
        new = tx.head.seq == 0 or self._state.last_kind == "ledger_migrated"
        if new or self._store.may_have_no_witness:
            witness.begin(tx.head)
            return True
        if witness.read() is not None:
            return False
        raise LedgerDamageError(
            f"the ledger {self.address} has {tx.head.seq} entries, and its witness {witness.path} "
            "is missing, so nobody knows whether entries were lost: put the witness back (it "
            f"belongs beside the ledger), or accept the ledger as it is with: {ADOPT}"
        )

    def _check_contains(self, tx: Transaction, position: Position, who: str) -> None:
        if position in (self._known, Position.beginning(self._known.ledger_id)):
            return
        if position.ledger_id != tx.head.ledger_id:
            raise LedgerDamageError(
                f"the ledger {self.address} is another one than {who} says: put the right one "
                f"back, or accept this one with: {ADOPT}"
            )
        if not tx.contains(position):
            lost = (
                f"it ends at entry {tx.head.seq}, and entry {position.seq} was seen"
                if tx.head.seq < position.seq
                else f"its entry {position.seq} is another one"
            )
            raise LedgerDamageError(
                f"the ledger {self.address} lost entries, says {who}: {lost}. It was rolled back "
                f"or replaced by an older copy; {RESTORE}, or accept it as it is with: {ADOPT}"
            )

    def _adopt(self, reason: str) -> None:
        """Append why the ledger is accepted as it is, and let the witness begin there."""
        try:
            seen = self._store.witness.read()
        except LedgerDamageError:
            seen = None
        self._store.check_integrity()
        with self._store.transaction(write=True) as tx:
            self._catch_up(tx)
            details = {"reason": reason, "witness": seen.to_json() if seen else None}
            self._state.apply(tx.append("ledger_adopted", details=details))
            tx.flush()
        self._known = self._seen = tx.head
        self._store.witness.replace(tx.head)
        self._store.note_adoption()

    def _forget(self) -> None:
        self._state = LedgerState()
        self._known = Position.beginning(self._seen.ledger_id)


def repeatable(method: Callable[P, R]) -> Callable[P, R]:
    """Let a writing method be carried out again when the answer of its commit was lost.

    Guarantee:
        However often it is sent, it is carried out once: every attempt has the same request id.
    """

    @functools.wraps(method)
    def repeated(*args: P.args, **kwargs: P.kwargs) -> R:
        named: dict[str, Any] = kwargs
        if named.get("request_id") is None:
            named["request_id"] = secrets.token_hex(16)
        return until_answered(lambda: method(*args, **kwargs))

    return repeated


def until_answered(call: Callable[[], R]) -> R:
    """Repeat a call whose connection is lost, for a while."""
    patience = _Patience()
    while True:
        try:
            return call()
        except LostConnectionError:
            if not patience.wait():
                raise


class _Patience:
    """Waits a little longer each time, and not for ever."""

    def __init__(self) -> None:
        self._end = time.monotonic() + RECONNECT_S
        self._pause = 0.02

    def wait(self) -> bool:
        if time.monotonic() > self._end:
            return False
        time.sleep(self._pause)
        self._pause = min(1.0, 2 * self._pause)
        return True


def check_name(what: str, name: str) -> None:
    """Refuse a name that cannot be told apart on a screen.

    Raises:
        LedgerError: with what to give.
    """
    if not isinstance(name, str) or not name.strip() or len(name) > 200 or not name.isprintable():
        raise LedgerError(f"{what} name {name!r}: give 1 to 200 printable characters")
