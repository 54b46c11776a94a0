"""An attempt that was given up leaves nothing behind, wherever it was stopped."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dist_dp import checkpoint_folder, fence, release_files
from dist_dp.accountant import WRITING, LocalAccountant
from dist_dp.checkpoint import CheckpointWriter, find_checkpoint
from dist_dp.errors import CheckpointError, DistDpError, LedgerError, StaleAttemptError
from dist_dp.fence import Fence, FencedAccountant, take_away
from dist_dp.leases import StepLeases
from dist_dp.ledger import Ledger
from dist_dp.release_files import partial_folder
from dist_dp.step_costs import StepCosts
from dist_dp.trail import StepTrail, digest_of
from tests.dist_dp.checkpoint_runs import NoBudget, go_on
from tests.dist_dp.test_leases import DELTA, EVENT, LEASE, STEPS, budget_of, charged, sums_of

Hook = Callable[..., Any]


def folder_of(run: Path) -> Path:
    return run / "private" / "attempts"


@pytest.fixture
def accountant(tmp_path: Path) -> LocalAccountant:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.register_dataset(
        "clicks", fingerprint="f", num_records=1000, epsilon=budget_of(99), delta=DELTA
    )
    ledger.open_run("run", "clicks", StepCosts.constant(EVENT, STEPS))
    return LocalAccountant(ledger)


def between(owner: Any, name: str, patch: pytest.MonkeyPatch, what: Hook) -> None:
    """Lets something happen just before a function runs: the caller has asked, and was stopped."""
    original: Hook = getattr(owner, name)

    def wrapped(*args: Any, **options: Any) -> Any:
        patch.undo()
        what()
        return original(*args, **options)

    patch.setattr(owner, name, wrapped)


def test_the_last_to_begin_goes_on(tmp_path: Path) -> None:
    first = Fence.take(folder_of(tmp_path))
    first.check()
    second = Fence.take(folder_of(tmp_path))
    with pytest.raises(StaleAttemptError, match=f"attempt 1 at the run in '{tmp_path}'"):
        first.check()
    second.check()
    Fence.take(folder_of(tmp_path))
    assert first.why_stale and second.why_stale


def test_of_two_that_take_the_same_number_one_gets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others: list[Fence] = []
    between(fence.os, "open", monkeypatch, lambda: others.append(Fence.take(folder_of(tmp_path))))
    last = Fence.take(folder_of(tmp_path))
    assert [other.number for other in others] == [1] and last.number == 2
    assert others[0].why_stale and not last.why_stale


def test_a_run_that_ended_and_began_anew_is_another(tmp_path: Path) -> None:
    first = Fence.take(folder_of(tmp_path))
    shutil.rmtree(tmp_path / "private")
    assert first.why_stale
    again = Fence.take(folder_of(tmp_path))
    assert again.number == first.number and first.why_stale and not again.why_stale


def test_where_no_attempt_can_be_noted_none_begins(tmp_path: Path) -> None:
    (tmp_path / "private").write_text("in the way")
    with pytest.raises(DistDpError, match="cannot begin an attempt"):
        Fence.take(folder_of(tmp_path))


def test_a_stale_attempt_charges_and_releases_nothing(
    tmp_path: Path, accountant: LocalAccountant
) -> None:
    own = Fence.take(folder_of(tmp_path))
    fenced = FencedAccountant(accountant, own)
    lease = fenced.reserve("run", 1, 5)
    Fence.take(folder_of(tmp_path))
    before = accountant.position()
    calls: dict[str, Hook] = {
        "reserve": lambda: fenced.reserve("run", 6, 5),
        "settle": lambda: fenced.settle(lease.lease_id, 0),
        "record_release": lambda: fenced.record_release("run", 5),
        "close_run": lambda: fenced.close_run("run", "completed"),
        "open_run": lambda: fenced.open_run("other", "clicks", None),
        "set_budget": lambda: fenced.set_budget("clicks", 9.0, DELTA, "why not"),
        "register_dataset": lambda: fenced.register_dataset("x", fingerprint="f", num_records=9),
    }
    assert calls.keys() == WRITING
    for call in calls.values():
        with pytest.raises(StaleAttemptError):
            call()
    assert accountant.position() == before and fenced.run_steps("run") == 5


def test_a_stale_attempt_notes_no_step(tmp_path: Path, accountant: LocalAccountant) -> None:
    trail, own = tmp_path / "trail", Fence.take(folder_of(tmp_path))
    leases = StepLeases(accountant, "run", STEPS, LEASE, trail=trail, fence=own)
    assert leases.cover(1)
    leases.confirm(1, sums_of(1))
    Fence.take(folder_of(tmp_path))
    content = trail.read_bytes()
    with pytest.raises(StaleAttemptError):
        leases.confirm(2, sums_of(2))
    assert trail.read_bytes() == content


def test_a_stale_attempt_saves_no_checkpoint(tmp_path: Path) -> None:
    """Nor does one that goes stale while a thread of its own is at it."""
    made = go_on(tmp_path, 3, save=True)
    home = tmp_path / "checkpoint"
    kept = find_checkpoint(home)
    made.fence = Fence.take(folder_of(tmp_path))
    writer = CheckpointWriter(made, home)
    writer.save()
    writer.wait()
    second = find_checkpoint(home)
    assert second != kept
    Fence.take(folder_of(tmp_path))
    with pytest.raises(StaleAttemptError):
        writer.save()
    assert [*home.iterdir()] == [second]
    writer.close()


# --- one that is stopped just after it has asked ------------------------------------------------


@pytest.mark.parametrize("new_one", ["has not saved", "is at it", "has saved"])
def test_a_checkpoint_that_was_taken_away_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_one: str
) -> None:
    """The new attempt gives its own the same number: neither is harmed."""
    go_on(tmp_path, 3, save=True)
    home = tmp_path / "checkpoint"
    old, new = go_on(tmp_path, 4), go_on(tmp_path, 5)
    old.fence = Fence.take(folder_of(tmp_path))

    def overtaken() -> None:
        new.fence = Fence.take(folder_of(tmp_path))
        take_away(checkpoint_folder.half_written(home))
        if new_one == "is at it":
            checkpoint_folder.begin(home, new.secret)
        if new_one == "has saved":
            later = CheckpointWriter(new, home, background=False)
            later.save()
            later.close()

    between(checkpoint_folder, "publish", monkeypatch, overtaken)
    writer = CheckpointWriter(old, home, background=False)
    with pytest.raises(CheckpointError):
        writer.save()
    writer.close()
    whole, step = ("save-000002", 5) if new_one == "has saved" else ("save-000001", 3)
    assert find_checkpoint(home).name == whole
    assert checkpoint_folder.read_checkpoint_info(home)["numbers"]["step"] == step
    begun = [path for path in home.iterdir() if path.name != whole]
    assert len(begun) == (new_one == "is at it")
    for path in begun:
        assert [file.name for file in path.iterdir()] == ["secret"]
    go_on(tmp_path, 6)


def test_an_older_checkpoint_removes_no_newer_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was published, and its writer stopped before it removed those before."""
    go_on(tmp_path, 2, save=True)
    home = tmp_path / "checkpoint"
    old, new = go_on(tmp_path, 3), go_on(tmp_path, 5)

    def overtaken() -> None:
        later = CheckpointWriter(new, home, background=False)
        later.save()
        later.close()

    original = checkpoint_folder._numbered
    calls = 0

    def numbered(folder: Path) -> list[int]:
        nonlocal calls
        calls += 1
        if calls == 2:  # the first one finds a number for it
            monkeypatch.undo()
            overtaken()
        return original(folder)

    monkeypatch.setattr(checkpoint_folder, "_numbered", numbered)
    old.fence = Fence.take(folder_of(tmp_path))
    writer = CheckpointWriter(old, home, background=False)
    writer.save()
    writer.close()
    assert [path.name for path in home.iterdir()] == ["save-000003"]
    assert checkpoint_folder.read_checkpoint_info(home)["numbers"]["step"] == 5


