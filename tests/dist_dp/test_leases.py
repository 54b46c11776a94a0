"""Leases of steps: asked for ahead, given back, and taken over by a run that goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_dp import trail as trail_module
from dist_dp.accountant import LocalAccountant
from dist_dp.accounting import epsilon_of
from dist_dp.errors import BudgetError, DistDpError, LedgerError
from dist_dp.events import GaussianEvent
from dist_dp.leases import StepLeases
from dist_dp.ledger import Ledger
from dist_dp.step_costs import StepCosts
from dist_dp.trail import StepTrail, digest_of
from tests.dist_dp.placement import OpenHanded

EVENT = GaussianEvent(1.0, 0.01)
STEPS, LEASE = 20, 5
DELTA = 1e-5


def budget_of(steps: int) -> float:
    return epsilon_of({EVENT: steps}, DELTA) * (1 + 1e-9)


@pytest.fixture
def books(tmp_path: Path) -> Iterator[Callable[[int], LocalAccountant]]:
    """A ledger with a run, whose budget covers so many steps."""
    ledger = Ledger(tmp_path / "ledger.sqlite")

    def opened(affordable: int) -> LocalAccountant:
        ledger.register_dataset(
            "clicks", fingerprint="f", num_records=1000, epsilon=budget_of(affordable), delta=DELTA
        )
        ledger.open_run("run", "clicks", StepCosts.constant(EVENT, STEPS))
        return LocalAccountant(ledger)

    yield opened
    ledger.close()


def sums_of(step: int) -> Tensor:
    return torch.arange(10.0) + step


def attempt(
    accountant: Any,
    trail: Path | None,
    *,
    done: int = 0,
    crash_at: int | None = None,
    fail_at: int | None = None,
    stop_after: int | None = None,
    sums: Callable[[int], Tensor] = sums_of,
) -> StepLeases:
    """Takes steps; a crash leaves everything as it is just before a step's end."""
    leases = StepLeases(accountant, "run", STEPS, LEASE, done=done, trail=trail)
    for step in range(done + 1, STEPS + 1):
        if not leases.cover(step):
            break
        if step == crash_at:
            leases._thread.shutdown()  # what was asked for has been granted
            return leases
        if step == fail_at:  # as when another worker is lost: the loop ends with an error
            leases.close(step)
            return leases
        leases.confirm(step, sums(step))
        if step == stop_after:
            break
    leases.close(step if leases.refusal is None else step - 1)
    return leases


def charged(accountant: LocalAccountant) -> int:
    return accountant.run_charges("run").get(EVENT, 0)


# --- ahead and back ---------------------------------------------------------------------------


def test_the_next_lease_is_asked_for_half_way() -> None:
    accountant = OpenHanded()
    leases = StepLeases(accountant, "run", 8, 4)
    assert leases.cover(1) and leases.cover(2)
    assert accountant.calls == [("reserve", 1, 4)]
    assert leases.cover(3)
    assert leases._ahead is not None
    leases._ahead.result()
    assert accountant.calls == [("reserve", 1, 4), ("reserve", 5, 4)]
    assert leases.cover(4) and leases.cover(5)
    assert accountant.calls[2:] == [("settle", "lease-1", 4)]
    assert leases.cover(7) and leases._ahead is None  # none beyond the plan
    leases.close(7)
    leases.close(7)  # nothing is given back twice
    assert accountant.calls[3:] == [("settle", "lease-5", 3)]


def test_a_budget_used_up_ahead_ends_the_run_when_it_is_reached() -> None:
    accountant = OpenHanded(5)
    leases = StepLeases(accountant, "run", 8, 3)
    assert all(leases.cover(step) for step in (1, 2, 3))
    assert not leases.cover(4)
    assert leases.refusal == "the budget of data set 'clicks' is used up"
    leases.close(3)
    assert [c for c in accountant.calls if c[0] == "settle"] == [("settle", "lease-1", 3)]


