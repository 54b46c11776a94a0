"""The prefix sums against sums in high precision."""

from __future__ import annotations

import math
from dataclasses import dataclass

import mpmath
import numpy as np
import pytest
import torch
from pydantic import ValidationError

from dist_dp.errors import ConfigError
from dist_dp.noise_schedule import NoiseSchedule
from dist_dp.schedules import ScheduleConfig, learning_rate_at

DIGITS = 60


@dataclass
class Exact:
    """P and Q with 60 digits."""

    decay: list[mpmath.mpf]
    variance: list[mpmath.mpf]

    def between(self, start: int, end: int) -> tuple[mpmath.mpf, mpmath.mpf]:
        ratio = self.decay[end] / self.decay[start]
        return ratio, self.decay[end] * mpmath.sqrt(self.variance[end] - self.variance[start])


def build(
    rates: list[float], weight_decay: float, noise: list[float] | None = None
) -> tuple[NoiseSchedule, Exact]:
    schedule = NoiseSchedule()
    norm, batch = 0.7, 2048.0
    with mpmath.workdps(DIGITS):
        exact = Exact([mpmath.mpf(1)], [mpmath.mpf(0)])
        for i, rate in enumerate(rates):
            sigma = 1.1 if noise is None else noise[i]
            assert schedule.advance(rate, sigma, norm, batch, weight_decay) == i + 1
            factor = 1 - mpmath.mpf(rate) * mpmath.mpf(weight_decay)
            exact.decay.append(exact.decay[-1] * factor)
            term = mpmath.mpf(rate) * mpmath.mpf(sigma) * mpmath.mpf(norm) / batch
            exact.variance.append(exact.variance[-1] + (term / exact.decay[-1]) ** 2)
    return schedule, exact


def check(
    schedule: NoiseSchedule, exact: Exact, pairs: list[tuple[int, int]], tolerance: float = 1e-12
) -> None:
    with mpmath.workdps(DIGITS):
        for start, end in pairs:
            decay, scale = schedule.decay_and_scale(torch.tensor([start]), end)
            wanted_decay, wanted_scale = exact.between(start, end)
            assert abs(float(decay) / wanted_decay - 1) < tolerance, (start, end)
            if wanted_scale == 0:
                assert float(scale) == 0
            else:
                assert abs(float(scale) / wanted_scale - 1) < tolerance, (start, end)


@pytest.mark.parametrize("weight_decay", [0.0, 1e-4, 1e-2])
def test_cosine_to_a_millionth_over_100000_steps(weight_decay: float) -> None:
    steps = 100_000
    config = ScheduleConfig(
        kind="cosine", base=0.5, warmup_steps=100, total_steps=steps, final_fraction=1e-6
    )
    schedule, exact = build([learning_rate_at(config, t) for t in range(1, steps + 1)],
                            weight_decay)  # fmt: skip
    end = steps
    singles = [(t - 1, t) for t in (1, 2, 99, 100, 101, 50_000, end - 99, end - 1, end)]
    spans = [(0, end), (0, 10), (10, 90_000), (end - 100, end), (end - 3, end), (20_000, end)]
    check(schedule, exact, singles + spans)
    all_decay, all_scale = schedule.decay_and_scale(torch.arange(end + 1), end)
    one_decay, one_scale = schedule.decay_and_scale(torch.arange(end - 50, end), end)
    assert torch.equal(all_decay[end - 50 : end], one_decay)
    assert torch.equal(all_scale[end - 50 : end], one_scale)
    assert (all_scale[-999:] < all_scale[-1000:-1]).all()


def test_plain_float64_would_fail_here() -> None:
    """The planted fault: one float64 prefix sum loses the last steps."""
    steps = 20_000
    rates = [0.5] * (steps - 3) + [5e-8, 5e-8, 5e-8]
    schedule, exact = build(rates, 0.0)
    schedule._data["variance_low"][:] = 0.0
    schedule._data["increment"][:] = np.diff(schedule._data["variance"], prepend=0.0)
    with pytest.raises(AssertionError):
        check(schedule, exact, [(steps - 1, steps)])


