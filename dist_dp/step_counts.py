"""What one worker does in a step, counted from the shapes of model, batch and tables.

Nothing here is measured: the counts follow from the code (which layer multiplies what, which pass
reads which activations, which collective sends what). :mod:`dist_dp.cost_model` turns them into
seconds. docs/cost-model.md has the formulas on one page.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from dist_dp.step_shapes import FLOAT, DenseShape, ShardShape, Workload, distinct_rows

ID = 8
"""Bytes of an id on its way to the owner of its row."""
LENGTH = 4
"""Bytes of a bag's length."""

KEPT_BYTES = 32 << 20
"""glibc gives larger arrays back to the system when freed (mallopt(3), M_MMAP_THRESHOLD)."""


@dataclass(frozen=True)
class Work:
    """Amounts of work of each kind; kinds differ in what they cost a unit.

    Attributes:
        matmul_flops: Floating-point operations of the dense layers' matrix products.
        small_matmul_flops: Those of the batched products of the interaction.
        activation_bytes: Read or written by passes over activations, their gradients, and dense
            parameters.
        fresh_bytes: Of arrays too large for the C library to keep (:data:`KEPT_BYTES`), which come
            anew from the system, page by page.
        indexed_numbers: Numbers gathered or scattered one by one (the interaction's triangle).
        lookup_rows: Rows that pooled lookups read, repeats counted.
        lookup_bytes: The same in bytes, at random in the tables.
        update_rows: Rows that the fused update adds a gradient to, repeats counted.
        update_bytes: Bytes it reads and writes for them, at random.
        ids: Ids looked up in the history, to find the distinct and stale rows.
        settle_rows: Distinct rows settled one by one.
        settle_normals: Normals drawn for them.
        stream_normals: Normals drawn by our kernels in a pass over all rows, or over dense
            gradients.
        torch_normals: Normals drawn by torch's generator into a new tensor, then added.
        stream_bytes: Read and written by passes over whole tables; told, and timed with the
            normals that they are made for.
        all_to_all_bytes: Sent to other workers by exchanges of ids, pooled rows and gradients.
        all_reduce_bytes: Sent by ring all-reduces (gloo's reduce-scatter is one too).
        all_gather_bytes: Sent by ring all-gathers.
        rounds: Messages that wait for one another.
        steps: 1: what a step costs whatever its size (Python, dispatch).
        tables: Local pieces of tables, each with a cost of its own.
    """

    matmul_flops: float = 0.0
    small_matmul_flops: float = 0.0
    activation_bytes: float = 0.0
    fresh_bytes: float = 0.0
    indexed_numbers: float = 0.0
    lookup_rows: float = 0.0
    lookup_bytes: float = 0.0
    update_rows: float = 0.0
    update_bytes: float = 0.0
    ids: float = 0.0
    settle_rows: float = 0.0
    settle_normals: float = 0.0
    stream_normals: float = 0.0
    torch_normals: float = 0.0
    stream_bytes: float = 0.0
    all_to_all_bytes: float = 0.0
    all_reduce_bytes: float = 0.0
    all_gather_bytes: float = 0.0
    rounds: float = 0.0
    steps: float = 0.0
    tables: float = 0.0

    def __add__(self, other: Work) -> Work:
        """Both together."""
        return Work(
            **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        )


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
    lookups = Work(
        lookup_rows=sum(w.ids_of(s) for s in w.shards),
        lookup_bytes=sum(FLOAT * w.ids_of(s) * s.columns for s in w.shards),
    )
    # The pooled rows are put side by side once (read and written).
    work = Work(matmul_flops=flops, activation_bytes=passes + 2 * w.pooled_bytes) + lookups
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
        work += _fresh(numbers * vectors, 2) + _fresh(w.pooled_bytes)
    return work


def _clip(w: Workload) -> Work:
    if not w.private:
        return Work()
    numbers = FLOAT * w.batch
    layers = w.dense.linears
    return Work(
        matmul_flops=sum(2 * w.batch * x.inputs * x.outputs for x in layers),
        # norms of inputs and output gradients, the bias's sum, the narrower of the two scaled
        activation_bytes=sum(
            numbers * (x.inputs + 2 * x.outputs + 2 * min(x.inputs, x.outputs)) for x in layers
        )
        + w.pooled_bytes
        + FLOAT * w.dense.parameter_count,
    )


def _settled(w: Workload) -> Work:
    """Rows that a batch reads, found and settled once each."""
    work = Work()
    for shard in w.shards:
        ids = w.ids_of(shard)
        rows = distinct_rows(shard.rows, ids, shard.table.skew)
        work += Work(ids=ids, settle_rows=rows, settle_normals=rows * shard.columns)
    return work


def _settle(w: Workload) -> Work:
    if w.mechanism == "lazydp":
        return _settled(w)
    return Work(ids=_settled(w).ids) if w.mechanism == "eana" else Work()


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
        settled = _settled(w)
        work += Work(settle_rows=settled.settle_rows, settle_normals=settled.settle_normals)
    return work


def _update(w: Workload) -> Work:
    work = Work(
        update_rows=sum(w.ids_of(s) for s in w.shards),
        update_bytes=sum(2 * FLOAT * w.ids_of(s) * s.columns for s in w.shards),
    )
    if w.private:
        # scaled by the clip factors
        work += Work(activation_bytes=2 * w.pooled_bytes) + _fresh(w.pooled_bytes)
    return work


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
