"""Where the time of a step goes, phase by phase."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class PhaseTimer:
    """Sums wall time by phase name within a step.

    Nested phases are taken out of the phase around them, so that the phases add up.

    Args:
        device: On CUDA the device is synchronised at the edges of a phase.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._cuda = device is not None and device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._inner: list[float] = []
        self._background: dict[str, float] = {}
        self._lock = threading.Lock()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time of the block under ``name``."""
        start = self._now()
        self._inner.append(0.0)
        try:
            yield
        finally:
            elapsed = self._now() - start
            inner = self._inner.pop()
            self._seconds[name] = self._seconds.get(name, 0.0) + elapsed - inner
            if self._inner:
                self._inner[-1] += elapsed

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def note(self, name: str, seconds: float) -> None:
        """Adds to what other threads did beside the step; from any thread."""
        with self._lock:
            self._background[name] = self._background.get(name, 0.0) + seconds

    def take_background(self) -> dict[str, float]:
        """Milliseconds by name that ran beside the steps since the last call; starts afresh."""
        with self._lock:
            taken, self._background = self._background, {}
        return {name: 1e3 * s for name, s in taken.items()}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Counts nothing in the block: it is not part of a step."""
        kept = dict(self._seconds)
        try:
            yield
        finally:
            self._seconds = kept

    def take(self) -> dict[str, float]:
        """Milliseconds by phase since the last take; starts afresh."""
        result = {name: 1e3 * s for name, s in self._seconds.items()}
        self._seconds = {}
        return result
