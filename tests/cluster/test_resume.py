"""A run that was stopped goes on from its checkpoint, through the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dist_dp.cluster.config import parse_config
from dist_dp.cluster.monitor import NAMESPACE, monitor_name
from dist_dp.cluster.trainer import Trainer
from dist_dp.errors import CheckpointError
from dist_dp.released import Release
from tests.cluster.small import charged_steps, run, small


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
def test_an_interrupted_run_goes_on(tmp_path: Path, clicks: Path) -> None:
    import ray

    def stop_soon(progress: dict[str, Any]) -> None:
        if progress.get("step", 0) >= 2:
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
    assert stopped["status"] == "interrupted" and 2 <= stopped["steps"] < 80
    assert (folder / "private" / "checkpoint" / "secret").exists()
    assert stopped["epsilon"] < 8
    # A checkpoint is no model; what was released at the stop is.
    refused = run("evaluate", folder / "private" / "checkpoint", "--data", clicks)
    assert refused.exit_code == 1 and "training checkpoint" in refused.stderr
    refused = run("train", "--resume", folder, "--epsilon", "1")
    assert refused.exit_code == 1 and "leave the other options out" in refused.stderr

    summary = Trainer.resumed(folder).fit()
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
