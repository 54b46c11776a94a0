"""A driver whose cluster's head is gone ends with an error, whatever it was waiting for."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_dp.cluster import head as module
from dist_dp.cluster.head import Head, HeadLostError
from dist_dp.cluster.monitor import _Monitor
from dist_dp.errors import DistDpError, StaleAttemptError


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


def head_at(listener: socket.socket, folder: Path) -> Head:
    return Head(f"127.0.0.1:{listener.getsockname()[1]}", folder)


def test_what_a_run_did_is_passed_on(listener: socket.socket, tmp_path: Path) -> None:
    done: list[int] = []

    def fails() -> None:
        raise ValueError("of its own")

    head = head_at(listener, tmp_path)
    head.while_there(lambda: done.append(1))
    assert done == [1]
    with pytest.raises(ValueError, match="of its own"):
        head.while_there(fails)


def test_a_run_without_a_head_ends(
    listener: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SILENCE_S", 1.0)
    head, over = head_at(listener, tmp_path), threading.Event()
    threading.Timer(1.5, listener.close).start()
    began = time.monotonic()
    with pytest.raises(HeadLostError, match=f"--resume {tmp_path}"):
        head.while_there(lambda: over.wait(60))
    assert 2.0 < time.monotonic() - began < 10
    over.set()

    def fails() -> None:
        raise ConnectionError("an actor is unavailable")

    with pytest.raises(HeadLostError) as caught:
        head.while_there(fails)
    assert isinstance(caught.value.__cause__, ConnectionError)


def test_actors_that_end_before_the_head_are_no_other_reason(
    listener: socket.socket, tmp_path: Path
) -> None:
    """As when a cluster is taken down: its nodes end one by one."""
    import ray

    def fails() -> None:
        threading.Timer(1.5, listener.close).start()
        raise ray.exceptions.ActorDiedError()

    with pytest.raises(HeadLostError) as caught:
        head_at(listener, tmp_path).while_there(fails)
    assert isinstance(caught.value.__cause__, ray.exceptions.ActorDiedError)


def test_a_stale_attempt_does_not_speak_for_the_run() -> None:
    """Whether it fails before the attempt in its place has joined, or after."""
    monitor = _Monitor()
    monitor.join(["worker"], 1)
    monitor.fail(StaleAttemptError("given up"), 1)
    assert len(monitor.failure()) == 1  # two drivers: nobody joins this one
    monitor.join(["worker"], 2)
    monitor.join(["worker"], 2)
    assert monitor.failure() == []
    monitor.fail(DistDpError("a late word"), 1)
    assert monitor.failure() == []
    monitor.fail(DistDpError("the disk is full"), 2)
    monitor.join(["worker"], 2)
    assert [str(failure) for failure in monitor.failure()] == ["the disk is full"]
    monitor.join(["worker"], 3)  # another worker was killed just then: there may be room by now
    assert monitor.failure() == []
