"""Progress one way, Ctrl-C the other: the live line, the monitor, and interrupted runs."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from dist_dp.cluster.console import ProgressLine
from dist_dp.ledger import Ledger
from dist_dp.released import Release
from tests.cluster.small import charged_steps, small, start, write_config

MARK = "DIST_DP_TEST_MARK"
TRAINING: dict[str, Any] = {
    "phase": "training",
    "step": 10,
    "steps": 100,
    "loss": 0.51234,
    "epsilon": 1.234,
    "examples_per_second": 12345.6,
}


def test_live_line_says_how_far_and_how_private() -> None:
    line = ProgressLine(Console(file=io.StringIO()))
    line({"phase": "starting Ray", "plan": SimpleNamespace(target_epsilon=8.0)})
    assert line.line({"phase": "evaluating"}) == "evaluating …"
    text = line.line(TRAINING)
    for words in ("step 10/100", "loss 0.5123", "ε ≤ 1.24 of 8", "12,346 examples/s", "left"):
        assert words in text
    assert "not private" in line.line({**TRAINING, "epsilon": float("inf")})
    assert "–" not in line.line({**TRAINING, "step": 20})  # Now the time left is known.


def test_one_line_a_phase_where_nobody_watches() -> None:
    out = io.StringIO()
    with ProgressLine(Console(file=out)) as line:
        for progress in ({}, {"phase": "a"}, {"phase": "a"}, TRAINING, TRAINING):
            line(progress)
    assert out.getvalue() == "a …\ntraining …\n"


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_monitor_passes_progress_and_stop() -> None:
    import ray

    from dist_dp.cluster.monitor import MonitorLink, start_monitor

    name = uuid.uuid4().hex
    monitor = start_monitor(name)
    link = MonitorLink(name)
    link.push(TRAINING)
    deadline = time.monotonic() + 30
    while ray.get(monitor.latest.remote()) != TRAINING:
        assert time.monotonic() < deadline
    assert not link.stop_requested
    ray.get(monitor.request_stop.remote())
    while not link.stop_requested:
        link.push({"phase": "training"})
        assert time.monotonic() < deadline
    # What was not sent again stays.
    assert ray.get(monitor.latest.remote())["loss"] == TRAINING["loss"]
    ray.kill(monitor)


def rows(folder: Path) -> list[dict[str, str]]:
    path = folder / "metrics.csv"
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def still_alive(mark: str) -> list[str]:
    """Processes that the marked command left, by the environment they inherited."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{MARK}={mark}".encode() in path.read_bytes():
                found.append(path.with_name("cmdline").read_bytes().decode(errors="replace"))
        except OSError:
            continue
    return found


@contextmanager
def training(home: Path, clicks: Path, *options: str) -> Iterator[tuple[Any, Path, str]]:
    """A run that would take long, once it has taken its first steps."""
    mark = uuid.uuid4().hex
    values = small(
        home,
        clicks,
        privacy={"epsilon": None, "noise_multiplier": 1.0},
        train={"steps": 5000, "lease_steps": 40},
        output={"name": "long"},
    )
    process = start(
        "train", "-c", write_config(home, values), *options, folder=home, **{MARK: mark}
    )
    folder = home / "runs" / "long"
    try:
        deadline = time.monotonic() + 240
        while len(rows(folder)) < 3:
            assert process.poll() is None, (home / "err.txt").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield process, folder, mark
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def interrupt(process: subprocess.Popen[str]) -> None:
    """Ctrl-C as a terminal sends it: to the whole process group."""
    os.killpg(process.pid, signal.SIGINT)


def assert_gone(mark: str) -> None:
    deadline = time.monotonic() + 30
    while still_alive(mark):
        assert time.monotonic() < deadline, still_alive(mark)
        time.sleep(0.2)


@pytest.mark.ray
@pytest.mark.slow
def test_ctrl_c_ends_cleanly(tmp_path: Path, clicks: Path) -> None:
    with training(tmp_path, clicks) as (process, folder, mark):
        interrupt(process)
        assert process.wait(timeout=180) == 0, (tmp_path / "err.txt").read_text()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    assert 3 <= summary["steps"] < 5000
    assert len(rows(folder)) == summary["steps"]
    assert Release.open(folder / "release").manifest["settled_to_step"] == summary["steps"]
    ledger = tmp_path / "ledger.sqlite"
    assert charged_steps(ledger, "clicks", "long") == summary["steps"]
    spent = Ledger(ledger).spent("clicks").epsilon
    assert spent == pytest.approx(summary["epsilon"], rel=1e-9)
    err = (tmp_path / "err.txt").read_text()
    assert "stopping after this step" in err and "Traceback" not in err
    assert "interrupted" in (tmp_path / "out.txt").read_text()
    assert_gone(mark)


@pytest.mark.ray
@pytest.mark.slow
def test_ctrl_c_twice_aborts_and_the_lease_stays_charged(tmp_path: Path, clicks: Path) -> None:
    with training(tmp_path, clicks, "--verbose") as (process, folder, mark):
        interrupt(process)
        deadline = time.monotonic() + 20
        while "stopping" not in (tmp_path / "err.txt").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        interrupt(process)
        assert process.wait(timeout=120) == 130, (tmp_path / "err.txt").read_text()
    assert not (folder / "release").exists() and not (folder / "summary.json").exists()
    assert "Ctrl-C" in (folder / "error.txt").read_text()
    ledger = Ledger(tmp_path / "ledger.sqlite")
    assert charged_steps(ledger.path, "clicks", "long") >= len(rows(folder)) >= 3
    assert ledger.spent("clicks").epsilon > 0
    err = (tmp_path / "err.txt").read_text()
    assert "aborted; what was leased" in err
    # --verbose brings the libraries' logs back.
    assert "INFO" in err + (tmp_path / "out.txt").read_text()
    assert_gone(mark)
