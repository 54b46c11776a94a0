"""A ledger's state, always caught up with its file before it is looked at or added to."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

from dist_dp.errors import LedgerError
from dist_dp.ledger_state import LedgerState
from dist_dp.ledger_store import LedgerStore, Transaction


class LedgerFile:
    """A ledger file and the fold of its entries; for several threads and processes at once.

    Args:
        path: the SQLite file, on a local disk; made with its parents if missing (mode 0600).

    Raises:
        LedgerError: the file cannot be made or read, is damaged, or is not a ledger.
    """

    def __init__(self, path: Path | str) -> None:
        self._store = LedgerStore(Path(path))
        self._state = LedgerState()
        self._last_seen = 0
        self._lock = threading.RLock()
        with self._transaction(write=False):
            pass

    @property
    def path(self) -> Path:
        """The ledger file, resolved."""
        return self._store.path

    def close(self) -> None:
        """Close the file. A later call opens it again."""
        self._store.close()

    @contextlib.contextmanager
    def _transaction(self, *, write: bool) -> Iterator[Transaction]:
        """Open a transaction with the state caught up to every entry before it."""
        with self._lock:
            with self._store.transaction(write=write) as tx:
                if tx.last_seq() < self._last_seen:
                    raise LedgerError(
                        f"the ledger {self.path} lost entries while in use: it was replaced by an "
                        "older copy; restore the newest one and start again"
                    )
                for entry in tx.entries_after(self._state.seq):
                    self._state.apply(entry)
                yield tx
                last_seq = tx.last_seq()
            # Own entries are applied by the next transaction; only now are they on the disk.
            self._last_seen = last_seq


def check_name(what: str, name: str) -> None:
    """Refuse a name that cannot be told apart on a screen.

    Raises:
        LedgerError: with what to give.
    """
    if not name.strip() or len(name) > 200 or not name.isprintable():
        raise LedgerError(f"{what} name {name!r}: give 1 to 200 printable characters")