@pytest.mark.parametrize("weight_decay", [0.0, 1e-3])
def test_rates_beyond_double_double(weight_decay: float) -> None:
    """Steps that weigh 1e-40 of the sum, next to steps that weigh most of it."""
    rates = [1.0] * 500 + [1e-20] * 500 + [1e-12] * 5 + [0.0] * 3 + [1e-20] * 5
    schedule, exact = build(rates, weight_decay)
    end = len(rates)
    pairs = [(s, end) for s in (0, 499, 500, 501, 1000, 1004, 1005, 1007, 1008, end - 1)]
    check(schedule, exact, [*pairs, (1005, 1008), (600, 601), (600, 900), (1000, 1001)])
    rows = torch.arange(end)
    together = schedule.decay_and_scale(rows, end)[1]
    for start in range(0, end, 7):
        alone = schedule.decay_and_scale(rows[start : start + 1], end)[1]
        assert torch.equal(together[start : start + 1], alone)


@pytest.mark.parametrize(
    ("steps", "product", "ramp"),
    [(30_000, 0.1, 0.5), (3000, 0.5, 0.5), (900, 0.99, 0.5), (60, 1 - 2**-40, 1e-12)],
)
def test_strong_decay(steps: int, product: float, ramp: float) -> None:
    """P falls far below the smallest float64."""
    rates = [2.0 * (1 - ramp * t / steps) for t in range(steps)]
    schedule, exact = build(rates, product / 2.0)
    recent = [
        (s, end) for end in (steps, steps - 1, steps - 3) for s in (end - 1, end - 2, end - 10)
    ]
    check(schedule, exact, recent)
    decay, scale = schedule.decay_and_scale(torch.arange(steps), steps)
    assert torch.isfinite(decay).all() and torch.isfinite(scale).all()
    with mpmath.workdps(DIGITS):
        _, wanted = exact.between(0, steps)
        assert abs(float(scale[0]) / wanted - 1) < 1e-12
    assert float(decay[0]) == pytest.approx(float(exact.decay[steps]), rel=1e-13, abs=1e-290)
    with pytest.raises(ValueError, match="to_step"):
        schedule.decay_and_scale(torch.tensor([0]), 1)


def test_definition_over_few_steps() -> None:
    """The recursion itself: every step's decay and noise in turn."""
    rates, noise = [0.3, 0.1, 0.0, 0.7], [1.0, 0.0, 2.0, 0.5]
    schedule, exact = build(rates, 0.2, noise)
    for start in range(5):
        mean, variance = 1.0, 0.0
        for i in range(start, 4):
            factor = 1 - rates[i] * 0.2
            mean, variance = mean * factor, variance * factor**2
            variance += (rates[i] * noise[i] * 0.7 / 2048.0) ** 2
        decay, scale = schedule.decay_and_scale(torch.tensor([start], dtype=torch.int32), 4)
        assert float(decay) == pytest.approx(mean, rel=1e-14)
        assert float(scale) == pytest.approx(math.sqrt(variance), rel=1e-14)
    check(schedule, exact, [(s, t) for t in range(5) for s in range(t + 1)])
    assert schedule.gradient_learning_rate(1) == pytest.approx(0.3 / 0.94, rel=1e-15)
    assert schedule.gradient_learning_rate(3) == 0.0


def test_splitting_an_interval_changes_nothing() -> None:
    """Settling s to m to t gives the same law as settling s to t."""
    rates = [0.5 / (t + 1) for t in range(200)]
    schedule, _ = build(rates, 0.01)
    for s, m, t in ((0, 1, 200), (5, 150, 199), (7, 7, 9)):
        (d1, v1), (d2, v2), (d, v) = (
            (float(a), float(b))
            for a, b in (
                schedule.decay_and_scale(torch.tensor([s]), m),
                schedule.decay_and_scale(torch.tensor([m]), t),
                schedule.decay_and_scale(torch.tensor([s]), t),
            )
        )
        assert d1 * d2 == pytest.approx(d, rel=1e-13)
        assert math.hypot(v1 * d2, v2) == pytest.approx(v, rel=1e-13)


