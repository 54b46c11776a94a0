"""A benchmark's figures for people."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from dist_dp.cluster.bench.results import BESIDE, CRITICAL_PHASES

_GB = 1e9


def print_step(result: dict[str, Any]) -> None:
    """Prints what ``dist-dp bench step`` found.

    Args:
        result: As it goes to the JSON file.
    """
    # wide enough for the longest row when written to a file or pipe
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    for part in (speed_table(result), phase_table(result)):
        console.print(part, "")
    for line in (*release_lines(result), *footer(result)):
        console.print(line)


def speed_table(result: dict[str, Any]) -> Table:
    """Step times, ratios and memory; "lazydp ×" is how many times as fast lazydp is."""
    table = Table(box=None, pad_edge=False)
    table.add_column("mechanism")
    for title in ("examples/s", "step", "low–high", "× none", "low–high", "lazydp ×"):
        table.add_column(title, justify="right")
    for title in ("memory", "beyond none", "timed"):
        table.add_column(title, justify="right")
    for row in result["results"]:
        table.add_row(
            row["mechanism"],
            f"{row['examples_per_second']:,.0f}",
            f"{row['step_ms']:,.1f} ms",
            f"{row['step_ms_low']:,.1f}–{row['step_ms_high']:,.1f}",
            f"{row['ratio_to_none']:.3g}",
            f"{row['ratio_to_none_low']:.3g}–{row['ratio_to_none_high']:.3g}",
            f"{row['lazydp_speedup']:.3g}" if "lazydp_speedup" in row else "",
            f"{row['peak_memory_bytes'] / _GB:.2f} GB",
            f"{row['memory_beyond_none_bytes'] / 1e6:,.0f} MB",
            f"{row['rounds']} × {row['steps_a_round']}",
        )
    return table


def phase_table(result: dict[str, Any]) -> Table:
    """Milliseconds by phase, one column a mechanism."""
    rows = result["results"]
    table = Table(box=None, pad_edge=False)
    table.add_column("ms a step")
    for row in rows:
        table.add_column(row["mechanism"], justify="right")
    for name in (*CRITICAL_PHASES, *BESIDE):
        label = f"({name}, beside)" if name in BESIDE else name.replace("_", " ")
        values = [row["phases_ms"][name] for row in rows]
        table.add_row(label, *(f"{v:,.2f}" if abs(v) >= 0.005 else "" for v in values))
    return table


def release_lines(result: dict[str, Any]) -> list[str]:
    """What a release costs, one line a mechanism."""
    return [
        f"release, {row['mechanism']}: settling all rows {row['release']['settle_ms']:,.0f} ms, "
        f"{row['release']['ms_a_step']:.3f} ms a step over "
        f"{row['release']['spread_over_steps']:,} steps"
        for row in result["results"]
        if row["release"] is not None
    ]


def footer(result: dict[str, Any]) -> list[str]:
    """Machine and settings."""
    machine, settings = result["machine"], result["settings"]
    rows = settings["rows"]
    size = f"{rows:,} rows" if isinstance(rows, int) else f"{sum(rows):,} rows in all"
    return [
        f"{machine['processor']}, {machine['cores']} cores, "
        f"{machine['memory_bytes'] / _GB:.0f} GB, torch {machine['torch']}, kernels "
        f"{machine['kernels']}, huge pages {'on' if machine['huge_pages'] else 'off'}",
        f"{settings['tables']} tables, {size}, dim {settings['dim']} "
        f"({settings['table_bytes'] / _GB:.1f} GB), batch {settings['batch']}, pooling "
        f"{settings['pooling']}, skew {settings['skew']}, {settings['workers']} worker(s), "
        f"{settings['sharding']}; {result['seconds']:.0f} s in all",
    ]
