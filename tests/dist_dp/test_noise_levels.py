"""Few noise levels: never below the schedule, no more than 16, and exact where they can be."""

from __future__ import annotations

from typing import Any

import pytest

from dist_dp.accounting import GaussianEvent
from dist_dp.noise_levels import MAX_LEVELS, factor_levels, planned_costs
from dist_dp.schedules import ScheduleConfig, learning_rate_at
from dist_dp.step_costs import StepCosts

SCHEDULES: dict[str, dict[str, Any]] = {
    "cosine": {"kind": "cosine", "total_steps": 500, "final_fraction": 0.1},
    "cosine that ends early": {"kind": "cosine", "total_steps": 200, "final_fraction": 0.3},
    "cosine after a warm-up": {
        "kind": "cosine", "total_steps": 400, "final_fraction": 0.5, "warmup_steps": 60,
    },
    "steps": {"kind": "step", "step_size": 10, "gamma": 0.9},
    "tiny steps": {"kind": "step", "step_size": 1, "gamma": 1 - 2**-52},
    "warm-up alone": {"warmup_steps": 100},
}  # fmt: skip
STEPS = 500


def schedule(**values: Any) -> ScheduleConfig:
    return ScheduleConfig(base=1.0, **values)


@pytest.mark.parametrize("name", SCHEDULES)
def test_rounded_up_to_few_levels(name: str) -> None:
    made = schedule(**SCHEDULES[name])
    runs = factor_levels(made, STEPS)
    rounded = [factor for factor, count in runs for _ in range(count)]
    asked = [learning_rate_at(made, step) for step in range(1, STEPS + 1)]
    assert len(set(asked)) > MAX_LEVELS and len(rounded) == STEPS
    levels = sorted(set(rounded))
    assert len(levels) <= MAX_LEVELS
    assert (levels[0], levels[-1]) == (min(asked), max(asked))
    ratio = (max(asked) / min(asked)) ** (1 / (MAX_LEVELS - 1)) * (1 + 1e-9)
    for wanted, given in zip(asked, rounded, strict=True):
        assert wanted <= given <= wanted * ratio
        # The nearest level above, not just any.
        assert given == min(level for level in levels if level >= wanted)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"kind": "step", "step_size": 50, "gamma": 0.7},
        {"warmup_steps": 15},
        {"kind": "cosine", "total_steps": 16, "final_fraction": 0.2},
    ],
)
def test_few_values_are_kept_as_they_are(values: dict[str, Any]) -> None:
    made = schedule(**values)
    rounded = [f for f, count in factor_levels(made, STEPS) for _ in range(count)]
    assert rounded == [learning_rate_at(made, step) for step in range(1, STEPS + 1)]


def test_one_value_is_one_segment() -> None:
    event = GaussianEvent(1.3, 0.01)
    for steady in (None, schedule()):
        assert planned_costs(1.3, 0.01, steady, 70) == StepCosts.constant(event, 70)


def test_costs_are_the_base_times_the_factor() -> None:
    made = schedule(kind="step", step_size=3, gamma=0.5)
    assert planned_costs(3.0, 0.2, made, 7).segments == (
        (GaussianEvent(3.0, 0.2), 3),
        (GaussianEvent(1.5, 0.2), 3),
        (GaussianEvent(0.75, 0.2), 1),
    )
