"""Normals: distribution, tails, independence of placement, and no collisions.

Keys are fixed, so the statistical tests always give the same answer; each states the level at
which it would reject a correct generator if the key were drawn anew.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from dist_dp import kernels
from dist_dp.kernels import box_muller, reference

SECRET = bytes(range(32))
KEY = kernels.derive_key(SECRET, "noise", "table")
LEVEL = 1e-4
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


@pytest.fixture(scope="module")
def draws() -> torch.Tensor:
    """2^20 normals: 8192 rows of 128 columns."""
    return kernels.normal(KEY, torch.arange(8192), 3, 7, num_columns=128)


def check_standard_normal(z: np.ndarray) -> None:
    """Reject at level 1e-4: Kolmogorov-Smirnov, and each of the first six moments."""
    z = z.astype(np.float64)
    tests = [stats.kstest(z, "norm").pvalue]
    for order in range(1, 7):
        mean = 0.0 if order % 2 else float(math.prod(range(1, order, 2)))
        second = float(math.prod(range(1, 2 * order, 2)))
        error = math.sqrt((second - mean**2) / z.size)
        tests.append(2 * stats.norm.sf(abs(float(np.mean(z**order)) - mean) / error))
    assert min(tests) > LEVEL / len(tests), tests


def test_distribution(draws: torch.Tensor) -> None:
    z = draws.numpy()
    check_standard_normal(z.ravel())
    for lane in range(8):
        check_standard_normal(z[:, lane::8].ravel())


def test_the_distribution_test_can_fail(draws: torch.Tensor) -> None:
    z = draws.numpy().ravel()
    for wrong in (z * 1.005, z + 0.01, np.where(np.abs(z) > 3.5, 0.0, z)):
        with pytest.raises(AssertionError):
            check_standard_normal(wrong)


def test_tail_counts(draws: torch.Tensor) -> None:
    """Two-sided Poisson tests at level 1e-4 together."""
    z = np.abs(draws.numpy().ravel())
    for bound in (3.0, 3.5, 4.0, 4.5):
        expected = z.size * 2 * stats.norm.sf(bound)
        count = int((z > bound).sum())
        tail = min(stats.poisson.cdf(count, expected), stats.poisson.sf(count - 1, expected))
        assert tail > LEVEL / 8, (bound, count, expected)


def test_no_correlation_between_neighbours(draws: torch.Tensor) -> None:
    """Rows, columns, steps, keys: correlations and those of squares at level 1e-4 together."""
    base = draws.double()
    rows = torch.arange(8192)
    others = {
        "rows": (base[1:], base[:-1]),
        "columns": (base[:, 1:], base[:, :-1]),
        "pair": (base[:, 0::2], base[:, 1::2]),
        "to": (base, kernels.normal(KEY, rows, 3, 8, num_columns=128).double()),
        "from": (base, kernels.normal(KEY, rows, 2, 7, num_columns=128).double()),
        "key": (
            base,
            kernels.normal(
                kernels.derive_key(SECRET, "noise", "tablf"), rows, 3, 7, num_columns=128
            ).double(),
        ),
    }
    for name, (a, b) in others.items():
        for power in (1, 2):
            x, y = a.pow(power).ravel().numpy(), b.pow(power).ravel().numpy()
            score = abs(np.corrcoef(x, y)[0, 1]) * math.sqrt(x.size)
            assert 2 * stats.norm.sf(score) > LEVEL / 12, (name, power, score)


def words(length: int, angle: int) -> np.ndarray:
    return np.array([length, angle] * 8, np.uint32).reshape(16, 1)


def transformed(length: int, angle: int, extra: int = 0) -> np.ndarray:
    return box_muller.normals(words(length, angle), words(extra, 0))[0]


def test_transform_reaches_far_tails() -> None:
    """u = odd 2^-64 gives sqrt(-2 log u), well beyond 5.77, the end of 24-bit uniforms, and 8."""
    for k in (1, 2**10 + 1, 2**17 + 1, 2**30 + 1, 2**39 + 1, 2**51 + 1):
        z = transformed(k >> 32, 0, k & 0xFFFFFFFF)
        exact = math.sqrt(-2 * math.log(k * 2.0**-64))
        assert z[0] == pytest.approx(exact, rel=1e-6)
        assert abs(z[1]) < 1e-8
    assert transformed(0, 0)[0] == pytest.approx(9.4193, abs=1e-4)
    assert abs(box_muller.LARGEST_NORMAL - 9.4193) < 1e-4
    assert transformed(0, 0, 2**17)[0] > 8.0
    assert transformed(1, 0)[0] > 6.6
    # a uniform of 24 bits ends at 5.77: here 2^40 different words lie beyond
    assert transformed(2**7, 0)[0] > 5.8
    assert 0 < transformed(2**32 - 1, 0)[0] < 3e-5


def test_more_bits_decide_only_in_the_tail() -> None:
    edge = box_muller.TAIL_BELOW
    assert transformed(edge, 5, 0)[0] == transformed(edge, 5, 2**32 - 1)[0]
    assert transformed(2**9, 5, 0)[0] > transformed(2**9, 5, 2**32 - 1)[0]
    assert transformed(edge - 2, 5, 2**32 - 1)[0] >= transformed(edge, 5)[0]


def test_transform_covers_the_circle_evenly() -> None:
    """The angle's top bits visit every part of the circle once."""
    top = np.arange(4096) << 20
    z = np.stack([transformed(2**30, int(a) + 2**19)[:2] for a in top]).astype(float)
    angle = np.sort(np.arctan2(z[:, 1], z[:, 0]))
    assert np.allclose(np.diff(angle), 2 * math.pi / 4096, atol=1e-6)
    assert np.allclose(np.hypot(*z.T), math.sqrt(-2 * math.log(0.25)), rtol=1e-6)


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


def test_no_collision_between_coordinates() -> None:
    """Neither swapped steps, nor streams, tables, rows, columns or rounds share a normal."""
    rows = torch.tensor([0, 1, 2**32, 2**32 + 1, 2**33])
    other = kernels.derive_key(SECRET, "noise", "other")
    sampling = kernels.derive_key(SECRET, "sampling", "table")
    sets = [
        kernels.normal(KEY, rows, 1, 2, num_columns=64),
        kernels.normal(KEY, rows, 0, 2, num_columns=64),
        kernels.normal(KEY, rows, 0, 1, num_columns=64),
        kernels.normal(KEY, rows, 2, 3, num_columns=64),
        kernels.normal(KEY, rows, 1, 3, num_columns=64),
        kernels.normal(other, rows, 1, 2, num_columns=64),
        kernels.normal(sampling, rows, 1, 2, num_columns=64),
        kernels.normal(KEY, rows, 1, 2, num_columns=64, rounds=12),
        kernels.normal(KEY, rows, 1, 2, num_columns=64, rounds=8),
    ]
    together = torch.cat([s.ravel() for s in sets])
    # a shared block would repeat 16 values; single float32 values may coincide by chance
    assert together.unique().numel() > together.numel() - 16


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
