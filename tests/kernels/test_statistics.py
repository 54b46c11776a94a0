"""The noise against what independent standard normals would be, on 10^8 draws.

All checks together would reject a correct generator with a fresh key with probability 10^-6; the
keys are fixed, so the verdict is always the same. test_planted_faults.py shows that they can fail.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from dist_dp import kernels
from dist_dp.kernels import box_muller
from tests.kernels.sample import Sample
from tests.kernels.statistics import CHECKS, LEVEL, rejected

TILES = 64


class On:
    """The kernels on one device."""

    def __init__(self, device: str) -> None:
        self.device = device

    def derive_key(self, secret: bytes, stream: str, name: str) -> bytes:
        return kernels.derive_key(secret, stream, name)

    def normal(
        self,
        key: bytes,
        rows: torch.Tensor,
        from_steps: torch.Tensor | int,
        to_step: int,
        *,
        column_offset: int = 0,
        num_columns: int,
        rounds: int = 20,
    ) -> torch.Tensor:
        if isinstance(from_steps, torch.Tensor):
            from_steps = from_steps.to(self.device)
        return kernels.normal(
            key, rows.to(self.device), from_steps, to_step,
            column_offset=column_offset, num_columns=num_columns, rounds=rounds,
        ).cpu()  # fmt: skip


@pytest.fixture(
    scope="module", params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.slow])]
)
def sample(request: pytest.FixtureRequest) -> Sample:
    return Sample(On(request.param), TILES)


@pytest.mark.parametrize("name", CHECKS)
def test_noise(name: str, sample: Sample) -> None:
    assert not rejected(name, sample)


def test_draws(sample: Sample) -> None:
    """10^8 of them, and among their pairs the tail down to u = 2^-23 at least."""
    assert sample.sums.draws >= 10**8
    assert sample.sums.tail.max() > 23 * math.log(2.0)


@pytest.mark.parametrize("depth", [12, 20, 32, 40, 48])
def test_tail_down_to_the_end(depth: int) -> None:
    """Words with `depth` leading zeros, as 10^8 draws hardly have: -log u is exponential there.

    Depth 48 is |z| > 8.1. Each at a fifth of the level.
    """
    random = np.random.default_rng(depth)
    u = random.integers(0, 2 ** (64 - depth), 2**20, dtype=np.uint64)
    upper, lower = (u >> np.uint64(32)).astype(np.uint32), u.astype(np.uint32)
    length = box_muller.lengths(upper, lower).astype(np.float64)
    beyond = length**2 / 2 - depth * math.log(2.0)
    assert stats.kstest(beyond, "expon").pvalue > LEVEL / 5
    assert length.max() > math.sqrt(2 * (depth + 8) * math.log(2.0))
