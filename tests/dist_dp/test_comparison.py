"""Mechanisms to be compared with: they do what they say, and nothing gets out of them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from dist_dp import kernels
from dist_dp.engine import PrivacyEngine
from dist_dp.errors import ConfigError, ReleaseError
from dist_dp.mechanisms import MECHANISMS, mechanism_class
from dist_dp.mechanisms.comparison import COMPARISONS, EANA, ComparisonMechanism, TorchDPSGD
from dist_dp.noise_schedule import NoiseSchedule
from dist_dp.plan import PrivacyPlan
from dist_dp.table_shard import TableShard

ROWS, DIM = 4000, 16
DEVIATION = 0.5 * 2.0 / 8  # eta sigma C / B, as advanced below
KEY = kernels.derive_key(bytes(32), "tables", "comparison")


def shard_of(weight: torch.Tensor) -> TableShard:
    return TableShard(
        table="c.t",
        num_rows=weight.shape[0],
        dim=weight.shape[1],
        row_offset=0,
        column_offset=0,
        weight=weight,
        replicated=False,
        kind="table_wise",
        noise_key=KEY,
    )


def advance(schedule: NoiseSchedule, weight_decay: float = 0.0) -> None:
    schedule.advance(
        learning_rate=0.5,
        noise_multiplier=2.0,
        max_grad_norm=1.0,
        expected_batch_size=8.0,
        weight_decay=weight_decay,
    )


@pytest.mark.parametrize("name", COMPARISONS)
def test_no_real_run_reaches_them_by_name(name: str) -> None:
    assert name not in MECHANISMS
    with pytest.raises(ConfigError, match=f"'{name}' is for comparison only"):
        mechanism_class(name)
    with pytest.raises(ConfigError, match=f"'{name}' is for comparison only"):
        PrivacyEngine(dataset="d", mechanism=name)
    with pytest.raises(ConfigError):
        PrivacyPlan(
            mechanism=name,  # type: ignore[arg-type]
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            num_records=100,
            expected_batch_size=10,
            steps=1,
            delta=1e-3,
        )


def test_the_refusal_of_eana_says_that_it_is_not_private() -> None:
    with pytest.raises(ConfigError, match="not private"):
        mechanism_class("eana")


@pytest.mark.parametrize("kind", [EANA, TorchDPSGD])
def test_nothing_is_settled_so_nothing_is_released(
    kind: type[ComparisonMechanism], tmp_path: Path
) -> None:
    shard = shard_of(torch.zeros(4, DIM))
    mechanism = kind(NoiseSchedule())
    assert not mechanism.is_settled(shard)
    with pytest.raises(ReleaseError, match=f"'{kind.name}'.*neither settled nor released"):
        mechanism.settle(shard)
    assert torch.equal(shard.weight, torch.zeros(4, DIM))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_eana_moves_the_touched_rows_by_one_steps_noise_and_no_other(weight_decay: float) -> None:
    schedule = NoiseSchedule()
    mechanism = EANA(schedule)
    weight = torch.ones(ROWS, DIM)
    shard = shard_of(weight)
    mechanism.prepare(shard)
    advance(schedule)
    # odd rows are touched, some of them several times
    rows = torch.arange(1, ROWS, 2)
    mechanism.before_lookup([(shard, torch.cat([rows, rows[:50], rows[:10]]))])
    mechanism.before_lookup([(shard, torch.arange(0, 10, 2))], training=False)
    advance(schedule, weight_decay)
    before = weight.clone()
    mechanism.after_update([shard])
    untouched = torch.arange(0, ROWS, 2)
    assert torch.equal(weight[untouched], before[untouched])
    decay = 1.0 - 0.5 * weight_decay
    expected = decay * before[rows] + DEVIATION * kernels.normal(KEY, rows, 1, 2, num_columns=DIM)
    assert torch.allclose(weight[rows], expected, atol=1e-6)
    mechanism.after_update([shard])
    assert torch.allclose(weight[rows], expected, atol=1e-6), "a batch is noised once"


def test_eana_notes_each_row_once_a_step_and_again_at_the_next() -> None:
    schedule = NoiseSchedule()
    mechanism = EANA(schedule)
    shard = shard_of(torch.zeros(8, DIM))
    for step in (1, 2):
        mechanism.before_lookup([(shard, torch.tensor([3, 3, 5]))])
        advance(schedule)
        before = shard.weight.clone()
        mechanism.after_update([shard])
        moved = (shard.weight != before).any(1).nonzero().squeeze(1).tolist()
        assert moved == [3, 5], step
    assert mechanism.state_bytes == 4 * 8


def test_torchs_noise_has_the_schedules_deviation_on_every_row() -> None:
    torch.manual_seed(1)
    schedule = NoiseSchedule()
    mechanism = TorchDPSGD(schedule)
    shard = shard_of(torch.full((ROWS, DIM), 3.0))
    advance(schedule, weight_decay=0.5)
    mechanism.after_update([shard])
    noise = (shard.weight - 0.75 * 3.0).double() / DEVIATION
    count = noise.numel()
    # six standard errors of mean and variance; the seed is fixed
    assert abs(float(noise.mean())) < 6 / math.sqrt(count)
    assert abs(float(noise.square().mean()) - 1) < 6 * math.sqrt(2 / count)
    assert bool((noise != 0).any(1).all())
