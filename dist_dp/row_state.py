"""What an optimizer keeps for the rows of a shard that were ever updated, and for no other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_dp.row_index import RowIndex


@dataclass(frozen=True)
class StateField:
    """One of the values that a row keeps.

    Attributes:
        columns: Whether there is one for each local column, or one for the row.
        dtype: Of the value.
    """

    columns: bool
    dtype: torch.dtype = torch.float32


class RowState:
    """State by slot: the rows of a shard that have one are numbered as they come.

    Memory is O(rows ever updated); the tensors double as they fill, up to the rows of the shard.

    Args:
        kind: The optimizer's kind.
        fields: The values of a row, by name.
        shape: Local rows and columns of the shard.
        device: Where the shard is.
    """

    def __init__(
        self,
        kind: str,
        fields: Mapping[str, StateField],
        shape: tuple[int, int],
        device: torch.device,
    ) -> None:
        self.kind = kind
        self.fields = dict(fields)
        self._shape = shape
        self._device = device
        self.clear()

    def clear(self) -> None:
        """Forgets every row."""
        self._index = RowIndex(self._device)
        self._capacity = 0
        self._values = {name: self._zeros(name, 0) for name in self.fields}

    def __len__(self) -> int:
        """Rows that have a state."""
        return len(self._index)

    @property
    def rows(self) -> Tensor:
        """int64 ``[len(self)]``: local rows by slot; a view."""
        return self._index.rows

    @property
    def nbytes(self) -> int:
        """Bytes held, spare room included."""
        return self._index.nbytes + sum(t.nbytes for t in self._values.values())

    @property
    def values(self) -> dict[str, Tensor]:
        """Live values by name and slot: ``[len(self), local columns]`` or ``[len(self)]``."""
        return {name: tensor[: len(self)] for name, tensor in self._values.items()}

    def lookup(self, rows: Tensor) -> Tensor:
        """The slots of local rows (int64), -1 where a row has no state."""
        return self._index.lookup(rows)

    def insert(self, rows: Tensor) -> Tensor:
        """The slots of distinct local rows (int64); new ones start from zeros."""
        slots = self._index.insert(rows)
        if len(self) > self._capacity:
            self._grow()
        return slots

    def sort(self) -> None:
        """Numbers the slots anew, in the order of the rows; values go with their rows.

        A saved state is sorted, so that a range of rows is a range of slots. Takes a copy of one of
        the tensors at a time.
        """
        rows, order = self.rows.sort()
        if bool((rows == self.rows).all()):
            return
        for name, tensor in self._values.items():
            moved = self._zeros(name, self._capacity)
            torch.index_select(tensor, 0, order, out=moved[: len(rows)])
            self._values[name] = moved
        self._index = RowIndex(self._device)
        self._index.insert(rows)

    def _grow(self) -> None:
        before = self._capacity
        self._capacity = max(len(self), min(max(256, 2 * before), self._shape[0]))
        for name, tensor in self._values.items():
            grown = self._zeros(name, self._capacity)
            grown[:before] = tensor
            self._values[name] = grown

    def _zeros(self, name: str, count: int) -> Tensor:
        field = self.fields[name]
        size = (count, self._shape[1]) if field.columns else (count,)
        return torch.zeros(size, dtype=field.dtype, device=self._device)

    def __repr__(self) -> str:
        """What it is, without the values."""
        return f"RowState({self.kind!r}, {len(self)} of {self._shape[0]} rows)"
