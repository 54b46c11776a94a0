"""States of rows in a checkpoint: of as many rows as were ever updated, moved to any sharding.

Each shard's state is tensors of its own, named after its box (first row, rows, first column and
columns of the table), so that replicas, which have the same box, are written once::

    row_states/TABLE/0+500.8+4/rows       global numbers, ascending
    row_states/TABLE/0+500.8+4/exp_avg    their values: one for each of the box's columns, or one

A shard reads from the boxes that overlap its own. Which rows it keeps of each must be known before
their values have a place, so there are two reads. A value of a whole row, split by columns before,
becomes the mean over the columns that it is now for: what a mean square of more columns is. A box
of fewer columns than the one saved takes the row's value as it is.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from dist_dp.checkpoint_tensors import Piece
from dist_dp.errors import CheckpointError
from dist_dp.row_state import RowState
from dist_dp.table_shard import TableShard

PREFIX = "row_states/"

_NAME = re.compile(PREFIX + r"(.+)/(\d+)\+(\d+)\.(\d+)\+(\d+)/(\w+)", re.ASCII)


@dataclass(frozen=True)
class _Box:
    """The rows and columns of a table that a shard has, or had when it was saved."""

    table: str
    row: int
    rows: int
    column: int
    columns: int

    @classmethod
    def of(cls, shard: TableShard) -> _Box:
        rows, columns = shard.weight.shape
        return cls(shard.table, shard.row_offset, rows, shard.column_offset, columns)

    def name(self, what: str) -> str:
        place = f"{self.row}+{self.rows}.{self.column}+{self.columns}"
        return f"{PREFIX}{self.table}/{place}/{what}"

    def shared_columns(self, other: _Box) -> tuple[int, int]:
        """First and one past the last of the columns, of the table, that both have."""
        first = max(self.column, other.column)
        return first, min(self.column + self.columns, other.column + other.columns)

    def overlaps(self, other: _Box) -> bool:
        first, last = self.shared_columns(other)
        rows = max(self.row, other.row) < min(self.row + self.rows, other.row + other.rows)
        return self.table == other.table and rows and first < last


def row_state_pieces(shards: Sequence[TableShard]) -> dict[str, list[Piece]]:
    """The states of the rows of some shards, live, each sorted by row."""
    found: dict[str, list[Piece]] = {}
    for shard in shards:
        state = shard.row_state
        if state is None:
            continue
        state.sort()
        box = _Box.of(shard)
        found[box.name("rows")] = [Piece.whole(state.rows + shard.row_offset)]
        for name, values in state.values.items():
            found[box.name(name)] = [Piece.whole(values)]
    return found


def row_state_kinds(shards: Sequence[TableShard]) -> dict[str, str]:
    """The kind of optimizer by table, of those whose rows have a state."""
    return {s.table: s.row_state.kind for s in shards if s.row_state is not None}


def check_same_row_states(shards: Sequence[TableShard], saved: Mapping[str, str]) -> None:
    """Refuses a run whose tables have another optimizer, as far as it keeps a state of rows.

    Args:
        shards: Of the run that goes on.
        saved: What :func:`row_state_kinds` gave, for all tables.

    Raises:
        CheckpointError: It names the table and both optimizers.
    """
    now = row_state_kinds(shards)
    for table in sorted({s.table for s in shards}):
        if saved.get(table) != now.get(table):
            raise CheckpointError(
                f"table '{table}' was saved with {_said(saved.get(table))} and has "
                f"{_said(now.get(table))} now; resume with the table optimizer that the run began "
                "with (train.table_optimizer)"
            )


def _said(kind: str | None) -> str:
    return "no state of its rows" if kind is None else f"rows in the state of '{kind}'"


class RestoredRows:
    """The states of the rows of this rank's shards, as a checkpoint fills them.

    First ``rows`` are filled, then :meth:`allocate` gives the pieces for the values, then
    :meth:`finish` puts into place what was not filled in place.

    Args:
        shards: Of the run that goes on.
        saved: What the checkpoint holds.

    Attributes:
        rows: Pieces for the numbers of the rows, of every box that overlaps a shard here.

    Raises:
        CheckpointError: A tensor's name is none of those that are written, or a box has no rows.
    """

    def __init__(self, shards: Sequence[TableShard], saved: Metadata) -> None:
        self._shards = list(shards)
        self._sizes: dict[str, torch.Size] = {}
        self._boxes: set[_Box] = set()
        for name, described in saved.state_dict_metadata.items():
            if name.startswith(PREFIX):
                assert isinstance(described, TensorStorageMetadata)
                self._sizes[name] = described.size
                self._boxes.add(_box_named(name))
        self.rows: dict[str, list[Piece]] = {}
        for shard in self._shards:
            for box in self._overlapping(shard):
                name = box.name("rows")
                if name not in self._sizes:
                    raise CheckpointError(f"it lacks '{name}', whose values it has")
                self.rows[name] = [Piece.whole(torch.empty(self._sizes[name], dtype=torch.int64))]
        self._merges: list[_Merge] = []

    def knows(self, name: str) -> bool:
        """Whether a tensor is a state of rows that the shards here keep, or of a table elsewhere.

        Args:
            name: Of a tensor of a checkpoint.
        """
        if not name.startswith(PREFIX):
            return False
        match = _NAME.fullmatch(name)
        assert match is not None  # else it was refused
        here = [s.row_state for s in self._shards if s.table == match[1]]
        return all(s is not None and match[6] in {"rows", *s.fields} for s in here)

    def allocate(self) -> dict[str, list[Piece]]:
        """Makes place for the states of the rows that belong here.

        Returns:
            Pieces for the values: the live state where rows of a box lie together in it.

        Raises:
            CheckpointError: The numbers of the rows are no ascending ones.
        """
        pieces: dict[str, list[Piece]] = defaultdict(list)
        for shard in self._shards:
            state = shard.row_state
            if state is None:
                continue
            state.clear()
            kept = [(box, *self._kept(shard, box)) for box in self._overlapping(shard)]
            every = [rows for _, rows, _ in kept]
            if not sum(len(rows) for rows in every):
                continue
            union = torch.unique(torch.cat(every))
            state.insert(union.to(shard.weight.device))
            for box, rows, first in kept:
                slots = torch.searchsorted(union, rows)
                for name in state.fields:
                    part = _Part(_Box.of(shard), box, state, name, slots)
                    piece = part.piece(self._sizes.get(box.name(name), torch.Size([])), first)
                    pieces[box.name(name)].append(piece)
                    if not part.is_live:
                        self._merges.append(_Merge(part, piece.tensor))
        return dict(pieces)

    def finish(self) -> None:
        """Puts into place what was not filled in place."""
        for merge in self._merges:
            merge.apply()
        self._merges.clear()

    def _overlapping(self, shard: TableShard) -> list[_Box]:
        mine = _Box.of(shard)
        found = [box for box in self._boxes if box.overlaps(mine)]
        return sorted(found, key=lambda box: (box.row, box.column))

    def _kept(self, shard: TableShard, box: _Box) -> tuple[Tensor, int]:
        """Local rows of a shard that a box has a state of, and the first one's place in the box."""
        (piece,) = self.rows[box.name("rows")]
        rows = piece.tensor
        if rows.dim() != 1 or not bool((rows[1:] > rows[:-1]).all()):
            raise CheckpointError(
                f"the rows of '{box.name('rows')}' are not in order: put a copy of the checkpoint "
                "back, or start a new run"
            )
        ends = torch.tensor([shard.row_offset, shard.row_offset + shard.weight.shape[0]])
        first, last = torch.searchsorted(rows, ends).tolist()
        return rows[first:last] - shard.row_offset, first


