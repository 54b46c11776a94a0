"""Uniform numbers for sampling and for initial values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from dist_dp import kernels
from dist_dp.kernels import reference

KEY = kernels.derive_key(bytes(32), "sampling", "records")
LEVEL = 1e-4


def test_distribution() -> None:
    """Kolmogorov-Smirnov and serial correlation, at level 1e-4 each."""
    u = kernels.uniforms(KEY, 3, 500_000)
    assert stats.kstest(u, "uniform").pvalue > LEVEL
    assert stats.pearsonr(u[1:], u[:-1]).pvalue > LEVEL
    assert stats.pearsonr(u, kernels.uniforms(KEY, 4, 500_000)).pvalue > LEVEL
    # bits beyond the 32nd are filled
    low = np.ldexp(u[u > 0.5], 32) % 1.0
    assert stats.kstest(low, "uniform").pvalue > LEVEL


def test_ends_are_excluded() -> None:
    for word, expected in ((0, 2.0**-65), (2**32 - 1, 1.0 - 2.0**-53)):
        block = np.full((16, 1), word, np.uint32)
        assert (reference.uniforms(block) == expected).all()


def test_any_part_alone() -> None:
    whole = kernels.uniforms(KEY, 1, 100)
    for first, count in ((0, 1), (7, 2), (8, 8), (13, 87), (99, 1), (5, 0)):
        part = kernels.uniforms(KEY, 1, count, first=first)
        assert np.array_equal(part, whole[first : first + count])


def test_refusals() -> None:
    with pytest.raises(ValueError, match="step"):
        kernels.uniforms(KEY, -1, 1)
    with pytest.raises(ValueError, match="count"):
        kernels.uniforms(KEY, 1, -1)
    with pytest.raises(ValueError, match="key"):
        kernels.uniforms(b"", 1, 1)
    with pytest.raises(ValueError, match="low"):
        kernels.uniform_rows(KEY, torch.tensor([1]), num_columns=1, low=1.0, high=0.0)
    with pytest.raises(IndexError, match="rows"):
        kernels.uniform_rows(KEY, torch.tensor([-1]), num_columns=1, low=0.0, high=1.0)


def test_initial_values() -> None:
    """In range, uniform at level 1e-4, and the same from any shard."""
    rows = torch.arange(5000)
    whole = kernels.uniform_rows(KEY, rows, num_columns=50, low=-0.1, high=0.3)
    assert whole.dtype == torch.float32
    assert float(whole.min()) >= np.float32(-0.1) and float(whole.max()) <= np.float32(0.3)
    flat = whole.double().numpy().ravel()
    assert stats.kstest(flat, stats.uniform(-0.1, 0.4).cdf).pvalue > LEVEL
    order = torch.tensor([4999, 0, 3])
    for first, last in ((0, 50), (3, 17), (15, 16), (16, 33), (49, 50)):
        part = kernels.uniform_rows(
            KEY, rows[order], num_columns=last - first, column_offset=first, low=-0.1, high=0.3
        )
        assert torch.equal(part, whole[order, first:last])


def test_independent_of_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.tensor([7, 2**40, 3])
    numbers = kernels.uniforms(KEY, 1, 100, first=5)
    values = kernels.uniform_rows(KEY, rows, num_columns=70, column_offset=9, low=0.0, high=1.0)
    monkeypatch.setattr("dist_dp.kernels.draws._BLOCK_CHUNK", 3)
    assert np.array_equal(kernels.uniforms(KEY, 1, 100, first=5), numbers)
    again = kernels.uniform_rows(KEY, rows, num_columns=70, column_offset=9, low=0.0, high=1.0)
    assert torch.equal(again, values)
