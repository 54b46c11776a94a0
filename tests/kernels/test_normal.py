"""Normals: bits that never change, independence of placement, counters, refusals.

Their statistics are in test_statistics.py, their accuracy in test_accuracy.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dist_dp import kernels
from dist_dp.kernels import box_muller, reference

SECRET = bytes(range(32))
KEY = kernels.derive_key(SECRET, "noise", "table")
GOLDEN = [
    "-0x1.4ed83e0000000p+0",
    "0x1.2dbe9c0000000p-1",
    "0x1.beccac0000000p-5",
    "0x1.5f3eec0000000p-1",
    "-0x1.0061ec0000000p+0",
    "-0x1.c26a8e0000000p-2",
    "-0x1.2325420000000p+0",
    "-0x1.059c8a0000000p-1",
]


def words(length: int, angle: int) -> np.ndarray:
    return np.array([length, angle] * 8, np.uint32).reshape(16, 1)


def transformed(length: int, angle: int, extra: int = 0) -> np.ndarray:
    return box_muller.normals(words(length, angle), words(extra, 0))[0]


def test_more_bits_decide_only_in_the_tail() -> None:
    edge = box_muller.TAIL_BELOW
    assert transformed(edge, 5, 0)[0] == transformed(edge, 5, 2**32 - 1)[0]
    assert transformed(2**9, 5, 0)[0] > transformed(2**9, 5, 2**32 - 1)[0]
    assert transformed(edge - 2, 5, 2**32 - 1)[0] >= transformed(edge, 5)[0]


def test_independent_of_placement() -> None:
    rows = torch.tensor([5, 2**32 + 5, 0, 2**48 - 1, 77, 5])
    steps = torch.tensor([0, 3, 1, 2, 9, 0], dtype=torch.int32)
    whole = kernels.normal(KEY, rows, steps, 10, num_columns=100)
    assert torch.equal(whole[0], whole[5])
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    shuffled = kernels.normal(KEY, rows[order], steps[order], 10, num_columns=100)
    assert torch.equal(shuffled, whole[order])
    for i in range(6):
        one = kernels.normal(KEY, rows[i : i + 1], int(steps[i]), 10, num_columns=100)
        assert torch.equal(one[0], whole[i])
    for first, last in ((0, 1), (1, 8), (7, 9), (8, 16), (3, 100), (99, 100), (40, 41)):
        part = kernels.normal(KEY, rows, steps, 10, column_offset=first, num_columns=last - first)
        assert torch.equal(part, whole[:, first:last])


def test_independent_of_chunks() -> None:
    rows = torch.arange(20000)
    narrow = kernels.normal(KEY, rows, 0, 1, num_columns=3)
    assert torch.equal(
        narrow[12345:12350], kernels.normal(KEY, torch.arange(12345, 12350), 0, 1, num_columns=3)
    )
    wide = kernels.normal(KEY, torch.tensor([1, 2]), 0, 1, num_columns=16 * 2**13)
    assert torch.equal(
        wide[1:, -5:],
        kernels.normal(KEY, torch.tensor([2]), 0, 1, column_offset=16 * 2**13 - 5, num_columns=5),
    )


def test_first_values_never_change() -> None:
    """Released models and checkpoints depend on these bits."""
    z = kernels.normal(KEY, torch.tensor([1, 2**40]), 2, 5, column_offset=14, num_columns=4)
    assert [v.hex() for v in z.ravel().tolist()] == GOLDEN


def test_counter_words_are_injective() -> None:
    """Upper row bits, domains and column blocks share a word without overlap; steps differ."""
    seen = set()
    for row in (0, 1, 2**32, 2**32 * 0xFFFF, 2**48 - 1):
        for block in (0, 1, 2**13 - 1):
            for domain in range(5):
                for start, end in ((1, 2), (2, 1), (0, 2), (2, 0)):
                    counters = reference.inputs(
                        np.array([row]), block, 1, np.array([start]), end, domain
                    )
                    seen.add(tuple(counters[:, 0].tolist()))
    assert len(seen) == 5 * 3 * 5 * 4


def test_derive_key() -> None:
    keys = {
        kernels.derive_key(SECRET, "noise", "t"),
        kernels.derive_key(SECRET, "noise", "u"),
        kernels.derive_key(SECRET, "noiset", ""),
        kernels.derive_key(SECRET, "", "noiset"),
        kernels.derive_key(SECRET, "sampling", "t"),
        kernels.derive_key(bytes(32), "noise", "t"),
        # every byte of the secret counts, the second half too
        kernels.derive_key(SECRET[:31] + b"\0", "noise", "t"),
    }
    assert len(keys) == 7
    assert all(len(k) == 32 for k in keys)
    with pytest.raises(ValueError, match="secret"):
        kernels.derive_key(b"short", "noise", "t")
    with pytest.raises(TypeError, match="secret"):
        kernels.derive_key("x" * 32, "noise", "t")  # type: ignore[arg-type]


def test_normal_like() -> None:
    flat = kernels.normal_like(KEY, (5000,), 0, 1)
    assert torch.equal(kernels.normal_like(KEY, (50, 100), 0, 1).ravel(), flat)
    assert torch.equal(kernels.normal_like(KEY, (3,), 0, 1), flat[:3])
    assert kernels.normal_like(KEY, (), 0, 1).shape == ()
    assert kernels.normal_like(KEY, (0, 4), 0, 1).shape == (0, 4)


def test_empty() -> None:
    none = torch.empty(0, dtype=torch.int64)
    assert kernels.normal(KEY, none, none, 1, num_columns=4).shape == (0, 4)
    assert kernels.normal(KEY, torch.tensor([1]), 0, 1, num_columns=0).shape == (1, 0)


ROW = torch.tensor([1])


@pytest.mark.parametrize(
    ("error", "argument", "change"),
    [
        (ValueError, "key", {"key": b"short"}),
        (TypeError, "key", {"key": None}),
        (TypeError, "rows", {"rows": [1]}),
        (TypeError, "rows", {"rows": torch.tensor([1.0])}),
        (ValueError, "rows", {"rows": torch.tensor([[1]])}),
        (IndexError, "rows", {"rows": torch.tensor([-1])}),
        (IndexError, "rows", {"rows": torch.tensor([2**48])}),
        (ValueError, "from_steps", {"from_steps": 5}),
        (ValueError, "from_steps", {"from_steps": 6}),
        (ValueError, "from_steps", {"from_steps": -1}),
        (ValueError, "from_steps", {"from_steps": torch.tensor([0, 1])}),
        (ValueError, "from_steps", {"from_steps": torch.tensor([6])}),
        (TypeError, "from_steps", {"from_steps": torch.tensor([0.5])}),
        (ValueError, "to_step", {"to_step": 2**31}),
        (TypeError, "to_step", {"to_step": 5.0}),
        (ValueError, "column_offset", {"column_offset": -1}),
        (ValueError, "column_offset", {"column_offset": 16 * 2**13 - 1}),
        (ValueError, "num_columns", {"num_columns": 16 * 2**13 + 1}),
        (ValueError, "rounds", {"rounds": 4}),
    ],
)
def test_refusals(error: type[Exception], argument: str, change: dict[str, object]) -> None:
    arguments: dict[str, object] = {
        "key": KEY, "rows": ROW, "from_steps": 0, "to_step": 5, "num_columns": 4,
    }  # fmt: skip
    with pytest.raises(error, match=argument):
        kernels.normal(**(arguments | change))  # type: ignore[arg-type]
