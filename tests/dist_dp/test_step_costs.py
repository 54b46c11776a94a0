"""What steps cost by their numbers: within the plan, across segments, beyond it; what fits."""

from __future__ import annotations

import itertools
import json
import pickle
from collections import Counter
from typing import Any

import pytest

from dist_dp.accounting import epsilon_of
from dist_dp.errors import ConfigError
from dist_dp.events import GaussianEvent, LaplaceEvent, PrivacyEvent, PureEvent
from dist_dp.run_charges import RunState
from dist_dp.step_costs import StepCosts, max_steps, sum_of

LOUD, MIDDLE, QUIET = (GaussianEvent(sigma, 0.02) for sigma in (4.0, 3.0, 2.0))
# The dearest lies inside, and one event comes twice.
COSTS = StepCosts(((MIDDLE, 3), (QUIET, 2), (LOUD, 4), (MIDDLE, 1)))
BY_STEP = [MIDDLE] * 3 + [QUIET] * 2 + [LOUD] * 4 + [MIDDLE]


def test_each_step_has_its_event() -> None:
    assert [COSTS.at(step) for step in range(1, 11)] == BY_STEP
    assert COSTS.planned_steps == 10 and COSTS.unplanned == {QUIET: 1}
    assert COSTS.planned == {MIDDLE: 4, QUIET: 2, LOUD: 4}


def test_a_step_that_is_not_planned_costs_the_dearest() -> None:
    assert COSTS.at(0) == COSTS.at(11) == COSTS.at(10**9) == QUIET
    assert COSTS.between(0, 1) == COSTS.between(11, 1) == {QUIET: 1}
    assert COSTS.between(9, 5) == {LOUD: 1, MIDDLE: 1, QUIET: 3}
    with pytest.raises(ValueError, match="first step is 1"):
        COSTS.at(-1)


def test_a_stretch_costs_what_its_steps_cost() -> None:
    """Every stretch of the plan and somewhat beyond, against one step at a time."""
    for first, count in itertools.product(range(13), range(14)):
        one_by_one = Counter(COSTS.at(step) for step in range(first, first + count))
        assert COSTS.between(first, count) == dict(one_by_one), (first, count)
    for first, count in ((-1, 2), (1, -1)):
        with pytest.raises(ValueError, match="at least 0"):
            COSTS.between(first, count)


def test_sums_leave_out_what_cancels() -> None:
    assert sum_of({LOUD: 2, QUIET: 1}, {QUIET: -1}, {LOUD: 3}, {}) == {LOUD: 5}


def test_round_trip_keeps_every_bit() -> None:
    costs = StepCosts(((GaussianEvent(1 / 3, 0.1), 2), (GaussianEvent(2 / 3, 0.1), 5)))
    assert StepCosts.from_json(json.loads(json.dumps(costs.to_json()))) == costs
    assert costs.planned_steps == 7  # kept beside the fields, which must not matter:
    assert pickle.loads(pickle.dumps(costs)) == costs and hash(costs) == hash(
        StepCosts(costs.segments)
    )


@pytest.mark.parametrize(
    ("segments", "words"),
    [
        ((), "without steps"),
        (((LOUD, 0),), "has 0 steps"),
        (((LOUD, True),), "has True steps"),
        (((LOUD, 1.0),), "has 1.0 steps"),
    ],
)
def test_what_makes_no_sense_is_named(segments: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        StepCosts(segments)


def test_a_setup_is_step_0() -> None:
    """Charged as often as it is reserved, apart from the steps."""
    select, laplace = PureEvent(0.5), LaplaceEvent(3.0)
    costs = StepCosts(((QUIET, 4),), setup=(select, laplace, select))
    assert costs.between(0, 1) == {select: 2, laplace: 1}
    assert costs.between(0, 3) == {select: 2, laplace: 1, QUIET: 2}
    assert costs.planned == {select: 2, laplace: 1, QUIET: 4} and costs.planned_steps == 4
    assert costs.between(5, 1) == {QUIET: 1}
    assert StepCosts.from_json(json.loads(json.dumps(costs.to_json()))) == costs
    with pytest.raises(ValueError, match="first step is 1"):
        costs.at(0)
    run = RunState("clicks", costs)
    run.charge(0, 3)
    assert run.charged == 2 and run.by_event == costs.between(0, 3)
    run.charge(0, 1)
    assert run.charged == 2 and run.by_event[select] == 4
    run.give_back(1, 2)
    assert run.charged == 0 and run.by_event == {select: 4, laplace: 2}


def test_an_unplanned_step_costs_no_less_than_any_of_several_kinds() -> None:
    mixed: tuple[PrivacyEvent, ...] = (
        LOUD, GaussianEvent(4.0, 0.3), PureEvent(0.2), LaplaceEvent(2.0)
    )  # fmt: skip
    costs = StepCosts(tuple((event, 2) for event in mixed))
    assert costs.between(9, 1) == costs.between(0, 1) == dict.fromkeys(mixed, 1)
    beyond = epsilon_of(costs.between(9, 1), 1e-6)
    assert all(beyond >= epsilon_of({event: 1}, 1e-6) for event in mixed)
    with pytest.raises(ValueError, match="last planned 8"):
        costs.at(9)
    # A setup alone: repeating any part of it is charged as all of it.
    once = StepCosts((), setup=(PureEvent(1.0), LOUD))
    assert once.between(0, 2) == {PureEvent(1.0): 2, LOUD: 2} and once.planned_steps == 0


def test_a_ledger_from_before_is_read() -> None:
    old = {"segments": [{"noise_multiplier": 4.0, "sample_rate": 0.02, "steps": 3}]}
    assert StepCosts.from_json(old) == StepCosts.constant(LOUD, 3)
    with pytest.raises(ConfigError, match="another version"):
        StepCosts.from_json({"segments": [{"kind": "later", "steps": 1}]})


def test_max_steps_is_the_largest() -> None:
    event, other = GaussianEvent(2.0, 1e-3), {GaussianEvent(2.0, 0.01): 100}
    costs = StepCosts.constant(event, 10_000)
    found = max_steps(costs, 1, 10_000, other, 0.25, 1e-5)
    assert 0 < found < 10_000
    assert epsilon_of({**other, event: found}, 1e-5) <= 0.25
    assert epsilon_of({**other, event: found + 1}, 1e-5) > 0.25
    # From here on every answer follows from what is known.
    assert max_steps(costs, 1, found - 1, other, 0.25, 1e-5) == found - 1
    assert max_steps(costs, 1, 1, {**other, event: found}, 0.25, 1e-5) == 0
    assert max_steps(costs, 1, 5, {**other, event: found - 3}, 0.25, 1e-5) == 3
    with pytest.raises(ConfigError, match="steps is 0"):
        max_steps(costs, 1, 0, other, 0.25, 1e-5)


@pytest.mark.parametrize("first", [1, 2, 4])
def test_what_fits_are_the_next_steps(first: int) -> None:
    """As many as one step after another would find, wherever the run stands."""
    already = {LOUD: 5}
    budget = epsilon_of({LOUD: 5, MIDDLE: 2, QUIET: 1}, 1e-5)
    fits = 0
    while epsilon_of(sum_of(already, COSTS.between(first, fits + 1)), 1e-5) <= budget:
        fits += 1
    assert 0 < fits < 9
    assert max_steps(COSTS, first, 9, already, budget, 1e-5) == fits
