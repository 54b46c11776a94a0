"""A noise multiplier that changes with the step: what is drawn is what is charged and stated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from torch import Tensor

from dist_dp import kernels
from dist_dp.accountant import LocalAccountant
from dist_dp.accounting import GaussianEvent, epsilon_of
from dist_dp.checkpoint import save_checkpoint
from dist_dp.errors import ConfigError, LedgerError
from dist_dp.ledger import Ledger
from dist_dp.noise_schedule import NoiseSchedule
from dist_dp.plan import PrivacyPlan
from dist_dp.released import Release
from dist_dp.schedules import ScheduleConfig
from tests.dist_dp import unsharded
from tests.dist_dp.placement import RECORDS
from tests.dist_dp.sharding_runs import KINDS, STEPS, private_run, together
from tests.dist_dp.test_engine import engine, train
from tests.dist_dp.worlds import run_world

TOLERANCE = 1e-5
# Rises by twentieths to 1: more values than levels, so what is drawn is rounded up.
RISING = ScheduleConfig(base=1.0, warmup_steps=20)
FALLING = ScheduleConfig(kind="step", base=1.0, step_size=3, gamma=0.6)
PLAN: dict[str, Any] = {
    "max_grad_norm": 2.0,
    "noise_multiplier": 4.0,
    "num_records": 10_000,
    "expected_batch_size": 100,
    "steps": 100,
    "delta": 1e-5,
}


def risen(step: int) -> float:
    """The factor of `RISING` in 16 levels from 1/20 to 1, by hand."""
    levels = [20 ** (level / 15 - 1) for level in range(16)]
    return next(level for level in levels if level > step / 20 * (1 - 1e-12))


# --- training draws it ------------------------------------------------------------------------


@cache
def wanted() -> dict[str, Tensor]:
    return unsharded.reference(STEPS, noise=risen).state


def far(kind: str, **options: Any) -> float:
    (run,) = run_world(run_of, 1, kind, options)
    state = together([run])
    return max(float((state[n] - w).abs().max() / w.abs().max()) for n, w in wanted().items())


def run_of(kind: str, options: dict[str, Any]) -> dict[str, Any]:
    return private_run(KINDS[kind], noise_multiplier_schedule=RISING, **options)


@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 4}, {"look_ahead": True}], ids=str)
def test_tables_and_dense_layers_get_the_noise_of_their_step(options: dict[str, Any]) -> None:
    assert far("row_wise", **options) <= TOLERANCE


def test_noise_that_stays_is_caught() -> None:
    with mock.patch.object(
        PrivacyPlan, "noise_multiplier_at", lambda plan, _: plan.noise_multiplier
    ):
        assert far("row_wise") > 100 * TOLERANCE


# --- what is drawn is what is charged ---------------------------------------------------------


@contextmanager
def noise_drawn() -> Iterator[tuple[list[float], list[float]]]:
    """Noise multipliers that reach the tables' schedule, and deviations of the dense noise."""
    tables: list[float] = []
    dense: list[float] = []
    advance, add_normal = NoiseSchedule.advance, kernels.add_normal

    def noted_advance(self: NoiseSchedule, lr: float, **options: Any) -> int:
        tables.append(options["noise_multiplier"])
        return advance(self, lr, **options)

    def noted_normal(*args: Any, **options: Any) -> Any:
        dense.append(options["scale"])
        return add_normal(*args, **options)

    with (
        mock.patch.object(NoiseSchedule, "advance", noted_advance),
        mock.patch.object(kernels, "add_normal", noted_normal),
    ):
        yield tables, dense


def composed(multipliers: list[float], rate: float, delta: float) -> float:
    """ε of steps with these noise multipliers, by the library's own accountant."""
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    for sigma, steps in Counter(multipliers).items():
        noise = dp_accounting.GaussianDpEvent(sigma)
        accountant.compose(dp_accounting.PoissonSampledDpEvent(rate, noise), steps)
    return float(accountant.get_epsilon(delta))


def ledger_of(folder: Path) -> LocalAccountant:
    return LocalAccountant(Ledger(folder / "ledger.sqlite"))


