"""Shards that one lookup reads together: their stale rows found and settled in one go.

The history (the step each row is settled to) is also what finds the repeats of a row: it is marked
at its first occurrence. So nothing is sorted, and for all tables of a lookup the compiled kernels
are called twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.autograd.graph import increment_version

from dist_dp.kernels import checks, dispatch, native, updates
from dist_dp.kernels.graphs import outside_graphs


class Stale(NamedTuple):
    """Rows to settle, of all tables of a set, table after table.

    Attributes:
        rows: int64 [k], local rows, each once in its table.
        from_steps: int32 [k], the step each was settled to.
        counts: int64 [tables], on the CPU: how many belong to each table.
    """

    rows: torch.Tensor
    from_steps: torch.Tensor
    counts: torch.Tensor


class ShardSet:
    """Shards described once, whose stale rows are found many times.

    Args:
        weights: float32, bfloat16 or float16 [R, D] for each shard, on one device; they must keep
            their memory.
        histories: int32 [R] for each, contiguous, no two the same memory.
        keys: each table's key.
        row_offsets: global number of each shard's first row.
        column_offsets: global number of each shard's first column.

    Raises:
        TypeError, ValueError: as for `dist_dp.kernels.settle_rows`.
    """

    def __init__(
        self,
        weights: Sequence[torch.Tensor],
        histories: Sequence[torch.Tensor],
        keys: Sequence[bytes],
        row_offsets: Sequence[int],
        column_offsets: Sequence[int],
    ) -> None:
        self._weights = [checks.table(w) for w in weights]
        self._histories = [checks.integers(h, "histories") for h in histories]
        self._keys = [checks.key(k) for k in keys]
        self._row_offsets = [
            checks.integer(o, "row_offsets", 0, checks.MAX_ROWS - w.shape[0])
            for o, w in zip(row_offsets, self._weights, strict=True)
        ]
        self._column_offsets = [
            checks.columns(o, w.shape[1])[0]
            for o, w in zip(column_offsets, self._weights, strict=True)
        ]
        for weight, history in zip(self._weights, self._histories, strict=True):
            if history.dtype != torch.int32 or not history.is_contiguous():
                raise TypeError("histories: contiguous int32 expected")
            if history.shape != weight.shape[:1] or history.device != weight.device:
                raise ValueError("histories: one step for each row of the weight, on its device")
        starts = [h.data_ptr() for h in self._histories if h.numel()]
        if len(set(starts)) < len(starts):
            raise ValueError("histories: one is given twice; its rows would be settled twice")
        self._addresses = [t.data_ptr() for t in self._tensors()]
        self._tables = (native.Table * len(self._weights))(
            *(
                native.table(*described)
                for described in zip(
                    self._weights,
                    self._histories,
                    self._keys,
                    self._row_offsets,
                    self._column_offsets,
                    strict=True,
                )
            )
        )

    def __repr__(self) -> str:
        """Without the keys."""
        return f"{type(self).__name__}({len(self._weights)} shards)"

    @outside_graphs
    @torch.no_grad()
    def take_stale(
        self, ids: Sequence[torch.Tensor], to_step: int, *, older_than: int | None = None
    ) -> Stale:
        """The rows among `ids` that are settled to a step before `older_than`, each once.

        They are marked in the histories as settled to `to_step`: the caller settles them before
        anything else.

        Args:
            ids: for each shard, local rows in any order, repeats allowed, int64 or int32 [n].
            to_step: the step they are to be settled to.
            older_than: at most `to_step`, which is the default.

        Raises:
            IndexError: an id is no row; nothing is marked then.
        """
        end = checks.integer(to_step, "to_step", 0, checks.MAX_STEP)
        before = end if older_than is None else checks.integer(older_than, "older_than", 0, end)
        if len(ids) != len(self._weights):
            raise ValueError(f"ids: {len(self._weights)} tensors expected, {len(ids)} given")
        if not ids:
            return Stale(
                *(torch.empty(0, dtype=d) for d in (torch.int64, torch.int32, torch.int64))
            )
        if self.compiled:
            kinds = {i.dtype for i in ids}
            if kinds not in ({torch.int64}, {torch.int32}):
                ids = [checks.integers(i, "ids").to(torch.int64) for i in ids]
            if any(i.device.type != "cpu" or i.dim() != 1 for i in ids):
                raise ValueError("ids: one dimension, on the CPU like the weights, expected")
            return Stale(
                *native.take_stale(self._tables, [i.contiguous() for i in ids], before, end)
            )
        distinct = [
            torch.unique(checks.rows(checks.integers(i, "ids"), "ids", h.numel()))
            for i, h in zip(ids, self._histories, strict=True)
        ]
        rows = [d[h[d] < before] for d, h in zip(distinct, self._histories, strict=True)]
        from_steps = [h[r] for r, h in zip(rows, self._histories, strict=True)]
        for stale, history in zip(rows, self._histories, strict=True):
            history[stale] = end
        counts = torch.tensor([r.numel() for r in rows])
        return Stale(torch.cat(rows), torch.cat(from_steps), counts)

    @property
    def compiled(self) -> bool:
        """Whether the compiled kernels serve this set.

        Raises:
            ValueError: a weight has moved in memory since the set was made.
        """
        if not self._weights:
            return False
        if [t.data_ptr() for t in self._tensors()] != self._addresses:
            raise ValueError("a weight of the set has moved in memory; make a new set")
        return self._weights[0].device.type == "cpu" and dispatch.chosen_isa() is not None

    def _tensors(self) -> list[torch.Tensor]:
        """What must keep its memory, since the kernels are handed addresses."""
        return self._weights


class TableSet(ShardSet):
    """Shards described once, to be settled many times; see :class:`ShardSet` for the arguments."""

    @outside_graphs
    @torch.no_grad()
    def settle(
        self,
        stale: Stale,
        *,
        to_step: int,
        decay: torch.Tensor,
        scale: torch.Tensor,
        rounds: int = 20,
        grid: float | None = None,
    ) -> None:
        """In place: weight[r] <- decay * weight[r] + scale * z for the rows found.

        The same numbers as `dist_dp.kernels.settle_rows`, with its guarantee.

        Args:
            stale: from `take_stale`.
            to_step: the step given there.
            decay: float64 [k].
            scale: float64 [k], the standard deviation to add.
            rounds: ChaCha rounds.
            grid: as for `settle_rows`.
        """
        end = checks.integer(to_step, "to_step", 0, checks.MAX_STEP)
        if decay.shape != stale.rows.shape or scale.shape != stale.rows.shape:
            raise ValueError(f"decay, scale: shape {tuple(stale.rows.shape)} expected")
        if self.compiled:
            native.settle_tables(
                self._tables, stale.rows, stale.from_steps, stale.counts, end,
                decay.to(torch.float64).contiguous(), scale.to(torch.float64).contiguous(),
                checks.rounds(rounds), checks.spacing(grid, self._weights[0].dtype),
                isa=dispatch.chosen_isa(),
            )  # fmt: skip
            increment_version(self._weights)
            return
        sizes = stale.counts.tolist()
        columns = (stale.rows, stale.from_steps, decay, scale)
        for i, (rows, from_steps, d, s) in enumerate(
            zip(*(c.split(sizes) for c in columns), strict=True)
        ):
            updates.settle_rows(
                self._weights[i], rows, key=self._keys[i], row_offset=self._row_offsets[i],
                column_offset=self._column_offsets[i], from_steps=from_steps, to_step=end,
                decay=d, scale=s, rounds=rounds, grid=grid,
            )  # fmt: skip
