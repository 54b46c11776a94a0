"""A clip norm that changes with the step: clipping and noise follow it, and ε stays."""

from __future__ import annotations

from functools import cache
from typing import Any
from unittest import mock

import pytest
from torch import Tensor

from dist_dp.errors import ConfigError
from dist_dp.plan import PrivacyPlan
from dist_dp.schedules import ScheduleConfig
from tests.dist_dp import unsharded
from tests.dist_dp.sharding_runs import KINDS, STEPS, private_run, together
from tests.dist_dp.worlds import run_world

TOLERANCE = 1e-5
HALVING = ScheduleConfig(kind="step", base=1.0, step_size=1, gamma=0.5)
PLAN: dict[str, Any] = {
    "max_grad_norm": 2.0,
    "noise_multiplier": 1.1,
    "num_records": 10_000,
    "expected_batch_size": 100,
    "steps": 100,
    "delta": 1e-5,
}


@cache
def wanted() -> dict[str, Tensor]:
    return unsharded.reference(STEPS, clip=lambda t: unsharded.CLIP * 0.5 ** (t - 1)).state


def far(kind: str, **options: Any) -> float:
    (run,) = run_world(run_of, 1, kind, options)
    state = together([run])
    return max(float((state[n] - w).abs().max() / w.abs().max()) for n, w in wanted().items())


def run_of(kind: str, options: dict[str, Any]) -> dict[str, Any]:
    return private_run(KINDS[kind], clip_schedule=HALVING, **options)


@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 4}])
@pytest.mark.parametrize("kind", ["row_wise", "mixed"])
def test_clipping_and_noise_follow_it(kind: str, options: dict[str, Any]) -> None:
    assert far(kind, **options) <= TOLERANCE


def test_a_norm_that_stays_is_caught() -> None:
    with mock.patch.object(PrivacyPlan, "max_grad_norm_at", lambda plan, _: plan.max_grad_norm):
        assert far("row_wise") > 100 * TOLERANCE


def test_noise_that_stays_is_caught() -> None:
    with mock.patch.object(PrivacyPlan, "noise_on_sum_at", lambda plan, _: plan.noise_on_sum):
        assert far("row_wise") > 100 * TOLERANCE


def test_every_step_costs_the_same() -> None:
    """Noise over sensitivity is the plan's noise multiplier at every step."""
    cosine = ScheduleConfig(
        kind="cosine", base=1.0, warmup_steps=10, total_steps=100, final_fraction=0.1
    )
    plan = PrivacyPlan(**PLAN, clip_schedule=cosine)
    for step in (1, 10, 55, 100):
        ratio = plan.noise_on_sum_at(step) / plan.max_grad_norm_at(step)
        assert ratio == pytest.approx(1.1, rel=1e-15)
    assert plan.max_grad_norm_at(1) == pytest.approx(0.2)
    assert plan.max_grad_norm_at(10) == 2.0
    assert plan.max_grad_norm_at(100) == pytest.approx(0.2)
    assert plan.epsilon() == PrivacyPlan(**PLAN).epsilon()
    assert "clipped to norm 2 at most, by a schedule fixed in advance, and" in plan.statement()
    assert PrivacyPlan.model_validate_json(plan.model_dump_json()) == plan
    assert plan.calibrate(2.0, 1e-5).clip_schedule == cosine
    steady = PrivacyPlan(**PLAN)
    assert steady.max_grad_norm_at(7) == 2.0 and steady.noise_on_sum_at(7) == steady.noise_on_sum


@pytest.mark.parametrize(
    ("schedule", "changes", "words"),
    [
        ({"base": 0.5}, {}, "clip_schedule has base 0.5.*base 1"),
        (
            {"kind": "cosine", "base": 1, "total_steps": 100},
            {},
            r"clip_schedule is 0 by step 100.*clip norm 0",
        ),
        ({"base": 1}, {"noise_grid": 2.0**-20}, "does not go with noise_grid"),
        ({"base": 1, "kind": "linear"}, {}, "clip_schedule.kind"),
    ],
)
def test_what_makes_no_sense_is_named(schedule: Any, changes: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        PrivacyPlan(**PLAN, **changes, clip_schedule=schedule)


def test_from_the_configuration() -> None:
    from dist_dp.cluster.config import parse_config
    from dist_dp.cluster.job import make_plan

    values: dict[str, Any] = {
        "privacy": {
            "noise_multiplier": 1.1,
            "max_grad_norm": 2.0,
            "clip_schedule": {"kind": "step", "step_size": 10, "gamma": 0.5},
        },
        "train": {"steps": 30, "expected_batch_size": 10},
    }
    plan = make_plan(parse_config(values), 1000)
    assert [plan.max_grad_norm_at(t) for t in (1, 10, 11, 30)] == [2.0, 2.0, 1.0, 0.5]
    values["noise"] = {"grid": "2^-20"}
    with pytest.raises(ConfigError, match="clip_schedule does not go with noise_grid"):
        make_plan(parse_config(values), 1000)
    values["privacy"]["clip_schedule"] = {"kind": "step", "step_size": 1, "gamma": 1e-30}
    del values["noise"]
    with pytest.raises(ConfigError, match=r"cannot be represented|clip norm 0"):
        make_plan(parse_config(values), 1000)
