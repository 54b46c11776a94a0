"""What it costs to go through embedding tables: lookups, their updates, and settling.

A lookup and the update behind it are timed in bags of one id and in long ones, on tables of a few
rows and on tables far beyond the cache: enough to tell what each thing costs that
:class:`~dist_dp.step_work.Access` counts. All of it is done at two widths, which tells what is paid
for a row from what is paid for its bytes. Before each of them the cache is filled with other data,
as the dense layers fill it in a step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from dist_dp import kernels
from dist_dp.cluster.bench.microbenchmarks import seconds
from dist_dp.noise_schedule import NoiseSchedule
from dist_dp.step_counts import table_access
from dist_dp.step_shapes import FLOAT, DenseShape, ShardShape, TableShape, Workload
from dist_dp.step_work import LONG_BAG, Access

TABLES = 8
TABLE_NUMBERS = 1 << 26
"""Weights of each large table: 256 MiB, 2 GiB all together.

Far beyond what the processor's translation buffers reach, as tables are.
"""
FEW_ROWS = 128
"""Rows of the small tables: so few that fetching them counts as nothing."""
WIDE, NARROW = 128, 32
"""Columns at which rows are timed."""
BAGS = 2048
"""Bags a table and lookup."""
BETWEEN_BYTES = 64 << 20
"""Written between two visits to the tables; the dense layers do as much and leave no row cached."""
STEP = 1000
"""Steps that the timed schedule has behind it."""


@dataclass(frozen=True)
class UnitCosts:
    """Seconds of one of each that is touched, at one width.

    Attributes:
        bag: A bag.
        id: An id.
        row: A distinct row, beyond its ids.
        region: A region of a table.
    """

    bag: float
    id: float
    row: float
    region: float


class Tables:
    """FBGEMM's tables of one shape, fused SGD, with a history, and ids to look up.

    Args:
        rows: Rows of each.
        columns: Their width.
    """

    def __init__(self, rows: int, columns: int) -> None:
        from fbgemm_gpu.split_embedding_configs import EmbOptimType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
            ComputeDevice,
            SplitTableBatchedEmbeddingBagsCodegen,
        )

        self.rows, self.columns = rows, columns
        self.fused: Any = SplitTableBatchedEmbeddingBagsCodegen(
            [(rows, columns, EmbeddingLocation.HOST, ComputeDevice.CPU)] * TABLES,
            optimizer=EmbOptimType.EXACT_SGD,
            learning_rate=0.01,
            stochastic_rounding=False,
        )
        self.weights: list[Tensor] = [w.detach() for w in self.fused.split_embedding_weights()]
        for weight in self.weights:
            weight.fill_(0.01)  # so that it lies in memory
        self._generator = torch.Generator().manual_seed(columns)
        self._between = torch.empty(BETWEEN_BYTES // FLOAT)

    def ids(self, pooling: int) -> list[Tensor]:
        """Fresh random ids of each table, int64."""
        size = (BAGS * pooling,)
        return [torch.randint(self.rows, size, generator=self._generator) for _ in self.weights]

    def access(self, pooling: int) -> Access:
        """What a lookup touches, counted as in a step."""
        table = TableShape(self.rows, self.columns, pooling=pooling)
        shards = (ShardShape(table, self.rows, self.columns),) * TABLES
        return table_access(Workload("none", BAGS, 1, (table,) * TABLES, shards, DenseShape(())))

    def look_up_and_update(self, pooling: int, repeats: int = 7) -> tuple[float, float]:
        """Median seconds of the pooled lookup, and of the backward with its fused update."""
        offsets = torch.arange(TABLES * BAGS + 1) * pooling
        forwards, backwards = [], []
        for _ in range(repeats + 1):
            self._between.fill_(1.0)
            ids = torch.cat(self.ids(pooling))
            begin = time.perf_counter()
            output = self.fused(ids, offsets)
            forwards.append(time.perf_counter() - begin)
            self._between.fill_(2.0)
            gradient = torch.ones_like(output)
            begin = time.perf_counter()
            output.backward(gradient)
            backwards.append(time.perf_counter() - begin)
        return median(forwards[1:]), median(backwards[1:])

    def settle(self, rounds: int, repeats: int = 5) -> tuple[float, float, float]:
        """Median seconds of an id found again, of the first of a row beyond it, of a row settled.

        The rows' noise is prepared as in a step, from a schedule with steps behind it.
        """
        histories = [torch.randint(STEP, (self.rows,), dtype=torch.int32) for _ in self.weights]
        keys = [kernels.derive_key(bytes(32), "bench", str(i)) for i in range(TABLES)]
        zeros = [0] * TABLES
        tables = kernels.TableSet(self.weights, histories, keys, zeros, zeros)
        schedule = NoiseSchedule()
        for _ in range(STEP + repeats + 1):
            schedule.advance(0.01, 1.0, 1.0, BAGS)
        again, first, settling = [], [], []
        for step in range(STEP, STEP + repeats + 1):
            self._between.fill_(1.0)
            ids = self.ids(LONG_BAG // 4)
            number = sum(i.numel() for i in ids)
            begin = time.perf_counter()
            stale = tables.take_stale(ids, step)
            found = time.perf_counter()
            tables.take_stale(ids, step)
            repeated = time.perf_counter()
            decay, scale = schedule.decay_and_scale(stale.from_steps, step)
            tables.settle(stale, to_step=step, decay=decay, scale=scale, rounds=rounds)
            settled = time.perf_counter()
            again.append((repeated - found) / number)
            first.append((2 * found - begin - repeated) / stale.rows.numel())
            settling.append((settled - repeated) / stale.rows.numel())
        return median(again[1:]), max(0.0, median(first[1:])), median(settling[1:])

    def stream(self, rounds: int) -> float:
        """Normals a second added to all rows."""
        key = kernels.derive_key(bytes(32), "bench", "stream")

        def run() -> None:
            for weight in self.weights:
                kernels.settle_range(
                    weight, key=key, from_steps=STEP - 1, to_step=STEP, decay=1.0, scale=1e-6,
                    rounds=rounds,
                )  # fmt: skip

        return TABLES * self.rows * self.columns / seconds(run, repeats=3)

    def torch_stream(self) -> float:
        """Normals a second by ``torch.normal`` into a tensor that is then added to a table.

        The tensor is new and of a table's size, as there: its one thread also takes the memory
        over from the system, page by page.
        """
        weight = self.weights[0]

        def run() -> None:
            weight.add_(torch.normal(0.0, 1e-6, weight.shape))

        return weight.numel() / seconds(run, repeats=3)


def unit_costs(times: dict[tuple[str, int], float], accesses: dict[int, Access]) -> UnitCosts:
    """What one of each costs, from four timings.

    Args:
        times: Seconds by ``("small", pooling)`` and ``("large", pooling)``, for bags of one id and
            of :data:`LONG_BAG`.
        accesses: By pooling: what is touched of the large tables. Of the small ones it is as many
            bags and ids, and the few rows count as nothing.
    """
    lone, long = accesses[1], accesses[LONG_BAG]
    an_id = max(0.0, times["small", LONG_BAG] - times["small", 1]) / (long.ids - lone.ids)
    a_bag = max(0.0, times["small", 1] - lone.ids * an_id) / lone.bags
    # what a row costs together with its share of a region
    of_lone, of_long = (
        max(0.0, times["large", pooling] - a.bags * a_bag - a.ids * an_id) / a.rows
        for pooling, a in accesses.items()
    )
    share_lone, share_long = lone.regions / lone.rows, long.regions / long.rows
    a_region = max(0.0, (of_lone - of_long) / (share_lone - share_long))
    return UnitCosts(a_bag, an_id, max(0.0, of_long - share_long * a_region), a_region)


def by_width(wide: float, narrow: float, unit: int = 1) -> tuple[float, float]:
    """What a thing costs whatever its width, and what a unit of its width costs, never below 0.

    Args:
        wide: Seconds at :data:`WIDE` columns.
        narrow: Seconds at :data:`NARROW` columns.
        unit: Units of a column.
    """
    slope = min(max(0.0, (wide - narrow) / (unit * (WIDE - NARROW))), wide / (unit * WIDE))
    return fmean((wide - slope * unit * WIDE, max(0.0, narrow - slope * unit * NARROW))), slope


def access_costs(wide: UnitCosts, narrow: UnitCosts) -> dict[str, float]:
    """Costs of a lookup or an update by the names of ``Access``, from two widths."""
    found = {"regions": fmean((wide.region, narrow.region))}
    for name in ("bag", "id", "row"):
        fixed, a_byte = by_width(getattr(wide, name), getattr(narrow, name), FLOAT)
        found |= {f"{name}s": fixed, f"{name}_bytes": a_byte}
    return found


def bag_repeats_seconds(pooling: int) -> float:
    """Median seconds of an id whose repeats in its bag are counted."""
    ids = torch.randint(TABLE_NUMBERS // WIDE, (TABLES * BAGS * pooling,))
    lengths = torch.full((TABLES * BAGS,), pooling, dtype=torch.int32)
    return seconds(lambda: kernels.bag_repeats(ids, lengths, None)) / ids.numel()


def table_rates(rounds: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Everything that is done to tables, by the names of ``MachineRates``."""
    lookups, updates, settling = {}, {}, {}
    streams: dict[str, float] = {}
    for columns in (WIDE, NARROW):
        say(f"rows of {columns} columns at random, in {TABLES * TABLE_NUMBERS * FLOAT >> 20} MiB")
        forwards, backwards, accesses = {}, {}, {}
        for size, rows in (("small", FEW_ROWS), ("large", TABLE_NUMBERS // columns)):
            tables = Tables(rows, columns)
            for pooling in (1, LONG_BAG):
                accesses[pooling] = tables.access(pooling)
                forwards[size, pooling], backwards[size, pooling] = tables.look_up_and_update(
                    pooling
                )
        lookups[columns] = unit_costs(forwards, accesses)
        updates[columns] = unit_costs(backwards, accesses)
        settling[columns] = tables.settle(rounds)
        if columns == WIDE:
            say("passes over whole tables")
            streams["stream_normals_per_second"] = tables.stream(rounds)
            streams["torch_normals_per_second"] = tables.torch_stream()
        del tables
    wide, narrow = settling[WIDE], settling[NARROW]
    a_row, a_normal = by_width(wide[2], narrow[2])
    return streams | {
        "lookup_seconds": access_costs(lookups[WIDE], lookups[NARROW]),
        "update_seconds": access_costs(updates[WIDE], updates[NARROW]),
        "search_id_seconds": fmean((wide[0], narrow[0])),
        "search_row_seconds": fmean((wide[1], narrow[1])),
        "settle_row_seconds": a_row,
        "settle_normal_seconds": a_normal,
        "short_bag_id_seconds": bag_repeats_seconds(1),
        "long_bag_id_seconds": bag_repeats_seconds(LONG_BAG),
    }
