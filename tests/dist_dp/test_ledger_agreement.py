"""SQLite, PostgreSQL and a plain-Python ledger agree; and many processes share one budget."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant

from dist_dp.accounting import GaussianEvent, epsilon_of
from dist_dp.errors import BudgetError, DistDpError, LedgerError
from dist_dp.ledger import Lease, Ledger, Reservation
from dist_dp.step_costs import StepCosts
from tests.dist_dp.ledgers import DELTA, register

EVENTS = (GaussianEvent(4.0, 0.02), GaussianEvent(8.0, 0.05))


@pytest.fixture(params=["sqlite", "postgresql"])
def address(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """A place for a ledger, of either kind."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    if request.param == "sqlite":
        yield str(tmp_path / "ledger.db")
    else:
        server = request.getfixturevalue("postgres_server")
        monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
        yield server.socket_url(server.new_database())


# --- against a plain reference ------------------------------------------------------------------


class Reference:
    """What a ledger of one data set means, written down without a thought for anything else."""

    def __init__(self) -> None:
        self.budget = 0.0
        self.runs: dict[str, dict[str, Any]] = {}
        self.leases: list[dict[str, Any]] = []
        self.entries = 0

    def counts(self) -> Counter[GaussianEvent]:
        total = Counter[GaussianEvent]()
        for lease in self.leases:
            total[self.runs[lease["run"]]["event"]] += lease["used"]
        return total

    def register(self, epsilon: float) -> None:
        self.budget = self.budget or epsilon
        self.entries = max(self.entries, 1)

    def open_run(self, run: str, event: GaussianEvent) -> str | None:
        if run in self.runs:
            return "LedgerError"
        self.runs[run] = {"event": event, "open": True, "released": 0}
        self.entries += 1
        return None

    def reserve(self, run: str, first: int, steps: int) -> Any:
        if run not in self.runs or not self.runs[run]["open"]:
            return "LedgerError"
        already, event = self.counts(), self.runs[run]["event"]
        for count in range(steps, 0, -1):
            if epsilon_of(already + Counter({event: count}), DELTA) <= self.budget:
                self.leases.append({"run": run, "steps": count, "used": count, "settled": False})
                self.entries += 1
                return first, count
        return "BudgetError"

    def settle(self, lease: int, used: int) -> str | None:
        item = self.leases[lease]
        if item["settled"] or used > item["steps"]:
            return "LedgerError"
        item.update(settled=True, used=used)
        self.entries += 1
        return None

    def release(self, run: str, step: int) -> str | None:
        if run not in self.runs:
            return "LedgerError"
        self.runs[run]["released"] = max(self.runs[run]["released"], step)
        self.entries += 1
        return None

    def close_run(self, run: str) -> str | None:
        if run not in self.runs or not self.runs[run]["open"]:
            return "LedgerError"
        self.runs[run]["open"] = False
        self.entries += 1
        return None

    def set_budget(self, epsilon: float) -> str | None:
        if epsilon_of(self.counts(), DELTA) > epsilon:
            return "BudgetError"
        self.budget = epsilon
        self.entries += 1
        return None


def told(outcome: Any) -> Any:
    """An outcome as the reference words it."""
    if isinstance(outcome, DistDpError):
        return type(outcome).__name__
    return (outcome.first_step, outcome.steps) if isinstance(outcome, Lease) else None