@dataclass(frozen=True)
class _Part:
    """A value of the rows that a saved box and a shard share.

    Attributes:
        mine: The shard's box.
        saved: The saved box.
        state: The shard's state, with place for the rows.
        name: The value's name.
        slots: int64 ``[n]``: the rows' slots, ascending.
    """

    mine: _Box
    saved: _Box
    state: RowState
    name: str
    slots: Tensor

    @property
    def share(self) -> float:
        """The part of the shard's columns that the saved box has."""
        first, last = self.mine.shared_columns(self.saved)
        return (last - first) / self.mine.columns

    @property
    def is_live(self) -> bool:
        """Whether the value can be read straight into the state."""
        count = len(self.slots)
        together = not count or int(self.slots[-1] - self.slots[0]) + 1 == count
        return together and (self.state.fields[self.name].columns or self.share == 1.0)

    def piece(self, size: Sequence[int], first: int) -> Piece:
        """What is read: the rows from one on, and the columns that both have.

        Args:
            size: Of the saved tensor.
            first: The first row, of the saved box's.
        """
        whole = self.state.values[self.name]
        if self.is_live:
            start = int(self.slots[0]) if len(self.slots) else 0
            target = self.columns_of(whole[start : start + len(self.slots)])
        else:
            target = torch.empty_like(self.columns_of(whole[: len(self.slots)]))
        offsets = [first]
        if whole.dim() == 2:
            offsets.append(self.mine.shared_columns(self.saved)[0] - self.saved.column)
        return Piece(tuple(size), tuple(offsets), target)

    def columns_of(self, values: Tensor) -> Tensor:
        """Of a value of the shard's rows, the columns that the saved box has."""
        if values.dim() == 1:
            return values
        first, last = self.mine.shared_columns(self.saved)
        return values[:, first - self.mine.column : last - self.mine.column]


@dataclass(frozen=True)
class _Merge:
    """A value that was read beside the state."""

    part: _Part
    read: Tensor

    def apply(self) -> None:
        """Puts it into the state."""
        part, values = self.part, self.part.state.values[self.part.name]
        slots = part.slots.to(values.device)
        if values.dim() == 2:
            part.columns_of(values)[slots] = self.read
        elif values.is_floating_point():
            values[slots] += self.read * part.share
        else:
            # Updates of a row: those of its columns happened together.
            values[slots] = torch.maximum(values[slots], self.read)


def _box_named(name: str) -> _Box:
    match = _NAME.fullmatch(name)
    if match is None:
        raise CheckpointError(f"it holds '{name}', which is no state of a table's rows")
    return _Box(match[1], *(int(match[number]) for number in range(2, 6)))
