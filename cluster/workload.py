"""From a model and the sharding of its tables to what the cost model counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from torch import nn

from dist_dp.shard_model import quiet_torchrec
from dist_dp.sharding import (
    ShardingKind,
    TableOptimizer,
    embedding_collections,
    kind_of,
    plan_sharding,
    table_configs,
)
from dist_dp.step_shapes import DenseShape, LinearShape, ShardShape, TableShape, Workload


@dataclass(frozen=True)
class PlannedShard:
    """A piece of a table: who holds it, where it begins, and how large it is."""

    rank: int
    row_offset: int
    column_offset: int
    rows: int
    columns: int


@dataclass(frozen=True)
class PlannedTable:
    """A table, and who is to hold which piece of it.

    Attributes:
        name: Path of the collection, a dot, name of the table.
        rows: Its rows.
        dim: Its columns.
        bags: Features that read it.
        kind: Sharding kind.
        shards: Its pieces.
    """

    name: str
    rows: int
    dim: int
    bags: int
    kind: str
    shards: tuple[PlannedShard, ...]


def planned_tables(
    model: nn.Module,
    sharding: ShardingKind | Mapping[str, ShardingKind],
    *,
    workers: int,
    device_type: str,
    batch_size: int,
    optimizer: TableOptimizer,
    workers_per_node: int | None = None,
) -> list[PlannedTable]:
    """Every table of an unsharded model (on the meta device, say), as workers would hold it.

    Args:
        model: The model.
        sharding: One kind for all tables, or a kind by table name.
        workers: World size.
        device_type: ``cpu`` or ``cuda``.
        batch_size: Examples of a worker's step.
        optimizer: Of the tables.
        workers_per_node: Workers of a host; by default all.

    Raises:
        ConfigError: The tables cannot be sharded that way.
    """
    with quiet_torchrec():
        plans = plan_sharding(
            model,
            sharding,
            world_size=workers,
            device_type=device_type,
            batch_size=max(1, batch_size),
            optimizer=optimizer,
            local_size=workers_per_node,
        )
    found: list[PlannedTable] = []
    for path, collection in embedding_collections(model).items():
        for table in table_configs(collection):
            parameter = plans[path][table.name]
            kind = kind_of(parameter)
            rows, dim = table.num_embeddings, table.embedding_dim
            if kind == "data_parallel":
                shards = [PlannedShard(rank, 0, 0, rows, dim) for rank in range(workers)]
            else:
                shards = [
                    PlannedShard(s.placement.rank(), *s.shard_offsets, *s.shard_sizes)
                    for s in parameter.sharding_spec.shards
                ]
            found.append(
                PlannedTable(
                    name=f"{path}.{table.name}",
                    rows=rows,
                    dim=dim,
                    bags=len(table.feature_names),
                    kind=kind,
                    shards=tuple(shards),
                )
            )
    return found


def dense_shape(model: nn.Module) -> DenseShape:
    """The dense part of a model: its linear layers, and DLRM's interaction or cross network.

    What other layers compute is left out.
    """
    from torchrec.models.dlrm import DLRM, InteractionArch
    from torchrec.modules.crossnet import LowRankCrossNet

    inside = {id(m) for c in embedding_collections(model).values() for m in c.modules()}
    linears: list[LinearShape] = []
    vectors = width = parameters = 0
    bottoms = {
        id(next(m for m in dlrm.dense_arch.modules() if isinstance(m, nn.Linear)))
        for dlrm in model.modules()
        if isinstance(dlrm, DLRM)
    }
    for module in model.modules():
        if id(module) in inside:
            continue
        parameters += sum(p.numel() for p in module.parameters(recurse=False))
        if isinstance(module, nn.Linear):
            linears.append(
                LinearShape(
                    module.in_features,
                    module.out_features,
                    relu=module.out_features > 1,
                    bottom=id(module) in bottoms,
                )
            )
        elif isinstance(module, LowRankCrossNet):
            for v, u in zip(module.V_kernels, module.W_kernels, strict=True):
                linears += [
                    LinearShape(v.shape[1], v.shape[0]),
                    LinearShape(u.shape[1], u.shape[0]),
                ]
        elif isinstance(module, InteractionArch):
            vectors = module.F + 1
        elif isinstance(module, DLRM):
            width = module.sparse_arch.D
    return DenseShape(tuple(linears), vectors, width if vectors else 0, parameters)


def padded_batch(expected_batch_size: float, workers: int) -> float:
    """Expected examples of a worker with padding: the largest of the workers' Poisson samples."""
    mean = expected_batch_size / workers
    if workers == 1:
        return mean
    # Blom's approximation of the largest of independent normals
    largest = NormalDist().inv_cdf((workers - 0.375) / (workers + 0.25))
    return float(mean + largest * mean**0.5)


def workloads(
    mechanism: str,
    tables: Sequence[PlannedTable],
    dense: DenseShape,
    *,
    expected_batch_size: float,
    workers: int,
    pooling: float,
    skew: float = 0.0,
) -> list[Workload]:
    """The step of every worker that differs from the others'.

    Args:
        mechanism: See :data:`~dist_dp.step_shapes.MECHANISMS`.
        tables: All tables.
        dense: The model outside its tables.
        expected_batch_size: Over all workers.
        workers: World size.
        pooling: Ids in each bag.
        skew: Exponent of the rows' popularity.
    """
    shapes = tuple(TableShape(t.rows, t.dim, t.bags, pooling, skew) for t in tables)
    pieces: dict[int, list[ShardShape]] = {rank: [] for rank in range(workers)}
    for table, shape in zip(tables, shapes, strict=True):
        for s in table.shards:
            if s.rows:
                pieces[s.rank].append(ShardShape(shape, s.rows, s.columns, table.kind))
    distinct = dict.fromkeys(tuple(found) for found in pieces.values())
    return [
        Workload(
            mechanism=mechanism,
            batch=padded_batch(expected_batch_size, workers),
            world_size=workers,
            tables=shapes,
            shards=shards,
            dense=dense,
        )
        for shards in distinct
    ]


def slowest(predictions: Sequence[dict[str, float]]) -> dict[str, Any]:
    """The prediction that the others wait for: workers meet in every exchange."""
    return max(predictions, key=lambda seconds: seconds["total"])
