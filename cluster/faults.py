"""What ends a run for good, and what it goes on after: workers' side and driver's side.

Ray Train starts the group of workers again when one is lost, and they go on from the last
checkpoint. An error that would come again is no reason to: the worker that meets it tells the
run's monitor, closes its connections, so that the others do not wait for it, and returns.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dist_dp.cluster.finish import attempts_folder
from dist_dp.cluster.monitor import MonitorLink
from dist_dp.distributed import broadcast_object, rank
from dist_dp.errors import DistDpError
from dist_dp.fence import Fence

_GRACE_S = 15.0
"""How long workers may take to end by themselves once one has said that the run cannot go on."""

_SIGNS = ("gloo", "Timed out waiting", "Connection closed", "Connection reset", "Broken pipe")
"""In messages of errors that PyTorch raises when another worker is gone."""


def is_fault(error: BaseException) -> bool:
    """Whether an error is a lost worker's or connection's, so that starting again may help.

    Our own errors (a refused budget, data that are gone, a full disk) and those of the model's code
    would come again.
    """
    import ray
    import torch.distributed as dist

    if isinstance(error, DistDpError):
        return False
    if isinstance(error, dist.DistError | ConnectionError | ray.exceptions.RayError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


@contextmanager
def ended_for_good(run: str, folder: Path) -> Iterator[tuple[MonitorLink, Fence | None, bool]]:
    """Around a worker's work: raises nothing but faults; see the module.

    Args:
        run: Name of the run, whose monitor is told.
        folder: Of the run.

    Yields:
        The link to the monitor, rank 0's attempt (None elsewhere), and whether there is nothing to
        do, since the run ended for good before.

    Raises:
        BaseException: A fault: the group is to be started again.
    """
    link = MonitorLink(run)
    fence: Fence | None = None
    try:
        # The attempt before this one is at its end now, whatever becomes of this.
        fence = Fence.take(attempts_folder(folder)) if rank() == 0 else None
        number = broadcast_object(fence.number if fence else None)
        assert number is not None
        is_over = link.join(number)
        yield link, fence, is_over
    except BaseException as error:
        # Whatever a stale attempt met: the one in its place speaks for the run.
        stale = fence.why_stale if fence is not None else None
        if stale is not None or not is_fault(error):
            link.fail(stale or error)
        elif link.failure is None:
            raise
        import torch.distributed as dist

        with suppress(Exception):
            dist.destroy_process_group()


class Watchdog:
    """Ends workers that have said nothing for too long, so that Ray Train starts them again.

    Watches only while they train, when there is a word after each step. Where one of them has said
    that the run cannot go on, and others still wait for it (the process group of the one that
    failed may live on in what its error refers to), they are ended too, and those that Ray Train
    starts in their place find that there is nothing to do.

    Args:
        monitor: The run's monitor.
        silence_s: How long they may say nothing.
        say: Told what is done.
    """

    def __init__(self, monitor: Any, silence_s: float, say: Callable[[str], None]) -> None:
        self._monitor = monitor
        self._silence_s = silence_s
        self._say = say
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops watching."""
        self._over.set()
        self._thread.join(timeout=5)

    def _watch(self) -> None:
        import ray

        while not self._over.wait(min(5.0, self._silence_s / 4)):
            with suppress(ray.exceptions.RayError):
                if ray.get(self._monitor.failing.remote(), timeout=10) > _GRACE_S:
                    ray.get(self._monitor.end.remote(), timeout=10)
                    self._end_workers()
                    continue
                silent, workers = ray.get(self._monitor.silence.remote(), timeout=10)
                if silent <= self._silence_s or not workers:
                    continue
                self._say(f"no word from the workers for {silent:.0f} s: starting them again")
                self._end_workers()

    def _end_workers(self) -> None:
        import ray

        _, workers = ray.get(self._monitor.silence.remote(), timeout=10)
        ray.get(self._monitor.forget_workers.remote(), timeout=10)
        for worker in workers:
            ray.kill(worker)
