"""``dist-dp budget``: what the ledger says, and whether it is as it was written."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dist_dp.errors import ConfigError, LedgerError
from dist_dp.figures import round_up
from dist_dp.ledger import Entry, Ledger, Position
from dist_dp.ledger_address import LedgerAddress, default_ledger, ledger_address
from dist_dp.ledger_export import verify_export, write_export


def _address(given: str | None) -> LedgerAddress:
    return ledger_address(given) if given else default_ledger()


def _open(given: str | None) -> Ledger:
    address = _address(given)
    return Ledger(address, create=False)


def show(given: str | None, dataset: str | None) -> None:
    """Prints the spend of every data set, or the history of one."""
    ledger = _open(given)
    entries = ledger.history(dataset) if dataset is not None else []
    console = _console()
    table = Table(box=SIMPLE_HEAD)
    table.add_column("data set", overflow="fold")
    table.add_column("unit")
    for column in ("units", "spent ε", "of ε", "δ", "runs", "not private"):
        table.add_column(column, justify="right", no_wrap=True)
    for budget in ledger.datasets():
        if dataset is not None and budget.name != dataset:
            continue
        spend = ledger.spent(budget.name)
        table.add_row(
            budget.name,
            budget.unit,
            f"{budget.num_records:,}",
            round_up(spend.epsilon),
            f"{budget.epsilon:g}",
            f"{budget.delta:g}",
            str(len(spend.runs)),
            str(len(spend.non_private_runs)),
        )
    console.print(table)
    for line in _forecasts(ledger, dataset):
        console.print(line, highlight=False, markup=False)
    for entry in entries:
        steps = f"{entry.steps} steps" if entry.steps is not None else ""
        line = f"{entry.seq:>5} {entry.at} {entry.kind:<18} {entry.run_id or ''} {steps}"
        console.print(line.rstrip(), highlight=False, markup=False)


def _forecasts(ledger: Ledger, dataset: str | None) -> Iterator[str]:
    """How far the open runs will come."""
    for budget in ledger.datasets():
        if dataset is not None and budget.name != dataset:
            continue
        for run in ledger.spent(budget.name).runs:
            if ledger.run_status(run) != "open":
                continue
            found = ledger.forecast(run)
            if found is not None:
                end = (
                    f"the budget of {budget.name} ends at step {found.last_step:,}"
                    if found.ends_early
                    else f"all fit, ε is {round_up(found.epsilon)} then"
                )
                yield (
                    f"{run} is at step {found.charged_to:,} of {found.planned:,} planned; if no "
                    f"other run goes on, {end}"
                )


def change(
    given: str | None,
    dataset: str,
    epsilon: float,
    delta: float | None,
    reason: str,
    allow_large_delta: bool = False,
) -> None:
    """Sets a data set's total budget."""
    ledger = _open(given)
    now = next((b for b in ledger.datasets() if b.name == dataset), None)
    if now is None:
        raise LedgerError(f"the ledger knows no data set '{dataset}'; see dist-dp budget show")
    delta = delta if delta is not None else now.delta
    ledger.set_budget(dataset, epsilon, delta, reason, allow_large_delta=allow_large_delta)
    Console().print(
        f"budget of '{dataset}': ε = {now.epsilon:g} → {epsilon:g}, δ = {now.delta:g} → {delta:g}"
    )


def history(given: str | None, dataset: str | None, *, json_output: bool) -> None:
    """Prints every entry of a data set, or of the whole ledger."""
    entries = _open(given).history(dataset)
    if json_output:
        print(json.dumps([vars(entry) for entry in entries], indent=2))
        return
    table = Table(box=SIMPLE_HEAD)
    table.add_column("entry", justify="right", no_wrap=True)
    for column in ("at", "kind", "data set", "run", "steps", "what", "hash"):
        table.add_column(column, overflow="fold")
    for entry in entries:
        table.add_row(
            str(entry.seq),
            entry.at,
            entry.kind,
            escape(entry.dataset),
            escape(entry.run_id or ""),
            _steps(entry),
            escape(_what(entry.details)),
            entry.hash[:12],
        )
    _console().print(table)


def verify(given: str | None, exported: Path | None, *, adopt: bool, reason: str | None) -> None:
    """Checks the ledger, or an exported file, and says what it holds; an error on damage."""
    if adopt != (reason is not None):
        raise ConfigError("--adopt and --reason go together: say why the ledger is accepted")
    if exported is not None:
        if adopt:
            raise ConfigError("an exported file cannot be adopted: leave it out")
        position, state = verify_export(exported)
        print(f"{exported}: every entry has its hash and follows the one before")
        _print_position(position, len(state.datasets), len(state.runs))
        if given is not None:
            ledger = _open(given)
            ledger.check_contains(position)
            print(f"{ledger.address}: holds all of them, and goes on to {ledger.position().seq}")
        return
    ledger = Ledger(_address(given), adopt=reason) if adopt else _open(given)
    ledger.check_integrity()
    with ledger.reading() as (position, entries):
        kinds = Counter(entry.kind for entry in entries)
    print(f"{ledger.address}: every entry has its hash and follows the one before")
    _print_position(position, kinds["dataset_registered"], kinds["run_opened"])
    for kind, count in sorted(kinds.items()):
        print(f"  {count:>8,} {kind}")


def export(given: str | None, out: Path) -> None:
    """Writes the whole ledger to a file of JSON lines."""
    ledger = _open(given)
    print(f"{ledger.address} in {out}:")
    position = write_export(ledger, out)
    print(f"  {position.seq:,} entries, the last with hash {position.hash}")


def _print_position(position: Position, datasets: int, runs: int) -> None:
    print(
        f"  ledger {position.ledger_id}: {position.seq:,} entries, {datasets:,} data sets, "
        f"{runs:,} runs\n  last hash {position.hash}"
    )


def _steps(entry: Entry) -> str:
    if entry.steps is None:
        return ""
    first = f" from {entry.first_step}" if entry.first_step is not None else ""
    return f"{entry.steps}{first}"


def _what(details: dict[str, Any]) -> str:
    """The details that say something to a reader, in short."""
    shown = ("epsilon", "delta", "unit", "num_records", "status", "reason", "from", "entries")
    return ", ".join(f"{key} {details[key]}" for key in shown if key in details)


def _console() -> Console:
    console = Console()
    if not console.is_terminal:
        # Nobody's window: whoever reads a pipe wants whole names and figures.
        console.width = max(console.width, 200)
    return console
