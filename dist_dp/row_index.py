"""Numbers the rows of a table that have a state, so that state exists for these rows alone.

A hash map with open addressing, vectorised in PyTorch: a lookup of many rows takes a few rounds of
gathers, each over the rows that are not found yet. Works on the CPU and on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SMALLEST = 1024
"""Places of an index that is still empty; a power of 2."""
_MULTIPLIER = 0x9E3779B97F4A7C15 - (1 << 64)
"""2^64 divided by the golden ratio, odd, as an int64: neighbours are scattered (Knuth)."""


class RowIndex:
    """From local row number to slot: 0, 1, … in the order of insertion.

    Memory is O(rows inserted): at most 32 bytes for each beyond the smallest size. The places are
    at most half full; they double.

    Args:
        device: Where the row numbers that will be asked for are.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._size = 0
        self._rows = torch.empty(_SMALLEST // 2, dtype=torch.int64, device=device)
        self._places = torch.full((_SMALLEST,), -1, dtype=torch.int32, device=device)

    def __len__(self) -> int:
        """Rows inserted."""
        return self._size

    @property
    def rows(self) -> Tensor:
        """int64 ``[len(self)]``: the rows by slot; a view."""
        return self._rows[: self._size]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._rows.nbytes + self._places.nbytes

    def lookup(self, rows: Tensor) -> Tensor:
        """The slots of rows.

        Args:
            rows: int64 ``[n]``, any order, repeats allowed.

        Returns:
            int64 ``[n]``, -1 where a row is absent.
        """
        places = self._home(rows)
        slots = self._places[places].long()
        elsewhere = (slots >= 0) & (self._rows[slots.clamp_min(0)] != rows)
        pending = elsewhere.nonzero().squeeze(1)
        wanted, places = rows[pending], places[pending]
        distance = 0
        while pending.numel():
            distance += 1
            places = (places + distance) & (self._places.numel() - 1)
            found = self._places[places].long()
            elsewhere = (found >= 0) & (self._rows[found.clamp_min(0)] != wanted)
            slots[pending] = found
            again = elsewhere.nonzero().squeeze(1)
            pending, wanted, places = pending[again], wanted[again], places[again]
        return slots

    def insert(self, rows: Tensor) -> Tensor:
        """The slots of rows, new ones for those that are absent, in the order given.

        Args:
            rows: int64 ``[n]``, distinct, 0 or more, any order.

        Returns:
            int64 ``[n]``.

        Raises:
            ValueError: A row comes twice.
        """
        slots = self.lookup(rows)
        absent = (slots < 0).nonzero().squeeze(1)
        if not absent.numel():
            return slots
        fresh = rows[absent]
        check_distinct(fresh)
        first, self._size = self._size, self._size + fresh.numel()
        if self._size > self._rows.numel():
            grown = fresh.new_empty(_doubled(self._rows.numel(), self._size))
            grown[:first] = self._rows[:first]
            self._rows = grown
        self._rows[first : self._size] = fresh
        slots[absent] = torch.arange(first, self._size, device=rows.device)
        if 2 * self._size > self._places.numel():
            places = _doubled(self._places.numel(), 2 * self._size)
            self._places = torch.full((places,), -1, dtype=torch.int32, device=rows.device)
            first = 0
        self._place(torch.arange(first, self._size, dtype=torch.int32, device=rows.device))
        return slots

    def _home(self, rows: Tensor) -> Tensor:
        """Where the search for a row begins."""
        bits = self._places.numel().bit_length() - 1
        return ((rows * _MULTIPLIER) >> (64 - bits)) & (self._places.numel() - 1)

    def _place(self, slots: Tensor) -> None:
        """Gives each slot, int32, the first free place on the way from its row's home.

        Where several want a place one of them gets it, and the others see that and go on.
        """
        places = self._home(self._rows[slots.long()])
        distance = 0
        while slots.numel():
            free = self._places[places] < 0
            self._places[places[free]] = slots[free]
            again = (self._places[places] != slots).nonzero().squeeze(1)
            distance += 1
            # Steps of 1, 2, 3, … reach every place, since their number is a power of 2.
            slots = slots[again]
            places = (places[again] + distance) & (self._places.numel() - 1)


def _doubled(size: int, needed: int) -> int:
    while size < needed:
        size *= 2
    return size


def check_distinct(rows: Tensor) -> None:
    """Refuses rows that are not distinct; cheap where they are sorted.

    Raises:
        ValueError: A row comes twice.
    """
    if bool((rows[1:] > rows[:-1]).all()):
        return
    ordered = rows.sort().values
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if twice.numel():
        raise ValueError(
            f"row {int(twice[0])} comes twice, but rows must be distinct; pass torch.unique(rows)"
        )
