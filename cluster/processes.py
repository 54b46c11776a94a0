"""Processes that were started earlier, told from others that have their number by now.

The kernel gives a number anew once its process has ended; number, start time and boot together
belong to one process only. Linux only, as ``ray start`` with several nodes is.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Process:
    """One process, for good.

    Attributes:
        pid: Its number; also that of its session, which it leads.
        started: Clock ticks between the boot and its start.
        boot: Which boot of the machine.
    """

    pid: int
    started: int
    boot: str

    @classmethod
    def of(cls, pid: int) -> Process:
        """The process that has this number now.

        Raises:
            ProcessLookupError: There is none.
        """
        stat = _stat(pid)
        if stat is None:
            raise ProcessLookupError(f"no process {pid}")
        return cls(pid, stat.started, _BOOT_ID.read_text().strip())

    @property
    def is_alive(self) -> bool:
        """Whether it runs: a process that ended and was not waited for does not."""
        stat = _stat(self.pid)
        return (
            stat is not None
            and stat.started == self.started
            and stat.state not in "ZX"
            and self.boot == _BOOT_ID.read_text().strip()
        )

    def members(self) -> list[int]:
        """Processes of its session (its descendants, whoever adopted them), itself not included.

        A session's number stays taken while one of its processes lives, so members that started
        after the leader are its own even when it has ended.
        """
        if self.boot != _BOOT_ID.read_text().strip():
            return []
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == self.pid:
                continue
            stat = _stat(int(entry.name))
            if stat is None or stat.session != self.pid or stat.state in "ZX":
                continue
            if stat.started >= self.started:
                found.append(int(entry.name))
        leader = _stat(self.pid)
        reused = leader is not None and leader.started != self.started
        return [] if reused else found

    def terminate(self) -> bool:
        """Asks it to end; False if it has ended already."""
        return self.is_alive and _signal(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """Ends it and its whole session at once."""
        for pid in self.members():
            _signal(pid, signal.SIGKILL)
        if self.is_alive:
            _signal(self.pid, signal.SIGKILL)

    def wait(self, timeout_s: float) -> bool:
        """Waits until nothing of its session is left; False if the time is up before."""
        deadline = time.monotonic() + timeout_s
        while self.is_alive or self.members():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True


@dataclass(frozen=True)
class _Stat:
    state: str
    session: int
    started: int


def _stat(pid: int) -> _Stat | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The second field is a name in brackets that may hold anything.
    fields = text.rpartition(")")[2].split()
    return _Stat(fields[0], int(fields[3]), int(fields[19]))


def _signal(pid: int, number: int) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True
