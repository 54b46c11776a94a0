"""``dist-dp bench scaling``: its figures, their growth, and the plot."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from dist_dp.cluster.bench.scaling import growth
from dist_dp.cluster.bench.scaling_chart import scaling_svg
from tests.cluster.small import assert_one_line_error, run

SVG = "{http://www.w3.org/2000/svg}"


def points(*sizes: tuple[int, dict[str, float]]) -> dict[str, Any]:
    """A result with the given step times by mechanism, by size in bytes."""
    settings = {"tables": 26, "dim": 128, "batch": 2048}
    return {
        "points": [
            {
                "settings": {**settings, "table_bytes": size},
                "results": [
                    {"mechanism": name, "step_ms": ms, "step_ms_low": ms, "step_ms_high": 2 * ms}
                    for name, ms in found.items()
                ],
            }
            for size, found in sizes
        ]
    }


def test_growth_compares_the_largest_size_with_the_smallest() -> None:
    result = points(
        (10, {"none": 2.0, "x": 3.0}), (20, {"none": 9.0}), (40, {"none": 4.0, "x": 30.0})
    )
    assert [(g["mechanism"], g["ratio"]) for g in growth(result["points"])] == [
        ("none", 2),
        ("x", 10),
    ]


def circles(svg: str) -> list[tuple[float, float]]:
    root = ElementTree.fromstring(svg)
    return [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in root.iter(f"{SVG}circle")]


def test_the_plot_is_log_log() -> None:
    """Equal factors are equal distances, and more is up and to the right."""
    times = [(10**9, {"none": 1.0}), (10**10, {"none": 10.0}), (10**11, {"none": 1000.0})]
    (x0, y0), (x1, y1), (x2, y2) = circles(scaling_svg(points(*times)))
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and x1 > x0
    assert y1 - y2 == pytest.approx(2 * (y0 - y1), abs=0.3) and y1 < y0


def test_the_plot_names_every_curve_and_its_labels_do_not_meet() -> None:
    found = {"none": 100.0, "lazydp": 101.0, "dpsgd": 102.0, "dpsgd-torch": 1e5}
    svg = scaling_svg(points((10**9, found), (10**10, found)))
    root = ElementTree.fromstring(svg)
    labels = {
        (t.text or "").split()[0]: float(t.attrib["y"])
        for t in root.iter(f"{SVG}text")
        if (t.text or "").split()[0] in found and "y" in t.attrib
    }
    assert set(labels) == set(found)
    heights = sorted(labels.values())
    assert min(b - a for a, b in pairwise(heights)) > 12
    assert all(0 < x < 760 and 0 < y < 460 for x, y in circles(svg))


@pytest.mark.slow
def test_sizes_are_measured_and_plotted(tmp_path: Path) -> None:
    path, plot = tmp_path / "scaling.json", tmp_path / "scaling.svg"
    options = "--tables 2 --dim 8 --batch 16 --records 300 --rounds 2 --steps 1"
    chosen = ["--rows", "300,100", "--mechanisms", "lazydp"]
    done = run("bench", "scaling", *options.split(), *chosen, "--json", path, "--plot", plot)
    assert done.exit_code == 0, done.output + repr(done.exception)
    result = json.loads(path.read_text(encoding="utf-8"))
    assert [p["settings"]["rows"] for p in result["points"]] == [100, 300], "smallest first"
    assert [g["mechanism"] for g in result["growth"]] == ["none", "lazydp"]
    assert len(circles(plot.read_text(encoding="utf-8"))) == 4
    again = tmp_path / "again.svg"
    assert run("bench", "scaling", "--from-json", path, "--plot", again).exit_code == 0
    assert again.read_text(encoding="utf-8") == plot.read_text(encoding="utf-8")


def test_one_size_is_too_few() -> None:
    assert_one_line_error(run("bench", "scaling", "--rows", "100"), "--rows", "two sizes")


@pytest.mark.parametrize("rows", ["100,x", "0,5", ""])
def test_sizes_are_numbers(rows: str) -> None:
    result = run("bench", "scaling", "--rows", rows or ",")
    assert result.exit_code == 2 and "--rows" in result.stderr
