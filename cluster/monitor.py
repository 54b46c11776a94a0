"""A small actor between the run and the person who watches it: progress one way, stop the other."""

from __future__ import annotations

from typing import Any

import ray

NAMESPACE = "dist-dp"


class _Monitor:
    def __init__(self) -> None:
        self._latest: dict[str, Any] = {}
        self._stop = False

    def push(self, progress: dict[str, Any]) -> bool:
        """Keeps the latest progress; returns whether a stop was asked for."""
        self._latest = {**self._latest, **progress}
        return self._stop

    def latest(self) -> dict[str, Any]:
        """The latest progress."""
        return self._latest

    def request_stop(self) -> None:
        """Asks the run to stop after the step in flight."""
        self._stop = True


def start_monitor(name: str) -> Any:
    """Starts the monitor of a run; workers find it by name."""
    return (
        ray.remote(_Monitor)
        .options(name=monitor_name(name), namespace=NAMESPACE, num_cpus=0)
        .remote()
    )


def monitor_name(run: str) -> str:
    """The actor's name."""
    return f"dist-dp-monitor-{run}"


class MonitorLink:
    """Rank 0's side: sends progress without waiting, and notices a stop a little later."""

    def __init__(self, run: str) -> None:
        self._actor = ray.get_actor(monitor_name(run), namespace=NAMESPACE)
        self._answer: Any = None
        self._stop = False

    def push(self, progress: dict[str, Any]) -> None:
        """Sends progress unless the answer to the one before is still under way."""
        self._collect()
        if self._answer is None:
            self._answer = self._actor.push.remote(progress)

    @property
    def stop_requested(self) -> bool:
        """Whether a stop was asked for."""
        self._collect()
        return self._stop

    def _collect(self) -> None:
        if self._answer is None:
            return
        ready, _ = ray.wait([self._answer], timeout=0)
        if ready:
            self._stop = bool(ray.get(self._answer)) or self._stop
            self._answer = None
