"""What ``dist-dp bench sparsity`` prints: the references, the frontier at each ε, all points."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from dist_dp.cluster.bench.sparsity_frontier import LOSS_ALLOWED

_NAMES = {
    "rows": "k",
    "threshold": "τ",
    "contribution_norm": "C₁",
    "share": "ratio",
    "selections": "m",
}


def print_sparsity(result: dict[str, Any], *, every_point: bool = False) -> None:
    """Prints the figures of a run.

    Args:
        result: What :func:`dist_dp.cluster.bench.sparsity.run_sparsity` returned.
        every_point: All points, and not the frontier alone.
    """
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    data, settings = result["data"], result["settings"]
    console.print(
        f"{data['source']} records: {data['train_records']:,} to train, {data['public_records']:,} "
        f"public, {data['test_records']:,} to test; {len(data['table_rows'])} tables with "
        f"{sum(data['table_rows']):,} rows, {data['table_coordinates']:,} coordinates; dense "
        f"layers have {data['dense_coordinates']:,}. Batch {settings['batch']}, "
        f"{settings['steps']} steps, δ {settings['delta']:.2g}."
    )
    none = next(r for r in result["results"] if r["mechanism"] == "none")
    best = f", best possible {data['best_auc']:.4f}" if "best_auc" in data else ""
    console.print(
        f"AUC without privacy {none['auc']:.4f}, with the tables left as initialised "
        f"{result['frozen_tables']['none']:.4f}{best}."
    )
    for epsilon, auc in result["frozen_tables"].items():
        if epsilon != "none":
            console.print(f"AUC with lazydp at ε {epsilon}, tables left as initialised: {auc:.4f}.")
    shown = [r for r in result["results"] if r["epsilon"] is not None]
    for found in result["frontiers"]:
        here = [r for r in shown if r["epsilon"] == found["epsilon"]]
        console.print(_table(here if every_point else found["points"], found["epsilon"]), "")
        comparable = found["largest_comparable_reduction"]
        console.print(
            f"Most with an AUC loss below {LOSS_ALLOWED}: "
            f"{'none' if comparable is None else reduction_text(comparable)}",
            "",
        )
    console.print(f"{result['seconds'] / 60:,.0f} minutes")


def _table(rows: list[dict[str, Any]], epsilon: float) -> Table:
    table = Table(box=None, pad_edge=False, title=f"ε {epsilon:g}", title_justify="left")
    table.add_column("mechanism")
    table.add_column("settings")
    for name in ("rows a step", "reduction", "AUC", "AUC loss", "its spread"):
        table.add_column(name, justify="right")
    for row in sorted(rows, key=lambda r: -r["noised_rows_per_step"]):
        table.add_row(
            row["mechanism"],
            settings_text(row["settings"]),
            f"{row['noised_rows_per_step']:,.1f}",
            reduction_text(row["reduction_vs_dpsgd"]),
            f"{row['auc']:.4f}",
            f"{row['auc_loss']:.4f}",
            _spread(row),
        )
    return table


def _spread(row: dict[str, Any]) -> str:
    low, high = row["auc_loss_low"], row["auc_loss_high"]
    return "-" if low == high else f"{low:.4f} to {high:.4f}"


def settings_text(settings: dict[str, Any]) -> str:
    """A point's settings in a few letters."""
    return ", ".join(f"{_NAMES[name]} {value:g}" for name, value in settings.items())


def reduction_text(value: float | None) -> str:
    """Such as 1.3e5 ×; a dash where nothing was noised."""
    return "-" if value is None else f"{value:.2g} ×".replace("e+0", "e").replace("e+", "e")
