"""Whether the head of the cluster is still there: without it a driver would wait, then be aborted.

The accountant and the state of the cluster are on the head. Ray's own client goes on trying for a
minute when it is gone and ends the process then, without a message.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_dp.errors import DistDpError

SILENCE_S = 30.0
"""A head that is set up to come back (Ray's fault tolerance of the head) has so long for it."""

_PROBE_S = 2.0
_ENDING_S = 10.0


class HeadLostError(DistDpError):
    """The head of the cluster is gone, and with it whatever was asked of the cluster."""


class Head:
    """The head that this driver is connected to.

    Args:
        address: Its host and port.
        run_folder: Of the run, for the remedy.
    """

    def __init__(self, address: str, run_folder: Path) -> None:
        self.address = address
        self._run_folder = run_folder

    def answers(self) -> bool:
        """Whether something listens there."""
        host, _, port = self.address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_S).close()
        except OSError:
            return False
        return True

    def lost(self) -> HeadLostError:
        """The error to raise."""
        return HeadLostError(
            f"the head of the cluster at {self.address} is gone, and the accountant with it: the "
            "run has ended, and what was leased stays charged. Start the cluster again (dist-dp "
            f"cluster up), then go on from the last checkpoint: dist-dp train --resume "
            f"{self._run_folder}"
        )

    def while_there(self, function: Callable[[], Any]) -> None:
        """Runs a function in a thread, and waits for it while the head is there.

        In the main thread, Ray Train would put its own handler of Ctrl-C in place of ours: it
        aborts the run, which would leave no release and the leased steps charged.

        Raises:
            HeadLostError: The head has been silent for ``SILENCE_S``, or the function failed and
                the head is gone; the function may still be waiting for it.
        """
        finished = threading.Event()
        failure: list[BaseException] = []

        def run() -> None:
            try:
                function()
            except BaseException as error:
                failure.append(error)
            finally:
                finished.set()

        threading.Thread(target=run, name="ray-train", daemon=True).start()
        heard = time.monotonic()
        while not finished.wait(1.0):
            if self.answers():
                heard = time.monotonic()
            elif time.monotonic() - heard > SILENCE_S:
                raise self.lost()
        if failure:
            if self._is_going(failure[0]):
                raise self.lost() from failure[0]
            raise failure[0]

    def _is_going(self, failure: BaseException) -> bool:
        """Whether the head is gone; waits a little where that is likely to be the reason."""
        import ray

        # Nodes that are taken down end one by one: the run's own actors before the head.
        likely = isinstance(failure, ray.exceptions.RayError)
        end = time.monotonic() + (_ENDING_S if likely else 0.0)
        while self.answers():
            if time.monotonic() >= end:
                return False
            time.sleep(0.2)
        return True
