"""Rates of one process, each by a small benchmark of one kind of work on data made for it.

The shapes are those of MLPerf's DLRM, so that matrix products and passes over activations run as
they do in a step; the tables are larger than any cache. No step is run here and nothing is fitted
to one.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dist_dp import kernels
from dist_dp.step_shapes import FLOAT

BATCH = 2048
LAYERS = ((512, 256), (479, 1024), (1024, 1024), (1024, 512))
"""Inputs and outputs of the linear layers that are timed."""
VECTORS, WIDTH = 27, 128
"""Vectors of the interaction, and their width."""
TABLES = 8
TABLE_NUMBERS = 1 << 26
"""Weights of each table: 256 MiB, 2 GiB all together.

Far beyond what the processor's translation buffers reach, as tables are.
"""
WIDE, NARROW = 128, 32
"""Columns at which random rows are timed: two, to tell what a row costs from what a byte costs."""
IDS = 2048
"""Random ids a table and lookup."""
STEP = 1000
"""Steps that the timed schedule has behind it."""


@dataclass(frozen=True)
class RowCosts:
    """Seconds of a row read or written at random: ``seconds_a_row + bytes / bytes_per_second``."""

    seconds_a_row: float
    units_per_second: float


def seconds(run: Callable[[], object], repeats: int = 5) -> float:
    """Median wall time of a call, after one that is not counted."""
    run()
    found = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        found.append(time.perf_counter() - begin)
    return median(found)


def row_costs(wide: float, narrow: float, units_wide: float, units_narrow: float) -> RowCosts:
    """What a row costs and what a unit (byte, normal) of it costs, from two widths.

    Args:
        wide: Seconds a row of ``units_wide`` units.
        narrow: Seconds a row of ``units_narrow`` units.
        units_wide: Units of a wide row.
        units_narrow: Units of a narrow row.

    Returns:
        All of it as a cost a unit, should the narrow row be the cheaper one by more than its
        width, and all of it as a cost a row, should it not be cheaper at all.
    """
    slope = (wide - narrow) / (units_wide - units_narrow)
    if slope <= 0:
        return RowCosts((wide + narrow) / 2, 1e15)
    fixed = wide - slope * units_wide
    if fixed < 0:
        return RowCosts(0.0, units_wide / wide)
    return RowCosts(fixed, 1.0 / slope)


def matmul_rate() -> float:
    """Flops a second of a linear layer's forward product and the two of its backward."""
    flops, total = 0.0, 0.0
    for inputs, outputs in LAYERS:
        x, delta = torch.randn(BATCH, inputs), torch.randn(BATCH, outputs)
        weight, bias = torch.randn(outputs, inputs), torch.randn(outputs)
        products: tuple[Callable[[], Tensor], ...] = (
            lambda x=x, w=weight, b=bias: functional.linear(x, w, b),  # type: ignore[misc]
            lambda d=delta, w=weight: d @ w,  # type: ignore[misc]
            lambda d=delta, x=x: d.t() @ x,  # type: ignore[misc]
        )
        flops += len(products) * 2 * BATCH * inputs * outputs
        total += sum(seconds(run) for run in products)
    return flops / total


def small_matmul_rate() -> float:
    """Flops a second of the interaction's batched products, forward and backward."""
    vectors = torch.randn(BATCH, VECTORS, WIDTH)
    square = torch.randn(BATCH, VECTORS, VECTORS)
    total = seconds(lambda: torch.bmm(vectors, vectors.transpose(1, 2)))
    total += seconds(lambda: torch.bmm(square, vectors))
    total += seconds(lambda: torch.bmm(vectors.transpose(1, 2), square))
    return 3 * 2 * BATCH * VECTORS * VECTORS * WIDTH / total


def activation_rate() -> float:
    """Bytes a second of passes over activations: ReLU and its backward, a concatenation, a norm."""
    hidden, pooled = torch.randn(BATCH, 1024), torch.randn(BATCH, (VECTORS - 1) * WIDTH)
    parts = list(pooled.split(WIDTH, dim=1))
    total = seconds(lambda: hidden.clamp_min(0.0))
    total += seconds(lambda: torch.ops.aten.threshold_backward(hidden, hidden, 0))
    total += seconds(lambda: torch.cat(parts, dim=1))
    total += seconds(lambda: torch.linalg.vector_norm(pooled, dim=1))
    return FLOAT * (5 * hidden.numel() + 3 * pooled.numel()) / total


def fresh_rate() -> float:
    """Bytes a second of memory from the system, beyond the time of the pass that fills it."""
    kept = torch.empty(1 << 24)
    anew = seconds(lambda: torch.empty(1 << 24).fill_(1.0))
    again = seconds(lambda: kept.fill_(1.0))
    return FLOAT * kept.numel() / max(anew - again, 1e-6)


def indexed_rate() -> float:
    """Numbers a second gathered from, and scattered into, the interaction's triangle."""
    square = torch.randn(BATCH, VECTORS, VECTORS)
    rows, columns = torch.triu_indices(VECTORS, VECTORS, offset=1)
    pairs = square[:, rows, columns]
    everything = torch.arange(BATCH).unsqueeze(1)
    total = seconds(lambda: square[:, rows, columns])
    total += seconds(lambda: square.index_put_((everything, rows, columns), pairs, accumulate=True))
    return 2 * pairs.numel() / total


