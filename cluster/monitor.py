"""A small actor between the run and the person who watches it: progress one way, stop the other."""

from __future__ import annotations

import time
from typing import Any

import ray

from dist_dp.errors import DistDpError

NAMESPACE = "dist-dp"


class _Monitor:
    def __init__(self) -> None:
        self._latest: dict[str, Any] = {}
        self._stop = False
        self._heard = time.monotonic()
        self._failure: BaseException | None = None
        self._workers: list[Any] = []

    def push(self, progress: dict[str, Any]) -> bool:
        """Keeps the latest progress; returns whether a stop was asked for."""
        self._latest = {**self._latest, **progress}
        self._heard = time.monotonic()
        return self._stop

    def join(self, worker: list[Any]) -> None:
        """A worker has begun: its actor, in a list, since a bare handle would not stay one."""
        self._latest.pop("phase", None)
        self._workers += worker

    def silence(self) -> tuple[float, list[Any]]:
        """Seconds since the last word while they train, else 0; and the workers' actors."""
        training = self._latest.get("phase") == "training"
        return (time.monotonic() - self._heard if training else 0.0), self._workers

    def forget_workers(self) -> None:
        """They are about to be ended; those that come after them join anew."""
        self._latest.pop("phase", None)
        self._workers = []

    def fail(self, error: BaseException) -> None:
        """The run cannot go on; the first reason stays."""
        self._failure = self._failure or error

    def failure(self) -> list[BaseException]:
        """Why the run cannot go on, if so; in a list, for Ray would raise a bare error."""
        return [] if self._failure is None else [self._failure]

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

    def join(self) -> None:
        """Tells that this worker has begun, so that it can be ended should it hang."""
        ray.get(self._actor.join.remote([ray.get_runtime_context().current_actor]))

    def fail(self, error: BaseException) -> None:
        """Tells that the run cannot go on."""
        try:
            ray.get(self._actor.fail.remote(error))
        except TypeError:  # it cannot be sent
            ray.get(self._actor.fail.remote(DistDpError(f"{type(error).__name__}: {error}")))

    @property
    def failure(self) -> BaseException | None:
        """Why the run cannot go on, if a worker has said so."""
        found = ray.get(self._actor.failure.remote())
        return found[0] if found else None

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
