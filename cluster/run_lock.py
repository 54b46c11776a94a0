"""One driver at a time on a run's folder: a second one is told who is there.

The lock is the system's (``flock``), so it ends with its process, however that ends. Workers that
outlive their driver are another matter: :mod:`dist_dp.fence`.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dist_dp.errors import ConfigError
from dist_dp.limits import read_json

LOCK_FILE = ".driver"

_OPEN = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@contextmanager
def driving(folder: Path) -> Iterator[None]:
    """Holds a run's folder for this driver.

    Guarantee:
        Two blocks for one folder never overlap, in one process or several, where the file system
        has locks (shared ones lock for all machines, or the block goes on without; attempts are
        told apart all the same).

    Raises:
        ConfigError: Another driver is at this run.
    """
    path = folder / LOCK_FILE
    held = _lock(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # first: whoever waits for it finds that it has no name
        os.close(held)


def _lock(path: Path) -> int:
    while True:
        try:
            descriptor = os.open(path, _OPEN, 0o600)
        except OSError as error:
            raise _unusable(path, error.strerror) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise _taken(path) from None
        except OSError:
            return descriptor  # a file system without locks
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise _unusable(path, "it is no regular file")
        if _is_named(descriptor, path):
            with suppress(OSError):  # a full disk: then it is another process, to the next one
                os.ftruncate(descriptor, 0)
                who = {"pid": os.getpid(), "host": socket.gethostname()}
                os.write(descriptor, json.dumps(who).encode())
            return descriptor
        os.close(descriptor)  # it was removed when it was locked: by the one before, at its end


def _is_named(descriptor: int, path: Path) -> bool:
    mine = os.fstat(descriptor)
    try:
        named = path.lstat()
    except FileNotFoundError:
        return False
    return os.path.samestat(mine, named)


def _unusable(path: Path, why: str | None) -> ConfigError:
    return ConfigError(
        f"cannot hold the run folder '{path.parent}' ({why}): see that it is there, that you may "
        f"write in it, and that '{path.name}' in it is a plain file or missing"
    )


def _taken(path: Path) -> ConfigError:
    try:
        who = read_json(path, most=4096)
        place = f"process {int(who['pid'])} on {str(who['host'])[:100]!r}"
    except (OSError, ValueError, TypeError, KeyError):
        place = "another process"
    return ConfigError(
        f"the run in '{path.parent}' is under way: {place} is at it. Wait until that ends, or end "
        "it (Ctrl-C), then go on with --resume"
    )
