"""Sixty random kills of a run of two workers on two nodes: none under-counted, none lost."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dist_dp.cluster.local_nodes import LocalCluster
from dist_dp.cluster.run_folder import read_summary
from dist_dp.ledger import Ledger
from tests.cluster.nodes import cluster_of, last_step, workers_of
from tests.cluster.small import charged_steps, small, start, write_config
from tests.cluster.test_faults import same_model

KILLS, STEPS = 60, 1800


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with cluster_of(2, tmp_path_factory.mktemp("state")) as cluster:
        yield cluster


def train(folder: Path, clicks: Path, moments: list[int], cluster: LocalCluster, seed: int) -> int:
    """A run whose workers are killed when it has come to these steps; the kills that were done."""
    folder.mkdir()
    values = small(
        folder,
        clicks,
        data={"name": "clicks"},
        model={"sharding": "row_wise"},
        privacy={"epsilon": None, "noise_multiplier": 1.0, "seed": 7, "delta": 1e-5},
        train={"steps": STEPS, "checkpoint_every": 10, "evaluate_every": 70, "lease_steps": 5},
        cluster={"address": "auto", "placement": "spread", "max_failures": -1},
        output={"tensorboard": False},
    )
    chosen, kills = random.Random(seed), 0
    config = write_config(folder, values)
    process = start("train", "-c", config, "--name", "run", folder=folder)
    deadline = time.monotonic() + 120 + 30 * len(moments)
    for moment in moments:
        while last_step(folder / "runs" / "run") < moment and process.poll() is None:
            assert time.monotonic() < deadline, (folder / "err.txt").read_text()
            time.sleep(0.02)
        time.sleep(chosen.random() * 0.2)  # anywhere in a step
        alive = workers_of(cluster)
        if process.poll() is None and alive:
            os.kill(chosen.choice(sorted(alive)), signal.SIGKILL)
            kills += 1
            time.sleep(1.0)
    assert process.wait(timeout=300) == 0, (folder / "err.txt").read_text()
    return kills


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.timeout(3600)
def test_sixty_random_kills(
    tmp_path: Path, clicks: Path, two_nodes: LocalCluster, record_property: Any
) -> None:
    chosen = random.Random(2026)
    moments = sorted(chosen.sample(range(20, STEPS - 20, 10), KILLS))
    begin = time.monotonic()
    kills = train(tmp_path / "killed", clicks, moments, two_nodes, seed=1)
    disturbed = time.monotonic() - begin
    train(tmp_path / "whole", clicks, [], two_nodes, seed=1)
    whole = time.monotonic() - begin - disturbed
    assert kills >= KILLS
    assert same_model(tmp_path / "killed", tmp_path / "whole")
    for name in ("killed", "whole"):
        path = tmp_path / name / "ledger.sqlite"
        assert charged_steps(path, "clicks", "run") == STEPS
        assert Ledger(path).open_leases("run") == []
    one, other = (read_summary(tmp_path / n / "runs" / "run") for n in ("killed", "whole"))
    assert one["epsilon"] == other["epsilon"] and one["steps"] == STEPS
    record_property("seconds_a_kill", (disturbed - whole) / kills)
    print(f"\n{kills} kills: {disturbed:.0f} s, undisturbed {whole:.0f} s; "
          f"{(disturbed - whole) / kills:.1f} s lost to each")  # fmt: skip