class Tables:
    """FBGEMM's tables of one width, fused SGD, with a history, and ids to look up.

    Args:
        columns: Their width.
    """

    def __init__(self, columns: int) -> None:
        from fbgemm_gpu.split_embedding_configs import EmbOptimType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
            ComputeDevice,
            SplitTableBatchedEmbeddingBagsCodegen,
        )

        self.columns = columns
        rows = TABLE_NUMBERS // columns
        self.fused: Any = SplitTableBatchedEmbeddingBagsCodegen(
            [(rows, columns, EmbeddingLocation.HOST, ComputeDevice.CPU)] * TABLES,
            optimizer=EmbOptimType.EXACT_SGD,
            learning_rate=0.01,
            stochastic_rounding=False,
        )
        self.weights: list[Tensor] = [w.detach() for w in self.fused.split_embedding_weights()]
        for weight in self.weights:
            weight.fill_(0.01)  # so that it lies in memory
        self.histories = [torch.zeros(rows, dtype=torch.int32) for _ in self.weights]
        self.keys = [kernels.derive_key(bytes(32), "bench", str(i)) for i in range(TABLES)]
        self._generator = torch.Generator().manual_seed(columns)
        self._rows = rows

    def ids(self) -> list[Tensor]:
        """Fresh random ids of each table, int64."""
        return [torch.randint(self._rows, (IDS,), generator=self._generator) for _ in self.weights]

    def look_up_and_update(self, repeats: int = 5) -> tuple[float, float]:
        """Median seconds a row of the pooled lookup, and of the backward with its fused update."""
        offsets = torch.arange(TABLES * IDS + 1)
        forwards, backwards = [], []
        for _ in range(repeats + 1):
            ids = torch.cat(self.ids())
            begin = time.perf_counter()
            output = self.fused(ids, offsets)
            middle = time.perf_counter()
            gradient = torch.ones_like(output)
            begin_backward = time.perf_counter()
            output.backward(gradient)
            backwards.append(time.perf_counter() - begin_backward)
            forwards.append(middle - begin)
        rows = TABLES * IDS
        return median(forwards[1:]) / rows, median(backwards[1:]) / rows

    def settle(self, rounds: int, repeats: int = 5) -> tuple[float, float]:
        """Median seconds of an id to find, and of a row to settle."""
        zeros = [0] * TABLES
        tables = kernels.TableSet(self.weights, self.histories, self.keys, zeros, zeros)
        finding, settling = [], []
        for number in range(repeats + 1):
            ids = self.ids()
            begin = time.perf_counter()
            stale = tables.take_stale(ids, number + 1)
            found = time.perf_counter()
            ones = torch.ones(stale.rows.numel(), dtype=torch.float64)
            scale = 1e-6 * ones
            begin_settling = time.perf_counter()
            tables.settle(stale, to_step=number + 1, decay=ones, scale=scale, rounds=rounds)
            settling.append((time.perf_counter() - begin_settling) / stale.rows.numel())
            finding.append((found - begin) / (TABLES * IDS))
        return median(finding[1:]), median(settling[1:])

    def stream(self, rounds: int) -> float:
        """Normals a second added to all rows."""

        def run() -> None:
            for weight, key in zip(self.weights, self.keys, strict=True):
                kernels.settle_range(
                    weight, key=key, from_steps=STEP - 1, to_step=STEP, decay=1.0, scale=1e-6,
                    rounds=rounds,
                )  # fmt: skip

        return TABLES * TABLE_NUMBERS / seconds(run, repeats=3)

    def torch_stream(self) -> float:
        """Normals a second by ``torch.normal`` into a tensor that is then added to a table.

        The tensor is new and of a table's size, as there: its one thread also takes the memory
        over from the system, page by page.
        """
        weight = self.weights[0]

        def run() -> None:
            weight.add_(torch.normal(0.0, 1e-6, weight.shape))

        return weight.numel() / seconds(run, repeats=3)


def disk_rate(folder: Path, size: int = 1 << 27) -> float:
    """Bytes a second written to a new file in a folder, until they are on the disk."""
    data = os.urandom(1 << 20)
    begin = time.perf_counter()
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(size // len(data)):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return size / (time.perf_counter() - begin)


def table_rates(rounds: int, say: Callable[[str], None]) -> dict[str, float]:
    """Everything that is done to tables, by the names of ``MachineRates``."""
    found: dict[int, Sequence[float]] = {}
    streams: dict[str, float] = {}
    for columns in (WIDE, NARROW):
        say(f"rows of {columns} columns at random, in {TABLES * TABLE_NUMBERS * FLOAT >> 20} MiB")
        tables = Tables(columns)
        found[columns] = (*tables.look_up_and_update(), *tables.settle(rounds))
        if columns == WIDE:
            say("passes over whole tables")
            streams["stream_normals_per_second"] = tables.stream(rounds)
            streams["torch_normals_per_second"] = tables.torch_stream()
        del tables
    wide, narrow = found[WIDE], found[NARROW]
    lookup = row_costs(wide[0], narrow[0], FLOAT * WIDE, FLOAT * NARROW)
    update = row_costs(wide[1], narrow[1], 2 * FLOAT * WIDE, 2 * FLOAT * NARROW)
    settling = row_costs(wide[3], narrow[3], WIDE, NARROW)
    return streams | {
        "lookup_seconds_a_row": lookup.seconds_a_row,
        "lookup_bytes_per_second": lookup.units_per_second,
        "update_seconds_a_row": update.seconds_a_row,
        "update_bytes_per_second": update.units_per_second,
        "id_seconds": (wide[2] + narrow[2]) / 2,
        "settle_seconds_a_row": settling.seconds_a_row,
        "settle_normals_per_second": settling.units_per_second,
    }