def test_a_trail_that_was_replaced_takes_nothing_more(tmp_path: Path) -> None:
    old = StepTrail(tmp_path / "trail")
    for step in (1, 2):
        old.note(step, digest_of(sums_of(step)))
    new = StepTrail(tmp_path / "trail")
    old.note(3, digest_of(sums_of(33)))
    assert StepTrail(tmp_path / "trail").last_step_after(0) == 2
    new = StepTrail(tmp_path / "trail")
    new.note(3, digest_of(sums_of(3)))
    found = StepTrail(tmp_path / "trail")
    assert found.last_step_after(0) == 3 and found.agrees(3, digest_of(sums_of(3)))
    assert [path.name for path in tmp_path.iterdir()] == ["trail"]


def test_a_lease_that_was_taken_over_cannot_be_given_back(
    tmp_path: Path, accountant: LocalAccountant
) -> None:
    """The old attempt wakes and settles it as far as it had come: less than the new one took."""
    trail = tmp_path / "trail"
    old = StepLeases(accountant, "run", STEPS, LEASE, trail=trail)
    for step in range(1, 8):
        assert old.cover(step)
        old.confirm(step, sums_of(step))
    old._thread.shutdown()
    new = StepLeases(accountant, "run", STEPS, LEASE, done=5, trail=trail)
    for step in range(6, 11):
        assert new.cover(step)
        new.confirm(step, sums_of(step))
    with pytest.raises(LedgerError, match="settled already"):
        old.close(7)
    new.close(10)
    assert charged(accountant) == 10
    assert accountant.open_leases("run") == []


def test_a_release_that_was_taken_away_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = go_on(tmp_path)
    own = Fence.take(folder_of(tmp_path))
    made.accountant = FencedAccountant(NoBudget(), own)  # type: ignore[arg-type]
    destination = tmp_path / "release"
    between(release_files, "publish", monkeypatch, lambda: take_away([partial_folder(destination)]))
    with pytest.raises(DistDpError):
        made.release(destination)
    assert not destination.exists() and not partial_folder(destination).exists()
