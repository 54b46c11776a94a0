"""Noise on few rows from the command line: what is refused, what a plan says, and whole runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_dp.cluster.config import parse_config
from dist_dp.cluster.metrics_log import read_metrics
from dist_dp.cluster.trainer import Trainer
from dist_dp.events import TopKEvent
from dist_dp.ledger import Ledger
from dist_dp.released import Release
from tests.cluster import test_faults
from tests.cluster.small import assert_one_line_error, run, small, write_config

ADAFEST: dict[str, Any] = {
    "mechanism": "adafest",
    "sparse": {"false_positives": 5, "selection_share": 0.2},
}
BOTH: dict[str, Any] = {
    "mechanism": "adafest+",
    "sparse": {
        "rows": 40,
        "choice_epsilon": 0.5,
        "choice_noise": "gumbel",
        "threshold": 3.0,
        "selection_share": 0.3,
        "max_contribution_norm": 2.0,
    },
}


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"train": {"table_optimizer": "adagrad"}}, ("train.table_optimizer", "adafest")),
        (
            {
                "privacy": {"mechanism": "none", "epsilon": None},
                "train": {"table_optimizer": "adam"},
            },
            ("train.table_optimizer", "adafest"),
        ),
        ({"privacy": {"mechanism": "adafest"}}, ("sparse is missing",)),
        ({"privacy": ADAFEST | {"sparse": {"selection_share": 1.0}}}, ("selection_share is 1",)),
        ({"privacy": ADAFEST, "noise": {"grid": "auto"}}, ("noise.grid", "lazydp")),
        ({"privacy": ADAFEST, "train": {"look_ahead": True}}, ("train.look_ahead", "lazydp")),
        ({"privacy": {"mechanism": "lazydp", "sparse": {"threshold": 1}}}, ("sparse is set",)),
        (
            {"privacy": BOTH | {"sparse": BOTH["sparse"] | {"rows": {"C1": 10**6}}}},
            ("1,000,000 rows of table 'C1'",),
        ),
        ({"privacy": BOTH | {"sparse": BOTH["sparse"] | {"rows": 10**6}}}, ("largest table",)),
        ({"privacy": ADAFEST | {"sparse": {"thresh": 1}}}, ("thresh",)),
    ],
)
def test_wrong_settings_are_one_line(
    tmp_path: Path, sections: dict[str, Any], words: tuple[str, ...]
) -> None:
    config = write_config(tmp_path, small(tmp_path, None, **sections))
    refused = run("plan", "-c", config, "--num-records", "10000")
    assert_one_line_error(refused, *words)


def test_a_plan_says_what_a_selection_comes_to(tmp_path: Path) -> None:
    config = write_config(tmp_path, small(tmp_path, None, privacy=ADAFEST))
    said = run("plan", "-c", config, "--num-records", "10000")
    assert said.exit_code == 0, said.output
    assert "5.0 that no unit touches, in the mean" in " ".join(said.output.split())
    found = json.loads(run("plan", "-c", config, "--num-records", "10000", "--json").output)
    selection = found["selection"]
    assert selection["false_positives"] == pytest.approx(5.0)
    assert selection["false_positive_coordinates"] == pytest.approx(40.0)
    assert selection["most_rows"] <= 5 + 26 * 128 + 1e-6
    assert selection["all_coordinates"] == 8 * selection["all_rows"]
    assert found["memory_bytes_by_worker"][0]["history"] == 0


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_and_one_that_loses_a_worker_are_the_same(
    ray_local: None, tmp_path: Path, clicks: Path
) -> None:
    """AdaFEST+ with Adagrad: selections, chosen rows and row states come out again, bit for bit."""
    privacy = BOTH | {"noise_multiplier": 1.0, "epsilon": None, "seed": 7, "delta": 1e-5}
    train = {
        "steps": test_faults.STEPS,
        "checkpoint_every": 4,
        "lease_steps": 5,
        "table_optimizer": "adagrad",
        "learning_rate": 0.05,
    }
    ends = {}
    for name, harms in (("whole", []), ("killed", [test_faults.harm("mid-update", rank=1)])):
        folder = tmp_path / name
        folder.mkdir()
        values = test_faults.values_of(folder, clicks, harms, privacy=privacy, train=train)
        summary = Trainer(parse_config(values)).fit()
        assert summary["steps"] == test_faults.STEPS
        ends[name] = folder
    assert test_faults.came_true(ends["killed"], [None])
    assert test_faults.same_model(ends["killed"], ends["whole"])
    for folder in ends.values():
        charges = Ledger(folder / "ledger.sqlite").run_charges("run")
        assert sum(n for e, n in charges.items() if isinstance(e, TopKEvent)) == 1
        assert sum(charges.values()) == test_faults.STEPS + 1
    rows = read_metrics(ends["whole"] / "runs" / "run")["noised_rows"]
    released = Release.open(ends["whole"] / "runs" / "run" / "release")
    trained = sum(released.table(name).shape[0] for name in released.manifest["tables"])
    assert 0 < rows.mean() < trained
    assert torch.isfinite(torch.cat([t.flatten() for t in released.dense().values()])).all()
