"""Leases of a run whose steps differ: charged, given back and granted by step number."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant

from dist_dp.accounting import GaussianEvent, epsilon_of
from dist_dp.errors import BudgetError, LedgerError
from dist_dp.ledger import Ledger
from dist_dp.noise_levels import planned_costs
from dist_dp.run_charges import multiple_of, part_of_plan
from dist_dp.schedules import ScheduleConfig
from dist_dp.step_costs import StepCosts
from tests.dist_dp.ledgers import append_raw

DELTA = 1e-5
LOUD, MIDDLE, QUIET = (GaussianEvent(sigma, 0.02) for sigma in (8.0, 6.0, 4.0))
COSTS = StepCosts(((LOUD, 30), (MIDDLE, 50), (QUIET, 20)))


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    made = Ledger(tmp_path / "ledger.db")
    register(made, 50.0)
    made.open_run("a", "clicks", COSTS)
    return made


def register(ledger: Ledger, epsilon: float, name: str = "clicks") -> None:
    ledger.register_dataset(
        name, fingerprint=f"sha of {name}", num_records=10_000, epsilon=epsilon, delta=DELTA
    )


def by_hand(counts: dict[GaussianEvent, int]) -> float:
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    for event, count in counts.items():
        noise = dp_accounting.GaussianDpEvent(event.noise_multiplier)
        accountant.compose(dp_accounting.PoissonSampledDpEvent(event.sample_rate, noise), count)
    return float(accountant.get_epsilon(DELTA))


def test_a_lease_costs_what_its_steps_cost(ledger: Ledger) -> None:
    ledger.reserve("a", 1, 40)
    assert ledger.run_charges("a") == {LOUD: 30, MIDDLE: 10}
    ledger.reserve("a", 41, 60)
    assert ledger.run_charges("a") == {LOUD: 30, MIDDLE: 50, QUIET: 20}
    assert ledger.run_epsilon("a") == pytest.approx(by_hand(ledger.run_charges("a")), rel=1e-8)
    ledger.reserve("a", 25, 10)  # a replay
    assert ledger.run_charges("a") == {LOUD: 36, MIDDLE: 54, QUIET: 20}
    ledger.reserve("a", 99, 4)  # two of these were not planned
    assert ledger.run_charges("a") == {LOUD: 36, MIDDLE: 54, QUIET: 24}
    assert ledger.run_steps("a") == 36 + 54 + 24
    spent = Ledger(ledger.path).spent("clicks")
    assert spent.steps_by_event == ledger.run_charges("a")
    assert spent.epsilon == pytest.approx(by_hand(spent.steps_by_event), rel=1e-8)
    assert ledger.run_costs("a") == COSTS


@pytest.mark.parametrize("used", [0, 1, 5, 10, 59, 60])
def test_what_is_given_back_are_the_last_steps(ledger: Ledger, used: int) -> None:
    lease = ledger.reserve("a", 26, 60)
    ledger.settle(lease.lease_id, used)
    left = Counter(COSTS.at(step) for step in range(26, 26 + used))
    assert Ledger(ledger.path).run_charges("a") == left
    assert ledger.run_steps("a") == used


def test_as_many_of_the_next_steps_as_fit(ledger: Ledger) -> None:
    """The budget ends within the dearest steps, after which the same lease has no room."""
    budget = by_hand({LOUD: 30, MIDDLE: 50, QUIET: 7}) + by_hand({LOUD: 30, MIDDLE: 50, QUIET: 8})
    ledger.set_budget("clicks", budget / 2, DELTA, "to the step")
    assert ledger.reserve("a", 1, 45).steps == 45
    lease = ledger.reserve("a", 46, 55)
    assert lease.steps == 35 + 7
    assert ledger.run_charges("a") == {LOUD: 30, MIDDLE: 50, QUIET: 7}
    with pytest.raises(BudgetError, match="used up"):
        ledger.reserve("a", 88, 1)
    # A step with more noise costs less: one of those may still fit.
    assert lease.epsilon_after == ledger.spent("clicks").epsilon <= budget / 2
    ledger.settle(lease.lease_id, 41)
    assert ledger.reserve("a", 87, 5).steps == 1


def test_no_reported_bound_is_below_the_exact_composition(tmp_path: Path) -> None:
    """Random leases, replays and settlements of two runs with many levels, and a plain one."""
    cosine = ScheduleConfig(kind="cosine", base=1.0, total_steps=90, final_fraction=0.5)
    falling = ScheduleConfig(kind="step", base=1.0, step_size=15, gamma=0.9)
    costs = {
        "cosine": planned_costs(12.0, 0.02, cosine, 90),
        "falling": planned_costs(9.0, 0.01, falling, 90),
        "plain": StepCosts.constant(LOUD, 90),
    }
    ledger = Ledger(tmp_path / "ledger.db")
    register(ledger, 100.0)
    for run_id, cost in costs.items():
        ledger.open_run(run_id, "clicks", cost)
    charged = {run_id: Counter[GaussianEvent]() for run_id in costs}
    rng = np.random.default_rng(7)
    for turn in range(30):
        run_id = str(rng.choice(list(costs)))
        first, steps = int(rng.integers(1, 95)), int(rng.integers(1, 12))
        lease = ledger.reserve(run_id, first, steps)
        cost = costs[run_id]
        before = charged[run_id] + Counter(cost.at(s) for s in range(first, first + steps))
        everything = sum((c for r, c in charged.items() if r != run_id), start=before)
        assert lease.run_epsilon >= epsilon_of(before, DELTA) * (1 - 1e-12)
        assert lease.epsilon_after >= epsilon_of(everything, DELTA) * (1 - 1e-12)
        used = int(rng.integers(0, steps + 1)) if turn % 3 else steps
        ledger.settle(lease.lease_id, used)
        charged[run_id] += Counter(cost.at(s) for s in range(first, first + used))
        assert ledger.run_charges(run_id) == dict(charged[run_id])
    whole = dict(sum(charged.values(), start=Counter[GaussianEvent]()))
    assert len(whole) > 12
    spent = ledger.spent("clicks")
    assert spent.steps_by_event == whole
    assert spent.epsilon == pytest.approx(by_hand(whole), rel=1e-6)


@pytest.mark.parametrize("planned", [1, 2, 3, 7, 16, 90, 1000])
def test_charges_are_rounded_up_only(planned: int) -> None:
    for rounding in (part_of_plan, multiple_of(1), multiple_of(13), multiple_of(800)):
        for charged in range(1, planned + 30):
            found = max(charged, rounding(charged, planned))
            assert found >= charged and isinstance(found, int)
            if charged <= planned:
                assert rounding(charged, planned) >= charged
                assert found <= planned  # so that a calibrated run fits its budget to the last step


def test_a_calibrated_run_fits_to_the_last_step(tmp_path: Path) -> None:
    cosine = ScheduleConfig(kind="cosine", base=1.0, total_steps=100, final_fraction=0.5)
    costs = planned_costs(12.0, 0.02, cosine, 100)
    ledger = Ledger(tmp_path / "ledger.db")
    register(ledger, epsilon_of(costs.planned, DELTA))
    ledger.open_run("a", "clicks", costs)
    for first in range(1, 101, 20):
        assert ledger.reserve("a", first, 20).steps == 20
    with pytest.raises(BudgetError):
        ledger.reserve("a", 100, 1)


def test_an_entry_of_an_earlier_version_is_read(ledger: Ledger) -> None:
    """One event for all steps; and a run without noise."""
    ledger.close()
    for run_id, event in (("old", vars(QUIET)), ("open", None)):
        details = {"event": event, "planned_steps": 70, "details": {"non_private": not event}}
        append_raw(ledger.path, "run_opened", run_id=run_id, details=details)
    again = Ledger(ledger.path)
    assert again.run_costs("old") == StepCosts.constant(QUIET, 70)
    lease = again.reserve("old", 1, 50)
    again.settle(lease.lease_id, 20)
    again.reserve("open", 1, 9)
    again.reserve("a", 1, 10)
    assert again.run_charges("old") == {QUIET: 20}
    assert again.run_costs("open") is None and again.run_charges("open") == {}
    spent = again.spent("clicks")
    assert spent.steps_by_event == {QUIET: 20, LOUD: 10}
    assert spent.non_private_runs == ("open",)


@pytest.mark.parametrize(
    "segments",
    [
        "[]",
        '[{"noise_multiplier": 1.0, "sample_rate": 0.1, "steps": 0}]',
        '[{"noise_multiplier": -1.0, "sample_rate": 0.1, "steps": 5}]',
        '[{"noise_multiplier": 1.0, "steps": 5}]',
        '"none"',
    ],
)
def test_costs_that_contradict_themselves_are_refused(ledger: Ledger, segments: str) -> None:
    ledger.close()
    details = {"segments": json.loads(segments), "details": {}}
    append_raw(ledger.path, "run_opened", run_id="b", details=details)
    with pytest.raises(LedgerError, match="contradicts itself at entry 3"):
        Ledger(ledger.path)


def test_a_repeated_request_charges_its_steps_once(ledger: Ledger) -> None:
    leases = [ledger.reserve("a", 25, 10, request_id="r") for _ in range(3)]
    assert leases[0] == leases[1] == leases[2]
    for _ in range(2):
        ledger.settle(leases[0].lease_id, 7, request_id="s")
    assert ledger.run_charges("a") == {LOUD: 6, MIDDLE: 1}


def test_threads_cannot_overspend_together(ledger: Ledger) -> None:
    budget = by_hand({LOUD: 60, MIDDLE: 100, QUIET: 25}) * (1 + 1e-9)
    ledger.set_budget("clicks", budget, DELTA, "for two and a half")
    ledger.open_run("b", "clicks", COSTS)
    ledger.open_run("c", "clicks", COSTS)

    def take(run_id: str) -> int:
        own, step = Ledger(ledger.path), 1
        try:
            while step <= 100:
                step += own.reserve(run_id, step, 7).steps
        except BudgetError:
            pass
        return min(step, 101) - 1

    with ThreadPoolExecutor(3) as pool:
        taken = list(pool.map(take, "abc"))
    spent = ledger.spent("clicks")
    assert sum(taken) <= sum(spent.steps_by_event.values())
    assert spent.epsilon == pytest.approx(by_hand(spent.steps_by_event), rel=1e-8)
    assert spent.epsilon <= budget


def test_leases_of_a_run_with_sixteen_levels_are_quick(tmp_path: Path) -> None:
    """Each level's charge is rounded up on its own, so that few compositions occur."""
    cosine = ScheduleConfig(kind="cosine", base=1.0, total_steps=5000, final_fraction=0.5)
    costs = planned_costs(8.0, 0.01, cosine, 5000)
    assert len(costs.planned) == 16
    ledger = Ledger(tmp_path / "ledger.db")
    register(ledger, epsilon_of(costs.planned, DELTA))
    ledger.open_run("a", "clicks", costs)
    start = time.process_time()
    for step in range(1, 5001, 50):
        assert ledger.reserve("a", step, 50).steps == 50
    assert time.process_time() - start < 30


