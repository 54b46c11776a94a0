"""How long a step of a planned run will take: ``dist-dp plan``'s use of the cost model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dist_dp.cluster.config import RunConfig
from dist_dp.cluster.workload import PlannedTable, slowest, workloads
from dist_dp.cost_model import MachineRates, predict, release_seconds
from dist_dp.plan import PrivacyPlan
from dist_dp.step_counts import step_counts, total
from dist_dp.step_shapes import DenseShape


@dataclass(frozen=True)
class Speed:
    """What a forecast assumes.

    Attributes:
        machine: File of ``dist-dp bench machine``; by default the rates that are shipped.
        pooling: Ids in each bag.
        network_gbits: Of one worker's link, each way; by default what the rates were measured with.
        latency_us: Of a message, in microseconds; likewise.
    """

    machine: Path | None = None
    pooling: float = 1.0
    network_gbits: float | None = None
    latency_us: float | None = None

    def rates(self, threads: int | None) -> MachineRates:
        """The rates of a worker.

        Args:
            threads: Its threads; by default those the rates were measured with.

        Raises:
            ConfigError: The file cannot be read.
        """
        found = MachineRates.shipped() if self.machine is None else MachineRates.load(self.machine)
        if threads is not None:
            found = found.with_threads(threads)
        if self.network_gbits is None and self.latency_us is None:
            return found
        link = float("inf") if self.network_gbits is None else self.network_gbits * 1e9 / 8
        wait = found.round_seconds if self.latency_us is None else 1e-6 * self.latency_us
        return found.with_network(link, wait)


def forecast_step(
    config: RunConfig,
    tables: Sequence[PlannedTable],
    dense: DenseShape,
    plan: PrivacyPlan,
    speed: Speed,
    records: float | None = None,
) -> dict[str, Any]:
    """Predicted time of a step on CPUs, of the slowest worker; see docs/cost-model.md.

    Tables with momentum, of half precision or with Adagrad are counted as plain ones.

    Args:
        config: Of the run.
        tables: As the workers would hold them.
        dense: The model outside its tables.
        plan: The privacy plan.
        speed: What to assume.
        records: Records of a step, where the plan's batch counts users. What it costs to clip them
            by user is not counted.

    Returns:
        Simple types: ``step_ms`` and ``phases_ms``, ``none_ms`` for the same step without privacy,
        the ``work`` behind them, and the ``release_seconds`` of settling and writing.
    """
    workers = config.cluster.num_workers
    rates = speed.rates(config.cluster.threads_per_worker)
    records = plan.expected_batch_size if records is None else records

    def of(mechanism: str) -> tuple[dict[str, float], Any]:
        found = workloads(
            mechanism,
            tables,
            dense,
            expected_batch_size=records,
            workers=workers,
            pooling=speed.pooling,
        )
        by_worker = [predict(w, rates) for w in found]
        worst = slowest(by_worker)
        return worst, found[by_worker.index(worst)]

    seconds, workload = of(plan.mechanism)
    floor, _ = of("none")
    work = total(step_counts(workload))
    return {
        "step_ms": 1e3 * seconds["total"],
        "phases_ms": {k: 1e3 * v for k, v in seconds.items() if k != "total"},
        "none_ms": 1e3 * floor["total"],
        "examples_per_second": records / seconds["total"],
        "ratio_to_none": floor["total"] / seconds["total"],
        "release_seconds": release_seconds(workload, rates),
        "work": {
            "matmul_flops": work.matmul_flops + work.small_matmul_flops,
            "normals": work.settle_normals + work.stream_normals + work.torch_normals,
            "table_bytes": work.lookup.id_bytes + 2 * work.update.row_bytes + work.stream_bytes,
            "sent_bytes": work.all_to_all_bytes + work.all_reduce_bytes + work.all_gather_bytes,
            "messages": work.rounds,
        },
        "threads_a_worker": rates.threads,
        "pooling": speed.pooling,
        "rates": rates.source,
    }


def print_forecast(console: Console, forecast: dict[str, Any]) -> None:
    """Prints a forecast for a person."""
    table = Table(title="forecast of a step", title_justify="left", show_header=False)
    work = forecast["work"]
    table.add_row("step", f"{forecast['step_ms']:,.0f} ms")
    table.add_row("examples a second", f"{forecast['examples_per_second']:,.0f}")
    table.add_row(
        "of the speed without privacy",
        f"{forecast['ratio_to_none']:.2f} (a step takes {forecast['none_ms']:,.0f} ms then)",
    )
    phases = sorted(forecast["phases_ms"].items(), key=lambda item: -item[1])
    table.add_row("where", ", ".join(f"{name} {ms:,.1f}" for name, ms in phases if ms >= 0.05))
    table.add_row(
        "a worker's work",
        f"{work['matmul_flops']:.3g} flops, {work['normals']:.3g} normals, "
        f"{work['table_bytes']:.3g} bytes of tables, {work['sent_bytes']:.3g} bytes sent in "
        f"{work['messages']:.0f} rounds",
    )
    table.add_row("release", f"{forecast['release_seconds']:,.0f} s")
    table.add_row(
        "assumes",
        f"{forecast['threads_a_worker']} threads a worker, {forecast['pooling']:g} ids a bag; "
        f"rates {forecast['rates']}",
    )
    console.print(table)
