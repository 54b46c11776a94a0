"""What one worker does in a step, counted from the shapes of model, batch and tables.

Nothing here is measured: the counts follow from the code (which layer multiplies what, which pass
reads which activations, which collective sends what). :mod:`dist_dp.cost_model` turns them into
seconds. docs/cost-model.md has the formulas on one page.
"""

from __future__ import annotations

import math

from dist_dp.step_shapes import FLOAT, DenseShape, ShardShape, Workload, distinct_rows
from dist_dp.step_work import KEPT_BYTES, LONG_BAG, REGION_BYTES, Access, Work

ID = 8
"""Bytes of an id on its way to the owner of its row."""
LENGTH = 4
"""Bytes of a bag's length."""


def step_counts(workload: Workload) -> dict[str, Work]:
    """The work of one worker in one step, by phase.

    Phases are those of :class:`~dist_dp.timing.PhaseTimer` and ``dist-dp bench step``, plus
    ``overhead`` for what does not depend on sizes.
    """
    found = {
        "forward": _forward(workload),
        "backward": _backward(workload),
        "clip": _clip(workload),
        "settle": _settle(workload),
        "noise": _noise(workload),
        "embedding_update": _update(workload),
        "dense_update": Work(activation_bytes=3 * FLOAT * workload.dense.parameter_count),
        "communication": _communication(workload),
        "overhead": Work(steps=1, tables=len(workload.shards)),
    }
    return {name: work for name, work in found.items() if work != Work()}


def total(counts: dict[str, Work]) -> Work:
    """All phases together."""
    return sum(counts.values(), start=Work())


def _forward(w: Workload) -> Work:
    numbers = FLOAT * w.batch
    # Each output is written with the bias, then by the ReLU, which reads it too.
    passes = sum(numbers * layer.outputs * (3 if layer.relu else 1) for layer in w.dense.linears)
    flops = sum(2 * w.batch * layer.inputs * layer.outputs for layer in w.dense.linears)
    # The pooled rows are put side by side once (read and written).
    work = Work(
        matmul_flops=flops, activation_bytes=passes + 2 * w.pooled_bytes, lookup=table_access(w)
    )
    work += _fresh(w.pooled_bytes, 2)  # the lookup's output, and side by side
    work += _fresh_outputs(w)
    if w.dense.vectors:
        vectors, pairs = w.dense.vectors * w.dense.width, _pairs(w.dense)
        work += Work(
            small_matmul_flops=2 * w.batch * w.dense.vectors * vectors,
            activation_bytes=2 * numbers * (vectors + w.dense.width + pairs),
            indexed_numbers=w.batch * pairs,
        )
        work += _fresh(numbers * vectors)
    return work


def table_access(w: Workload) -> Access:
    """What a batch's lookups touch in this worker's pieces; their update touches the same."""
    return sum((_shard_access(w, shard) for shard in w.shards), start=Access())


def _shard_access(w: Workload, shard: ShardShape) -> Access:
    bags, ids, size = w.bags_of(shard), w.ids_of(shard), FLOAT * shard.columns
    rows = distinct_rows(shard.rows, ids, shard.table.skew)
    return Access(
        bags=bags,
        bag_bytes=bags * size,
        ids=ids,
        id_bytes=ids * size,
        rows=rows,
        row_bytes=rows * size,
        # popular rows lie anywhere, so the distinct ones do too
        regions=distinct_rows(math.ceil(shard.rows * size / REGION_BYTES), rows),
    )


def _fresh(size: float, times: int = 1) -> Work:
    """New arrays of ``size`` bytes, if they are too large to be kept."""
    return Work(fresh_bytes=times * size) if size > KEPT_BYTES else Work()


def _fresh_outputs(w: Workload) -> Work:
    """The linear layers' outputs, before and after the ReLU, or their gradients."""
    sizes = ((FLOAT * w.batch * x.outputs, 2 if x.relu else 1) for x in w.dense.linears)
    return sum((_fresh(size, times) for size, times in sizes), start=Work())


def _pairs(dense: DenseShape) -> int:
    return dense.vectors * (dense.vectors - 1) // 2


def _backward(w: Workload) -> Work:
    numbers = FLOAT * w.batch
    layers = w.dense.linears
    flops = sum(2 * w.batch * x.inputs * x.outputs for x in layers if not x.bottom)
    passes = sum(3 * numbers * x.outputs for x in layers if x.relu)
    if not w.private:
        # Parameter gradients; a private step takes them clipped, in its own phase.
        flops += sum(2 * w.batch * x.inputs * x.outputs for x in layers)
        passes += sum(numbers * x.outputs for x in layers)
    work = Work(matmul_flops=flops, activation_bytes=passes + 2 * w.pooled_bytes)
    work += _fresh(w.pooled_bytes) + _fresh_outputs(w)
    if w.dense.vectors:
        vectors, square = w.dense.vectors * w.dense.width, w.dense.vectors**2
        work += Work(
            small_matmul_flops=4 * w.batch * w.dense.vectors * vectors,
            # zeros for the scattered triangle, the two products' sum, and its part for the tables
            activation_bytes=numbers * (square + 3 * vectors) + 2 * w.pooled_bytes,
            indexed_numbers=w.batch * _pairs(w.dense),
        )
        work += _fresh(numbers * vectors, 2)
    return work


