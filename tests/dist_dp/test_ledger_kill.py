"""kill -9 of a process that writes to the ledger: what it acknowledged is there, always."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dist_dp.ledger import Lease, Ledger, Reservation
from tests.dist_dp.ledgers import register, version_1

pytestmark = pytest.mark.chaos

# A disk write of any kind that SQLite or we make, or a change of names.
WRITES = ["pwrite64", "write", "fdatasync", "fsync", "ftruncate", "link", "rename", "unlink"]


@pytest.fixture(scope="module")
def forks() -> Any:
    """Processes that are there at once, with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["tests.dist_dp.test_ledger_kill", "dist_dp.ledger_sqlite", "dist_dp.ledger_postgres"]
    )
    return context


@pytest.fixture(params=["sqlite", "postgresql"])
def address(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    place = str(tmp_path / "ledger.db")
    if request.param == "postgresql":
        server = request.getfixturevalue("postgres_server")
        place = server.socket_url(server.new_database())
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    yield place


def begun(address: str | Path) -> Ledger:
    """A ledger with a run without noise: nothing to compose, so that most time goes to the disk."""
    ledger = Ledger(address)
    register(ledger, 1.0)
    ledger.open_run("a", "clicks", None, {"non_private": True})
    return ledger


def _write_for_ever(address: str, home: str, turn: int, pipe: Any) -> None:
    """Lease, settle and lease together; say what was answered, when it was."""
    os.environ["XDG_DATA_HOME"] = home
    ledger, step = Ledger(address), 1
    while True:
        lease = ledger.reserve("a", step, 2)
        pipe.send(("leased", lease.lease_id))
        ledger.settle(lease.lease_id, 1)
        pipe.send(("settled", lease.lease_id))
        for got in ledger.reserve_many([Reservation("a", step + n, 1) for n in range(turn % 4)]):
            assert isinstance(got, Lease)
            pipe.send(("leased", got.lease_id))
        step += 1


def _rest(pipe: Any) -> list[Any]:
    messages = []
    while True:
        try:
            messages.append(pipe.recv())
        except EOFError:
            return messages


def test_killed_at_random_moments(address: str, forks: Any) -> None:
    """Twenty-five processes, one after the other, on one ledger."""
    ledger = begun(address)
    rng = random.Random(5)
    leased, settled = set(), set()
    for turn in range(25):
        ours, theirs = forks.Pipe(duplex=False)
        arguments = (address, os.environ["XDG_DATA_HOME"], turn, theirs)
        child = forks.Process(target=_write_for_ever, args=arguments)
        child.start()
        theirs.close()
        messages = [ours.recv()] if turn % 4 else []
        time.sleep(rng.random() * 0.03)
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join()
        messages += _rest(ours)
        leased |= {lease for kind, lease in messages if kind == "leased"}
        settled |= {lease for kind, lease in messages if kind == "settled"}
        history = (ledger if turn % 2 else Ledger(address)).history("clicks")
        by_kind = {
            kind: {e.lease_id for e in history if e.kind == kind}
            for kind in ("steps_reserved", "steps_settled")
        }
        assert leased <= by_kind["steps_reserved"]
        assert settled <= by_kind["steps_settled"]
    # What was written and not answered is at most what was under way when a process died.
    assert len(by_kind["steps_reserved"]) <= len(leased) + 3 * 25
    assert len(leased) >= 18  # whoever was waited for said one
    charged = {e.lease_id: e.steps for e in history if e.kind.startswith("steps_")}
    assert ledger.run_steps("a") == sum(charged.values())


# --- before each of its disk writes, one after the other --------------------------------------


def _leases(path: Path, pipe: Any) -> None:
    ledger = Ledger(path)
    pipe.send("ready")
    pipe.recv()
    lease = ledger.reserve("a", 60, 10)
    pipe.send(lease.lease_id)
    ledger.settle(lease.lease_id, 4)
    for got in ledger.reserve_many([Reservation("a", 70 + n, 1) for n in range(3)]):
        assert isinstance(got, Lease)
        pipe.send(got.lease_id)
    ledger.close()


def _makes(path: Path, pipe: Any) -> None:
    pipe.send("ready")
    pipe.recv()
    Ledger(path)
    pipe.send("made")


def _killed_before(
    forks: Any, target: Any, path: Path, system_call: str, number: int
) -> tuple[bool, list[Any]]:
    """Run a target that is killed before the n-th call of a kind; whether it was, and its words."""
    ours, theirs = forks.Pipe()
    child = forks.Process(target=target, args=(path, theirs))
    child.start()
    theirs.close()
    assert ours.recv() == "ready"
    tracer = subprocess.Popen(
        ["strace", "-p", str(child.pid), "-e", f"trace={system_call}", "-e",
         f"inject={system_call}:signal=KILL:when={number}"],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert tracer.stderr is not None
    first = tracer.stderr.readline()
    if "attached" not in first:
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join()
        pytest.skip(f"strace may not attach to a process here ({first.strip()})")
    ours.send("go")
    child.join()
    tracer.wait()
    tracer.stderr.close()
    return child.exitcode == -signal.SIGKILL, _rest(ours)


@pytest.mark.skipif(shutil.which("strace") is None, reason="no strace (apt-get install strace)")
@pytest.mark.parametrize(
    "what",
    [
        "leases",
        pytest.param("makes", marks=pytest.mark.slow),
        pytest.param("migrates", marks=pytest.mark.slow),
    ],
)
def test_killed_before_every_disk_write(tmp_path: Path, forks: Any, what: str) -> None:
    model = begun(tmp_path / "begun.db")
    model.reserve("a", 1, 10)
    model.close()
    target = _leases if what == "leases" else _makes
    points = 0
    for system_call in WRITES:
        number, killed = 0, True
        while killed:
            number += 1
            folder = tmp_path / f"{system_call}-{number}"
            folder.mkdir()
            path = folder / "ledger.db"
            if what == "leases":
                for end in ("", ".witness"):
                    shutil.copy(f"{model.path}{end}", f"{path}{end}")
            elif what == "migrates":
                version_1(path)
            killed, said = _killed_before(forks, target, path, system_call, number)
            points += killed
            ledger = Ledger(path)
            if what == "leases":
                written = {e.lease_id for e in ledger.history() if e.kind == "steps_reserved"}
                assert set(said) <= written and len(written) in (1, 2, 5)
                assert ledger.reserve("a", 80, 1).steps == 1
            else:
                kinds = [entry.kind for entry in ledger.history()]
                assert kinds[12:] == (["ledger_migrated"] if what == "migrates" else [])
                assert len(kinds) == (13 if what == "migrates" else 0)
            assert Ledger(path).position() == ledger.position()
            ledger.close()
            shutil.rmtree(folder)
    assert points >= {"leases": 30, "makes": 50, "migrates": 50}[what]
