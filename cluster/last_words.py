"""What is said for a driver that was ended before it could say anything.

Ray ends a process from within, without a message, when the node that it is connected to is gone
(``_exit`` in its C++ part); the system does so when memory is short. So a small process of its own
waits at the other end of a pipe: when that closes and nobody said that all is well, it speaks.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from types import TracebackType

_WAIT = """
import sys
last = ""
for line in sys.stdin:
    last = line.rstrip("\\n")
if last:
    sys.stderr.write(last + "\\n")
"""


class LastWords:
    """A line that appears on standard error should this process end within the block, unasked."""

    def __init__(self) -> None:
        self._text = ""
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> LastWords:
        """Starts the process that waits."""
        # Without it a run goes on as well: it only helps to read what became of it.
        with contextlib.suppress(OSError):
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _WAIT],
                stdin=subprocess.PIPE,
                text=True,
                start_new_session=True,  # Ctrl-C is not for it
            )
        return self

    def are(self, text: str) -> None:
        """Sets the line; empty for none. Cheap if it is the same as before."""
        line = " ".join(text.split())
        if line == self._text or self._process is None or self._process.stdin is None:
            return
        self._text = line
        with contextlib.suppress(OSError, ValueError):  # it has ended
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        """All is well, or this process says itself what is not."""
        self.are("")
        if self._process is None or self._process.stdin is None:
            return
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.wait()
