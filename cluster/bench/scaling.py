"""Step time against table size: the same benchmark at several sizes, one process each."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.table import Table

from dist_dp.cluster.bench.settings import StepSettings
from dist_dp.cluster.bench.tables import footer
from dist_dp.errors import ConfigError

MECHANISMS = ("none", "lazydp", "dpsgd", "dpsgd-torch")
ROWS = (100_000, 225_000, 450_000, 900_000)
"""Rows of each of the 26 tables: 1.3, 3, 6 and 12 GB at 128 columns."""


def run_scaling(
    settings: StepSettings, rows: Sequence[int], say: Callable[[str], None]
) -> dict[str, Any]:
    """Measures every size, smallest first.

    Args:
        settings: What to measure at each size; its tables are all alike.
        rows: Rows of each table, one number for each size.
        say: Told what is going on.

    Returns:
        What goes to the JSON file.

    Raises:
        ConfigError: Fewer than two sizes.
    """
    from dist_dp.cluster.bench.world import run_step

    sizes = sorted(set(rows))
    if len(sizes) < 2:
        raise ConfigError("--rows: give two sizes or more, separated by commas")
    points: list[dict[str, Any]] = []
    machine: dict[str, Any] = {}
    for size in sizes:
        point = replace(settings, rows=(size,) * len(settings.rows))
        say(f"{point.table_bytes / 1e9:.1f} GB of tables")
        result = run_step(point, say, apart=True)
        machine = result["machine"]
        points.append({key: result[key] for key in ("settings", "results", "seconds")})
    return {
        "command": "dist-dp bench scaling",
        "machine": machine,
        "points": points,
        "growth": growth(points),
    }


def growth(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """How much longer a step takes at the largest size than at the smallest, by mechanism."""
    small, large = ({r["mechanism"]: r for r in p["results"]} for p in (points[0], points[-1]))
    return [
        {
            "mechanism": name,
            "step_ms_smallest": small[name]["step_ms"],
            "step_ms_largest": large[name]["step_ms"],
            "ratio": large[name]["step_ms"] / small[name]["step_ms"],
        }
        for name in small
    ]


def print_scaling(result: dict[str, Any]) -> None:
    """Prints step times by size, and their growth."""
    points = result["points"]
    table = Table(box=None, pad_edge=False)
    table.add_column("ms a step")
    for point in points:
        table.add_column(f"{point['settings']['table_bytes'] / 1e9:.1f} GB", justify="right")
    table.add_column("largest ÷ smallest", justify="right")
    for row in result["growth"]:
        name = row["mechanism"]
        found = [r["step_ms"] for p in points for r in p["results"] if r["mechanism"] == name]
        table.add_row(name, *(f"{ms:,.1f}" for ms in found), f"{row['ratio']:.2f}")
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(table, "")
    seconds = sum(p["seconds"] for p in points)
    for line in footer({**points[-1], "machine": result["machine"], "seconds": seconds}):
        console.print(line)
