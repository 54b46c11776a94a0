"""``dist-dp plan``: what a run would be, before anything runs."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from dist_dp.cluster import quiet
from dist_dp.cluster.config import RunConfig
from dist_dp.cluster.console import skipped_text
from dist_dp.cluster.forecast import Speed, forecast_step, print_forecast
from dist_dp.cluster.job import make_plan
from dist_dp.cluster.models import build_model
from dist_dp.cluster.workload import PlannedTable, dense_shape, planned_tables
from dist_dp.datasets.schema import DataSchema
from dist_dp.errors import ConfigError
from dist_dp.figures import round_up
from dist_dp.noise_grid import MULTIPLES, spacing_text
from dist_dp.plan import PrivacyPlan
from dist_dp.selection_forecast import forecast_selection
from dist_dp.sharding import TableOptimizer
from dist_dp.sparse_settings import SPARSE_MECHANISMS

HISTORY_BYTES_A_ROW = 4
_OPTIMIZER_BYTES = {"sgd": 0, "adagrad": 4, "rowwise_adagrad": 0, "adam": 4}


def make_report(
    config: RunConfig,
    *,
    num_records: int | None = None,
    num_users: int | None = None,
    speed: Speed | None = None,
    verbose: bool = False,
) -> dict[str, Any]:
    """Plans noise, steps, memory, sharding and, on CPUs, the time of a step.

    Args:
        config: The configuration.
        num_records: Training records, to plan without reading data (the format's default schema
            or the declared one is used then).
        num_users: Users of the training records, likewise, with ``privacy.unit: user``; each is
            taken to have as many records in a step as it may.
        speed: What the forecast of a step's time assumes.
        verbose: Let libraries log.

    Returns:
        Simple types.

    Raises:
        ConfigError: Something does not fit together.
    """
    quiet.apply(verbose)
    skipped: dict[str, int] = {}
    unit = config.privacy.unit
    num_units = num_users if unit == "user" else num_records
    if num_units is None and (num_records, num_users) != (None, None):
        raise ConfigError(
            f"the unit of privacy is one {unit}: plan with --num-{unit}s, or change privacy.unit"
        )
    if num_units is None:
        from dist_dp.cluster.prepare import prepare

        prepared = prepare(config)
        schema, plan, dataset = prepared.schema, prepared.plan, prepared.dataset
        skipped = dict(prepared.store.manifest.skipped_rows)
        records_per_unit = prepared.records_per_unit
    else:
        schema, dataset = _declared_schema(config), config.data.name or "not named"
        plan = make_plan(config, num_units, schema.table_rows())
        records_per_unit = float(plan.max_records_per_user or 1)
    records = plan.expected_batch_size * records_per_unit
    model = build_model(config.model, schema)
    planned = _tables(config, model, records)
    tables = [_simple(table) for table in planned]
    memory = _memory_by_worker(config, tables)
    private = plan.is_private
    return {
        "dataset": dataset,
        "mechanism": plan.mechanism,
        "epsilon": plan.epsilon() if private else None,
        "delta": plan.delta if private else None,
        "noise_multiplier": plan.noise_multiplier,
        "noise_multiplier_range": list(plan.noise_multiplier_range()),
        "max_grad_norm": plan.max_grad_norm,
        "noise_grid": plan.noise_grid,
        "unit": plan.unit,
        f"num_{plan.unit}s": plan.num_units,
        "max_records_per_user": plan.max_records_per_user,
        "expected_records": records,
        "skipped_rows": skipped,
        "expected_batch_size": plan.expected_batch_size,
        "sample_rate": plan.sample_rate,
        "steps": plan.steps,
        "epochs": plan.steps * plan.expected_batch_size / plan.num_units,
        "num_workers": config.cluster.num_workers,
        "memory_bytes_by_worker": memory,
        "forecast": None
        if config.cluster.use_gpu or plan.mechanism in SPARSE_MECHANISMS
        else forecast_step(config, planned, dense_shape(model), plan, speed or Speed(), records),
        "selection": _selection(plan, planned, records, (speed or Speed()).pooling),
        "tables": tables,
        "statement": plan.statement(),
    }


def _selection(
    plan: PrivacyPlan, planned: list[PlannedTable], records: float, pooling: float
) -> dict[str, Any] | None:
    """What a step's selection of rows comes to, with so many ids in each bag."""
    found = forecast_selection(
        plan,
        {table.name: (table.rows, table.dim) for table in planned},
        {table.name: records * table.bags * pooling for table in planned},
    )
    return None if found is None else asdict(found)


