"""``dist-dp cluster down`` in the middle of a run: it ends with an error, and can go on later."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from dist_dp.cluster.run_folder import read_summary
from dist_dp.ledger import Ledger
from tests.cluster.nodes import cluster_of, last_step, wait_for
from tests.cluster.small import charged_steps, run, small, start, write_config

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STEPS = 1500  # more than a cluster takes to end


@pytest.mark.timeout(900)
def test_a_cluster_is_taken_down_under_a_run(tmp_path: Path, clicks: Path) -> None:
    values = small(
        tmp_path,
        clicks,
        data={"name": "clicks"},
        privacy={"epsilon": 8.0},
        train={"steps": STEPS, "checkpoint_every": 25, "lease_steps": 5},
        cluster={"num_workers": 1, "address": "auto"},
        output={"name": "run", "tensorboard": False},
    )
    folder, ledger = tmp_path / "runs" / "run", tmp_path / "ledger.sqlite"
    with cluster_of(1, tmp_path / "state"):
        process = start("train", "-c", write_config(tmp_path, values), folder=tmp_path)
        wait_for(lambda: last_step(folder) >= 40, process, 300)
        taken = last_step(folder)
        down = run("cluster", "down")
        assert down.exit_code == 0, down.output
        began = time.monotonic()
        assert process.wait(timeout=120) == 1
        print(f"\nended {time.monotonic() - began:.0f} s after the cluster")
        time.sleep(1.0)  # Ray may end the process: another one says so
        said = (tmp_path / "err.txt").read_text().splitlines()
        assert "Traceback" not in "".join(said), said
        errors = [line for line in said if line.startswith("error")]
        assert len(errors) == 1 and "the head of the cluster" in errors[0], said
        assert f"--resume {folder}" in errors[0]
        assert Ledger(ledger).run_status("run") == "open"
        assert taken <= charged_steps(ledger, "clicks", "run") < STEPS
    # Without any cluster: on a Ray of its own.
    resumed = start("train", "--resume", folder, "--set", "cluster.address=null", folder=tmp_path)
    assert resumed.wait(timeout=400) == 0, (tmp_path / "err.txt").read_text()
    summary = read_summary(folder)
    assert summary["status"] == "completed" and summary["steps"] == STEPS
    # What was replayed came out as before.
    assert charged_steps(ledger, "clicks", "run") == summary["steps_charged"] == STEPS
