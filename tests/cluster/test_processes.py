"""A process is known by more than its number."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator

import pytest

from dist_dp.cluster.processes import Process

CHILD = "import subprocess, sys, time; subprocess.Popen(['sleep', '60']); print(flush=True); "


@pytest.fixture
def parent() -> Iterator[subprocess.Popen[str]]:
    """A process that leads a session with one child in it."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD + "time.sleep(60)"],
        start_new_session=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline()
    yield process
    Process.of(process.pid).kill() if process.poll() is None else None
    process.wait()


def test_a_session_is_ended_with_its_leader(parent: subprocess.Popen[str]) -> None:
    process = Process.of(parent.pid)
    assert process.is_alive and len(process.members()) == 1
    assert not process.wait(0.1)
    process.kill()
    assert process.wait(5.0)
    assert not process.is_alive and process.members() == []


def test_what_a_dead_leader_left_is_found(parent: subprocess.Popen[str]) -> None:
    process = Process.of(parent.pid)
    assert process.terminate()
    parent.wait()
    assert not process.is_alive and len(process.members()) == 1 and not process.terminate()
    process.kill()
    assert process.wait(5.0)


@pytest.mark.parametrize("change", [{"started": 1}, {"boot": "another"}])
def test_another_process_with_the_number_is_left_alone(
    parent: subprocess.Popen[str], change: dict[str, object]
) -> None:
    process = dataclasses.replace(Process.of(parent.pid), **change)  # type: ignore[arg-type]
    assert not process.is_alive and process.members() == []
    assert not process.terminate()
    process.kill()
    assert parent.poll() is None
