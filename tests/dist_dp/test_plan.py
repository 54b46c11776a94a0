"""The privacy plan: round trip, refusals, calibration, statement."""

from __future__ import annotations

import json
import math
import pickle
from typing import Any

import pytest
import yaml

from dist_dp.accounting import GaussianEvent, epsilon_of
from dist_dp.errors import ConfigError
from dist_dp.plan import PrivacyPlan

BASE: dict[str, Any] = {
    "mechanism": "lazydp",
    "noise_multiplier": 1.3,
    "max_grad_norm": 1.0,
    "num_records": 60_000,
    "expected_batch_size": 150,
    "steps": 6000,
    "delta": 1e-5,
}


def plan(**changes: Any) -> PrivacyPlan:
    return PrivacyPlan(**{**BASE, **changes})


def test_epsilon_is_that_of_what_training_does() -> None:
    assert plan().sample_rate == 150 / 60_000
    assert plan().events() == {GaussianEvent(1.3, 0.0025): 6000}
    assert plan().event_at(1) == plan().event_at(6000) == GaussianEvent(1.3, 0.0025)
    assert plan().epsilon() == pytest.approx(0.64011, abs=5e-6)
    assert plan(accountant="rdp").epsilon() == pytest.approx(0.7242234, abs=5e-8)
    assert plan().epsilon({}) == plan().epsilon(plan().events(0)) == 0.0
    assert 0 < plan().epsilon(plan().events(100)) < plan().epsilon()
    half = plan(expected_batch_size=150.5)
    assert half.event_at(1) == GaussianEvent(1.3, 150.5 / 60_000)


def test_calibrate_reaches_the_target_and_not_more() -> None:
    found = plan(noise_multiplier=None, delta=None).calibrate(1.0, 1e-6)
    assert found.delta == 1e-6 and found.target_epsilon == 1.0
    assert 0.999 < found.epsilon() <= 1.0
    assert epsilon_of({found.event_at(1): found.steps}, 1e-6) == found.epsilon()
    assert found.steps == 6000 and found.max_grad_norm == 1.0


def test_round_trip_keeps_every_bit() -> None:
    original = plan(noise_multiplier=1 / 3, expected_batch_size=123.456)
    assert PrivacyPlan.model_validate_json(original.model_dump_json()) == original
    assert PrivacyPlan(**json.loads(json.dumps(original.model_dump(mode="json")))) == original
    assert PrivacyPlan(**yaml.safe_load(yaml.safe_dump(original.model_dump()))) == original
    assert PrivacyPlan.model_validate(original.model_dump()) == original
    assert pickle.loads(pickle.dumps(original)) == original
    with pytest.raises(ValueError):
        original.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"delta": 1 / 60_000}, "delta.*not below 1/num_records.*allow_large_delta .--force-delta"),
        ({"delta": 0}, "delta"),
        ({"delta": 1}, "delta"),
        ({"expected_batch_size": 60_001}, "expected_batch_size.*larger than num_records.*lower"),
        ({"expected_batch_size": 0}, "expected_batch_size"),
        ({"noise_multiplier": -1}, "noise_multiplier"),
        ({"noise_multiplier": math.nan}, "noise_multiplier"),
        ({"max_grad_norm": 0}, "max_grad_norm"),
        ({"max_grad_norm": "wide"}, "max_grad_norm is 'wide'"),
        ({"max_grad_norm": math.inf}, "max_grad_norm"),
        ({"steps": 0}, "steps"),
        ({"steps": 1.5}, "steps"),
        ({"steps": True}, "steps is True: should be a number"),
        ({"target_epsilon": 0}, "target_epsilon"),
        ({"mechanism": "magic"}, "mechanism is 'magic'.*lazydp"),
        ({"unit": "user"}, "unit"),
        ({"neighbouring_relation": "replace_one"}, "neighbouring_relation"),
        ({"sampling": "shuffle"}, "sampling"),
        ({"noise_multipler": 1}, "noise_multipler is not a key.*noise_multiplier"),
        ({"mechanism": "none"}, "noise_multiplier 1.3.*leave out"),
        ({"mechanism": "none", "noise_multiplier": None, "target_epsilon": 3.0}, "target_epsilon"),
    ],
)
def test_refuses_and_names_the_key(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){words}"):
        plan(**changes)
    with pytest.raises(ConfigError):
        PrivacyPlan.model_validate({**BASE, **changes})


def test_refuses_what_is_no_plan() -> None:
    with pytest.raises(ConfigError, match="steps is missing"):
        PrivacyPlan(**{key: value for key, value in BASE.items() if key != "steps"})
    for text in ("{", "[1]", "null"):
        with pytest.raises(ConfigError):
            PrivacyPlan.model_validate_json(text)
    with pytest.raises(ConfigError):
        PrivacyPlan.model_validate(3)


def test_large_delta_only_on_request() -> None:
    assert plan(delta=1e-3, allow_large_delta=True).epsilon() > 0
    open_delta = plan(noise_multiplier=None, delta=None)
    with pytest.raises(ConfigError, match="allow_large_delta"):
        open_delta.calibrate(1.0, 1e-3)


@pytest.mark.parametrize(("epsilon", "delta"), [(0.0, 1e-6), (-1.0, 1e-6), (1.0, 0.0), (1.0, 2.0)])
def test_calibrate_refuses(epsilon: float, delta: float) -> None:
    with pytest.raises(ConfigError):
        plan().calibrate(epsilon, delta)


def test_what_is_missing_is_asked_for() -> None:
    with pytest.raises(ConfigError, match="noise_multiplier is not set"):
        plan(noise_multiplier=None).events()
    with pytest.raises(ConfigError, match="delta is not set"):
        plan(delta=None).epsilon()


def test_without_mechanism_or_noise_nothing_is_promised() -> None:
    none = plan(mechanism="none", noise_multiplier=None, delta=None)
    assert math.isinf(none.epsilon()) and none.noise_multiplier_at(1) == 0.0
    with pytest.raises(ConfigError, match=r"'none' adds no noise.*no privacy cost"):
        none.events()
    assert "not private" in none.statement() and not none.is_private
    with pytest.raises(ConfigError, match="cannot be calibrated"):
        none.calibrate(1.0, 1e-6)
    silent = plan(noise_multiplier=0.0)
    assert math.isinf(silent.epsilon()) and not silent.is_private
    assert "not private" in silent.statement() and "ε =" not in silent.statement()


def test_statement_says_what_holds_and_what_does_not() -> None:
    text = plan().statement()
    for words in (
        "ε = 0.6402 ",  # 0.64011…, rounded up
        "δ = 1e-05",
        "one record",
        "adding or removing one",
        "6,000 steps",
        "0.0025",
        "released model and anything computed from it",
        "does not cover someone who watches the memory",
        "which table rows are touched",
        "metrics computed without noise",
        "hyper-parameters",
        "number of records is treated as public",
    ):
        assert words in text, words
    ten = plan().statement(plan().events(10))
    assert "ε = 0" in ten and "from 10 steps" in ten
