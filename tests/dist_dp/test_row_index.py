"""The map from rows to slots: against a dictionary, and its size."""

from __future__ import annotations

import torch

from dist_dp.row_index import RowIndex


def test_it_is_a_dictionary() -> None:
    generator = torch.Generator().manual_seed(1)
    index, wanted = RowIndex(), {}
    for size in (0, 1, 7, 300, 5000, 40, 20_000):
        rows = torch.randperm(50_000, generator=generator)[:size]
        for row in rows.tolist():
            wanted.setdefault(row, len(wanted))
        assert index.insert(rows).tolist() == [wanted[r] for r in rows.tolist()]
        assert len(index) == len(wanted)
    asked = torch.randint(0, 60_000, (30_000,), generator=generator)
    assert index.lookup(asked).tolist() == [wanted.get(r, -1) for r in asked.tolist()]
    assert index.rows.tolist() == list(wanted)


def test_neighbours_and_multiples_find_their_places() -> None:
    """Rows as tables have them: runs, and strides of powers of two up to 2^40."""
    for rows in (torch.arange(100_000), torch.arange(50_000) << 12, torch.arange(1000) << 40):
        index = RowIndex()
        assert torch.equal(index.insert(rows), torch.arange(rows.numel()))
        assert torch.equal(index.lookup(rows.flip(0)), torch.arange(rows.numel()).flip(0))
        assert int(index.lookup(rows + 7 + rows.max()).max()) == -1


def test_memory_is_that_of_the_rows_it_holds() -> None:
    index = RowIndex()
    index.insert(torch.arange(1000) * 10**8)
    assert index.num_bytes < 100_000
