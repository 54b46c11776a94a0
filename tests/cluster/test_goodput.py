"""A quarter of an hour with a worker killed every three minutes: what share of it was training."""

from __future__ import annotations

import csv
import os
import random
import signal
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_dp.cluster.local_nodes import LocalCluster
from dist_dp.cluster.run_folder import read_summary
from tests.cluster.nodes import cluster_of, last_step, workers_of
from tests.cluster.small import charged_steps, small, start, write_config

EVERY_S, KILLS, STEP_S = 180.0, 4, 0.03


@pytest.fixture
def two_nodes(tmp_path: Path) -> Iterator[LocalCluster]:
    with cluster_of(2, tmp_path) as cluster:
        yield cluster


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.timeout(2400)
def test_goodput_with_a_kill_every_three_minutes(
    tmp_path: Path, clicks: Path, two_nodes: LocalCluster
) -> None:
    """Goodput: the steps that count, at the speed between kills, over the time all took."""
    steps = int((KILLS + 0.7) * EVERY_S / STEP_S)
    values = small(
        tmp_path,
        clicks,
        data={"name": "clicks"},
        model={"sharding": "row_wise"},
        privacy={"epsilon": None, "noise_multiplier": 4.0, "delta": 1e-5, "stop_at_budget": True},
        train={"steps": steps, "checkpoint_every": 200, "lease_steps": 100, "log_every": 10},
        cluster={"address": "auto", "placement": "spread", "max_failures": -1},
        output={"tensorboard": False},
    )
    run = tmp_path / "runs" / "run"
    process = start("train", "-c", write_config(tmp_path, values), "--name", "run", folder=tmp_path)
    while last_step(run) < 10 and process.poll() is None:
        time.sleep(0.1)
    begin, chosen, kills = time.monotonic(), random.Random(5), 0
    first = last_step(run)
    while process.poll() is None:
        time.sleep(0.2)
        if time.monotonic() - begin > (kills + 1) * EVERY_S and kills < KILLS:
            os.kill(chosen.choice(sorted(workers_of(two_nodes))), signal.SIGKILL)
            kills += 1
        if last_step(run) >= steps:
            break
    took = time.monotonic() - begin
    assert process.wait(timeout=300) == 0, (tmp_path / "err.txt").read_text()
    assert kills >= 2
    assert read_summary(run)["steps"] == steps
    assert charged_steps(tmp_path / "ledger.sqlite", "clicks", "run") >= steps
    with open(run / "metrics.csv", encoding="utf-8", newline="") as file:
        step_s = statistics.median(float(row["step_ms"]) / 1e3 for row in csv.DictReader(file))
    goodput = (steps - first) * step_s / took
    print(f"\n{kills} kills in {took:.0f} s, {steps} steps of {1e3 * step_s:.0f} ms: "
          f"goodput {100 * goodput:.1f} %")  # fmt: skip
    assert goodput > 0.6
