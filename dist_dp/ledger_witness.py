"""What was last seen of a ledger, kept outside of it: an older copy does not hold it.

A ledger's hashes are those of an older copy too, as it was whole once. So the last position is
noted in a small file beside: two slots, each with a check sum, written in turn, so that one is
whole whatever happens. It is written after the commit. A process that dies in between leaves the
witness behind the ledger, which is harmless. It is not forced to the disk at every commit: what a
power cut takes from it makes a roll-back to those few entries harder to see, nothing else.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

from dist_dp.durable import sync_folder
from dist_dp.errors import LedgerError
from dist_dp.ledger_entry import LedgerDamageError, Position, canonical
from dist_dp.limits import open_regular, parse_json

_SLOT = 512  # one sector, so that a power cut leaves a slot old or new
_LOCK_WAIT_S = 60.0
ADOPT = 'dist-dp budget verify --adopt --reason "…"'


class Witness:
    """The last position of a ledger that anybody here saw, in a file of its own.

    Guarantee:
        It never goes back: of several processes that write at once, the latest position stays.
        Every position in it was committed before. So a ledger that does not lead through it has
        lost entries, or is another one.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> Position | None:
        """Return the position, or None if there is no such file.

        Raises:
            LedgerError: the file cannot be read, or neither slot is whole.
        """
        try:
            file = open_regular(self.path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise self._unusable(error) from error
        try:
            return _latest(os.pread(file, 2 * _SLOT, 0)) or self._settled(file)
        except OSError as error:
            raise self._unusable(error) from error
        finally:
            os.close(file)

    def begin(self, position: Position) -> None:
        """Make the file if there is none; it is on the disk when this returns.

        Raises:
            LedgerError: it cannot be written.
        """
        with self._new_file(position) as aside, contextlib.suppress(FileExistsError):
            os.link(aside, self.path)

    def replace(self, position: Position) -> None:
        """Put another position in its place, whatever it was (the ledger was adopted).

        Raises:
            LedgerError: it cannot be written.
        """
        with self._new_file(position) as aside:
            os.replace(aside, self.path)

    def advance(self, position: Position) -> None:
        """Note a position that is committed, unless a later one is noted already.

        Raises:
            LedgerError: it cannot be written; what was committed is in the ledger all the same.
        """
        try:
            file = open_regular(self.path, os.O_RDWR)
        except (OSError, ValueError) as error:
            raise self._unusable(error) from error
        try:
            self._lock(file, fcntl.LOCK_EX)
            slots = os.pread(file, 2 * _SLOT, 0)
            now = _latest(slots)
            if now is None:
                raise self._broken()
            if position.seq > now.seq:
                other = 1 if _slot(slots[:_SLOT]) == now else 0
                os.pwrite(file, _text(position), other * _SLOT)
        except OSError as error:
            raise self._unusable(error) from error
        finally:
            os.close(file)

    def _settled(self, file: int) -> Position:
        """Read again, with nobody writing."""
        self._lock(file, fcntl.LOCK_SH)
        position = _latest(os.pread(file, 2 * _SLOT, 0))
        if position is None:
            raise self._broken()
        return position

    def _lock(self, file: int, kind: int) -> None:
        deadline = time.monotonic() + _LOCK_WAIT_S
        while True:
            try:
                return fcntl.flock(file, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise LedgerError(
                        f"the ledger's witness {self.path} is held by another process for "
                        f"{_LOCK_WAIT_S:g} s: end the one that hangs, then try again"
                    ) from None
                time.sleep(0.0002)

    @contextlib.contextmanager
    def _new_file(self, position: Position) -> Iterator[Path]:
        aside = self.path.with_name(f".{self.path.name}.{secrets.token_hex(8)}.new")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(aside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            with open(descriptor, "wb") as file:
                file.write(_text(position) * 2)
                file.flush()
                os.fsync(descriptor)
            yield aside
            sync_folder(self.path.parent)
        except OSError as error:
            raise self._unusable(error) from error
        finally:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)

    def _unusable(self, error: Exception) -> LedgerError:
        why = getattr(error, "strerror", None) or error
        return LedgerError(
            f"the ledger's witness {self.path} cannot be used ({why}): make it "
            "and its folder readable and writable for this user (what was committed stays charged)"
        )

    def _broken(self) -> LedgerDamageError:
        return LedgerDamageError(
            f"its witness {self.path} is damaged, so nobody knows whether this is the newest state "
            f"of the ledger: restore both from a back-up, or look at the ledger and accept it as "
            f"it is with: {ADOPT}"
        )


def _text(position: Position) -> bytes:
    said = canonical(position.to_json()).encode("ascii")
    line = said + b" " + hashlib.sha256(said).hexdigest().encode("ascii")
    return line.ljust(_SLOT - 1) + b"\n"


def _slot(text: bytes) -> Position | None:
    said, _, check_sum = text.rstrip().rpartition(b" ")
    if hashlib.sha256(said).hexdigest().encode("ascii") != check_sum:
        return None
    return Position.from_json(parse_json(said))


def _latest(slots: bytes) -> Position | None:
    found = [_slot(slots[:_SLOT]), _slot(slots[_SLOT:])]
    return max((item for item in found if item), key=lambda item: item.seq, default=None)
