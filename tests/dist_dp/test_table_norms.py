"""Norms of table gradients against the table gradient itself, built densely for each example."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dist_dp.clipping.table_norms import TableUse, squared_norms

ROWS, DIM = 5, 3


def dense_norms(uses: list[TableUse], batch: int) -> Tensor:
    """Each example's whole table gradient, row by row in plain Python, then its norm."""
    table = torch.zeros(batch, ROWS, DIM, dtype=torch.float64)
    for use in uses:
        entry = 0
        for b, length in enumerate(use.lengths.tolist()):
            for _ in range(length):
                weight = 1.0 if use.entry_weights is None else float(use.entry_weights[entry])
                delta = use.delta[b] if use.pooled else use.delta[entry]
                table[b, int(use.rows[entry])] += weight * delta.double()
                entry += 1
    return table.square().sum((1, 2))


def random_use(
    seed: int, *, pooled: bool = True, weighted: bool = False, longest: int = 4, batch: int = 6
) -> TableUse:
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, longest + 1, (batch,), generator=g)
    count = int(lengths.sum())
    return TableUse(
        rows=torch.randint(0, ROWS, (count,), generator=g),
        lengths=lengths,
        entry_weights=torch.randn(count, generator=g) if weighted else None,
        delta=torch.randn(batch if pooled else count, DIM, generator=g),
        pooled=pooled,
    )


CASES = {
    "pooled": [random_use(1)],
    "pooled, weighted with both signs": [random_use(2, weighted=True)],
    "sequence": [random_use(3, pooled=False)],
    "two features share": [random_use(4), random_use(5, weighted=True)],
    "pooled and sequence share": [random_use(6), random_use(7, pooled=False)],
    "long bags": [random_use(8, longest=30)],
    "all empty": [random_use(9, longest=0)],
    "all empty, shared": [random_use(9, longest=0), random_use(10, longest=0)],
}


@pytest.mark.parametrize("case", CASES)
def test_against_the_dense_gradient(case: str) -> None:
    found = squared_norms(CASES[case], ROWS, 6)
    assert found.shape == (6,)
    torch.testing.assert_close(found.double(), dense_norms(CASES[case], 6), rtol=1e-5, atol=1e-6)


def test_one_id_in_every_bag() -> None:
    """The short way that Criteo's single-valued features take."""
    for weights in (None, torch.tensor([0.5, -2.0])):
        use = TableUse(torch.tensor([1, 1]), torch.ones(2, dtype=torch.int64), weights,
                       torch.tensor([[3.0, 4.0, 0.0], [1.0, 0.0, 0.0]]), True)  # fmt: skip
        torch.testing.assert_close(squared_norms([use], ROWS, 2).double(), dense_norms([use], 2))
    # As many ids as examples, yet not one in each.
    uneven = TableUse(torch.tensor([2, 2]), torch.tensor([2, 0]), None, torch.ones(2, DIM), True)
    assert squared_norms([uneven], ROWS, 2).tolist() == [4.0 * DIM, 0.0]


def test_repeats_weigh_more_than_their_number() -> None:
    """An id three times is a row gradient three times as long: 9, not 3."""
    rows = torch.tensor([2, 2, 2])
    use = TableUse(rows, torch.tensor([3]), None, torch.tensor([[1.0, 0.0, 0.0]]), True)
    assert squared_norms([use], ROWS, 1).item() == 9.0


def test_opposite_uses_of_a_shared_row_cancel() -> None:
    one, row = torch.ones(1, dtype=torch.int64), torch.tensor([3])
    delta = torch.tensor([[1.0, 2.0, 3.0]])
    uses = [TableUse(row, one, None, delta, True), TableUse(row, one, None, -delta, True)]
    assert squared_norms(uses, ROWS, 1).item() == 0.0
