"""A small actor between the run and the person who watches it: progress one way, stop the other."""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dist_dp.errors import ConfigError, DistDpError

NAMESPACE = "dist-dp"


class _Monitor:
    def __init__(self) -> None:
        self._latest: dict[str, Any] = {}
        self._stop = False
        self._heard = time.monotonic()
        self._failure: BaseException | None = None
        self._workers: list[Any] = []
        self._notices: list[str] = []
        self._attempt = 0
        self._failed = 0.0
        self._over = False

    def push(self, progress: dict[str, Any]) -> bool:
        """Keeps the latest progress; returns whether a stop was asked for."""
        self._latest = {**self._latest, **progress}
        self._heard = time.monotonic()
        return self._stop

    def join(self, worker: list[Any], attempt: int) -> bool:
        """A worker has begun: its actor, in a list, since a bare handle would not stay one.

        Returns:
            Whether there is nothing left to do: the run ended for good before.
        """
        if self._over:
            return True
        if attempt > self._attempt:
            self._attempt = attempt
            # Of the one before: if it would come again, this one will meet it, too.
            self._failure = None
        self._latest.pop("phase", None)
        self._workers += worker
        return False

    def silence(self) -> tuple[float, list[Any]]:
        """Seconds since the last word while they train, else 0; and the workers' actors."""
        training = self._latest.get("phase") == "training"
        return (time.monotonic() - self._heard if training else 0.0), self._workers

    def forget_workers(self) -> None:
        """They are about to be ended; those that come after them join anew."""
        self._latest.pop("phase", None)
        self._workers = []

    def fail(self, error: BaseException, attempt: int) -> None:
        """The attempt cannot go on; its first reason stays. One that was given up has no say."""
        if attempt >= self._attempt and self._failure is None:
            self._failure, self._failed = error, time.monotonic()

    def failing(self) -> float:
        """Seconds since an attempt said that it cannot go on, 0 if none did."""
        return 0.0 if self._failure is None else max(1e-9, time.monotonic() - self._failed)

    def end(self) -> None:
        """The run is over: whoever joins from now on has nothing to do."""
        self._over = True

    def failure(self) -> list[BaseException]:
        """Why the run cannot go on, if so; in a list, for Ray would raise a bare error."""
        return [] if self._failure is None else [self._failure]

    def say(self, text: str) -> None:
        """Something that whoever watches is to read once."""
        self._notices.append(text)

    def latest(self) -> dict[str, Any]:
        """The latest progress."""
        return self._latest

    def news(self) -> tuple[dict[str, Any], list[str]]:
        """The latest progress, and all that was said."""
        return self._latest, self._notices

    def request_stop(self) -> None:
        """Asks the run to stop after the step in flight."""
        self._stop = True


def start_monitor(name: str) -> Any:
    """Starts the monitor of a run, on the driver's node; workers find it by name.

    Raises:
        ConfigError: A run of that name is under way in the cluster.
    """
    # On another one it would be lost with that node, though the run could go on.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    try:
        return (
            ray.remote(_Monitor)
            .options(
                name=monitor_name(name), namespace=NAMESPACE, num_cpus=0, scheduling_strategy=here
            )
            .remote()
        )
    except ValueError:  # its name is taken
        raise ConfigError(
            f"a run named '{name}' is under way in this cluster: wait until it ends, or choose "
            "another --name"
        ) from None


def monitor_name(run: str) -> str:
    """The actor's name."""
    return f"dist-dp-monitor-{run}"


class MonitorLink:
    """Rank 0's side: sends progress without waiting, and notices a stop a little later."""

    def __init__(self, run: str) -> None:
        self._actor = ray.get_actor(monitor_name(run), namespace=NAMESPACE)
        self._answer: Any = None
        self._stop = False
        self._attempt = 0

    def push(self, progress: dict[str, Any]) -> None:
        """Sends progress unless the answer to the one before is still under way."""
        self._collect()
        if self._answer is None:
            self._answer = self._actor.push.remote(progress)

    def join(self, attempt: int) -> bool:
        """Tells that this worker has begun, so that it can be ended should it hang.

        Returns:
            Whether the run ended for good before, so that there is nothing to do.
        """
        self._attempt = attempt
        me = ray.get_runtime_context().current_actor
        return bool(ray.get(self._actor.join.remote([me], attempt)))

    def fail(self, error: BaseException) -> None:
        """Tells that the run cannot go on."""
        try:
            ray.get(self._actor.fail.remote(error, self._attempt))
        except TypeError:  # it cannot be sent
            plain = DistDpError(f"{type(error).__name__}: {error}")
            ray.get(self._actor.fail.remote(plain, self._attempt))

    def say(self, text: str) -> None:
        """Tells whoever watches the run, once; nothing is waited for. From any thread."""
        self._actor.say.remote(text)

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
