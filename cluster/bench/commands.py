"""The commands of ``dist-dp bench``; heavy imports happen inside."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from dist_dp.cluster.bench.model_commands import check_model, machine
from dist_dp.cluster.bench.sparsity_command import sparsity
from dist_dp.cluster.readable_errors import readable_errors
from dist_dp.errors import ConfigError
from dist_dp.limits import read_json

bench_app = typer.Typer(help="Measure what privacy costs on this machine.")
bench_app.command("machine")(machine)
bench_app.command("check-model")(check_model)
bench_app.command("sparsity")(sparsity)


@bench_app.command("step")
@readable_errors
def step(
    preset: Annotated[str | None, typer.Option(help="Named settings; see --list-presets.")] = None,
    mechanisms: Annotated[
        str | None, typer.Option(help="Separated by commas; none is always measured.")
    ] = None,
    tables: Annotated[int | None, typer.Option(min=1, help="Number of equal tables.")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Rows of each table.")] = None,
    dim: Annotated[int | None, typer.Option(min=4, help="Columns of each table.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Expected examples a step.")] = None,
    pooling: Annotated[int | None, typer.Option(min=1, help="Ids in each bag.")] = None,
    skew: Annotated[str | None, typer.Option(help="uniform, low, medium or high.")] = None,
    records: Annotated[int | None, typer.Option(min=1, help="Records to draw from.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes.")] = None,
    sharding: Annotated[str | None, typer.Option(help="Kind for all tables.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Turns of each mechanism.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Timed steps a turn.")] = None,
    warmup: Annotated[int | None, typer.Option(min=0, help="Untimed steps a turn.")] = None,
    release: Annotated[
        bool | None, typer.Option("--release/--no-release", help="Time settling all rows.")
    ] = None,
    release_every: Annotated[
        int | None, typer.Option(min=1, help="Steps to spread the release's cost over.")
    ] = None,
    look_ahead: Annotated[
        bool, typer.Option("--look-ahead", help="lazydp settles the next batch beside this one.")
    ] = False,
    false_positives: Annotated[
        float | None, typer.Option(min=0, help="adafest: rows a step that no example touches.")
    ] = None,
    kept_rows: Annotated[
        int | None, typer.Option(min=1, help="fest: rows of a table that are trained.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures to this file, too.")
    ] = None,
    list_presets: Annotated[
        bool, typer.Option("--list-presets", help="Show the presets and exit.")
    ] = False,
) -> None:
    """Time a step of each mechanism beside a step without privacy, in turns."""
    from dist_dp.cluster.bench import presets
    from dist_dp.cluster.bench.tables import print_step
    from dist_dp.cluster.bench.world import run_step, to_stderr

    if list_presets:
        presets.show()
        return
    check_writable(json_file)
    settings = presets.chosen(preset, tables=tables, rows=rows, dim=dim).changed(
        mechanisms=tuple(mechanisms.split(",")) if mechanisms else None,
        batch=batch,
        pooling=pooling,
        skew=skew,
        records=records,
        workers=workers,
        sharding=sharding,
        rounds=rounds,
        steps=steps,
        warmup=warmup,
        release=release,
        release_every=release_every,
        look_ahead=look_ahead,
        false_positives=false_positives,
        kept_rows=kept_rows,
    )
    result = run_step(settings, to_stderr)
    print_step(result)
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


@bench_app.command("accountant")
@readable_errors
def accountant(
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures to this file, too.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Times each way is measured.")] = 3,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long each time.")] = 1.0,
) -> None:
    """Time the ledger: leases a second, and what a step waits for its charge."""
    from dist_dp.cluster.bench.accountant import run, show
    from dist_dp.cluster.bench.world import to_stderr

    check_writable(json_file)
    result = run(to_stderr, rounds=rounds, seconds=seconds)
    show(result)
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def check_writable(file: Path | None, option: str = "--json") -> None:
    """Refuses, before anything is measured, a file that could not be written in the end.

    Raises:
        typer.BadParameter: There is no such folder, it may not be written to, or it is the file.
    """
    if file is None:
        return
    folder = file.resolve().parent
    if not folder.is_dir():
        raise typer.BadParameter(f"no folder {file.parent}", param_hint=option)
    if file.is_dir():
        raise typer.BadParameter(f"{file} is a folder; name a file", param_hint=option)
    if not os.access(file if file.exists() else folder, os.W_OK):
        raise typer.BadParameter(f"{file} may not be written", param_hint=option)


@bench_app.command("scaling")
@readable_errors
def scaling(
    rows: Annotated[
        str | None, typer.Option(help="Rows of each table at each size, separated by commas.")
    ] = None,
    mechanisms: Annotated[
        str | None, typer.Option(help="Separated by commas; none is always measured.")
    ] = None,
    tables: Annotated[int | None, typer.Option(min=1, help="Number of equal tables.")] = None,
    dim: Annotated[int | None, typer.Option(min=4, help="Columns of each table.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Expected examples a step.")] = None,
    records: Annotated[int | None, typer.Option(min=1, help="Records to draw from.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Turns of each mechanism.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Timed steps a turn.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures to this file, too.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Write a plot to this file, in SVG, log-log.")
    ] = None,
    from_json: Annotated[
        Path | None, typer.Option(help="Measure nothing: print and plot this file of --json.")
    ] = None,
) -> None:
    """Time a step at several table sizes."""
    from dist_dp.cluster.bench import presets
    from dist_dp.cluster.bench.scaling import MECHANISMS, ROWS, print_scaling, run_scaling
    from dist_dp.cluster.bench.scaling_chart import scaling_svg
    from dist_dp.cluster.bench.world import to_stderr

    check_writable(json_file)
    check_writable(plot, "--plot")
    if from_json is not None:
        try:
            result = read_json(from_json)
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read the measurements '{from_json}': {error}") from None
    else:
        settings = presets.chosen(None, tables=tables, rows=None, dim=dim).changed(
            mechanisms=tuple(mechanisms.split(",")) if mechanisms else MECHANISMS,
            batch=batch,
            records=records,
            workers=workers,
            rounds=rounds,
            steps=steps,
            release=False,
        )
        sizes = _numbers(rows) if rows else ROWS
        result = run_scaling(settings, sizes, to_stderr)
    print_scaling(result)
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if plot is not None:
        plot.write_text(scaling_svg(result), encoding="utf-8")


def _numbers(text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part.replace("_", "")) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise typer.BadParameter(
            f"'{text}' is no list of whole numbers above 0", param_hint="--rows"
        )
    return found