def test_a_ledger_out_of_reach_for_a_while_stops_nobody(
    books: Callable[[int], LocalAccountant], monkeypatch: pytest.MonkeyPatch
) -> None:
    accountant = books(STEPS)
    reserve, calls = Ledger.reserve, 0

    def flaky(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:  # the one asked for in the thread
            raise LedgerError("out of reach")
        return reserve(*args, **options)

    monkeypatch.setattr(Ledger, "reserve", flaky)
    attempt(accountant, None)
    assert charged(accountant) == STEPS and calls == 5


def test_a_ledger_that_stays_out_of_reach_ends_the_run(
    books: Callable[[int], LocalAccountant], monkeypatch: pytest.MonkeyPatch
) -> None:
    accountant = books(STEPS)
    leases = StepLeases(accountant, "run", STEPS, LEASE)
    assert leases.cover(1)

    def broken(*_args: Any, **_options: Any) -> Any:
        raise LedgerError("out of reach")

    monkeypatch.setattr(Ledger, "reserve", broken)
    assert leases.cover(4)
    with pytest.raises(LedgerError, match="out of reach"):
        leases.cover(6)
    leases.close(5)
    assert charged(accountant) == 5


# --- going on after a crash -------------------------------------------------------------------

CRASHES = [(7, 3), (6, 5), (13, 2), (3, 0), (20, 15), (1, 0), (11, 10)]


@pytest.mark.parametrize(("crash_at", "checkpoint"), CRASHES)
def test_an_identical_replay_is_charged_once(
    books: Callable[[int], LocalAccountant], tmp_path: Path, crash_at: int, checkpoint: int
) -> None:
    """The budget covers each step once, and no more."""
    accountant, trail = books(STEPS), tmp_path / "trail"
    attempt(accountant, trail, crash_at=crash_at)
    assert charged(accountant) >= crash_at
    leases = attempt(accountant, trail, done=checkpoint)
    assert leases.refusal is None
    assert charged(accountant) == STEPS
    assert accountant.open_leases("run") == []
    assert accountant.spent("clicks").epsilon == pytest.approx(budget_of(STEPS))


@pytest.mark.parametrize(("crash_at", "checkpoint"), CRASHES)
@pytest.mark.parametrize("differs", ["first", "last"])
def test_a_replay_that_comes_out_otherwise_is_charged_again(
    books: Callable[[int], LocalAccountant],
    tmp_path: Path,
    crash_at: int,
    checkpoint: int,
    differs: str,
) -> None:
    accountant, trail = books(10 * STEPS), tmp_path / "trail"
    attempt(accountant, trail, crash_at=crash_at)
    first, last = checkpoint + 1, crash_at - 1
    where = first if differs == "first" else last
    attempt(accountant, trail, done=checkpoint, sums=lambda s: sums_of(s) + (s >= where) * 1e-3)
    assert charged(accountant) == STEPS + max(0, last - checkpoint)
    assert accountant.open_leases("run") == []


@pytest.mark.parametrize("after", ["nothing", "the charge"])
@pytest.mark.parametrize("checkpoint_again", [False, True])
def test_killed_between_a_step_that_came_out_otherwise_and_its_charge(
    books: Callable[[int], LocalAccountant],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    after: str,
    checkpoint_again: bool,
) -> None:
    """Whoever goes on pays for it, though it takes the step as the first attempt did."""
    accountant, trail = books(10 * STEPS), tmp_path / "trail"
    attempt(accountant, trail, crash_at=14)
    again = StepLeases._charge_again

    def killed(self: StepLeases, first: int, last: int) -> None:
        if after == "the charge":
            again(self, first, last)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StepLeases, "_charge_again", killed)
        with pytest.raises(KeyboardInterrupt):
            attempt(accountant, trail, done=4, sums=lambda s: sums_of(s) + (s == 8) * 1e-3)
    # A checkpoint of step 8 may have been saved before the next step asked for its charge.
    attempt(accountant, trail, done=8 if checkpoint_again else 4)
    twice = 13 - 4  # the replayed stretch; the same once more where nobody knows it was charged
    assert charged(accountant) >= STEPS + twice
    assert charged(accountant) <= STEPS + (1 + (after == "the charge")) * twice + 1
    attempt(accountant, trail, done=16)
    assert charged(accountant) <= STEPS + (1 + (after == "the charge")) * twice + 1


def test_one_bit_is_enough() -> None:
    some = torch.randn(100_000, generator=torch.Generator().manual_seed(1))
    other = some.clone()
    other[0] = torch.nextafter(other[0], torch.tensor(9.0))
    assert digest_of(some) == digest_of(some.clone()) != digest_of(other)
    assert digest_of(torch.empty(0)) == b""


def test_a_replay_that_ends_the_run_is_paid_before_it_closes(
    books: Callable[[int], LocalAccountant], tmp_path: Path
) -> None:
    """The last step of all differs: no later step would notice."""
    accountant, trail = books(10 * STEPS), tmp_path / "trail"
    leases = attempt(accountant, trail)
    assert charged(accountant) == STEPS and leases.refusal is None
    attempt(accountant, trail, done=12, sums=lambda s: sums_of(s) + (s == STEPS) * 1e-3)
    assert charged(accountant) == STEPS + 8


def test_what_cannot_be_paid_again_ends_the_run(
    books: Callable[[int], LocalAccountant], tmp_path: Path
) -> None:
    accountant, trail = books(STEPS), tmp_path / "trail"
    attempt(accountant, trail, crash_at=18)
    leases = attempt(accountant, trail, done=4, sums=lambda s: sums_of(s) + (s >= 6) * 1e-3)
    assert leases.refusal is not None and "budget" in leases.refusal
    assert accountant.spent("clicks").epsilon <= budget_of(STEPS)


def test_what_cannot_be_paid_at_the_end_is_not_released(
    books: Callable[[int], LocalAccountant], tmp_path: Path
) -> None:
    accountant, trail = books(STEPS), tmp_path / "trail"
    attempt(accountant, trail)
    with pytest.raises(BudgetError, match="clicks"):
        attempt(accountant, trail, done=12, sums=lambda s: sums_of(s) + (s == STEPS) * 1e-3)