def _clip(w: Workload) -> Work:
    if not w.private:
        return Work()
    numbers = FLOAT * w.batch
    layers = w.dense.linears
    return _bag_repeats(w) + Work(
        matmul_flops=sum(2 * w.batch * x.inputs * x.outputs for x in layers),
        # norms of inputs and output gradients, the bias's sum, the narrower of the two scaled
        activation_bytes=sum(
            numbers * (x.inputs + 2 * x.outputs + 2 * min(x.inputs, x.outputs)) for x in layers
        )
        + w.pooled_bytes
        + FLOAT * w.dense.parameter_count,
    )


def _bag_repeats(w: Workload) -> Work:
    """Ids of the worker's own examples, by the length of their bags; between the two, in part."""
    work = Work()
    for table in w.tables:
        ids = w.batch * table.bags * table.pooling
        long = min(1.0, max(0.0, (table.pooling - 1) / (LONG_BAG - 1)))
        work += Work(short_bag_ids=(1 - long) * ids, long_bag_ids=long * ids)
    return work


def _settled(w: Workload) -> Work:
    """The distinct rows that a batch reads, settled once each."""
    access = table_access(w)
    return Work(settle_rows=access.rows, settle_normals=access.row_bytes / FLOAT)


def _settle(w: Workload) -> Work:
    if w.mechanism not in ("lazydp", "eana"):
        return Work()
    access = table_access(w)
    work = Work(search_ids=access.ids, search_rows=access.rows)
    return work + _settled(w) if w.mechanism == "lazydp" else work


def _noise(w: Workload) -> Work:
    if not w.private:
        return Work()
    parameters = w.dense.parameter_count
    work = Work(stream_normals=parameters, activation_bytes=2 * FLOAT * parameters)
    weights = sum(s.rows * s.columns for s in w.shards)
    if w.mechanism == "dpsgd":
        work += Work(stream_normals=weights, stream_bytes=2 * FLOAT * weights)
    elif w.mechanism == "dpsgd-torch":
        # written with the noise (new memory), read again, and the table read and written
        work += Work(torch_normals=weights, stream_bytes=4 * FLOAT * weights)
    elif w.mechanism == "eana":
        work += _settled(w)
    return work


def _update(w: Workload) -> Work:
    # A private step's gradients are first scaled, where they lie, by the clip factors.
    scaled = 2 * w.pooled_bytes if w.private else 0.0
    return Work(update=table_access(w), activation_bytes=scaled)


def _communication(w: Workload) -> Work:
    """What the worker sends; one process sends nothing."""
    world = w.world_size
    if world == 1:
        return Work()
    others = (world - 1) / world
    work = all_reduce(FLOAT * w.dense.parameter_count, world)
    by_kind: dict[str, list[ShardShape]] = {}
    for shard in w.shards:
        by_kind.setdefault(shard.kind, []).append(shard)
    for kind, shards in by_kind.items():
        if kind == "data_parallel":
            weights = sum(s.rows * s.columns for s in shards)
            work += all_reduce(FLOAT * weights, world)
            continue
        # Each worker sends as much as arrives at the average one, whose share this is.
        ids = sum(w.ids_of(s) for s in shards)
        bags = sum(s.table.bags for s in shards)
        pooled = sum(s.table.bags * s.columns for s in shards)
        work += Work(
            all_to_all_bytes=others * (ID * ids + LENGTH * bags * w.batch * world), rounds=3
        )
        if kind in ROW_KINDS:
            # Partial sums for everybody's examples are added up on the way home; their gradient
            # goes to every owner.
            sums = FLOAT * w.batch * world * pooled
            work += all_reduce(sums, world)
            # gloo reduces a copy, of which each worker keeps its part
            work += Work(activation_bytes=2 * sums) + _fresh(sums)
            work += Work(all_gather_bytes=(world - 1) * FLOAT * w.batch * pooled, rounds=world - 1)
        else:
            there = others * FLOAT * w.batch * world * pooled
            work += Work(all_to_all_bytes=2 * there, rounds=2)
    return work


ROW_KINDS = ("row_wise", "table_row_wise", "grid")
"""Kinds whose workers hold partial sums of a bag."""


def all_reduce(size: float, world_size: int) -> Work:
    """A ring all-reduce of ``size`` bytes: 2 (W - 1) messages of size / W."""
    steps = 2 * (world_size - 1)
    return Work(all_reduce_bytes=steps * size / world_size, rounds=steps)
