"""The commands of ``dist-dp bench`` around the cost model; heavy imports happen inside."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from dist_dp.cluster.readable_errors import readable_errors


@readable_errors
def machine(
    json_file: Annotated[Path, typer.Option("--json", help="Write the rates to this file.")],
    rounds: Annotated[int, typer.Option(help="ChaCha rounds of the noise: 20 or 12.")] = 20,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of one worker; by default all cores.")
    ] = None,
) -> None:
    """Measure this machine's rates for the cost model (dist-dp plan --machine)."""
    from dist_dp.cluster.bench.commands import check_writable
    from dist_dp.cluster.bench.machine import measure_machine
    from dist_dp.cluster.bench.world import to_stderr

    if rounds not in (20, 12):
        raise typer.BadParameter("20 or 12", param_hint="--rounds")
    check_writable(json_file)
    rates = measure_machine(
        to_stderr,
        threads=threads or os.cpu_count() or 1,
        rounds=rounds,
        folder=json_file.resolve().parent,
    )
    rates.save(json_file)
    for name, value in rates.readable():
        print(f"{name:<32} {value}")


@readable_errors
def check_model(
    file: Annotated[Path, typer.Argument(help="What --json of bench step or scaling wrote.")],
    machine: Annotated[
        Path | None,
        typer.Option(help="Rates of the machine (dist-dp bench machine); else the shipped ones."),
    ] = None,
    phases: Annotated[bool, typer.Option("--phases", help="Show every phase, too.")] = False,
) -> None:
    """Compare measured steps with the cost model; exit status 1 beyond 25 %."""
    from dist_dp.cluster.bench.check_model import run_check

    if not run_check(file, machine, phases=phases):
        raise typer.Exit(1)