def test_a_replay_that_stops_early_gives_back_nothing_that_began(
    books: Callable[[int], LocalAccountant], tmp_path: Path
) -> None:
    accountant, trail = books(STEPS), tmp_path / "trail"
    attempt(accountant, trail, crash_at=9)
    attempt(accountant, trail, done=2, stop_after=4)
    assert charged(accountant) == 9  # the first attempt had begun step 9
    attempt(accountant, trail, done=4)
    assert charged(accountant) == STEPS


def test_several_crashes_in_a_row(books: Callable[[int], LocalAccountant], tmp_path: Path) -> None:
    accountant, trail = books(STEPS), tmp_path / "trail"
    for done, crash_at in ((0, 6), (3, 8), (3, 5), (3, 12), (10, 12), (10, 19)):
        attempt(accountant, trail, done=done, crash_at=crash_at)
    attempt(accountant, trail, done=15)
    assert charged(accountant) == STEPS and accountant.open_leases("run") == []


@pytest.mark.parametrize(("fail_at", "checkpoint"), CRASHES)
def test_a_step_that_failed_had_no_result_to_charge_again(
    books: Callable[[int], LocalAccountant], tmp_path: Path, fail_at: int, checkpoint: int
) -> None:
    accountant, trail = books(STEPS), tmp_path / "trail"
    attempt(accountant, trail, fail_at=fail_at)
    assert charged(accountant) == fail_at
    attempt(accountant, trail, done=checkpoint)
    assert charged(accountant) == STEPS and accountant.open_leases("run") == []


def test_a_machine_that_goes_down_twice(
    books: Callable[[int], LocalAccountant], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leases of the first time are not taken for unused ones of the second."""
    accountant, trail = books(10 * STEPS), tmp_path / "trail"
    attempt(accountant, trail, crash_at=14)
    with open(trail, "r+b") as file:
        file.truncate(16 * 12)  # steps 12 to 14 left no trace; 16 to 20 were leased ahead
    boot = tmp_path / "boot_id"
    boot.write_text("another start")
    monkeypatch.setattr(trail_module, "_BOOT", boot)
    attempt(accountant, trail, done=4, crash_at=13)
    assert charged(accountant) == 20 + 5
    attempt(accountant, trail, done=4)
    assert charged(accountant) == 20 + STEPS - 11 and accountant.open_leases("run") == []


def test_without_a_trail_everything_is_charged_again(
    books: Callable[[int], LocalAccountant], tmp_path: Path
) -> None:
    accountant = books(10 * STEPS)
    attempt(accountant, None, crash_at=9)
    before = charged(accountant)
    attempt(accountant, None, done=4)
    assert charged(accountant) == before + STEPS - 4


def test_a_trail_that_lost_its_end(
    books: Callable[[int], LocalAccountant], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine went down: steps that nobody can recognise any more are charged again."""
    accountant, trail = books(10 * STEPS), tmp_path / "trail"
    attempt(accountant, trail, crash_at=14)
    leased = charged(accountant)
    with open(trail, "r+b") as file:
        file.truncate(16 * 12 + 3)  # its writer, steps 1 to 11, and a piece of the next
    boot = tmp_path / "boot_id"
    boot.write_text("another start")
    monkeypatch.setattr(trail_module, "_BOOT", boot)
    assert leased == 20  # the leases of steps 11 to 15 and of the next five are open
    attempt(accountant, trail, done=4)
    assert charged(accountant) == leased + STEPS - 11


def test_an_older_ledger_is_refused(
    books: Callable[[int], LocalAccountant], tmp_path: Path
) -> None:
    accountant, trail = books(STEPS), tmp_path / "trail"
    written = StepTrail(trail)
    for step in range(1, 9):
        written.note(step, digest_of(sums_of(step)))
    written.close()
    with pytest.raises(LedgerError, match=r"taken 8 steps.*charged only 0.*older copy"):
        attempt(accountant, trail, done=4)


def test_a_trail_forgets_what_was_taken_otherwise(tmp_path: Path) -> None:
    trail = StepTrail(tmp_path / "trail")
    for step in range(1, 9):
        trail.note(step, digest_of(sums_of(step)))
    trail.note(5, digest_of(sums_of(99)))
    for one in (trail, StepTrail(tmp_path / "trail")):
        assert one.last_step_after(0) == 5 and one.last_step_after(5) == 5
        assert one.agrees(5, digest_of(sums_of(99))) and one.agrees(4, digest_of(sums_of(4)))
        assert not one.agrees(6, digest_of(sums_of(6)))
    trail.close()


def test_ranks_hear_of_rank_0s_errors() -> None:
    with pytest.raises(ValueError, match="rank 0 needs an accountant"):
        StepLeases(None, "run", 1)
    assert issubclass(BudgetError, DistDpError)