class Both:
    """Drives a ledger and the reference, and compares every answer."""

    def __init__(self, address: str, rng: random.Random) -> None:
        self.address, self.rng = address, rng
        self.ledger, self.reference = Ledger(address), Reference()
        self.leases: list[str] = []
        self.asked = 0

    def call(self, method: str, *args: Any) -> Any:
        """Once, or as one does whose answer was lost: twice, with one request id."""
        self.asked += 1
        request_id = f"request {self.asked}" if self.rng.random() < 0.5 else None
        outcomes = []
        for _ in range(2 if request_id and self.rng.random() < 0.3 else 1):
            try:
                outcomes.append(getattr(self.ledger, method)(*args, request_id=request_id))
            except DistDpError as error:
                outcomes.append(error)
        if not isinstance(outcomes[0], DistDpError):
            assert outcomes[-1] == outcomes[0]
        return outcomes[0]

    def step(self) -> None:
        rng, reference = self.rng, self.reference
        run = rng.choice(["r0", "r1", "r2", "r3", "nobody"])
        first, steps = rng.randint(1, 60), rng.randint(1, 25)
        kind = rng.choices(
            ["reserve", "many", "settle", "open", "close", "budget", "release", "reopen"],
            [8, 3, 6, 2, 2, 1, 1, 1],
        )[0]
        if kind == "reserve":
            got = self.call("reserve", run, first, steps)
            assert told(got) == reference.reserve(run, first, steps)
            self.leases += [got.lease_id] if isinstance(got, Lease) else []
        elif kind == "many":
            wanted = [
                Reservation(rng.choice(["r0", "r1", "r2", "nobody"]), first + n, steps)
                for n in range(rng.randint(0, 6))
            ]
            outcomes = self.ledger.reserve_many(wanted)
            for item, got in zip(wanted, outcomes, strict=True):
                assert told(got) == reference.reserve(item.run_id, item.first_step, item.steps)
                self.leases += [got.lease_id] if isinstance(got, Lease) else []
        elif kind == "settle" and self.leases:
            lease, used = rng.randrange(len(self.leases)), rng.randint(0, 25)
            got = self.call("settle", self.leases[lease], used)
            assert told(got) == reference.settle(lease, used)
        elif kind == "open" and run != "nobody":
            event = rng.choice(EVENTS)
            got = self.call("open_run", run, "clicks", StepCosts.constant(event, 60))
            assert told(got) == reference.open_run(run, event)
        elif kind == "close":
            assert told(self.call("close_run", run, "finished")) == reference.close_run(run)
        elif kind == "budget":
            epsilon = rng.choice([0.1, 0.15, 0.2, 0.3])
            got = self.call("set_budget", "clicks", epsilon, DELTA, "why not")
            assert told(got) == reference.set_budget(epsilon)
        elif kind == "release":
            assert told(self.call("record_release", run, first)) == reference.release(run, first)
        elif kind == "reopen":
            self.ledger.close()
            if rng.random() < 0.5:
                self.ledger = Ledger(self.address)

    def compare(self) -> None:
        spent, counts = self.ledger.spent("clicks"), self.reference.counts()
        assert spent.steps_by_event == {event: n for event, n in counts.items() if n}
        assert spent.budget_epsilon == self.reference.budget
        assert spent.epsilon == epsilon_of(counts, DELTA) <= self.reference.budget
        assert self.ledger.position().seq == self.reference.entries
        for run, state in self.reference.runs.items():
            assert self.ledger.released_step(run) == state["released"]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_random_operations_agree_with_a_plain_reference(address: str, seed: int) -> None:
    both = Both(address, random.Random(seed))
    register(both.ledger, 0.2)
    both.reference.register(0.2)
    for _ in range(60):
        both.step()
        both.compare()
    both.ledger = Ledger(address)
    both.compare()
    assert both.reference.entries > 12


