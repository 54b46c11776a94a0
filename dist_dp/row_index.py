"""A map from row numbers to slots, for what exists only for some rows of a table.

Open addressing with linear probing, done for all rows of a call at once. Its memory is that of the
rows it holds, whatever the table's size.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST = 1 << 10
_EMPTY = -1


class RowIndex:
    """Rows by number, each with a slot: 0, 1, … in the order in which they came.

    Args:
        device: Where rows are looked up.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._rows = torch.empty(_LEAST // 2, dtype=torch.int64, device=self._device)
        self._count = 0
        self._clear(_LEAST)

    def __len__(self) -> int:
        """Rows that have a slot."""
        return self._count

    @property
    def rows(self) -> Tensor:
        """int64 ``[len]``: the row of each slot; a view."""
        return self._rows[: self._count]

    @property
    def num_bytes(self) -> int:
        """Memory it takes."""
        return 8 * (self._keys.numel() + self._rows.numel()) + 4 * self._slots.numel()

    def lookup(self, rows: Tensor) -> Tensor:
        """The slot of each row, int64 ``[n]``; -1 where it has none.

        Args:
            rows: int64 ``[n]``, 0 or more, repeats allowed.
        """
        slots = torch.full(rows.shape, -1, dtype=torch.int64, device=rows.device)
        places = self._first_places(rows)
        pending = torch.arange(rows.numel(), device=rows.device)
        while pending.numel():
            found = self._keys[places]
            hit = found == rows[pending]
            slots[pending[hit]] = self._slots[places[hit]].to(torch.int64)
            on = ~(hit | (found == _EMPTY))
            pending, places = pending[on], (places[on] + 1) & self._mask
        return slots

    def insert(self, rows: Tensor) -> Tensor:
        """The slot of each row, int64 ``[n]``; rows that had none get the next ones, in order.

        Args:
            rows: int64 ``[n]``, 0 or more, distinct.
        """
        slots = self.lookup(rows)
        new = slots < 0
        fresh = rows[new]
        if not fresh.numel():
            return slots
        count = self._count + fresh.numel()
        if count > self._rows.numel():
            larger = self._rows.new_empty(max(count, 2 * self._rows.numel()))
            larger[: self._count] = self.rows
            self._rows = larger
        self._rows[self._count : count] = fresh
        numbers = torch.arange(self._count, count, device=rows.device)
        self._count = count
        if 2 * count > self._keys.numel():
            size = self._keys.numel()
            while 2 * count > size:
                size *= 2
            self._clear(size)
            self._put(self.rows, torch.arange(count, device=rows.device))
        else:
            self._put(fresh, numbers)
        slots[new] = numbers
        return slots

    def _clear(self, size: int) -> None:
        self._mask = size - 1
        self._keys = torch.full((size,), _EMPTY, dtype=torch.int64, device=self._device)
        self._slots = torch.empty(size, dtype=torch.int32, device=self._device)

    def _put(self, rows: Tensor, slots: Tensor) -> None:
        """Puts rows that are not there into free places; of several at one place one gets it."""
        places = self._first_places(rows)
        while rows.numel():
            free = self._keys[places] == _EMPTY
            self._keys[places[free]] = rows[free]
            mine = self._keys[places] == rows
            self._slots[places[mine]] = slots[mine].to(torch.int32)
            rows, slots, places = rows[~mine], slots[~mine], (places[~mine] + 1) & self._mask

    def _first_places(self, rows: Tensor) -> Tensor:
        """Where to begin to look: neighbours in a table are spread."""
        mixed = rows * -7046029254386353131  # the golden ratio's fraction of 2^64, odd
        return ((mixed ^ (mixed >> 29)) * 0x2545F491 >> 20) & self._mask
