"""``dist-dp bench check-model``: measured steps beside the cost model's predictions."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

from dist_dp.cluster.bench.settings import SKEWS, StepSettings
from dist_dp.cost_model import MachineRates, predict
from dist_dp.errors import ConfigError
from dist_dp.limits import read_json

TOLERANCE = 0.25
"""Relative error up to which a prediction counts as right."""


@dataclass(frozen=True)
class Comparison:
    """One measured point and its prediction.

    Attributes:
        mechanism: Its name.
        settings: What was measured.
        measured_ms: Median step.
        predicted_ms: Predicted step.
        measured_phases_ms: By phase.
        predicted_phases_ms: By phase.
    """

    mechanism: str
    settings: StepSettings
    measured_ms: float
    predicted_ms: float
    measured_phases_ms: dict[str, float]
    predicted_phases_ms: dict[str, float]

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return self.predicted_ms / self.measured_ms - 1.0


def compare(result: dict[str, Any], rates: MachineRates) -> list[Comparison]:
    """Every measured point of a ``dist-dp bench`` file with its prediction.

    Args:
        result: As ``dist-dp bench step`` or ``dist-dp bench scaling`` wrote it.
        rates: Of the machine it was measured on.

    Raises:
        ConfigError: The file holds something else.
    """
    if result.get("command") == "dist-dp bench step":
        points = [result]
    elif result.get("command") == "dist-dp bench scaling":
        points = result["points"]
    else:
        raise ConfigError(
            "no measured steps in the file: give what --json of dist-dp bench step or dist-dp "
            "bench scaling wrote"
        )
    threads = int(result["machine"]["threads_a_worker"])
    return [c for point in points for c in _compare(point, rates.with_threads(threads))]


def _compare(point: dict[str, Any], rates: MachineRates) -> Iterator[Comparison]:
    from dist_dp.cluster.bench.model import build_models
    from dist_dp.cluster.workload import dense_shape, planned_tables, slowest, workloads
    from dist_dp.sharding import ShardingKind, TableOptimizer

    settings = settings_of(point["settings"])
    model, _ = build_models(settings)
    tables = planned_tables(
        model,
        cast(ShardingKind, settings.kind),
        workers=settings.workers,
        device_type="cpu",
        batch_size=settings.batch // settings.workers,
        optimizer=TableOptimizer(),
    )
    dense = dense_shape(model)
    for row in point["results"]:
        found = workloads(
            row["mechanism"],
            tables,
            dense,
            expected_batch_size=settings.batch,
            workers=settings.workers,
            pooling=settings.pooling,
            skew=SKEWS[settings.skew],
        )
        seconds = slowest([predict(w, rates) for w in found])
        phases = {name: 1e3 * value for name, value in seconds.items()}
        total = phases.pop("total")
        yield Comparison(
            row["mechanism"], settings, row["step_ms"], total, row["phases_ms"], phases
        )


def settings_of(values: dict[str, Any]) -> StepSettings:
    """The settings in a benchmark's file."""
    known = {f.name for f in fields(StepSettings)}
    given: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known
    }
    if isinstance(values["rows"], int):
        given["rows"] = (values["rows"],) * values["tables"]
    return StepSettings(**given)


def run_check(file: Path, machine: Path | None, *, phases: bool) -> bool:
    """Compares and prints; the ``check-model`` command.

    Returns:
        Whether every prediction is within :data:`TOLERANCE`.

    Raises:
        ConfigError: A file cannot be read or holds something else.
    """
    try:
        result: Any = read_json(file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the measurements '{file}': {error}") from None
    rates = MachineRates.shipped() if machine is None else MachineRates.load(machine)
    found = compare(result, rates)
    _print(found, rates, phases=phases)
    return all(abs(c.error) <= TOLERANCE for c in found)


def _print(found: list[Comparison], rates: MachineRates, *, phases: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    table = Table(box=None, pad_edge=False)
    table.add_column("mechanism")
    for title in ("tables", "batch", "workers", "measured", "predicted", "error"):
        table.add_column(title, justify="right")
    for c in found:
        mark = "" if abs(c.error) <= TOLERANCE else "  beyond"
        table.add_row(
            c.mechanism,
            f"{c.settings.table_bytes / 1e9:.2f} GB",
            str(c.settings.batch),
            str(c.settings.workers),
            f"{c.measured_ms:,.1f} ms",
            f"{c.predicted_ms:,.1f} ms",
            f"{100 * c.error:+.0f} %{mark}",
        )
        names = dict.fromkeys([*c.measured_phases_ms, *c.predicted_phases_ms]) if phases else {}
        for name in names:
            measured, predicted = (
                f"{v:,.2f}" if v is not None else ""
                for v in (c.measured_phases_ms.get(name), c.predicted_phases_ms.get(name))
            )
            table.add_row(f"  {name}", "", "", "", measured, predicted, "")
    console.print(table, "")
    worst = max((abs(c.error) for c in found), default=0.0)
    beyond = sum(abs(c.error) > TOLERANCE for c in found)
    console.print(
        f"largest error {100 * worst:.0f} %; {beyond} of {len(found)} points beyond "
        f"{100 * TOLERANCE:.0f} %. Rates: {rates.source}"
    )
