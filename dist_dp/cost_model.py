"""Seconds of a step: what it does (:mod:`dist_dp.step_counts`) over the rates of a machine.

Every kind of work has one rate, measured by a micro-benchmark of its own
(``dist-dp bench machine``), never fitted to the steps that are predicted. docs/cost-model.md says
what is left out.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from dist_dp.errors import ConfigError
from dist_dp.limits import read_json
from dist_dp.step_counts import step_counts
from dist_dp.step_shapes import FLOAT, MECHANISMS, Workload
from dist_dp.step_work import Access, Work

RATES_VERSION = 2


@dataclass(frozen=True)
class MachineRates:
    """What one machine does in a second, and what things cost it.

    Those of :meth:`shipped` were measured with ``dist-dp bench machine`` on 2 cores of an AMD EPYC
    with AVX-512 (no huge pages, otherwise idle); the command makes them anew for another machine.
    Its network values are those of two local processes over gloo. Rates of a GPU are not known:
    nothing was measured on one.

    Attributes:
        threads: Threads that the rates are for; ``with_threads`` converts those that scale.
        matmul_flops_per_second: Matrix products of dense layers.
        small_matmul_flops_per_second: Batched products of an interaction.
        activation_bytes_per_second: Passes over activations (read and written).
        fresh_bytes_per_second: Memory new from the system, beyond the pass that fills it.
        indexed_numbers_per_second: Numbers gathered or scattered one by one; one thread.
        lookup_seconds: FBGEMM's pooled lookup, for one of each that
            :class:`~dist_dp.step_work.Access` counts.
        update_seconds: FBGEMM's backward with its fused update, likewise.
        search_id_seconds: Looking one id up in the history.
        search_row_seconds: What the first id of a row costs beyond that.
        short_bag_id_seconds: Looking for an id's repeats in a bag of one id.
        long_bag_id_seconds: The same in a bag of 32.
        settle_row_seconds: Settling one listed row, its share by columns aside.
        settle_normal_seconds: A normal drawn and added to a row, rows in random order.
        stream_normals_per_second: Normals drawn and added to a whole table.
        rounds: ChaCha rounds of the noise.
        torch_normals_per_second: ``torch.normal`` into a new tensor, then added; one thread.
        step_seconds: By mechanism: what a step costs whatever its size.
        table_seconds: By mechanism: what each local piece of a table adds to it.
        worker_seconds: What a step costs beyond that with more than one worker, messages aside.
        all_to_all_bytes_per_second: Sent by one worker in an exchange.
        all_reduce_bytes_per_second: Sent by one worker in a ring all-reduce.
        all_gather_bytes_per_second: Sent by one worker in a ring all-gather.
        round_seconds: Latency of a message.
        disk_bytes_per_second: Written by a release.
        source: Where and how the rates were found.
    """

    threads: int
    matmul_flops_per_second: float
    small_matmul_flops_per_second: float
    activation_bytes_per_second: float
    fresh_bytes_per_second: float
    indexed_numbers_per_second: float
    lookup_seconds: dict[str, float]
    update_seconds: dict[str, float]
    search_id_seconds: float
    search_row_seconds: float
    short_bag_id_seconds: float
    long_bag_id_seconds: float
    settle_row_seconds: float
    settle_normal_seconds: float
    stream_normals_per_second: float
    rounds: int
    torch_normals_per_second: float
    step_seconds: dict[str, float]
    table_seconds: dict[str, float]
    worker_seconds: float
    all_to_all_bytes_per_second: float
    all_reduce_bytes_per_second: float
    all_gather_bytes_per_second: float
    round_seconds: float
    disk_bytes_per_second: float
    source: str

    def with_threads(self, threads: int) -> MachineRates:
        """The rates of a worker with another number of threads on such cores.

        What runs on all threads is taken to scale with them, memory traffic included.
        """
        factor = threads / self.threads
        changed = {name: getattr(self, name) * factor for name in _SCALING_RATES}
        for name in _SCALING_COSTS:
            changed[name] = getattr(self, name) / factor
        for name in _SCALING_ACCESSES:
            changed[name] = {k: cost / factor for k, cost in getattr(self, name).items()}
        return replace(self, threads=threads, **changed)

    def with_network(self, bytes_per_second: float, round_seconds: float) -> MachineRates:
        """The rates on a network: exchanges run at its speed where that is the slower one.

        Args:
            bytes_per_second: Of one worker's link, each way.
            round_seconds: Latency of a message.
        """
        changed = {n: min(getattr(self, n), bytes_per_second) for n in _NETWORK_RATES}
        return replace(self, round_seconds=round_seconds, **changed)

    def readable(self) -> list[tuple[str, str]]:
        """Names and values for a person."""
        shown = []
        for name, value in asdict(self).items():
            if isinstance(value, dict):
                each = ", ".join(f"{key} {1e6 * v:.3g}" for key, v in value.items()) + " µs"
                shown.append((name, each))
            elif name.endswith("seconds"):
                shown.append((name, f"{1e6 * value:.3g} µs"))
            else:
                shown.append((name, f"{value:.4g}" if isinstance(value, float) else str(value)))
        return shown

    def save(self, path: Path) -> None:
        """Writes the rates as JSON."""
        path.write_text(
            json.dumps({"version": RATES_VERSION, **asdict(self)}, indent=1) + "\n",
            encoding="utf-8",
        )

    @classmethod
    def shipped(cls) -> MachineRates:
        """The rates that come with the package; ``source`` names their machine."""
        return cls.load(Path(__file__).with_name("machine_rates.json"))

    @classmethod
    def load(cls, path: Path) -> MachineRates:
        """Reads what :meth:`save` wrote.

        Raises:
            ConfigError: The file cannot be read, or holds something else.
        """
        remedy = "make it with dist-dp bench machine --json FILE"
        try:
            values: Any = read_json(path)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"cannot read the machine's rates '{path}': {error}; {remedy}"
            ) from None
        names = {f.name for f in fields(cls)}
        if not isinstance(values, dict) or values.pop("version", None) != RATES_VERSION:
            raise ConfigError(f"'{path}' holds no rates of this version; {remedy}")
        if set(values) != names:
            wrong = ", ".join(sorted(names.symmetric_difference(values)))
            raise ConfigError(f"'{path}' lacks, or does not know, {wrong}; {remedy}")
        for name, value in values.items():
            numbers = list(value.values()) if isinstance(value, dict) else [value]
            if name != "source" and any(
                not _is_positive(n, zero="seconds" in name) for n in numbers
            ):
                raise ConfigError(f"'{path}': {name} is {value}; {remedy}")
            keys = _KEYS.get(name)
            if keys is not None and (not isinstance(value, dict) or set(value) != keys):
                raise ConfigError(f"'{path}': {name} is not of {', '.join(sorted(keys))}; {remedy}")
        return cls(**values)


def _is_positive(value: Any, *, zero: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 < value < float("inf") or (zero and value == 0)


_KEYS = {
    "lookup_seconds": {f.name for f in fields(Access)},
    "update_seconds": {f.name for f in fields(Access)},
    "step_seconds": set(MECHANISMS),
    "table_seconds": set(MECHANISMS),
}
_SCALING_RATES = (
    "matmul_flops_per_second",
    "small_matmul_flops_per_second",
    "activation_bytes_per_second",
    "stream_normals_per_second",
)
_SCALING_ACCESSES = ("lookup_seconds", "update_seconds")
_SCALING_COSTS = (
    "search_id_seconds",
    "search_row_seconds",
    "short_bag_id_seconds",
    "long_bag_id_seconds",
    "settle_row_seconds",
    "settle_normal_seconds",
)
_NETWORK_RATES = (
    "all_to_all_bytes_per_second",
    "all_reduce_bytes_per_second",
    "all_gather_bytes_per_second",
)


def access_seconds(access: Access, costs: dict[str, float]) -> float:
    """Seconds of going through tables.

    Args:
        access: What is touched.
        costs: Seconds of one of each, by the field's name.
    """
    found: float = sum(count * costs[name] for name, count in asdict(access).items())
    return found


def seconds_of(work: Work, rates: MachineRates) -> float:
    """Seconds of some work, ``steps`` and ``tables`` aside (a mechanism sets their cost)."""
    return (
        work.matmul_flops / rates.matmul_flops_per_second
        + work.small_matmul_flops / rates.small_matmul_flops_per_second
        + work.activation_bytes / rates.activation_bytes_per_second
        + work.fresh_bytes / rates.fresh_bytes_per_second
        + work.indexed_numbers / rates.indexed_numbers_per_second
        + access_seconds(work.lookup, rates.lookup_seconds)
        + access_seconds(work.update, rates.update_seconds)
        + work.search_ids * rates.search_id_seconds
        + work.search_rows * rates.search_row_seconds
        + work.short_bag_ids * rates.short_bag_id_seconds
        + work.long_bag_ids * rates.long_bag_id_seconds
        + work.settle_rows * rates.settle_row_seconds
        + work.settle_normals * rates.settle_normal_seconds
        + work.stream_normals / rates.stream_normals_per_second
        + work.torch_normals / rates.torch_normals_per_second
        + work.all_to_all_bytes / rates.all_to_all_bytes_per_second
        + work.all_reduce_bytes / rates.all_reduce_bytes_per_second
        + work.all_gather_bytes / rates.all_gather_bytes_per_second
        + work.rounds * rates.round_seconds
    )


def predict(workload: Workload, rates: MachineRates) -> dict[str, float]:
    """Predicted seconds of a worker's step by phase, and their sum as ``total``.

    Args:
        workload: The step.
        rates: Of the worker (its threads, its network).
    """
    counts = step_counts(workload)
    seconds = {name: seconds_of(work, rates) for name, work in counts.items()}
    fixed = counts["overhead"]
    name = workload.mechanism
    seconds["overhead"] = (
        fixed.steps * rates.step_seconds[name] + fixed.tables * rates.table_seconds[name]
    )
    if workload.world_size > 1:
        seconds["overhead"] += rates.worker_seconds
    return seconds | {"total": sum(seconds.values())}


def release_seconds(workload: Workload, rates: MachineRates) -> float:
    """Predicted seconds of a worker's release: settling and writing its tables, side by side."""
    weights = sum(s.rows * s.columns for s in workload.shards)
    settling = weights / rates.stream_normals_per_second if workload.mechanism == "lazydp" else 0.0
    return max(settling, FLOAT * weights / rates.disk_bytes_per_second)