def test_state_round_trip() -> None:
    rates = [0.5 / (t + 1) for t in range(3000)]
    first, _ = build(rates[:2000], 0.9)
    second = NoiseSchedule()
    second.load_state_dict(first.state_dict())
    for rate in rates[2000:]:
        for schedule in (first, second):
            schedule.advance(rate, 1.1, 0.7, 2048.0, 0.9)
    assert second.step == 3000
    rows = torch.arange(3001)
    for a, b in zip(
        first.decay_and_scale(rows, 3000), second.decay_and_scale(rows, 3000), strict=True
    ):
        assert torch.equal(a, b)
    assert second.gradient_learning_rate(7) == first.gradient_learning_rate(7)
    broken = first.state_dict()
    broken["decay"] = broken["decay"][:-1]
    with pytest.raises(ValueError, match="decay"):
        second.load_state_dict(broken)
    del broken["decay"]
    with pytest.raises(ValueError, match="entries"):
        second.load_state_dict(broken)


def test_refusals() -> None:
    schedule = NoiseSchedule()
    good = {
        "learning_rate": 0.1, "noise_multiplier": 1.0, "max_grad_norm": 1.0,
        "expected_batch_size": 10.0, "weight_decay": 0.1,
    }  # fmt: skip
    for name, value in (
        ("learning_rate", -0.1),
        ("learning_rate", math.nan),
        ("noise_multiplier", -1.0),
        ("noise_multiplier", math.inf),
        ("max_grad_norm", 0.0),
        ("expected_batch_size", 0.0),
        ("weight_decay", -1e-3),
        ("weight_decay", 10.0),
        ("weight_decay", 11.0),
    ):
        with pytest.raises(ConfigError, match=name):
            schedule.advance(**(good | {name: value}))
    assert schedule.step == 0
    schedule.advance(**good)
    with pytest.raises(ValueError, match="to_step"):
        schedule.decay_and_scale(torch.tensor([0]), 2)
    with pytest.raises(ValueError, match="from_steps"):
        schedule.decay_and_scale(torch.tensor([1]), 0)
    with pytest.raises(ValueError, match="from_steps"):
        schedule.decay_and_scale(torch.tensor([-1]), 1)
    with pytest.raises(TypeError, match="from_steps"):
        schedule.decay_and_scale(torch.tensor([0.0]), 1)
    with pytest.raises(ValueError, match="step"):
        schedule.gradient_learning_rate(2)
    empty = schedule.decay_and_scale(torch.empty(0, dtype=torch.int64), 1)
    assert empty[0].shape == empty[1].shape == (0,)


def test_learning_rates() -> None:
    cosine = ScheduleConfig(
        kind="cosine", base=2.0, warmup_steps=10, total_steps=110, final_fraction=0.1
    )
    assert learning_rate_at(cosine, 1) == pytest.approx(0.2)
    assert learning_rate_at(cosine, 10) == pytest.approx(2.0)
    assert learning_rate_at(cosine, 60) == pytest.approx(1.1)
    assert learning_rate_at(cosine, 110) == pytest.approx(0.2)
    assert learning_rate_at(cosine, 500) == learning_rate_at(cosine, 110)
    steps = ScheduleConfig(kind="step", base=1.0, step_size=3, gamma=0.5)
    assert [learning_rate_at(steps, t) for t in range(1, 8)] == [1, 1, 1, 0.5, 0.5, 0.5, 0.25]
    constant = ScheduleConfig(base=0.3, warmup_steps=3)
    assert [learning_rate_at(constant, t) for t in (1, 3, 4, 99)] == pytest.approx(
        [0.1, 0.3, 0.3, 0.3]
    )
    with pytest.raises(ValueError, match="step"):
        learning_rate_at(constant, 0)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"kind": "cosine", "base": 1.0}, "total_steps"),
        ({"kind": "step", "base": 1.0, "gamma": 0.5}, "step_size"),
        ({"kind": "constant", "base": 1.0, "gamma": 0.5}, "gamma"),
        ({"kind": "constant", "base": 0.0}, "base"),
        ({"kind": "constant", "base": math.nan}, "base"),
        ({"kind": "linear", "base": 1.0}, "kind"),
        ({"kind": "constant", "base": 1.0, "rate": 1.0}, "rate"),
        ({"kind": "cosine", "base": 1.0, "total_steps": 5, "warmup_steps": 5}, "warmup_steps"),
    ],
)
def test_schedule_settings(settings: dict[str, object], key: str) -> None:
    with pytest.raises(ValidationError, match=key):
        ScheduleConfig(**settings)  # type: ignore[arg-type]