def test_a_forecast_says_where_the_budget_ends(tmp_path: Path) -> None:
    """What it says is what reserving one lease after another comes to."""
    event = GaussianEvent(1.0, 0.01)
    budget = epsilon_of({event: 70}, 1e-5) * (1 + 1e-9)
    with contextlib.closing(Ledger(tmp_path / "books.sqlite")) as ledger:
        ledger.register_dataset(
            "clicks", fingerprint="f", num_records=100, epsilon=budget, delta=1e-5
        )
        for run in ("one", "two"):
            ledger.open_run(run, "clicks", StepCosts.constant(event, 50))
        ledger.open_run("loud", "clicks", None, {"non_private": True})
        first = ledger.forecast("one")
        assert first is not None and (first.charged_to, first.last_step) == (0, 50)
        assert not first.ends_early and first.epsilon == epsilon_of({event: 50}, 1e-5)
        for step in range(1, 50, 7):
            ledger.reserve("one", step, 7)
        lease = ledger.reserve("one", 50, 1)
        ledger.settle(lease.lease_id, 0)
        found = ledger.forecast("two")
        assert found is not None and found.ends_early
        assert (found.charged_to, found.planned, found.last_step) == (0, 50, 21)
        assert ledger.reserve("two", 1, 50).steps == 21
        assert ledger.forecast("two") == dataclasses.replace(found, charged_to=21)
        assert ledger.forecast("loud") is None
