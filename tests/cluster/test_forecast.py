"""``dist-dp plan`` forecasts a step; the model behind it against the figures that were measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dist_dp.cluster.bench.check_model import TOLERANCE, compare
from dist_dp.cluster.cli import app
from dist_dp.cost_model import MachineRates

ROOT = Path(__file__).parents[2]
# Noise on few rows has no cost model yet, and gradient sizes are no steps.
FIGURES = sorted(
    f
    for f in (ROOT / "docs" / "figures").rglob("*.json")
    if f.parent.name != "sparse" and not f.stem.startswith("sparsity")
)
MLPERF = ROOT / "examples" / "mlperf_dlrm.yaml"


def planned(*options: str) -> dict[str, Any]:
    arguments = ["plan", "--config", str(MLPERF), "--num-records=4195197692", "--json", *options]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    report: dict[str, Any] = json.loads(result.stdout)
    return report


@pytest.mark.parametrize("file", FIGURES, ids=lambda f: f.stem)
def test_measured_steps_are_predicted(file: Path) -> None:
    """Every point of docs/performance.md, with rates measured apart from them."""
    found = compare(json.loads(file.read_text()), MachineRates.shipped())
    assert len(found) >= 2
    wrong = {c.mechanism: c.error for c in found if abs(c.error) > TOLERANCE}
    assert not wrong


def test_there_are_figures() -> None:
    assert len(FIGURES) >= 16


def test_96_gigabytes_on_8_workers() -> None:
    report = planned()
    assert sum(t["bytes"] for t in report["tables"]) == 187_767_399 * 128 * 4
    forecast = report["forecast"]
    assert forecast["step_ms"] == pytest.approx(sum(forecast["phases_ms"].values()))
    assert 0.5 < forecast["ratio_to_none"] < 1.0
    assert forecast["examples_per_second"] == pytest.approx(16384 / forecast["step_ms"] * 1e3)
    tuned = planned("--set", "privacy.mechanism=dpsgd")["forecast"]
    assert tuned["step_ms"] > 2 * forecast["step_ms"]
    assert tuned["work"]["normals"] > 187_767_399 * 128 / 8


def test_a_slower_network_and_faster_workers() -> None:
    plain = planned()["forecast"]
    slow = planned("--network-gbits=0.1")["forecast"]
    assert slow["phases_ms"]["communication"] > 2 * plain["phases_ms"]["communication"]
    assert slow["phases_ms"]["clip"] == plain["phases_ms"]["clip"]
    more = planned("--set", "cluster.threads_per_worker=8")["forecast"]
    assert more["threads_a_worker"] == 8
    assert more["phases_ms"]["clip"] == pytest.approx(plain["phases_ms"]["clip"] / 4, rel=0.3)


def test_rates_of_another_machine(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app,
        ["plan", "--config", str(MLPERF), "--num-records=4195197692", "--machine", "missing.json"],
    )
    assert result.exit_code != 0
    assert "cannot read the machine's rates 'missing.json'" in " ".join(result.output.split())
