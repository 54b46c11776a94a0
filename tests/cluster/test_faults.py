"""Workers that are lost at every moment of a run: it ends with the same model, charged once."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_dp.cluster.config import parse_config
from dist_dp.cluster.trainer import Trainer
from dist_dp.errors import DistDpError
from dist_dp.ledger import Ledger
from dist_dp.released import Release
from tests.cluster.faulty import MOMENTS
from tests.cluster.small import charged_steps, small

STEPS = 40
AT = {"before charge": 6, "after charge": 13, "in the forward": 5, "mid-update": 19}
AT |= {"mid-checkpoint": 24}


def harm(moment: str, rank: int = 0, kind: str = "killed", step: int | None = None) -> Any:
    return {"moment": moment, "rank": rank, "kind": kind, "step": step or AT.get(moment, 0)}


def values_of(
    folder: Path, clicks: Path, harms: list[Any], **sections: dict[str, Any]
) -> dict[str, Any]:
    """A configuration of a run through the harms, with changes by section."""
    folder.mkdir(exist_ok=True)
    values: dict[str, dict[str, Any]] = {
        "model": {
            "name": "custom",
            "factory": "tests.cluster.faulty:doomed",
            "factory_args": {"harms": harms, "folder": str(folder)},
            "embedding_dim": None, "dense_arch": None, "over_arch": None,
            "sharding": "row_wise",
        },
        "privacy": {"epsilon": None, "noise_multiplier": 1.0, "seed": 7, "delta": 1e-5},
        "train": {"steps": STEPS, "checkpoint_every": 4, "evaluate_every": 7, "lease_steps": 5},
        "cluster": {"max_failures": len(harms)},
        "output": {"name": "run"},
    }  # fmt: skip
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return small(folder, clicks, **values)


def came_true(folder: Path, harms: list[Any]) -> bool:
    return all((folder / f"harm-{number}").exists() for number in range(len(harms)))


def fit(folder: Path, clicks: Path, harms: list[Any], **cluster: Any) -> dict[str, Any]:
    """A run through the harms; all of them must have come true."""
    cluster = {"max_failures": len(harms), **cluster}
    values = values_of(folder, clicks, harms, cluster=cluster)
    said: list[dict[str, Any]] = []
    summary = Trainer(parse_config(values), watch=said.append).fit()
    assert came_true(folder, harms)
    assert not (folder / "runs" / "run" / "private").exists()
    return {**summary, "said": said}


def same_model(one: Path, other: Path) -> bool:
    a, b = (Release.open(folder / "runs" / "run" / "release") for folder in (one, other))
    tables = all(torch.equal(a.table(n), b.table(n)) for n in b.manifest["tables"])
    return tables and all(torch.equal(a.dense()[n], v) for n, v in b.dense().items())


def charged(folder: Path) -> int:
    return charged_steps(folder / "ledger.sqlite", "clicks", "run")


@pytest.fixture(scope="module")
def undisturbed(
    ray_local: None, tmp_path_factory: pytest.TempPathFactory, clicks: Path
) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, fit(folder, clicks, [])


@pytest.mark.ray
@pytest.mark.slow
def test_killed_twice(
    undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path, clicks: Path
) -> None:
    """The short version, for every day."""
    harms = [harm("mid-update", rank=1), harm("after the release is recorded")]
    summary = fit(tmp_path, clicks, harms)
    assert same_model(tmp_path, undisturbed[0])
    assert charged(tmp_path) == STEPS and summary["steps_charged"] == STEPS


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.chaos
def test_killed_at_every_moment(
    undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path, clicks: Path
) -> None:
    harms = [harm(moment) for moment in MOMENTS[:-1]]  # the last one has a test of its own
    harms[2]["rank"] = harms[5]["rank"] = 1
    harms.append(harm("mid-update", rank=1, step=30))
    summary = fit(tmp_path, clicks, harms)
    folder, whole = undisturbed
    assert same_model(tmp_path, folder)
    assert charged(tmp_path) == charged(folder) == STEPS
    ledger = Ledger(tmp_path / "ledger.sqlite")
    assert ledger.open_leases("run") == [] and ledger.run_status("run") == "completed"
    for name in ("steps", "epsilon", "steps_charged", "status"):
        assert summary[name] == whole[name], name


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.chaos
def test_killed_when_all_is_done_but_the_account(
    undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path, clicks: Path
) -> None:
    summary = fit(tmp_path, clicks, [harm(MOMENTS[-1])])
    assert same_model(tmp_path, undisturbed[0]) and charged(tmp_path) == STEPS
    assert summary["status"] == "completed"
    assert Ledger(tmp_path / "ledger.sqlite").run_status("run") == "completed"


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.chaos
def test_a_worker_that_hangs_is_started_again(
    undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path, clicks: Path
) -> None:
    harms = [harm("in the forward", kind="hung")]
    # On a machine that is busy with other things, a step may take as long, too.
    summary = fit(tmp_path, clicks, harms, hang_timeout_s=6.0, max_failures=5)
    assert summary["steps"] == STEPS and charged(tmp_path) == STEPS
    assert same_model(tmp_path, undisturbed[0])


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("max_failures", [0, 2])
def test_one_workers_own_trouble_ends_the_run(
    tmp_path: Path, clicks: Path, max_failures: int
) -> None:
    """The other worker waits for it in a collective; nobody waits for ``hang_timeout_s``."""
    harms = [harm("mid-update", rank=0, kind="raised")]
    values = values_of(tmp_path, clicks, harms, cluster={"max_failures": max_failures})
    began = time.monotonic()
    with pytest.raises(DistDpError, match="this worker's own trouble"):
        Trainer(parse_config(values)).fit()
    assert came_true(tmp_path, harms)
    assert time.monotonic() - began < 240  # a minute where nothing else runs


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_worker_hangs_at_every_moment(
    undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path, clicks: Path
) -> None:
    """The watchdog ends it while they train; in a release, the other one waits no longer."""
    moments = ("before charge", "after charge", "mid-update", "mid-checkpoint", "mid-release")
    harms = [harm(moment, kind="hung") for moment in moments]
    summary = fit(tmp_path, clicks, harms, hang_timeout_s=8.0, max_failures=12)
    assert summary["steps"] == STEPS and charged(tmp_path) == STEPS
    assert same_model(tmp_path, undisturbed[0])
    assert Ledger(tmp_path / "ledger.sqlite").run_status("run") == "completed"
