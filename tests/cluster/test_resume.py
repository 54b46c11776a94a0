"""A run that was stopped goes on from its checkpoint, through the trainer."""

from __future__ import annotations

import os
import signal
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_dp.checkpoint import find_checkpoint, read_checkpoint_info
from dist_dp.cluster.config import parse_config
from dist_dp.cluster.finish import checkpoint_folder
from dist_dp.cluster.monitor import NAMESPACE, monitor_name
from dist_dp.cluster.run_folder import read_summary
from dist_dp.cluster.trainer import Trainer
from dist_dp.errors import CheckpointError, ConfigError, DistDpError
from dist_dp.ledger import Ledger
from dist_dp.released import Release
from tests.cluster.small import charged_steps, run, small, start, write_config


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
def test_an_interrupted_run_goes_on(tmp_path: Path, clicks: Path) -> None:
    import ray

    refusals: list[str] = []

    def stop_soon(progress: dict[str, Any]) -> None:
        if progress.get("step", 0) >= 2:
            if not refusals:  # a second driver, while the first is at work
                with pytest.raises(ConfigError) as caught:
                    Trainer.resumed(tmp_path / "runs" / "long").fit()
                refusals.append(str(caught.value))
            monitor = ray.get_actor(monitor_name("long"), namespace=NAMESPACE)
            monitor.request_stop.remote()

    values = small(
        tmp_path,
        clicks,
        train={"steps": 80, "checkpoint_every": 30},
        output={"name": "long"},
    )
    first = Trainer(parse_config(values), watch=stop_soon)
    stopped = first.fit()
    folder = first.run_folder
    assert folder is not None
    assert f"is under way: process {os.getpid()}" in refusals[0]
    assert stopped["status"] == "interrupted" and 2 <= stopped["steps"] < 80
    checkpoint = find_checkpoint(checkpoint_folder(folder))
    assert (checkpoint / "secret").exists()
    assert stopped["epsilon"] < 8
    # A checkpoint is no model; what was released at the stop is.
    refused = run("evaluate", checkpoint, "--data", clicks)
    assert refused.exit_code == 1 and "training checkpoint" in refused.stderr
    for options, words in (
        (["--epsilon", "1"], "leave the other options out"),
        (["--set", "train.steps=90"], "'train.steps' cannot be changed for a run that goes on"),
        (["--set", "model.shardings=row_wise"], "'model.shardings' cannot be changed"),
    ):
        refused = run("train", "--resume", folder, *options)
        assert refused.exit_code == 1 and words in refused.stderr

    # A run of its name in another folder is another run.
    twin = {
        **values,
        "privacy": {**values["privacy"], "stop_at_budget": True},
        "output": {"name": "long", "folder": str(tmp_path / "elsewhere")},
    }
    with pytest.raises(ConfigError, match=r"'long' is in the ledger already.*another --name"):
        Trainer(parse_config(twin)).fit()
    assert not (tmp_path / "elsewhere" / "long").exists()
    # Also if both were begun at the same time, which the workers notice.
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(DistDpError, match="'long' is in the ledger already"),
    ):
        patch.setattr("dist_dp.cluster.trainer._check_account_is_free", lambda *_: None)
        Trainer(parse_config(twin)).fit()
    assert Ledger(tmp_path / "ledger.sqlite").run_status("long") == "open"

    # It may go on elsewhere.
    done = run("train", "--resume", folder, "--workers", "1", "--set", "model.sharding=row_wise")
    assert done.exit_code == 0, done.output
    summary = read_summary(folder)
    assert summary["world_size"] == 1
    assert {s["kind"] for s in summary["sharding"]} == {"row_wise"}
    assert summary["status"] == "completed" and summary["steps"] == summary["steps_charged"] == 80
    assert 7.9 < summary["epsilon"] <= 8
    assert charged_steps(tmp_path / "ledger.sqlite", "clicks", "long") == 80
    assert Release.open(folder / "release").manifest["settled_to_step"] == 80
    kept = Release.open(folder / f"release-step-{stopped['steps']:06d}")
    assert kept.manifest["privacy"]["epsilon"] == pytest.approx(stopped["epsilon"])
    # The secret is of no more use once the run is complete.
    assert not (folder / "private").exists()
    assert len((folder / "metrics.csv").read_text().splitlines()) == 81
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        Trainer.resumed(folder)


MARK = "DIST_DP_TEST_MARK"


def marked(mark: str) -> list[int]:
    """Processes that a marked command started, by the environment they inherited."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{MARK}={mark}".encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.usefixtures("ray_local")
def test_everything_is_killed_during_a_checkpoint(tmp_path: Path, clicks: Path) -> None:
    def values(name: str) -> dict[str, Any]:
        # A budget with room for the steps that run again; a seed, so that two runs are the same.
        return small(
            tmp_path,
            clicks,
            privacy={
                "epsilon": None,
                "noise_multiplier": 1.0,
                "seed": 7,
                "delta": 1e-5,
                "dataset_budget": {"epsilon": 50.0, "delta": 1e-5},
                "stop_at_budget": True,
            },
            train={"steps": 60, "checkpoint_every": 1, "evaluate_every": 7, "lease_steps": 5},
            output={"name": name},
        )

    config = write_config(tmp_path, values("killed"))
    mark = uuid.uuid4().hex
    process = start("train", "-c", config, folder=tmp_path, **{MARK: mark})
    home = checkpoint_folder(tmp_path / "runs" / "killed")
    deadline = time.monotonic() + 240
    doomed: list[int] = []
    try:
        while max((p.name for p in home.glob("save-*")), default="") < "save-000010":
            assert process.poll() is None, (tmp_path / "err.txt").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        doomed = marked(mark)
        while not any(name.endswith(".partial") for name in os.listdir(home)):
            assert time.monotonic() < deadline
    finally:
        for pid in [*doomed, *marked(mark)]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.wait()
    while left := marked(mark):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    went_on_from = read_checkpoint_info(home)["numbers"]["step"]
    assert 9 <= went_on_from < 60

    resumed = Trainer.resumed(tmp_path / "runs" / "killed").fit()
    whole = Trainer(parse_config(values("whole"))).fit()
    assert resumed["steps"] == whole["steps"] == 60
    # Replayed steps came out as before, so each is charged once.
    assert whole["steps_charged"] == resumed["steps_charged"] == 60
    one, other = (Release.open(tmp_path / "runs" / n / "release") for n in ("killed", "whole"))
    assert one.manifest["tables"].keys() == other.manifest["tables"].keys()
    for name in other.manifest["tables"]:
        assert torch.equal(one.table(name), other.table(name)), name
    dense = other.dense()
    assert one.dense().keys() == dense.keys()
    for name, value in one.dense().items():
        assert torch.equal(value, dense[name]), name
