"""The kinds of work that a step consists of, each with a price of its own."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

KEPT_BYTES = 32 << 20
"""glibc gives larger arrays back to the system when freed (mallopt(3), M_MMAP_THRESHOLD)."""

REGION_BYTES = 32 << 10
"""Eight pages of a table: their entries in the page table share a line of the cache."""

LONG_BAG = 32
"""Ids of a bag from which on a bag counts as a long one."""


class Summed:
    """A dataclass of amounts that are added up field by field."""

    def __add__(self, other: Self) -> Self:
        """Both together."""
        names = (f.name for f in fields(self))  # type: ignore[arg-type]
        return type(self)(**{n: getattr(self, n) + getattr(other, n) for n in names})


@dataclass(frozen=True)
class Access(Summed):
    """How pooled lookups, or the updates behind them, go through tables.

    A row is read from memory the first time that a batch names it; its repeats find it in the
    cache, so small and popular tables need no rule of their own.

    Attributes:
        bags: Bags pooled, or gradients of bags read.
        bag_bytes: The same in bytes.
        ids: Ids, repeats counted: rows added up, or gradients added to a row.
        id_bytes: The same in bytes.
        rows: Distinct rows.
        row_bytes: The same in bytes.
        regions: Regions of :data:`REGION_BYTES` with such a row in them, each at the price of
            finding out where in memory it lies; close rows share it.
    """

    bags: float = 0.0
    bag_bytes: float = 0.0
    ids: float = 0.0
    id_bytes: float = 0.0
    rows: float = 0.0
    row_bytes: float = 0.0
    regions: float = 0.0


@dataclass(frozen=True)
class Work(Summed):
    """Amounts of work of each kind; kinds differ in what they cost a unit.

    Attributes:
        matmul_flops: Floating-point operations of the dense layers' matrix products.
        small_matmul_flops: Those of the batched products of the interaction.
        activation_bytes: Read or written by passes over activations, their gradients, and dense
            parameters.
        fresh_bytes: Of arrays too large for the C library to keep (:data:`KEPT_BYTES`), which come
            anew from the system, page by page.
        indexed_numbers: Numbers gathered or scattered one by one (the interaction's triangle).
        lookup: What pooled lookups read.
        update: What the fused update groups by row and writes.
        search_ids: Ids looked up in the history, to find the distinct and stale rows.
        search_rows: Distinct rows among them.
        settle_rows: Distinct rows settled one by one.
        settle_normals: Normals drawn for them.
        stream_normals: Normals drawn by our kernels in a pass over all rows, or over dense
            gradients.
        short_bag_ids: Ids whose repeats in their bag are counted, for the norms; the share that
            counts as in bags of one id.
        long_bag_ids: The share that counts as in bags of :data:`LONG_BAG` ids.
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
    lookup: Access = Access()
    update: Access = Access()
    search_ids: float = 0.0
    search_rows: float = 0.0
    settle_rows: float = 0.0
    settle_normals: float = 0.0
    short_bag_ids: float = 0.0
    long_bag_ids: float = 0.0
    stream_normals: float = 0.0
    torch_normals: float = 0.0
    stream_bytes: float = 0.0
    all_to_all_bytes: float = 0.0
    all_reduce_bytes: float = 0.0
    all_gather_bytes: float = 0.0
    rounds: float = 0.0
    steps: float = 0.0
    tables: float = 0.0
