"""What the cost model is told of a step: tables and their pieces, dense layers, batch, workers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from dist_dp.errors import ConfigError

MECHANISMS = ("none", "lazydp", "dpsgd", "dpsgd-torch", "eana")
"""Mechanisms whose steps can be counted: those that ``dist-dp bench step`` measures."""

FLOAT = 4
"""Bytes of a weight, an activation or a gradient."""

_EXACT_RANKS = 1 << 14


@dataclass(frozen=True)
class TableShape:
    """A table and how examples read it.

    Attributes:
        rows: Rows of the whole table.
        dim: Columns of the whole table.
        bags: Features that read it.
        pooling: Ids in each bag.
        skew: s; the r-th most popular row is read in proportion to r^-s (0: all alike).
    """

    rows: int
    dim: int
    bags: int = 1
    pooling: float = 1.0
    skew: float = 0.0


@dataclass(frozen=True)
class ShardShape:
    """One worker's piece of a table; ``kind`` is its sharding kind."""

    table: TableShape
    rows: int
    columns: int
    kind: str = "table_wise"

    @property
    def share(self) -> float:
        """Part of the table's lookups that it serves: popular rows lie anywhere in a table."""
        return self.rows / self.table.rows


@dataclass(frozen=True)
class LinearShape:
    """A linear layer.

    Attributes:
        inputs: Width of its input.
        outputs: Width of its output.
        relu: Whether a ReLU follows.
        bottom: Whether its input is data, which needs no gradient.
    """

    inputs: int
    outputs: int
    relu: bool = True
    bottom: bool = False


@dataclass(frozen=True)
class DenseShape:
    """The model outside its tables.

    Attributes:
        linears: The linear layers, a cross network's two products a layer among them.
        vectors: Vectors whose products in pairs the interaction takes (DLRM: the features and the
            bottom MLP's output); 0 for none.
        width: Numbers of each vector.
        parameters: Trained parameters; by default those of the linear layers.
    """

    linears: tuple[LinearShape, ...]
    vectors: int = 0
    width: int = 0
    parameters: int | None = None

    @property
    def parameter_count(self) -> int:
        """Trained parameters."""
        if self.parameters is not None:
            return self.parameters
        return sum((layer.inputs + 1) * layer.outputs for layer in self.linears)


@dataclass(frozen=True)
class Workload:
    """A step of one worker.

    Attributes:
        mechanism: One of :data:`MECHANISMS`.
        batch: Examples on each worker, padding included.
        world_size: Workers.
        tables: All tables.
        shards: This worker's pieces.
        dense: The model outside its tables.

    Raises:
        ConfigError: The mechanism is unknown.
    """

    mechanism: str
    batch: float
    world_size: int
    tables: tuple[TableShape, ...]
    shards: tuple[ShardShape, ...]
    dense: DenseShape

    def __post_init__(self) -> None:
        """Refuses a mechanism that cannot be counted."""
        if self.mechanism not in MECHANISMS:
            raise ConfigError(
                f"mechanism '{self.mechanism}' has no cost model; choose from "
                f"{', '.join(MECHANISMS)}"
            )

    @property
    def private(self) -> bool:
        """Whether the step clips."""
        return self.mechanism != "none"

    @property
    def pooled_bytes(self) -> float:
        """Bytes of the pooled rows of this worker's own examples, all tables."""
        return FLOAT * self.batch * sum(t.bags * t.dim for t in self.tables)

    def bags_of(self, shard: ShardShape) -> float:
        """Bags that a step pools in a shard."""
        examples = self.batch * (1 if shard.kind == "data_parallel" else self.world_size)
        return examples * shard.table.bags

    def ids_of(self, shard: ShardShape) -> float:
        """Ids that a step reads in a shard, repeats counted."""
        return self.bags_of(shard) * shard.table.pooling * shard.share


@lru_cache(maxsize=4096)
def distinct_rows(rows: int, ids: float, skew: float = 0.0) -> float:
    """Expected number of distinct rows among ``ids`` independent draws: Σ_r 1 - (1 - p_r)^ids.

    Args:
        rows: Rows of the table.
        ids: Draws.
        skew: s; p_r is proportional to the integral of x^-s over [r, r + 1].
    """
    if rows <= 0 or ids <= 0:
        return 0.0
    if skew == 0.0:
        return float(-rows * math.expm1(ids * math.log1p(-1.0 / rows))) if rows > 1 else 1.0
    # Ranks one by one as far as they differ much, then in stretches of nearly equal ones.
    exact = min(rows, _EXACT_RANKS)
    edges = np.arange(1, exact + 2, dtype=np.float64)
    if rows > exact:
        edges = np.concatenate([edges, np.geomspace(exact + 1, rows + 1, 4096)[1:]])
    power = 1.0 - skew
    if abs(power) < 1e-9:
        mass = np.diff(np.log(edges)) / math.log(rows + 1)
    else:
        mass = np.diff(edges**power) / ((rows + 1.0) ** power - 1.0)
    counts = np.diff(edges)
    each = np.minimum(mass / counts, 1.0 - 1e-16)
    return float(np.sum(-np.expm1(ids * np.log1p(-each)) * counts))
