"""The noise grid: what it hides, that it covers all that is released, and what it costs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from dist_dp import kernels
from dist_dp.checkpoint import save_checkpoint
from dist_dp.distributed import ensure_process_group
from dist_dp.errors import CheckpointError, ConfigError
from dist_dp.mechanisms import DPSGD, LazyDP
from dist_dp.noise_grid import (
    MULTIPLES,
    dense_spacing,
    read_spacing,
    spacing_text,
    table_spacing,
)
from dist_dp.noise_schedule import NoiseSchedule
from dist_dp.plan import PrivacyPlan
from dist_dp.released import Release
from dist_dp.table_shard import TableShard
from tests.dist_dp import placement
from tests.dist_dp.gradients import build, pieces
from tests.dist_dp.placement import model
from tests.dist_dp.test_checkpoint import SECRET, engine, weights
from tests.dist_dp.test_distribution import Samples, rejected, runs
from tests.dist_dp.test_engine import train
from tests.dist_dp.test_plan import plan
from tests.dist_dp.test_private_step import Small, begin, data, loss, state
from tests.dist_dp.worlds import run_world

GRID = 2.0**-20


@pytest.fixture(autouse=True)
def world() -> None:
    ensure_process_group()
    torch.manual_seed(1)


def on_grid(values: Tensor, spacing: float) -> bool:
    multiples = values.double() / spacing
    return bool((multiples == multiples.round()).all() and (multiples.abs() <= MULTIPLES).all())


# What it hides.

FINE = 2.0**-18
NEAR = 2.0**-6


def released(unnoised: float, grid: float | None, family: str) -> Tensor:
    """128,000 released weights after one step: a gradient to ``unnoised``, noise N(0, 1)."""
    schedule = NoiseSchedule()
    mechanism = LazyDP(schedule, grid=grid)
    key = kernels.derive_key(bytes(32), "low-order bits", family)
    weight = torch.zeros(2000, 64)
    shard = TableShard("t", 2000, 64, 0, 0, weight, False, "table_wise", noise_key=key)
    mechanism.before_lookup([(shard, torch.arange(2000))])
    schedule.advance(1.0, 1.0, 1.0, 1.0)
    weight += unnoised
    mechanism.settle(shard)
    return weight


def finer_than_a_third(values: Tensor) -> int:
    """Numbers near 0 that are no multiple of 2^-25, the distance of float32 numbers at 1/3."""
    near = values[values.abs() < NEAR].double() / 2.0**-25
    return int((near != near.round()).sum())


def test_without_a_grid_one_number_tells_two_data_sets_apart() -> None:
    """The attack that the grid is for: noise of deviation 1 hides a difference of 1/3, bits do not.

    About one number in eighty is near 0. From 0 it gets there with bits far below 2^-25; from 1/3
    it cannot.
    """
    assert finer_than_a_third(released(0.0, None, "zero")) > 1000
    assert finer_than_a_third(released(1 / 3, None, "third")) == 0


def test_on_the_grid_low_order_bits_look_alike() -> None:
    """The same patterns are reached, equally often: chi-square of homogeneity, level 1e-3."""
    found = [released(0.0, FINE, "zero"), released(1 / 3, FINE, "third")]
    counts = []
    for values in found:
        assert on_grid(values, FINE) and finer_than_a_third(values) == 0
        near = values[values.abs() < NEAR].double() / FINE
        counts.append(np.bincount(near.long().numpy() % 64, minlength=64))
        assert set(np.flatnonzero(counts[-1])) == set(range(64))
    assert stats.chi2_contingency(np.stack(counts)).pvalue > 1e-3


def test_zero_has_one_sign() -> None:
    """-0 would say that the unnoised weight was at most 0."""
    for unnoised in (-1e-9, 1e-9):
        values = released(unnoised, 2.0**-6, "sign")
        assert int((values == 0).sum()) > 500
        assert not bool(torch.signbit(values[values == 0]).any())


# What is released.


def test_all_that_is_released_is_on_the_grid(tmp_path: Path) -> None:
    made = engine(tmp_path, noise_grid="auto", noise_rounds=12)
    train(made)
    spacing = made.parts.plan.noise_grid
    assert spacing is not None and made.parts.mechanism.rounds == 12
    folder = made.release(tmp_path / "released")
    release = Release.open(folder)
    assert release.manifest["privacy"]["plan"]["noise_grid"] == spacing
    assert release.manifest["privacy"]["plan"]["noise_rounds"] == 12
    for table in release.manifest["tables"]:
        assert on_grid(release.table(table), spacing)
    card = (folder / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert f"multiples of {spacing_text(spacing)}" in card
    assert "attacks on the low-order bits" not in card and "float32 rounding of gradients" in card
    assert "ChaCha12 is a pseudorandom function" in card

    plain = engine(tmp_path / "plain")
    train(plain)
    folder = plain.release(tmp_path / "plain" / "released")
    release = Release.open(folder)
    assert not any(on_grid(release.table(t), spacing) for t in release.manifest["tables"])
    card = (folder / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "| noise grid | none |" in card and "attacks on the low-order bits" in card


def test_training_reads_are_not_rounded_and_releases_are() -> None:
    """Which rows a batch reads is private, so a read may leave no mark of its own."""
    module = Small()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    private = build(module, sigma=1.0, optimizer=optimizer, grid=GRID)
    for step in (1, 2, 3):
        begin(private, step)
        value = loss(module, data(step))
        # before the gradient, which would take them off the grid anyway
        read = [s.weight[s.last_step == step - 1] for c in private.optimizer.cuts for s in c.shards]
        value.backward()
        private.optimizer.step()
    assert sum(r.numel() for r in read) and not any(on_grid(r, GRID) for r in read if r.numel())
    private.settle()
    assert all(on_grid(piece, GRID) for piece in pieces(private).values())
    private.settle()  # again, with nothing owed
    assert all(on_grid(piece, GRID) for piece in pieces(private).values())


def test_an_evaluation_of_the_model_reads_from_the_grid() -> None:
    module = Small()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    private = build(module, sigma=1.0, optimizer=optimizer, grid=GRID)
    begin(private)
    loss(module, data()).backward()
    private.optimizer.step()
    module.eval()
    loss(module, data(2))  # gradients stay enabled: the mode alone decides
    read = [s.weight[s.last_step == 1] for c in private.optimizer.cuts for s in c.shards]
    assert sum(rows.numel() for rows in read) > 0
    assert all(on_grid(rows, GRID) for rows in read if rows.numel())


@pytest.mark.parametrize("mechanism", [LazyDP, DPSGD])
def test_lookups_outside_training_are_on_the_grid(mechanism: Any) -> None:
    schedule = NoiseSchedule()
    made = mechanism(schedule, grid=GRID)
    shard = TableShard(
        "t", 40, 8, 0, 0, torch.rand(40, 8), False, "table_wise", noise_key=bytes(32)
    )
    schedule.advance(1.0, 1.0, 1.0, 1.0)
    made.after_update([shard])
    made.before_lookup([(shard, torch.arange(20))], training=False)
    assert on_grid(shard.weight[:20], GRID)
    assert on_grid(shard.weight[20:], GRID) == (mechanism is DPSGD)


def test_a_record_without_gradient_leaves_no_mark_at_the_ends_of_the_grid() -> None:
    """Weights are held inside the range at a release only: of all rows alike.

    Two rows drift to the end of a narrow range; one is read in the last step, by a record whose
    gradient is zero. Held at the read, its weights would lie a step's noise inside the end.
    """
    spacing = 2.0**-24  # the range ends at 1
    counts = []
    for read in (False, True):
        schedule = NoiseSchedule()
        mechanism = LazyDP(schedule, grid=spacing)
        weight = torch.full((400, 64), 1.5)
        shard = TableShard("t", 400, 64, 0, 0, weight, False, "table_wise", noise_key=bytes(32))
        for _ in range(3):
            schedule.advance(0.01, 1.0, 1.0, 1.0)
        if read:
            mechanism.before_lookup([(shard, torch.arange(400))])
        schedule.advance(0.01, 1.0, 1.0, 1.0)
        mechanism.settle(shard)
        counts.append(int((shard.weight < 1.0).sum()))
    assert counts == [0, 0]


def test_a_rate_of_0_after_noise_is_refused() -> None:
    module = Small()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    private = build(module, sigma=1.0, optimizer=optimizer, grid=GRID)
    for step, rate in ((1, 0.0), (2, 0.5), (3, 0.0)):
        private.optimizer.param_groups[0]["lr"] = rate
        begin(private, step)
        loss(module, data(step)).backward()
        if step == 3:
            with pytest.raises(ConfigError, match=r"step 3: .*rate is 0 after steps with noise"):
                private.optimizer.step()
        else:
            private.optimizer.step()


def test_a_grid_that_gets_too_coarse_while_training() -> None:
    module = Small()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    private = build(module, sigma=1.0, optimizer=optimizer, grid=GRID)
    private.optimizer.param_groups[0]["lr"] = 1e-6
    begin(private)
    loss(module, data()).backward()
    with pytest.raises(ConfigError, match="more than an eighth of the noise on a weight at step 1"):
        private.optimizer.step()


def test_noised_sums_of_dense_gradients_are_on_their_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Small()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    private = build(module, sigma=1.3, clip=0.7, optimizer=optimizer, grid=GRID)
    seen: dict[str, Tensor] = {}
    monkeypatch.setattr(private.optimizer, "_update_dense", lambda sums: seen.update(sums.by_name))
    begin(private)
    loss(module, data()).backward()
    private.optimizer.step()
    assert private.plan.dense_noise_grid == dense_spacing(1.3 * 0.7) == 2.0**-7
    assert len(seen) == 4
    for value in seen.values():
        assert on_grid(value, 2.0**-7) and not on_grid(value, 2.0**-4)


@pytest.mark.parametrize("mechanism", ["lazydp", "dpsgd"])
def test_noise_has_the_stated_size(mechanism: str) -> None:
    """As without a grid: N(0, (lr sigma C / B)^2) a step. Level 1e-4 for each test."""
    module = Small(width=100, dim=64)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    private = build(
        module, mechanism=mechanism, sigma=1.5, clip=0.7, expected=3.0, optimizer=optimizer,
        grid=2.0**-16,
    )  # fmt: skip
    before = state(private)
    for step in range(1, 4):
        begin(private, step)
        (loss(module, data()) * 0).backward()
        private.optimizer.step()
    private.settle()
    deviation = 3**0.5 * 0.5 * 1.5 * 0.7 / 3.0
    pairs = zip(state(private), before, strict=True)
    moved = [(a - b).flatten() / deviation for a, b in pairs]
    dense = len(private.recorder.parameters)
    for part in (torch.cat(moved[:dense]), torch.cat(moved[dense:])):
        assert part.numel() > 1000
        assert stats.kstest(part.double().numpy(), "norm").pvalue > 1e-4
        squares, law = float(part.double().square().sum()), stats.chi2(len(part))
        assert min(law.cdf(squares), law.sf(squares)) > 0.5e-4


@pytest.fixture(scope="module")
def eager() -> Samples:
    return runs(DPSGD, "eager")


@pytest.mark.parametrize("mechanism", [LazyDP, DPSGD])
def test_readings_keep_their_law(mechanism: Any, eager: Samples) -> None:
    """All readings of `test_distribution`, on a grid: the roundings do not show at level 1e-3."""
    found = runs(lambda schedule: mechanism(schedule, grid=2.0**-16), "grid")
    assert mechanism is LazyDP or on_grid(torch.from_numpy(found), 2.0**-16)
    assert not rejected(found, eager)


# Placement and going on.


def test_one_worker_or_two() -> None:
    """The same tables; where gradients are added in another order, within two spacings."""
    coarse = 2.0**-14
    kinds = {"whole": "table_wise", "parts": {"a": "row_wise", "b": "data_parallel"}}
    (alone,) = run_world(placement.grid_runs, 1, kinds, coarse)
    pair = run_world(placement.grid_runs, 2, kinds, coarse)
    for (kind, zero), found in ((key, r[key]) for r in pair for key in r):
        for (name, row, column), piece in found.items():
            whole = alone["whole", zero][name, 0, 0]
            part = whole[row : row + piece.shape[0], column : column + piece.shape[1]]
            assert on_grid(piece, coarse), (kind, name)
            assert float((piece - part).abs().max()) <= (0.0 if zero else 2 * coarse), (kind, name)


def test_going_on_is_as_if_it_never_stopped(tmp_path: Path) -> None:
    def start(module: torch.nn.Module) -> dict[str, Any]:
        return {"optimizer": torch.optim.SGD(module.parameters(), lr=0.1, weight_decay=0.01)}

    ends = []
    for home, most in ((tmp_path / "a", 10**6), (tmp_path / "b", 3)):
        module = model(meta=False)
        made = engine(home, secret=SECRET, noise_grid="auto")
        train(made, module, most=most, **start(module))
        ends.append(made)
    folder = save_checkpoint(ends[1], tmp_path / "checkpoint")
    module = model(meta=False)
    resumed = engine(tmp_path / "b", resume_from=folder, noise_grid="auto")
    train(resumed, module, **start(module))
    one, other = weights(ends[0]), weights(resumed)
    assert all(torch.equal(one[name], other[name]) for name in one | other)
    module = model(meta=False)
    with pytest.raises(CheckpointError, match="another privacy plan"):
        train(engine(tmp_path / "b", resume_from=folder), module, **start(module))


# The spacing.


@pytest.mark.parametrize(
    ("smallest", "largest", "steps", "exponent"),
    [
        (0.01, 0.01, 1, -21),  # 2^24 multiples reach 8
        (0.01, 0.01, 10_000, -21),  # 8 deviations of the whole run are 8
        (0.01, 0.01, 10_001, -20),
        (0.01, 1.0, 10_000, -14),
        (2.0**-18, 0.01, 100, -21),
        (1e6, 1e6, 1, -1),
    ],
)
def test_auto(smallest: float, largest: float, steps: int, exponent: int) -> None:
    spacing = table_spacing(smallest, largest, steps)
    assert spacing == 2.0**exponent
    assert spacing <= smallest / 8
    assert MULTIPLES * spacing >= max(8.0, 8 * largest * math.sqrt(steps))


def test_auto_says_when_nothing_fits() -> None:
    with pytest.raises(ConfigError, match=r"noise\.grid: none fits.*±8.*2\^-21.*2\^-22 at most"):
        table_spacing(2.0**-18 * 0.99, 0.01, 100)


@pytest.mark.parametrize("deviation", [1e-3, 0.5, 1.0, 3.7, 1e4])
def test_dense_sums_cannot_reach_the_end_of_their_grid(deviation: float) -> None:
    spacing = dense_spacing(deviation)
    assert deviation / 128 < spacing <= deviation / 64
    assert MULTIPLES * spacing > 1e5 * deviation


@pytest.mark.parametrize("value", [2.0**-20, "2^-20", "2**-20", "9.5367431640625e-07"])
def test_spacings_that_can_be_read(value: Any) -> None:
    assert read_spacing(value) == 2.0**-20
    assert plan(noise_grid=value).noise_grid == 2.0**-20


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (1e-6, r"2\^-20 = 9.53674e-07 and 2\^-19 = 1.90735e-06"),
        ("3^-20", "power of two such as"),
        ("2^x", "power of two such as"),
        (True, "power of two such as"),
        (0.0, "power of two between"),
        (-0.5, "power of two between"),
        ("inf", "power of two between"),
        ("2^-101", "power of two between"),
        ("2^99999", "power of two such as"),
    ],
)
def test_spacings_that_cannot(value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_spacing(value)
    with pytest.raises(ConfigError, match=f"noise_grid is .*{words}"):
        plan(noise_grid=value)


def test_plans_with_a_grid() -> None:
    original = plan(noise_grid=2.0**-20, noise_rounds=12)
    assert PrivacyPlan.model_validate_json(original.model_dump_json()) == original
    assert original.dense_noise_grid == 2.0**-6 and plan().dense_noise_grid is None
    assert original.epsilon() == plan().epsilon()
    assert "2^-20" in original.statement() and "ChaCha12" in original.statement()
    assert "low-order" not in original.statement() and "low-order" in plan().statement()
    with pytest.raises(ConfigError, match="noise_multiplier is not set"):
        plan(noise_multiplier=None, noise_grid=2.0**-20).dense_noise_grid  # noqa: B018
    for silent in ({"mechanism": "none", "noise_multiplier": None}, {"noise_multiplier": 0.0}):
        with pytest.raises(ConfigError, match=r"noise_grid.*no noise is added"):
            plan(noise_grid=2.0**-20, **silent)
        with pytest.raises(ConfigError, match=r"noise\.grid auto.*adds no noise"):
            plan(**silent).with_noise_grid("auto", 0.0, 0.0)
    with pytest.raises(ConfigError, match="noise_rounds"):
        plan(noise_rounds=8)
    with pytest.raises(ConfigError, match=r"2\^-10 is more than an eighth.*give 2\^-13"):
        plan().with_noise_grid("2^-10", 0.001, 0.01)


def test_a_grid_without_noise_is_refused(tmp_path: Path) -> None:
    module = model(meta=False)
    made = engine(tmp_path, mechanism="none", noise_grid="auto")
    with pytest.raises(ConfigError, match=r"noise\.grid auto.*mechanism 'none'"):
        made.make_private(
            module=module,
            optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
            data_loader=placement.records(),
            noise_multiplier=0.0,
            max_grad_norm=1.0,
            expected_batch_size=10,
            steps=2,
        )