@pytest.mark.parametrize("schedule", [RISING, FALLING], ids=["rising", "falling"])
@pytest.mark.parametrize("mechanism", ["lazydp", "dpsgd"])
def test_what_is_drawn_is_charged_and_stated(
    tmp_path: Path, schedule: ScheduleConfig, mechanism: str
) -> None:
    made = engine(tmp_path, mechanism=mechanism, run_id="run")
    with noise_drawn() as (tables, dense):
        train(made, noise_multiplier_schedule=schedule, epochs=None, steps=8)
    assert len(set(tables)) > 2 and len(tables) == 8
    assert dense == tables  # the clip norm is 1
    rate = 10 / RECORDS
    events = Counter(GaussianEvent(sigma, rate) for sigma in tables)
    ledger = ledger_of(tmp_path)
    assert ledger.run_charges("run") == events == ledger.spent("clicks").steps_by_event
    delta = made.parts.plan.delta or 0.0
    exact = composed(tables, rate, delta)
    assert ledger.run_epsilon("run") == pytest.approx(exact, rel=1e-6)
    privacy = Release.open(made.release(tmp_path / "released")).manifest["privacy"]
    assert privacy["epsilon"] == pytest.approx(exact, rel=1e-6)
    assert 0.99 * 4.0 < privacy["epsilon"] <= 4.0  # calibrated
    assert privacy["noise_multiplier_range"] == [min(tables), max(tables)]
    words = f"{min(tables):.6g} to {max(tables):.6g}, by a schedule of the step fixed in advance"
    assert words in (tmp_path / "released" / "MODEL_CARD.md").read_text(encoding="utf-8")


def test_a_replay_is_charged_at_the_events_of_its_steps(tmp_path: Path) -> None:
    """Rising noise: the steps run twice are the dearest, dearer than as many later ones."""
    settings: dict[str, Any] = {
        "noise_multiplier_schedule": RISING,
        "epochs": None,
        "steps": 8,
        "budget": (60.0, 1e-3),
    }
    stopped = engine(tmp_path, run_id="run")
    train(stopped, most=2, **settings)
    folder = save_checkpoint(stopped, tmp_path / "checkpoint")
    ledger = ledger_of(tmp_path)
    ledger.reserve("run", 3, 2)  # lost in a crash
    resumed = engine(tmp_path, run_id="run", resume_from=folder)
    with noise_drawn() as (tables, _):
        train(resumed, **settings)
    plan = resumed.parts.plan
    assert tables == [plan.noise_multiplier_at(step) for step in range(3, 9)]
    twice = Counter(plan.event_at(step) for step in (1, 2, 3, 4, 3, 4, 5, 6, 7, 8))
    assert ledger.run_charges("run") == twice
    privacy = Release.open(resumed.release(tmp_path / "released")).manifest["privacy"]
    assert privacy["steps_charged"] == 10
    assert privacy["epsilon"] == epsilon_of(twice, plan.delta or 0.0) > plan.epsilon()
    # Ten steps from the first on, none twice, would cost less than this.
    later = plan.model_copy(update={"steps": 10})
    assert privacy["epsilon"] > later.epsilon()


def test_a_run_does_not_go_on_with_other_noise_than_it_is_charged_for(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"noise_multiplier_schedule": FALLING, "epochs": None, "steps": 8}
    stopped = engine(tmp_path, run_id="run")
    train(stopped, most=2, **settings)
    folder = save_checkpoint(stopped, tmp_path / "checkpoint")
    other = stopped.parts.plan.model_copy(update={"noise_multiplier": 1e-3}).step_costs()
    with (
        mock.patch.object(Ledger, "run_costs", lambda *_: other),
        pytest.raises(LedgerError, match="opened in the ledger with other noise"),
    ):
        train(engine(tmp_path, run_id="run", resume_from=folder), **settings)


# --- the plan ---------------------------------------------------------------------------------


def cosine(final: float = 0.25) -> ScheduleConfig:
    return ScheduleConfig(kind="cosine", base=1.0, total_steps=100, final_fraction=final)


