"""Whatever a caller hands over, the ledger can be read afterwards, and says what was asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_dp.accounting import GaussianEvent
from dist_dp.errors import DistDpError, LedgerError
from dist_dp.ledger import Ledger, Reservation
from dist_dp.step_costs import StepCosts
from tests.dist_dp.ledgers import EVENT, filled

ODD: dict[str, Callable[[Ledger, Any], Any]] = {
    "first step": lambda ledger, value: ledger.reserve("a", value, 5),
    "steps": lambda ledger, value: ledger.reserve("a", 60, value),
    "used": lambda ledger, value: ledger.settle(ledger.reserve("a", 60, 10).lease_id, value),
    "release": lambda ledger, value: ledger.record_release("a", value),
    "records": lambda ledger, value: ledger.register_dataset(
        "other", fingerprint="f", num_records=value, epsilon=1.0, delta=1e-30
    ),
}


@pytest.mark.parametrize("value", [True, 1.0, 2.5, float("nan"), "1", None, -1, 2**31, 2**63])
@pytest.mark.parametrize("what", ODD)
def test_no_call_makes_a_ledger_unreadable(tmp_path: Path, what: str, value: Any) -> None:
    """A number that a database would give back as another one damaged it for everybody."""
    ledger = filled(tmp_path / "ledger")
    if what != "records" or value not in (2**31, 2**63):
        with pytest.raises(DistDpError, match="give a"):
            ODD[what](ledger, value)
    else:
        ODD[what](ledger, value)
    again = Ledger(ledger.address)
    assert again.spent("clicks").epsilon > 0
    assert ledger.reserve("a", 100, 5).steps == 5


def test_whole_numbers_of_other_types_are_taken(tmp_path: Path) -> None:
    ledger = filled(tmp_path / "ledger")
    lease = ledger.reserve("a", np.int64(60), np.int32(10))  # type: ignore[arg-type]
    ledger.settle(lease.lease_id, np.int64(3))  # type: ignore[arg-type]
    ledger.register_dataset(
        "more", fingerprint="f", num_records=np.int64(5), epsilon=np.float32(1.0), delta=1e-6
    )  # type: ignore[call-overload, unused-ignore]
    assert Ledger(ledger.address).run_steps("a") == 47 + 3


@pytest.mark.parametrize("name", [5, "\ud800", "zero\0"])
def test_texts_that_cannot_be_written_are_refused(tmp_path: Path, name: Any) -> None:
    ledger = filled(tmp_path / "ledger")
    with pytest.raises((LedgerError, UnicodeEncodeError)):
        ledger.reserve("a", 60, 10, request_id=name)
    with pytest.raises(LedgerError, match="printable"):
        ledger.open_run("b", name, None, {"non_private": True})
    assert Ledger(ledger.address).run_steps("a") == 47


def test_an_odd_request_leaves_the_others_of_its_batch_alone(tmp_path: Path) -> None:
    ledger = filled(tmp_path / "ledger")
    good, odd = ledger.reserve_many(
        [Reservation("a", 60, 10), Reservation("a", 70, 2.5)]  # type: ignore[arg-type]
    )
    assert not isinstance(good, DistDpError) and good.steps == 10
    assert isinstance(odd, LedgerError)


def test_a_run_of_more_steps_than_there_are_is_refused(tmp_path: Path) -> None:
    """Its leases would be rounded up to a part of the plan, which takes for ever to compose."""
    ledger = filled(tmp_path / "ledger")
    with pytest.raises(LedgerError, match="plan at most"):
        ledger.open_run("b", "clicks", StepCosts.constant(EVENT, 10**15))


def _lease(ledger: Ledger) -> str:
    return ledger.open_leases("a")[0].lease_id


LOUD = StepCosts.constant(EVENT, 100)
QUIET = StepCosts.constant(GaussianEvent(0.5, 0.02), 100)
TWICE: dict[str, tuple[Callable[[Ledger], Any], Callable[[Ledger], Any]]] = {
    "open with less noise": (
        lambda ledger: ledger.open_run("b", "clicks", LOUD, request_id="k"),
        lambda ledger: ledger.open_run("b", "clicks", QUIET, request_id="k"),
    ),
    "release a later step": (
        lambda ledger: ledger.record_release("a", 5, request_id="k"),
        lambda ledger: ledger.record_release("a", 40, request_id="k"),
    ),
    "settle more": (
        lambda ledger: ledger.settle(ledger.open_leases("a")[0].lease_id, 1, request_id="k"),
        lambda ledger: ledger.settle(_settled(ledger), 10, request_id="k"),
    ),
    "settle another lease": (
        lambda ledger: ledger.settle(_lease(ledger), 1, request_id="k"),
        lambda ledger: ledger.settle(_lease(ledger), 1, request_id="k"),
    ),
    "lower budget": (
        lambda ledger: ledger.set_budget("clicks", 90.0, 1e-5, "x", request_id="k"),
        lambda ledger: ledger.set_budget("clicks", 60.0, 1e-5, "x", request_id="k"),
    ),
    "close, not reserve": (
        lambda ledger: ledger.reserve("a", 60, 1, request_id="k"),
        lambda ledger: ledger.close_run("a", "finished", request_id="k"),
    ),
    "release, not reserve": (
        lambda ledger: ledger.reserve("a", 60, 1, request_id="k"),
        lambda ledger: ledger.record_release("a", 60, request_id="k"),
    ),
    "register, not reserve": (
        lambda ledger: ledger.reserve("a", 60, 1, request_id="k"),
        lambda ledger: ledger.register_dataset(
            "b", fingerprint="b", num_records=10, epsilon=1.0, delta=1e-3, request_id="k"
        ),
    ),
}


def _settled(ledger: Ledger) -> str:
    return next(
        str(entry.lease_id)
        for entry in ledger.history()
        if entry.kind == "steps_settled" and entry.request_id == "k"
    )


@pytest.mark.parametrize("case", TWICE)
def test_a_request_that_asks_for_something_else_is_no_repetition(tmp_path: Path, case: str) -> None:
    """It was taken for one, and what it asked for (a release, less noise) was never written."""
    ledger = filled(tmp_path / "ledger", epsilon=70.0)
    first, other = TWICE[case]
    first(ledger)
    before = ledger.position()
    with pytest.raises(LedgerError, match="made before with other arguments"):
        other(ledger)
    assert ledger.position() == before


@pytest.mark.parametrize("case", ["open with less noise", "release a later step", "lower budget"])
def test_the_same_request_is_one(tmp_path: Path, case: str) -> None:
    ledger = filled(tmp_path / "ledger", epsilon=70.0)
    first, _ = TWICE[case]
    first(ledger)
    before = ledger.position()
    first(ledger)
    assert ledger.position() == before
