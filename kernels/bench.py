"""How fast the kernels are here: `python -m dist_dp.kernels.bench`.

Every row is measured once in each repetition, so that a machine that slows down slows all of them
down. Told are medians and the lowest and highest repetition. Weights count as bytes read and
written; "of limit" is against the slower of the generator alone and the same rows read,
multiplied and written without noise.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from dist_dp.kernels import bench_cases, bench_gpu, bench_states, dispatch
from dist_dp.kernels.bench_cases import Case, Suite

Speeds = dict[Case, list[float]]
"""Numbers per second of each repetition."""


def measure(suite: Suite, repetitions: int, console: Console) -> Speeds:
    """Measure all cases in turns."""
    speeds: Speeds = {case: [] for case in suite.cases}
    with console.status("warming up") as status:
        for repetition, case, speed in bench_cases.repetitions(suite, repetitions):
            status.update(f"repetition {repetition + 1} of {repetitions}")
            speeds[case].append(speed)
    return speeds


def result(suite: Suite, speeds: Speeds, case: Case) -> dict[str, Any]:
    """One row, as it stands in the JSON file."""
    unit = "gbytes_per_second" if case.weights else "mnormals_per_second_per_core"
    factor = 8e-9 if case.weights else 1e-6 / case.threads
    mine = speeds[case]
    row: dict[str, Any] = {
        "name": case.name,
        "isa": case.isa,
        "rounds": case.rounds,
        "threads": case.threads,
        unit: statistics.median(mine) * factor,
        "low": min(mine) * factor,
        "high": max(mine) * factor,
        "ratio_to_torch_normal": None,
    }
    if case in suite.torch_normal:
        base = suite.torch_normal[case]
        row["ratio_to_torch_normal"] = _ratio(speeds, case, (base,)) / case.threads
    if case.limits:
        row["fraction_of_limit"] = _ratio(speeds, case, case.limits)
    return row


def targets(suite: Suite, speeds: Speeds) -> list[dict[str, Any]]:
    """What was to be reached, and whether it was."""
    rows = []
    for target in suite.targets:
        measured = _ratio(speeds, target.case, target.against)
        reached = measured >= target.wanted
        rows.append(
            {
                "name": target.name,
                "wanted": target.wanted,
                "measured": measured,
                "reached": reached,
            }
        )
    return rows


def _ratio(speeds: Speeds, case: Case, against: tuple[Case, ...]) -> float:
    slowest = min(statistics.median(speeds[other]) for other in against)
    return statistics.median(speeds[case]) / slowest


def results_table(rows: list[dict[str, Any]]) -> Table:
    """The rows for people."""
    table = Table(box=None, pad_edge=False)
    table.add_column("", overflow="fold")
    table.add_column("with")
    for title in ("rounds", "threads", "speed", "low–high", "× torch", "of limit"):
        table.add_column(title, justify="right")
    table.add_column("unit")
    for row in rows:
        weights = "gbytes_per_second" in row
        speed = row["gbytes_per_second"] if weights else row["mnormals_per_second_per_core"]
        digits = ".1f" if weights else ".0f"
        ratio, fraction = row["ratio_to_torch_normal"], row.get("fraction_of_limit")
        table.add_row(
            row["name"],
            row["isa"],
            "" if row["rounds"] is None else str(row["rounds"]),
            str(row["threads"]),
            f"{speed:{digits}}",
            f"{row['low']:{digits}}–{row['high']:{digits}}",
            "" if ratio is None else f"{ratio:.2f}",
            "" if fraction is None else f"{fraction:.0%}",
            "GB/s" if weights else "M/s/core",
        )
    return table


def targets_table(rows: list[dict[str, Any]]) -> Table:
    """The targets for people."""
    table = Table(box=None, pad_edge=False)
    table.add_column("target")
    for title in ("wanted", "measured", "reached"):
        table.add_column(title, justify="right")
    for row in rows:
        reached = "yes" if row["reached"] else "no"
        table.add_row(row["name"], f"{row['wanted']:.2f}", f"{row['measured']:.2f}", reached)
    return table


def processor() -> str:
    """The processor's name, as the system tells it."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main(
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures to this file, too.")
    ] = None,
    repetitions: Annotated[int, typer.Option(min=1, help="Measurements of each row.")] = 7,
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny sizes, to try the command; no true figures.")
    ] = False,
) -> None:
    """Measure the kernels on this machine: takes 2.5 GiB of memory and some minutes."""
    if json_file is not None and not json_file.parent.is_dir():
        raise typer.BadParameter(f"no folder {json_file.parent}", param_hint="--json")
    isa = dispatch.chosen_isa()
    if isa is None:
        print(f"Nothing to measure: {dispatch.slow_reason()}", file=sys.stderr)
        raise typer.Exit(1)
    sizes = bench_cases.QUICK if quick else bench_cases.Sizes()
    suite = bench_cases.on_cpu(sizes, isa)
    bench_states.add(suite, sizes, isa)
    gpu = bench_gpu.add(suite, sizes)
    speeds = measure(suite, repetitions, Console(stderr=True))
    rows = [result(suite, speeds, case) for case in suite.cases]
    reached = targets(suite, speeds)
    # wide enough for the longest row when written to a file or pipe
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(results_table(rows), "", targets_table(reached), "")
    console.print(
        f"{processor()}, torch {torch.__version__}, {repetitions} repetitions"
        f"{', sizes too small for true figures' if quick else ''}; {gpu}",
        highlight=False,
    )
    if json_file is not None:
        content = {
            "processor": processor(),
            "torch": torch.__version__,
            "gpu": gpu,
            "repetitions": repetitions,
            "quick": quick,
            "results": rows,
            "targets": reached,
        }
        json_file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