def test_a_plan_counts_every_level() -> None:
    plan = PrivacyPlan(**PLAN, noise_multiplier_schedule=cosine())
    drawn = [plan.noise_multiplier_at(step) for step in range(1, 101)]
    assert len(set(drawn)) == 16 and drawn == sorted(drawn, reverse=True)
    assert plan.noise_multiplier_range() == (drawn[-1], drawn[0])
    assert drawn[-1] == 1.0 and drawn[0] == pytest.approx(4.0, rel=1e-3)
    assert [plan.event_at(step).noise_multiplier for step in range(1, 101)] == drawn
    assert plan.events() == Counter(GaussianEvent(sigma, 0.01) for sigma in drawn)
    assert plan.events(7) == Counter(GaussianEvent(sigma, 0.01) for sigma in drawn[:7])
    # As the ledger charges what was not planned.
    assert plan.noise_multiplier_at(101) == plan.event_at(101).noise_multiplier == 1.0
    assert plan.noise_on_sum_at(100) == 2.0 * 1.0
    assert plan.epsilon() == pytest.approx(composed(drawn, 0.01, 1e-5), rel=1e-6)
    part = plan.epsilon(plan.events(40))
    assert part == pytest.approx(composed(drawn[:40], 0.01, 1e-5), rel=1e-6)
    assert PrivacyPlan(**PLAN).epsilon() < plan.epsilon()
    words = "a noise multiplier of 1 to 3.9993, by a schedule fixed in advance, accounted by PLD"
    assert words in plan.statement()
    assert PrivacyPlan.model_validate_json(plan.model_dump_json()) == plan
    for step in (0, -3):
        with pytest.raises(ValueError, match="first step is 1"):
            plan.noise_multiplier_at(step)


def test_calibration_finds_the_base_of_the_whole_composition() -> None:
    open_noise = PrivacyPlan(
        **{**PLAN, "noise_multiplier": None}, noise_multiplier_schedule=cosine()
    )
    found = open_noise.calibrate(0.3, 1e-5)
    assert found.noise_multiplier_schedule == cosine()
    drawn = [found.noise_multiplier_at(step) for step in range(1, 101)]
    assert 0.3 * (1 - 2e-4) < composed(drawn, 0.01, 1e-5) <= 0.3
    assert found.epsilon() <= 0.3
    assert max(drawn) == pytest.approx(found.noise_multiplier, rel=1e-3)


def test_both_schedules_make_one_noise() -> None:
    plan = PrivacyPlan(**PLAN, clip_schedule=RISING, noise_multiplier_schedule=FALLING)
    for step in (1, 3, 4, 50):
        ratio = plan.noise_on_sum_at(step) / plan.max_grad_norm_at(step)
        assert ratio == pytest.approx(plan.event_at(step).noise_multiplier, rel=1e-15)
        assert plan.noise_on_sum_at(step) <= plan.noise_on_sum


@pytest.mark.parametrize(
    ("schedule", "changes", "words"),
    [
        ({"base": 0.5}, {}, r"schedule has base 0.5.*base 1.*as noise_multiplier"),
        (
            {"kind": "cosine", "base": 1, "total_steps": 100},
            {},
            r"noise_multiplier_schedule is 0 by step 100.*without noise.*final_fraction",
        ),
        ({"base": 1, "kind": "step", "step_size": 1, "gamma": 1e-9}, {}, "is 0 by step 100"),
        ({"base": 1}, {"noise_multiplier": 0.0}, "is 0 at a step"),
        (
            {"base": 1, "warmup_steps": 1000},
            {"noise_multiplier": 5e-324},
            "times noise_multiplier 4.94066e-324 is 0 at a step",
        ),
        ({"base": 1}, {"noise_grid": 2.0**-20}, "does not go with noise_grid"),
        (
            {"base": 1},
            {"mechanism": "none", "noise_multiplier": None},
            "mechanism 'none' adds no noise: leave it out",
        ),
        ({"base": 1, "kind": "linear"}, {}, r"noise_multiplier_schedule.kind"),
    ],
)
def test_what_makes_no_sense_is_named(schedule: Any, changes: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        PrivacyPlan(**{**PLAN, **changes}, noise_multiplier_schedule=schedule)


def test_from_the_configuration() -> None:
    from dist_dp.cluster.config import parse_config
    from dist_dp.cluster.job import make_plan

    values: dict[str, Any] = {
        "privacy": {
            "noise_multiplier": 2.0,
            "noise_multiplier_schedule": {"kind": "step", "step_size": 10, "gamma": 0.5},
        },
        "train": {"steps": 30, "expected_batch_size": 10},
    }
    plan = make_plan(parse_config(values), 1000)
    assert [plan.noise_multiplier_at(t) for t in (1, 10, 11, 30)] == [2.0, 2.0, 1.0, 0.5]
    values["noise"] = {"grid": "2^-20"}
    with pytest.raises(ConfigError, match="noise_multiplier_schedule does not go with noise_grid"):
        make_plan(parse_config(values), 1000)
    del values["noise"]
    values["privacy"] |= {"noise_multiplier": None, "epsilon": 3.0}
    plan = make_plan(parse_config(values), 1000)
    assert 2.99 < plan.epsilon() <= 3.0 and len(plan.events()) == 3
