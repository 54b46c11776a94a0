"""``dist-dp budget``: what the ledger says."""

from __future__ import annotations

from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from dist_dp.account import default_ledger_path
from dist_dp.errors import LedgerError
from dist_dp.ledger import Ledger


def _open(path: Path | None) -> Ledger:
    path = path or default_ledger_path()
    if not path.exists():
        raise LedgerError(f"there is no ledger at '{path}'; give --ledger, or train first")
    return Ledger(path)


def show(path: Path | None, dataset: str | None) -> None:
    """Prints the spend of every data set, or the history of one."""
    ledger = _open(path)
    entries = ledger.history(dataset) if dataset is not None else []
    console = Console()
    if not console.is_terminal:
        # Nobody's window: whoever reads a pipe wants whole names and figures.
        console.width = max(console.width, 200)
    table = Table(box=SIMPLE_HEAD)
    table.add_column("data set", overflow="fold")
    table.add_column("unit")
    for column in ("records", "spent ε", "of ε", "δ", "runs", "not private"):
        table.add_column(column, justify="right", no_wrap=True)
    for budget in ledger.datasets():
        if dataset is not None and budget.name != dataset:
            continue
        spend = ledger.spent(budget.name)
        table.add_row(
            budget.name,
            budget.unit,
            f"{budget.num_records:,}",
            f"{spend.epsilon:.4g}",
            f"{budget.epsilon:.4g}",
            f"{budget.delta:.3g}",
            str(len(spend.runs)),
            str(len(spend.non_private_runs)),
        )
    console.print(table)
    for entry in entries:
        steps = f"{entry.steps} steps" if entry.steps is not None else ""
        line = f"{entry.seq:>5} {entry.at} {entry.kind:<18} {entry.run_id or ''} {steps}"
        console.print(line.rstrip(), highlight=False, markup=False)


def change(
    path: Path | None,
    dataset: str,
    epsilon: float,
    delta: float | None,
    reason: str,
    allow_large_delta: bool = False,
) -> None:
    """Sets a data set's total budget."""
    ledger = _open(path)
    now = next((b for b in ledger.datasets() if b.name == dataset), None)
    if now is None:
        raise LedgerError(f"the ledger knows no data set '{dataset}'; see dist-dp budget show")
    delta = delta if delta is not None else now.delta
    ledger.set_budget(dataset, epsilon, delta, reason, allow_large_delta=allow_large_delta)
    Console().print(
        f"budget of '{dataset}': ε = {now.epsilon:g} → {epsilon:g}, δ = {now.delta:g} → {delta:g}"
    )