def _declared_schema(config: RunConfig) -> DataSchema:
    from dist_dp.datasets.readers import criteo, movielens

    data = config.data
    if data.columns is not None:
        schema = data.columns
    elif data.format == "criteo":
        schema = criteo.default_schema()
    elif data.format == "movielens-100k":
        schema = movielens.default_schema("100k")
    elif data.format == "movielens-1m":
        schema = movielens.default_schema("1m")
    else:
        raise ConfigError(
            "data.format: planning without data needs a format with a schema of its own (criteo, "
            "movielens-100k, movielens-1m) or data.columns"
        )
    return schema.with_num_embeddings(data.num_embeddings, data.max_num_embeddings)


def _tables(config: RunConfig, model: nn.Module, records: float) -> list[PlannedTable]:
    """Every table, as the workers would hold it."""
    workers = config.cluster.num_workers
    return planned_tables(
        model,
        config.model.sharding,
        workers=workers,
        device_type="cuda" if config.cluster.use_gpu else "cpu",
        batch_size=int(records / workers),
        optimizer=TableOptimizer(config.train.table_optimizer),
        workers_per_node=config.cluster.workers_per_node,
    )


def _simple(table: PlannedTable) -> dict[str, Any]:
    return {
        "table": table.name,
        "rows": table.rows,
        "dim": table.dim,
        "kind": table.kind,
        "bytes": 4 * table.rows * table.dim,
        "shards": [
            {
                "rank": s.rank,
                "offset": [s.row_offset, s.column_offset],
                "size": [s.rows, s.columns],
            }
            for s in table.shards
        ],
    }


def _memory_by_worker(config: RunConfig, tables: list[dict[str, Any]]) -> list[dict[str, int]]:
    """Weights, history and optimizer state of each worker's shards; a lower bound of its need."""
    workers: defaultdict[int, dict[str, int]] = defaultdict(
        lambda: {"weights": 0, "history": 0, "optimizer": 0}
    )
    state = _OPTIMIZER_BYTES[config.train.table_optimizer] + (4 if config.train.momentum else 0)
    history = HISTORY_BYTES_A_ROW
    if config.privacy.mechanism in SPARSE_MECHANISMS:
        # No noise waits, and state comes with the rows that survive.
        state, history = 0, 0
    for table in tables:
        for shard in table["shards"]:
            rows, columns = shard["size"]
            entry = workers[shard["rank"]]
            entry["weights"] += 4 * rows * columns
            entry["history"] += history * rows
            entry["optimizer"] += state * rows * columns
            if config.train.table_optimizer == "rowwise_adagrad" and history:
                entry["optimizer"] += 4 * rows
    return [workers[r] for r in range(config.cluster.num_workers)]


def _selection_lines(selection: dict[str, Any]) -> list[tuple[str, str]]:
    """What a plan says about the rows that a step noises."""
    every, all_rows = selection["all_coordinates"], selection["all_rows"]
    least, most = selection["false_positive_coordinates"], selection["most_coordinates"]
    if not selection["thresholds"]:
        lines = [
            (
                "rows noised a step",
                f"{selection['eligible_rows']:,}: those chosen, at every step (of {all_rows:,})",
            ),
            ("gradient size", f"{least:,.0f} coordinates of {every:,} (1 / {every / least:,.0f})"),
        ]
    else:
        lines = [
            (
                "survivors a step",
                f"{selection['false_positives']:,.1f} that no unit touches, in the mean, and those "
                f"of the rows looked up that pass: {selection['most_rows']:,.0f} in the mean if "
                f"all did (of {all_rows:,})",
            ),
            (
                "gradient size",
                f"{least:,.0f} to {most:,.0f} coordinates of {every:,} (1 / "
                f"{every / max(1.0, most):,.0f} to 1 / {every / max(1.0, least):,.0f})",
            ),
        ]
    if selection["thresholds"]:
        taus = sorted({f"{tau:.4g}" for tau in selection["thresholds"].values()})
        lines.append(("threshold", ", ".join(taus[:4]) + (", …" if len(taus) > 4 else "")))
    if selection["warning"]:
        lines.append(("[bold red]warning[/]", selection["warning"]))
    return lines


