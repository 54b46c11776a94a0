"""Clusters of several nodes for tests, by ``dist-dp cluster up``, and harm done to their nodes."""

from __future__ import annotations

import contextlib
import csv
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dist_dp.cluster import local_nodes
from dist_dp.cluster.local_nodes import LocalCluster, read_state
from dist_dp.cluster.processes import Process
from tests.cluster.small import ROOT, run

WORKER = b"ray::RayTrainWorker"


@contextlib.contextmanager
def cluster_of(nodes: int, state: Path) -> Iterator[LocalCluster]:
    """Nodes of one CPU; one that says nothing is given up after some seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(state))
        patch.setenv("PYTHONPATH", f"{ROOT}:{os.environ.get('PYTHONPATH', '')}")
        for name, value in (("period_ms", 1000), ("timeout_ms", 2000), ("failure_threshold", 5)):
            patch.setenv(f"RAY_health_check_{name}", str(value))
        try:
            yield up(nodes)
        finally:
            if read_state() is not None:
                run("cluster", "down")


def up(nodes: int) -> LocalCluster:
    result = run("cluster", "up", "--nodes", str(nodes), "--cpus-per-node", "1")
    state = read_state()
    assert result.exit_code == 0 and state is not None, result.output
    return state


def join(cluster: LocalCluster) -> LocalCluster:
    """One more node; the command line starts all of them at once."""
    count = len(cluster.nodes)
    return local_nodes._start_node(cluster, count, count + 1)


def workers_on(node: Process) -> list[int]:
    """Training workers on a node."""
    found = []
    for pid in node.members():
        with contextlib.suppress(OSError):
            if (Path("/proc") / str(pid) / "cmdline").read_bytes().startswith(WORKER):
                found.append(pid)
    return found


def workers_of(cluster: LocalCluster) -> list[int]:
    """Training workers on any node."""
    return [pid for node in cluster.nodes for pid in workers_on(node)]


def send(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def last_step(folder: Path) -> int:
    """The last step in the metrics of a run."""
    try:
        with open(folder / "metrics.csv", encoding="utf-8", newline="") as file:
            *_, row = csv.reader(file)
        return int(float(row[0]))
    except (OSError, ValueError):
        return 0


def wait_for(what: Callable[[], Any], process: subprocess.Popen[str], timeout_s: float) -> None:
    """Waits until something is so; the run must still be going on."""
    deadline = time.monotonic() + timeout_s
    while not what():
        assert process.poll() is None, f"the run has ended with {process.returncode}"
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)
