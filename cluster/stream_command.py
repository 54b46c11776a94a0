"""``dist-dp stream``: trains period by period, and prints what came of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from dist_dp.cluster.readable_errors import readable_errors


@readable_errors
def stream(
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="YAML file; see examples/.")
    ] = None,
    periods: Annotated[
        list[str] | None,
        typer.Option("--period", help="Source of a period; repeatable, oldest first."),
    ] = None,
    epsilon: Annotated[float | None, typer.Option(help="ε of the whole stream.")] = None,
    delta: Annotated[float | None, typer.Option(help="δ; by default 0.1 / records.")] = None,
    num_workers: Annotated[
        int | None, typer.Option("--num-workers", "--workers", help="Number of Ray workers.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Running Ray cluster; by default one is started here.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the stream.")] = None,
    output: Annotated[str | None, typer.Option(help="Folder of all runs.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", "-s", help="Any setting, as KEY=VALUE; repeatable.")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show the libraries' logs.")] = False,
) -> None:
    """Train over periods in order of time, under one budget; the same command again goes on."""
    from rich.console import Console

    from dist_dp.cluster.config import load_config, parse_overrides
    from dist_dp.cluster.console import watched_fit
    from dist_dp.cluster.stream import Stream, guarantee_of

    options: dict[str, Any] = {
        "stream.periods": periods,
        "privacy.epsilon": epsilon,
        "privacy.delta": delta,
        "cluster.num_workers": num_workers,
        "cluster.address": address,
        "output.name": name,
        "output.folder": output,
    }
    given = {key: value for key, value in options.items() if value is not None}
    resolved = load_config(config, {**given, **parse_overrides(settings or [])})

    def fit(run: Any, changes: Mapping[str, Any]) -> tuple[dict[str, Any], Path]:
        return watched_fit(run, changes, verbose=verbose)

    says = Console(stderr=True)
    made = Stream(resolved, fit, say=lambda text: says.print(text, markup=False), verbose=verbose)
    results = made.run()
    print_stream(results, guarantee_of(results), made.folder)


def print_stream(results: Sequence[Mapping[str, Any]], guarantee: str, folder: Path) -> None:
    """Prints a line for each period, and what holds for all of them.

    Args:
        results: What each period has reached.
        guarantee: That of the stream.
        folder: The stream's folder.
    """
    from rich.console import Console
    from rich.table import Table

    from dist_dp.figures import round_up

    console = Console()
    table = Table("period", "records", "ε", "AUC on next", "log-loss on next", "new rows kept")
    for entry in results:
        if "epsilon" not in entry:
            table.add_row(entry["name"], "not trained yet")
            continue
        metrics = entry.get("next") or {}
        table.add_row(
            entry["name"],
            f"{entry['records']:,}",
            "∞" if entry["epsilon"] is None else round_up(entry["epsilon"]),
            _number(metrics.get("auc")),
            _number(metrics.get("log_loss")),
            _rows(entry.get("kept_rows")),
        )
    console.print(table)
    console.print(guarantee, markup=False)
    console.print(
        f"{folder}: stream.json, and a run for each period. Metrics are computed on the next "
        "period's records without noise, so no guarantee covers them.",
        markup=False,
        soft_wrap=True,
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _rows(kept: Mapping[str, Any] | None) -> str:
    if not kept or kept["changed"] is None:
        return "–"
    return f"{kept['changed']:,} of {kept['rows']:,}"