def test_a_commit_beside_a_reader_is_no_false_alarm(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The witness may be ahead of what a transaction sees that began before it was written."""
    writer = Ledger(address)
    register(writer, 5.0)
    writer.open_run("a", "clicks", None, {"non_private": True})
    reader = Ledger(address)
    begin, seen = reader._store.transaction, []

    @contextlib.contextmanager
    def overtaken(*, write: bool) -> Iterator[Any]:
        with begin(write=write) as tx:
            list(tx.follow(tx.head))
            if not write:
                seen.append(writer.reserve("a", 1 + len(seen), 1))
            yield tx

    monkeypatch.setattr(reader._store, "transaction", overtaken)
    for count in range(5):
        assert reader.run_steps("a") == count
    assert writer._store.witness.read() == writer.position() != reader._seen


# --- several reservations in one transaction -----------------------------------------------------


def test_reservations_together_have_outcomes_of_their_own(address: str) -> None:
    ledger = Ledger(address)
    register(ledger, (epsilon_of({EVENTS[0]: 30}, DELTA) + epsilon_of({EVENTS[0]: 31}, DELTA)) / 2)
    for run in "ab":
        ledger.open_run(run, "clicks", StepCosts.constant(EVENTS[0], 100))
    before = ledger.position().seq
    wanted = [
        Reservation("a", 1, 10, "one"),
        Reservation("nobody", 1, 10),
        Reservation("b", 1, 15),
        Reservation("a", 1, 10, "one"),  # the same request
        Reservation("a", 1, 11, "one"),  # another one under its name
        Reservation("a", 11, 10),  # not all of it fits
        Reservation("b", 16, 1),
        Reservation("b", 0, 0),
    ]
    first = ledger.reserve_many(wanted)
    assert [told(item) for item in first] == [
        (1, 10), "LedgerError", (1, 15), (1, 10), "LedgerError", (11, 5), "BudgetError",
        "LedgerError",
    ]  # fmt: skip
    assert first[0] == first[3]
    assert ledger.position().seq == before + 3
    assert Ledger(address).spent("clicks").steps_by_event == {EVENTS[0]: 30}
    # A lease of the same transaction can be settled, or asked for, in it.
    with ledger.together():
        ledger.settle(first[2].lease_id, 5)  # type: ignore[union-attr]
        lease = ledger.reserve("b", 6, 10)
        ledger.settle(lease.lease_id, 9)
    assert ledger.run_steps("b") == 14 and ledger.reserve_many([]) == []


def test_what_fails_together_charges_nothing(address: str) -> None:
    ledger = Ledger(address)
    register(ledger, 5.0)
    ledger.open_run("a", "clicks", StepCosts.constant(EVENTS[0], 100))
    before, spent = ledger.position(), ledger.spent("clicks")
    with pytest.raises(ZeroDivisionError), ledger.together():
        ledger.reserve("a", 1, 10)
        _ = 1 / 0
    assert (ledger.position(), ledger.spent("clicks")) == (before, spent)
    assert Ledger(address).position() == before
    assert ledger.reserve("a", 1, 3).steps == 3 and ledger.run_steps("a") == 3


# --- processes ------------------------------------------------------------------------------------


def _spend(address: str, home: str, number: int, pipe: Any) -> None:
    """Lease until nothing is left; give back a part now and then, in each process's own way."""
    os.environ["XDG_DATA_HOME"] = home
    rng, ledger, run, step = random.Random(number), Ledger(address), f"run {number}", 1
    pipe.send("ready")
    pipe.recv()
    refused = 0
    while refused < 2 and step < 300:
        wanted = [Reservation(run, step + 5 * n, 5) for n in range(1 + number % 3)]
        outcomes = ledger.reserve_many(wanted) if number % 2 else [_try(ledger, wanted[0])]
        for got in outcomes:
            if isinstance(got, BudgetError):
                refused += 1
                continue
            assert isinstance(got, Lease)
            step += got.steps
            used = got.steps if rng.random() < 0.8 else rng.randint(0, got.steps)
            ledger.settle(got.lease_id, used)
            pipe.send((got.lease_id, got.epsilon_after, used))
    pipe.send(None)


def _try(ledger: Ledger, item: Reservation) -> Lease | BudgetError:
    try:
        return ledger.reserve(item.run_id, item.first_step, item.steps)
    except BudgetError as error:
        return error


def test_eight_processes_never_pass_one_budget(address: str, tmp_path: Path) -> None:
    ledger = Ledger(address)
    budget = (epsilon_of({EVENTS[0]: 60}, DELTA) + epsilon_of({EVENTS[0]: 61}, DELTA)) / 2
    register(ledger, budget)
    for number in range(8):
        ledger.open_run(f"run {number}", "clicks", StepCosts.constant(EVENTS[0], 60))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.dist_dp.test_ledger_agreement"])
    pipes, children = [], []
    for number in range(8):
        ours, theirs = context.Pipe()
        home = os.environ["XDG_DATA_HOME"]
        child = context.Process(target=_spend, args=(address, home, number, theirs))
        child.start()
        pipes.append(ours)
        children.append(child)
    for pipe in pipes:
        assert pipe.recv() == "ready"
    for pipe in pipes:
        pipe.send("go")
    told: dict[str, int] = {}
    for pipe in pipes:
        while (message := pipe.recv()) is not None:
            lease_id, epsilon, used = message
            told[lease_id] = used
            assert epsilon <= budget
    for child in children:
        child.join()
        assert child.exitcode == 0
    # At every moment, by Google's library alone: the most that was charged at once.
    charged, most = 0, 0
    leases: dict[str, int] = {}
    settled: dict[str, int] = {}
    for entry in Ledger(address).history("clicks"):
        if entry.kind == "steps_reserved":
            leases[str(entry.lease_id)] = int(entry.steps or 0)
            charged += int(entry.steps or 0)
        elif entry.kind == "steps_settled":
            settled[str(entry.lease_id)] = int(entry.steps or 0)
            charged -= leases[str(entry.lease_id)] - int(entry.steps or 0)
        most = max(most, charged)
    assert settled == told and charged == sum(told.values())
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    noise = dp_accounting.GaussianDpEvent(EVENTS[0].noise_multiplier)
    step = dp_accounting.PoissonSampledDpEvent(EVENTS[0].sample_rate, noise)
    accountant.compose(step, most)
    assert accountant.get_epsilon(DELTA) <= budget and most == 60


def test_reservations_together_are_quick(address: str) -> None:
    """Far below what `docs/ledger.md` names, and by this process's time: machines are busy."""
    ledger = Ledger(address)
    register(ledger, 500.0)
    for number in range(8):
        ledger.open_run(str(number), "clicks", StepCosts.constant(EVENTS[0], 200))
    ledger.reserve_many([Reservation(str(n), 1, 1) for n in range(8)])
    start, count = time.process_time(), 0
    for turn in range(4):
        wanted = [Reservation(str(n % 8), 1 + 64 * turn + n // 8, 1) for n in range(256)]
        count += sum(isinstance(got, Lease) for got in ledger.reserve_many(wanted))
    assert count == 1024 and count / (time.process_time() - start) > 250
    assert isinstance(ledger.reserve_many([Reservation("9", 1, 1)])[0], LedgerError)
