"""The command ``dist-dp bench sparsity``; heavy imports happen inside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from dist_dp.cluster.readable_errors import readable_errors


@readable_errors
def sparsity(
    epsilons: Annotated[
        str | None, typer.Option("--epsilon", help="Separated by commas; by default 1,3,8.")
    ] = None,
    mechanisms: Annotated[
        str | None, typer.Option(help="Separated by commas; none and lazydp always take part.")
    ] = None,
    kept_rows: Annotated[
        str | None, typer.Option(help="fest: rows of each table that are trained.")
    ] = None,
    thresholds: Annotated[str | None, typer.Option(help="adafest: τ, in units of C₁.")] = None,
    contribution_norms: Annotated[str | None, typer.Option(help="adafest: C₁.")] = None,
    ratios: Annotated[
        str | None, typer.Option(help="adafest: the selection's share of a step's privacy.")
    ] = None,
    selections: Annotated[
        str | None, typer.Option(help="exponential: rows of all tables selected in a step.")
    ] = None,
    rates: Annotated[
        str | None,
        typer.Option(help="To try, tables:dense layers, for all mechanisms: 10:1,30:2."),
    ] = None,
    records: Annotated[int | None, typer.Option(min=1, help="Generated, to train on.")] = None,
    other_records: Annotated[
        int | None, typer.Option(min=1, help="Generated as public ones, and for the test.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Expected records a step.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of each run.")] = None,
    seeds: Annotated[
        str | None, typer.Option(help="The first for all points, the others for the frontier.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="A real set in place of generated records.")
    ] = None,
    data_format: Annotated[str, typer.Option("--format", help="Of --data.")] = "auto",
    max_rows: Annotated[
        int | None, typer.Option(min=1, help="Most rows of a table; by default all.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small tables, few points and steps: to try it out.")
    ] = False,
    workers: Annotated[
        int, typer.Option(min=1, help="Processes; each has a model of its own in memory.")
    ] = 1,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures to this file, too.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a plot to this file, in SVG.")] = None,
    from_json: Annotated[
        Path | None, typer.Option(help="Measure nothing: print and plot this file of --json.")
    ] = None,
    every_point: Annotated[
        bool, typer.Option("--every-point", help="Print all points, not the frontier alone.")
    ] = False,
) -> None:
    """Measure how few coordinates a step noises, against the AUC that costs."""
    from dist_dp.cluster.bench.commands import check_writable
    from dist_dp.cluster.bench.sparsity import run_sparsity
    from dist_dp.cluster.bench.sparsity_chart import sparsity_svg
    from dist_dp.cluster.bench.sparsity_settings import chosen
    from dist_dp.cluster.bench.sparsity_table import print_sparsity
    from dist_dp.cluster.bench.world import to_stderr
    from dist_dp.errors import ConfigError
    from dist_dp.limits import read_json

    check_writable(json_file)
    check_writable(plot, "--plot")
    if from_json is not None:
        try:
            result = read_json(from_json)
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read the measurements '{from_json}': {error}") from None
    else:
        settings = chosen(
            quick=quick,
            epsilons=_numbers(epsilons, "--epsilon"),
            mechanisms=tuple(mechanisms.split(",")) if mechanisms else None,
            kept_rows=_integers(kept_rows, "--kept-rows"),
            thresholds=_numbers(thresholds, "--thresholds"),
            contribution_norms=_numbers(contribution_norms, "--contribution-norms"),
            shares=_numbers(ratios, "--ratios"),
            selections=_integers(selections, "--selections"),
            rates=_rates(rates),
            records=records,
            other_records=other_records,
            batch=batch,
            steps=steps,
            seeds=_integers(seeds, "--seeds", least=0),
            path=data,
            format=data_format,
            max_rows=max_rows,
        )

        def save(so_far: dict[str, Any]) -> None:
            if json_file is not None:
                json_file.write_text(json.dumps(so_far, indent=1) + "\n", encoding="utf-8")

        result = run_sparsity(settings, to_stderr, workers=workers, save=save)
    print_sparsity(result, every_point=every_point)
    if plot is not None:
        plot.write_text(sparsity_svg(result), encoding="utf-8")


def _numbers(text: str | None, option: str) -> tuple[float, ...] | None:
    """Numbers above 0; None if the option is not given."""
    if text is None:
        return None
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(0 < value < float("inf") for value in found):
        raise typer.BadParameter(f"'{text}' is no list of numbers above 0", param_hint=option)
    return found


def _rates(text: str | None) -> tuple[tuple[float, float], ...] | None:
    """Pairs of numbers above 0."""
    if text is None:
        return None
    try:
        pairs = [[float(number) for number in part.split(":")] for part in text.split(",")]
        found = tuple((tables, dense) for tables, dense in pairs)
    except ValueError:
        found = ()
    if not found or not all(0 < value < float("inf") for pair in found for value in pair):
        raise typer.BadParameter(
            f"'{text}' is no list of pairs of rates above 0, such as 10:1,30:2",
            param_hint="--rates",
        )
    return found


def _integers(text: str | None, option: str, least: int = 1) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < least:
        raise typer.BadParameter(
            f"'{text}' is no list of whole numbers from {least} on", param_hint=option
        )
    return found
