"""``dist-dp bench accountant``: every way is measured, on a real ledger and through Ray."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cluster.small import run


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_every_way_has_its_figures(tmp_path: Path) -> None:
    file = tmp_path / "accountant.json"
    result = run("bench", "accountant", "--rounds", "1", "--seconds", "0.2", "--json", file)
    assert result.exit_code == 0, result.output
    found = json.loads(file.read_text())
    ways = {row["way"]: row for row in found["results"]}
    assert len(ways) == 5 and sum(way.startswith("Ray") for way in ways) == 2
    for row in ways.values():
        assert 0 < row["low"] <= row["leases_per_second"] <= row["high"]
        assert row["steps_per_second"] == found["lease_steps"] * row["leases_per_second"]
    many = next(row for way, row in ways.items() if "in a call" in way)
    assert many["leases_per_second"] > 2 * ways["one caller"]["leases_per_second"]
    assert 0 < found["wait_share_of_step"] < 0.2
    assert f"{found['longest_wait_ms']:.1f} ms" in result.output
