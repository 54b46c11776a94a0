"""The index of rows with a state: a dictionary's answers, memory of its rows, and speed."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from dist_dp.row_index import RowIndex

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def some(count: int, most: int, seed: int) -> Tensor:
    """Distinct rows below ``most``, in random order."""
    g = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, most, (3 * count + 16,), generator=g).unique()
    return drawn[torch.randperm(len(drawn), generator=g)][:count]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("most", [3000, 10**6, 2**62])
def test_it_is_a_dictionary(device: str, most: int) -> None:
    """Inserts of new and known rows mixed, through several doublings."""
    index, wanted = RowIndex(device), {}
    for seed in range(12):
        rows = some(700, most, seed)
        found = index.insert(rows.to(device))
        for row in rows.tolist():
            wanted.setdefault(row, len(wanted))
        assert found.dtype == torch.int64
        assert found.tolist() == [wanted[row] for row in rows.tolist()]
        asked = torch.cat([some(500, most, 100 + seed), rows[:50], rows[:50]])
        slots = index.lookup(asked.to(device))
        assert slots.dtype == torch.int64
        assert slots.tolist() == [wanted.get(row, -1) for row in asked.tolist()]
    assert len(index) == len(wanted)
    assert index.rows.tolist() == list(wanted)


def test_patterns_of_rows() -> None:
    """What tables see: ranges, multiples of a power of 2, and the ends of what int64 holds."""
    for rows in (
        torch.arange(5000),
        torch.arange(5000) * 4096,
        torch.arange(5000) * 2**40,
        torch.tensor([0, 2**63 - 1, 1, 2**63 - 2]),
    ):
        index = RowIndex()
        assert index.insert(rows).tolist() == list(range(len(rows)))
        assert index.lookup(rows.flip(0)).tolist() == list(range(len(rows)))[::-1]
        assert index.lookup(rows[:4] + 3).tolist() == [
            rows.tolist().index(row) if row in rows.tolist() else -1
            for row in (rows[:4] + 3).tolist()
        ]


def test_nothing() -> None:
    index, none = RowIndex(), torch.empty(0, dtype=torch.int64)
    assert index.lookup(none).tolist() == index.insert(none).tolist() == index.rows.tolist() == []
    assert index.lookup(torch.tensor([0, 7])).tolist() == [-1, -1] and len(index) == 0


def test_a_row_that_comes_twice_is_refused() -> None:
    index = RowIndex()
    with pytest.raises(ValueError, match=r"row 7 comes twice.*torch\.unique"):
        index.insert(torch.tensor([7, 3, 7]))
    assert len(index) == 0 and index.lookup(torch.tensor([7, 3])).tolist() == [-1, -1]


def test_memory_is_that_of_the_rows_inserted() -> None:
    index = RowIndex()
    empty = index.nbytes
    assert empty < 10_000
    rows = some(100_000, 2**40, 1)
    index.insert(rows)
    assert index.nbytes <= empty + 32 * len(rows)


def test_a_search_is_short() -> None:
    """At most half full, few rows are found far from home, even for neighbours."""
    for rows in (some(200_000, 10**9, 2), torch.arange(200_000)):
        index, probes = RowIndex(), 0
        index.insert(rows)
        places, pending = index._home(rows), torch.arange(len(rows))
        wanted = torch.arange(len(rows))
        distance = 0
        while pending.numel():
            probes += pending.numel()
            distance += 1
            again = (index._places[places] != wanted[pending]).nonzero().squeeze(1)
            places = (places[again] + distance) & (index._places.numel() - 1)
            pending = pending[again]
        assert distance < 30 and probes < 2 * len(rows)


def test_speed() -> None:
    """50,000 rows of a million take milliseconds; the bound leaves room for a busy machine."""
    index = RowIndex()
    index.insert(some(1_000_000, 10**8, 3))
    rows, taken = index.rows[torch.randperm(1_000_000)[:50_000]], []
    for seed in range(5):
        started = time.thread_time()
        index.lookup(rows)
        index.insert(some(50_000, 10**8, seed))
        taken.append(time.thread_time() - started)
    assert min(taken) < 0.15
