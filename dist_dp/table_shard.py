"""A local piece of an embedding table, and the bookkeeping private training needs for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dist_dp.distributed import all_gather_cat
from dist_dp.errors import ReleaseError
from dist_dp.row_state import RowState


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
        group: Number of the optimizer group of tables it belongs to.
        noise_key: 32-byte subkey of this table.
        momentum: float32 ``[local rows, local columns]``, SGD's momentum as TorchRec would hold it,
            settled to ``last_step`` with the weight; None without.
        low: What a half-precision weight lacks of its float32 value; see
            :mod:`dist_dp.wide_rows`. None for float32 tables.
        row_state: What the optimizer keeps for rows that were ever updated, where the update is of
            single rows (:mod:`dist_dp.row_optimizers`); None otherwise.
        settling: True while rows are being brought up to date; if an error struck meanwhile it
            stays so, and the rows must not leave (see :meth:`check_whole` and :func:`settled`).
    """

    table: str
    num_rows: int
    dim: int
    row_offset: int
    column_offset: int
    weight: Tensor
    replicated: bool
    kind: str
    group: int = 0
    noise_key: bytes = b""
    momentum: Tensor | None = field(default=None, repr=False)
    low: Tensor | None = field(default=None, repr=False)
    row_state: RowState | None = field(default=None, repr=False)
    settling: bool = False
    _history: Tensor | None = field(default=None, repr=False)

    @property
    def last_step(self) -> Tensor:
        """int32 ``[local rows]``, the history table: the step each row is settled to.

        The step up to which the row's noise and decay have been applied; allocated on first use,
        because only mechanisms that defer noise need its 4 bytes a row.
        """
        if self._history is None:
            self._history = torch.zeros(
                self.weight.shape[0], dtype=torch.int32, device=self.weight.device
            )
        return self._history

    @property
    def has_history(self) -> bool:
        """Whether the history table exists."""
        return self._history is not None

    def state_tensors(self) -> dict[str, Tensor]:
        """Live tensors that a training checkpoint keeps; dimension 0 is the local rows.

        The row state is kept too, but not here: it has a row only where there was an update.
        """
        tensors = {"weight": self.weight}
        if self._history is not None:
            tensors["last_step"] = self._history
        if self.momentum is not None:
            tensors["momentum"] = self.momentum
        if self.low is not None:
            tensors["low"] = self.low
        return tensors

    def check_whole(self) -> None:
        """Refuses a shard whose settling was cut short: rows may be marked and lack their noise.

        Raises:
            ReleaseError: An error (or an interrupt) struck in the middle.
        """
        if self.settling:
            raise ReleaseError(
                f"settling of table '{self.table}' was cut short by an error, so some of its rows "
                "may lack noise: nothing can be trained, saved or released from this process. "
                "Resume from the last checkpoint."
            )

    def __repr__(self) -> str:
        """Without the key."""
        rows, columns = self.weight.shape
        return (
            f"TableShard({self.table!r}, rows {self.row_offset}+{rows} of {self.num_rows}, "
            f"columns {self.column_offset}+{columns} of {self.dim}, {self.kind})"
        )

    def rows_of_all_ranks(self, rows: Tensor) -> Tensor:
        """The distinct rows that some rank is about to read, int64, sorted.

        Replicas must settle the same rows at the same steps or they drift apart, so a replicated
        table takes the union over ranks (a collective: every rank reaches this call).
        """
        distinct: Tensor = torch.unique(rows)
        union: Tensor = torch.unique(all_gather_cat(distinct))
        return union.to(torch.int64)


@contextmanager
def settled(shards: Sequence[TableShard]) -> Iterator[None]:
    """Around the settling of rows: marked first, brought up to date, both or neither.

    Guarantee:
        An error or interrupt in the block leaves every shard's ``settling`` set, for good: rows may
        be marked as settled that lack their noise, and no later settling forgets that.

    Raises:
        ReleaseError: A settling of one of them was cut short before.
    """
    for shard in shards:
        shard.check_whole()
    for shard in shards:
        shard.settling = True
    yield
    for shard in shards:
        shard.settling = False
