"""Which attempt at a run is the one that goes on: an earlier one must leave nothing behind.

After a loss of workers, or with ``--resume``, a new attempt takes the place of the one before. That
one may still be alive: cut off by the network, or stopped for a while. It must not write a
checkpoint, a trail, a charge or a release into the run that went on without it.

Attempts are numbered by files in the run's private folder, each made by one atomic operation
(``O_EXCL``, on shared storage too); the highest number goes on. An attempt asks before whatever it
leaves behind. That alone could be passed by a process that is stopped just after it has asked. So
a new attempt also takes away what the old one needs, before it reads where to go on:

- half-written checkpoints and releases lose their names, so that they cannot be published;
- the trail is replaced by a copy (`dist_dp.trail`): the old one writes into a file without a name;
- the leases left open are settled (`dist_dp.leases`), and a lease is settled once.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dist_dp.accountant import WRITING, Accountant
from dist_dp.errors import DistDpError, StaleAttemptError
from dist_dp.limits import read_whole

GIVEN_UP = ".given-up-"
"""Begins the names of folders that were taken from an attempt and not yet removed."""


_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL


class Fence:
    """One attempt at a run. Only rank 0, which writes everything that outlives it, has one.

    Guarantee:
        Once another attempt has been made by :meth:`take`, :meth:`check` of this one raises: at
        once on a local disk; on shared storage as soon as its client sees the new file.

    Args:
        folder: Where the attempts are numbered.
        number: Of this one.
        token: Content of its file, random: a folder that was removed and made anew is another.
    """

    def __init__(self, folder: Path, number: int, token: bytes) -> None:
        self._file = folder / f"{number:06d}"
        self._next = folder / f"{number + 1:06d}"
        self._token = token
        self.number = number

    @classmethod
    def take(cls, folder: Path) -> Fence:
        """Begins an attempt; every earlier one is stale when this returns.

        Raises:
            DistDpError: The folder cannot be written.
        """
        token = secrets.token_bytes(16)
        try:
            # One by one: parents that are made on the way would get the rights of the umask.
            folder.parent.mkdir(exist_ok=True, mode=0o700)
            folder.mkdir(exist_ok=True, mode=0o700)
            number = 1 + max((int(p.name) for p in folder.iterdir() if p.name.isdigit()), default=0)
            while True:
                try:
                    file = os.open(folder / f"{number:06d}", _NEW, 0o600)
                except FileExistsError:
                    number += 1
                    continue
                break
            with open(file, "wb") as stream:
                stream.write(token)
                stream.flush()
                os.fsync(file)
        except OSError as error:
            raise DistDpError(
                f"cannot begin an attempt in '{folder}' ({error.strerror}): see that there is room "
                "and that you may write there, then go on with --resume"
            ) from error
        return cls(folder, number, token)

    @property
    def why_stale(self) -> StaleAttemptError | None:
        """None while this attempt goes on, or why it does not."""
        try:
            if not self._next.exists() and read_whole(self._file) == self._token:
                return None
        except (OSError, ValueError):
            pass  # the run is over, and its private folder gone
        return StaleAttemptError(
            f"attempt {self.number} at the run in '{self._file.parents[2]}' was given up and "
            "another one has taken its place: nothing more of this one is kept; let the other one "
            "end"
        )

    def check(self) -> None:
        """Asks whether this attempt may leave something behind.

        Raises:
            StaleAttemptError: Another one goes on.
        """
        stale = self.why_stale
        if stale is not None:
            raise stale


class FencedAccountant(Accountant):
    """An accountant that charges nothing, gives nothing back and releases nothing when stale.

    Args:
        accountant: The one to ask.
        fence: Of this attempt.
    """

    def __init__(self, accountant: Accountant, fence: Fence) -> None:
        self._accountant = accountant
        self._fence = fence

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        if method in WRITING:
            self._fence.check()
        return self._accountant._call(method, *args, **kwargs)


def take_away(folders: Iterable[Path]) -> None:
    """Takes half-written folders from whoever writes them, and removes them.

    Guarantee:
        When this returns none of them has its name, so a rename by their writer fails.
    """
    for folder in folders:
        aside = folder.with_name(f"{GIVEN_UP}{secrets.token_hex(8)}")
        try:
            folder.rename(aside)
        except FileNotFoundError:  # published or removed meanwhile
            continue
        # Its writer may still be adding files; what stays is removed the next time.
        shutil.rmtree(aside, ignore_errors=True)
