"""What a run does before its steps is charged once for a secret, before it begins."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_dp.account import check_whole_run_fits
from dist_dp.accountant import LocalAccountant
from dist_dp.accounting import epsilon_of
from dist_dp.errors import BudgetError, LedgerError
from dist_dp.events import GaussianEvent, TopKEvent
from dist_dp.leases import StepLeases
from dist_dp.ledger import Ledger
from dist_dp.plan import PrivacyPlan
from dist_dp.setup_charge import charge_setup
from dist_dp.step_costs import StepCosts
from tests.dist_dp.ledgers import DELTA, register

CHOICE, STEP = TopKEvent(0.02, 500), GaussianEvent(4.0, 0.02)
COSTS = StepCosts(((STEP, 20),), setup=(CHOICE,))
SECRET, OTHER = bytes(32), bytes(range(32))


def accountant(path: Path, epsilon: float = 10.0, costs: StepCosts = COSTS) -> LocalAccountant:
    ledger = Ledger(path)
    register(ledger, epsilon)
    ledger.open_run("run", "clicks", costs)
    return LocalAccountant(ledger)


def test_a_setup_is_charged_before_it_begins(tmp_path: Path) -> None:
    """Durable at once, of step 0, and no step is counted; nothing of it can be given back."""
    mine = accountant(tmp_path / "ledger")
    expected = epsilon_of({CHOICE: 1}, DELTA)
    assert charge_setup(mine, "run", SECRET) == expected
    again = LocalAccountant(Ledger(tmp_path / "ledger"))
    assert again.run_charges("run") == {CHOICE: 1} and again.run_steps("run") == 0
    assert again.open_leases("run") == [] and again.run_epsilon("run") == expected


def test_the_same_choice_made_again_costs_nothing(tmp_path: Path) -> None:
    """Whatever lies in between; another secret is another choice."""
    mine = accountant(tmp_path / "ledger")
    charge_setup(mine, "run", SECRET)
    leases = StepLeases(mine, "run", 20, 5)
    assert leases.cover(1) and leases.cover(2)
    leases.close(2)
    resumed = LocalAccountant(Ledger(tmp_path / "ledger"))
    for _ in range(3):
        charge_setup(resumed, "run", SECRET)
    assert resumed.run_charges("run") == {CHOICE: 1, STEP: 2}
    charge_setup(resumed, "run", OTHER)
    assert resumed.run_charges("run") == {CHOICE: 2, STEP: 2}
    assert SECRET.hex() not in str(resumed.history()) and OTHER.hex() not in str(resumed.history())


def test_a_crash_between_charge_and_choice_costs_nothing_more(tmp_path: Path) -> None:
    """The lease is found open: by the same secret, and by an attempt that begins anew."""
    mine = accountant(tmp_path / "ledger")
    real, mine.settle = mine.settle, _crash  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        charge_setup(mine, "run", SECRET)
    assert len(mine.open_leases("run")) == 1
    mine.settle = real  # type: ignore[method-assign]
    charge_setup(mine, "run", SECRET)
    assert mine.run_charges("run") == {CHOICE: 1} and mine.open_leases("run") == []

    mine.settle = _crash  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        charge_setup(mine, "run", OTHER)
    mine.settle = real  # type: ignore[method-assign]
    # Nobody knows whether that choice was made: taking the run over does not give it back.
    leases = StepLeases(mine, "run", 20, 5, trail=tmp_path / "trail")
    assert leases.cover(1)
    leases.close(1)
    assert mine.run_charges("run") == {CHOICE: 2, STEP: 1} and mine.open_leases("run") == []


def _crash(*_args: object, **_named: object) -> None:
    raise KeyboardInterrupt


def test_a_budget_that_does_not_cover_it_refuses_it(tmp_path: Path) -> None:
    mine = accountant(tmp_path / "ledger", epsilon=0.9 * epsilon_of({CHOICE: 1}, DELTA))
    with pytest.raises(BudgetError, match="used up"):
        charge_setup(mine, "run", SECRET)
    assert mine.run_charges("run") == {}


def test_a_run_without_a_setup_is_charged_nothing(tmp_path: Path) -> None:
    mine = accountant(tmp_path / "ledger", costs=StepCosts.constant(STEP, 20))
    assert charge_setup(mine, "run", SECRET) == 0.0
    assert mine.history()[-1].kind == "run_opened"
    with pytest.raises(LedgerError, match="open it before"):
        charge_setup(mine, "another", SECRET)


class ChoosingPlan(PrivacyPlan):
    """A plan whose run chooses rows before its first step."""

    def step_costs(self) -> StepCosts:
        return COSTS


def test_a_whole_run_has_to_fit_with_its_setup(tmp_path: Path) -> None:
    """A budget for the steps alone is refused before anything is charged."""
    plan = ChoosingPlan(
        noise_multiplier=4.0, max_grad_norm=1.0, num_records=10_000, expected_batch_size=200.0,
        steps=20, delta=DELTA,
    )  # fmt: skip
    whole, steps, choice = (
        epsilon_of(events, DELTA) for events in (COSTS.planned, {STEP: 20}, {CHOICE: 1})
    )
    assert steps < whole and choice < whole
    check_whole_run_fits(accountant(tmp_path / "enough", whole * 1.001), "clicks", plan)
    fewer = epsilon_of({CHOICE: 1, STEP: 7}, DELTA)
    with pytest.raises(BudgetError, match="; 7 of the 20 planned steps still fit"):
        check_whole_run_fits(accountant(tmp_path / "some", fewer * 1.0001), "clicks", plan)
    with pytest.raises(BudgetError, match="not even what the run does before its first step"):
        check_whole_run_fits(accountant(tmp_path / "none", choice * 0.9), "clicks", plan)
