"""A local piece of an embedding table, and the bookkeeping private training needs for it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dist_dp.distributed import all_gather_cat


@dataclass
class TableShard:
    """The rows and columns of one table that live on this worker.

    Attributes:
        table: Unique name: path of the collection, a dot, name of the table. Independent of the
            sharding, so that noise keyed by it is too.
        num_rows: Rows of the whole table.
        dim: Columns of the whole table.
        row_offset: Global number of the first local row.
        column_offset: Global number of the first local column.
        weight: float ``[local rows, local columns]``, a live view of the trained weights.
        replicated: True if every worker holds the same full copy (data_parallel).
        kind: The sharding kind, for reports.
        noise_key: 32-byte subkey of this table.
        last_step: int32 ``[local rows]``, the history table: the step up to which the row's
            noise and decay have been applied.
    """

    table: str
    num_rows: int
    dim: int
    row_offset: int
    column_offset: int
    weight: Tensor
    replicated: bool
    kind: str
    noise_key: bytes = b""
    last_step: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int32))

    def __post_init__(self) -> None:
        if self.last_step.numel() == 0:
            self.last_step = torch.zeros(
                self.weight.shape[0], dtype=torch.int32, device=self.weight.device
            )

    def __repr__(self) -> str:
        """Without the key."""
        rows, columns = self.weight.shape
        return (
            f"TableShard({self.table!r}, rows {self.row_offset}+{rows} of {self.num_rows}, "
            f"columns {self.column_offset}+{columns} of {self.dim}, {self.kind})"
        )

    def unique_rows(self, rows: Tensor) -> Tensor:
        """The distinct local rows a lookup is about to read, int64, sorted.

        Replicas must settle the same rows at the same steps or they drift apart, so a replicated
        table takes the union over ranks (a collective: every rank reaches this call).
        """
        distinct: Tensor = torch.unique(rows)
        if self.replicated:
            distinct = torch.unique(all_gather_cat(distinct))
        return distinct.to(torch.int64)
