"""What rounding to the grid adds to a record's influence, and that clipping makes room for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dist_dp import kernels
from dist_dp.distributed import ensure_process_group
from dist_dp.errors import ConfigError
from dist_dp.grid_rounding import clip_limits, put_on_grid
from dist_dp.optimizer import ROUNDING_MARGIN
from dist_dp.table_shard import TableShard
from tests.dist_dp.gradients import build
from tests.dist_dp.models import BATCH
from tests.dist_dp.test_private_step import Small, begin, data, loss

GRID = 2.0**-20


@pytest.fixture(autouse=True)
def world() -> None:
    ensure_process_group()
    torch.manual_seed(1)


def test_a_number_moves_by_at_most_one_spacing_more() -> None:
    """Read (decayed, rounded), then a gradient subtracted in float32, up to the range's end."""
    multiples = torch.randint(-(2**24) + 2**20, 2**24 - 2**20, (4000, 16))
    start = (multiples * GRID).float()
    weight = start.clone()
    kernels.settle_range(
        weight, key=bytes(32), from_steps=0, to_step=1, decay=0.97, scale=0.0, grid=GRID
    )
    gradient = torch.randn(4000, 16) * 0.01
    moved = (weight - gradient).double()
    exact = start.double() * float(np.float32(0.97)) - gradient.double()
    most = float((moved - exact).abs().max())
    assert GRID * 0.75 < most <= GRID


def test_limits() -> None:
    numbers = torch.tensor([0.0, 16.0, 400.0], dtype=torch.float64)
    limits = clip_limits(2.0, numbers, GRID, 0.001)
    wanted = 2.0 - numbers.sqrt() * GRID / 0.001
    torch.testing.assert_close(limits.double(), wanted, rtol=1e-7, atol=0)
    assert limits[0] == 2.0
    with pytest.raises(ConfigError, match=r"reads 400 numbers.*2\^-10.*half of max_grad_norm"):
        clip_limits(2.0, numbers, 2.0**-10, 0.001)


def test_examples_are_clipped_by_as_much_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clipped norm plus the rounding of all numbers read is the clip norm, for each example."""
    module, clip, expected, rate, coarse = Small(), 1e-3, 4.0, 0.5, 2.0**-22
    optimizer = torch.optim.SGD(module.parameters(), lr=rate, weight_decay=0.1)
    private = build(
        module, sigma=2.0, clip=clip, expected=expected, optimizer=optimizer, grid=coarse
    )
    (cut,) = private.cuts
    sent: list[Tensor] = []
    backward = cut.backward
    monkeypatch.setattr(cut, "backward", lambda c, lr: (sent.append(c), backward(c, lr)))
    batch = data()
    for step in (1, 2):  # counts of one step do not reach the next
        begin(private, step)
        loss(module, batch).backward()
        private.optimizer.step()
        features = batch.sparse[0]
        numbers = 8 * sum(features[f].lengths() for f in ("f0", "f1")).double()
        rounding = numbers.sqrt() * coarse * expected * (1 - rate * 0.1) / rate
        assert private.optimizer.last_stats is not None
        norms = private.optimizer.last_stats.norms.double()
        assert bool((norms > clip).all())
        kept = sent[-1].double() * expected / BATCH * norms
        assert float(rounding.max()) > 0.01 * clip
        torch.testing.assert_close(
            kept + rounding, torch.full_like(kept, clip * ROUNDING_MARGIN), rtol=1e-6, atol=0
        )


def test_a_grid_that_gets_too_coarse_while_training() -> None:
    """A learning-rate scheduler may go where the plan could not see."""
    module = Small()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    private = build(module, sigma=1.0, optimizer=optimizer, grid=2.0**-12)
    tables = private.optimizer.param_groups[0]

    def step(number: int, rate: float) -> None:
        tables["lr"] = rate
        begin(private, number)
        loss(module, data(number)).backward()
        private.optimizer.step()

    step(1, 0.5)
    with pytest.raises(ConfigError, match=r"an eighth of the noise on a weight at step 2"):
        step(2, 1e-4)
    private.optimizer.zero_grad()
    step(2, 0.0)
    with pytest.raises(ConfigError, match=r"was 0 at step 2 and rises again"):
        step(3, 0.5)


def test_a_table_that_starts_outside_the_range() -> None:
    weight = torch.full((3, 4), -9.0)
    shard = TableShard("t", 3, 4, 0, 0, weight, False, "table_wise", noise_key=bytes(32))
    with pytest.raises(ConfigError, match=r"table 't' starts with a weight of 9.*±8.*2\^-21"):
        put_on_grid(shard, 2.0**-21)
    assert bool((weight == -9.0).all())