def print_report(report: dict[str, Any]) -> None:
    """Prints a plan for a person."""
    console = Console()
    head = Table.grid(padding=(0, 2))
    if report["epsilon"] is None:
        head.add_row("privacy", f"[bold red]none[/] (mechanism {report['mechanism']})")
    else:
        head.add_row(
            "privacy",
            f"ε = {round_up(report['epsilon'])}, δ = {report['delta']:g} for each {report['unit']}",
        )
        head.add_row("noise multiplier", _noise(report))
        head.add_row("clip norm", f"{report['max_grad_norm']:g}")
    if report["noise_grid"] is not None:
        spacing = report["noise_grid"]
        head.add_row(
            "noise grid",
            f"{spacing_text(spacing)}, table weights within ±{MULTIPLES * spacing:g}",
        )
    head.add_row("mechanism", report["mechanism"])
    units = f"{report['unit']}s"
    head.add_row(units, f"{report[f'num_{units}']:,} (data set '{report['dataset']}')")
    if report["max_records_per_user"] is not None:
        head.add_row("records of a user", f"at most {report['max_records_per_user']:,} in a step")
    if report["skipped_rows"]:
        head.add_row("left out", skipped_text(report["skipped_rows"]))
    head.add_row(
        "expected batch",
        f"{report['expected_batch_size']:g} {units} over {report['num_workers']} worker(s), "
        f"sample rate {report['sample_rate']:.4g}"
        + ("" if units == "records" else f", {report['expected_records']:,.0f} records"),
    )
    head.add_row("steps", f"{report['steps']:,} ({report['epochs']:.2f} epochs)")
    if report["selection"] is not None:
        for row in _selection_lines(report["selection"]):
            head.add_row(*row)
    console.print(head)
    memory = Table(title="memory per worker", title_justify="left")
    for column in ("worker", "weights", "history", "optimizer", "total"):
        memory.add_column(column, justify="right")
    for number, entry in enumerate(report["memory_bytes_by_worker"]):
        values = [entry["weights"], entry["history"], entry["optimizer"]]
        memory.add_row(str(number), *(size_text(v) for v in (*values, sum(values))))
    console.print(memory)
    if report["forecast"] is not None:
        print_forecast(console, report["forecast"])
    sharding = Table(title="sharding", title_justify="left")
    for column in ("table", "rows", "dim", "kind", "workers", "largest piece", "size"):
        sharding.add_column(column)
    for table in report["tables"]:
        ranks = sorted({s["rank"] for s in table["shards"]})
        sharding.add_row(
            table["table"].rpartition(".")[2],
            f"{table['rows']:,}",
            str(table["dim"]),
            table["kind"],
            ",".join(map(str, ranks)) if len(ranks) <= 8 else f"{len(ranks)} workers",
            _largest_piece(table["shards"]),
            size_text(table["bytes"]),
        )
    console.print(sharding)


def _noise(report: dict[str, Any]) -> str:
    least, greatest = report["noise_multiplier_range"]
    return f"{greatest:.4g}" if least == greatest else f"{least:.4g} to {greatest:.4g}, by schedule"


def _largest_piece(shards: list[dict[str, Any]]) -> str:
    rows, columns = max((s["size"] for s in shards), key=lambda size: size[0] * size[1])
    return f"{rows:,} × {columns}"


def size_text(count: float) -> str:
    """Bytes for a person."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
