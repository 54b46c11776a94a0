"""The central accountant on Ray: one ledger, many clients, and a process that is killed."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
import uuid
from pathlib import Path

import pytest

from dist_dp.accounting import GaussianEvent, epsilon_of
from dist_dp.cluster.accountant import AccountantClient, _connecting, start_accountant
from dist_dp.errors import BudgetError, LedgerError
from dist_dp.ledger import Ledger, Position
from dist_dp.ledger_address import default_ledger
from dist_dp.step_costs import StepCosts
from tests.cluster.ray_memory import holding
from tests.postgres_server import PASSWORD, PostgresServer

pytestmark = pytest.mark.ray

DELTA = 1e-5
EVENT = GaussianEvent(1.0, 1e-3)


def started(path: Path, epsilon: float) -> AccountantClient:
    client = start_accountant(path)
    client.register_dataset(
        "clicks", fingerprint="f", num_records=10_000, epsilon=epsilon, delta=DELTA
    )
    return client


@pytest.mark.usefixtures("ray_local")
def test_errors_come_out_as_they_went_in(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="no accountant runs"):
        AccountantClient(tmp_path / "nobody.db").datasets()
    client = started(tmp_path / "ledger.db", epsilon_of({EVENT: 5}, DELTA))
    again = start_accountant(tmp_path / "." / "ledger.db")
    assert again.pid() == client.pid() != os.getpid()

    client.open_run("a", "clicks", StepCosts.constant(EVENT, 10))
    lease = client.reserve("a", 0, 10)
    assert lease.steps == 5
    with pytest.raises(BudgetError, match="'clicks' is used up") as caught:
        client.reserve("a", 5, 1)
    assert type(caught.value) is BudgetError and "Traceback" not in str(caught.value)
    with pytest.raises(LedgerError, match="already"):
        client.open_run("a", "clicks", StepCosts.constant(EVENT, 10))
    client.settle(lease.lease_id, 3)
    client.close_run("a", "stopped")
    # What the actor says is what is in the file, on this node.
    ledger = Ledger(tmp_path / "ledger.db")
    assert client.spent("clicks") == ledger.spent("clicks")
    assert client.history("clicks") == ledger.history("clicks")
    assert client.run_epsilon("a") == epsilon_of({EVENT: 3}, DELTA)

    # The accountant of another ledger is another one; a damaged file is an error of the start.
    bad = tmp_path / "bad.db"
    bad.write_bytes(os.urandom(5000))
    with pytest.raises(LedgerError, match="back-up"):
        start_accountant(bad)


@pytest.mark.usefixtures("ray_local")
def test_worker_charges_through_a_sent_client(tmp_path: Path) -> None:
    import ray

    client = started(tmp_path / "ledger.db", 1.0)
    client.open_run("a", "clicks", StepCosts.constant(EVENT, 10))

    def work(sent: AccountantClient) -> int:
        return sent.reserve("a", 0, 4).steps

    assert ray.get(ray.remote(work).options(num_cpus=0.1).remote(client)) == 4
    assert pickle.loads(pickle.dumps(client)).spent("clicks").steps_by_event == {EVENT: 4}


@pytest.mark.usefixtures("ray_local")
@pytest.mark.chaos
def test_killed_accountant_forgets_nothing_and_charges_nothing_twice(tmp_path: Path) -> None:
    """Four clients lease while the accountant's process is killed twice; the budget binds."""
    path, total = tmp_path / "ledger.db", 150
    client = started(
        path, (epsilon_of({EVENT: total}, DELTA) + epsilon_of({EVENT: 151}, DELTA)) / 2
    )
    acknowledged: dict[str, int] = {}
    refused: list[str] = []
    failures: list[BaseException] = []
    lock = threading.Lock()

    def lease(run_id: str) -> None:
        own = AccountantClient(path)
        own.open_run(run_id, "clicks", StepCosts.constant(EVENT, total))
        step = 0
        try:
            while True:
                got = own.reserve(run_id, step, 2)
                step += got.steps
                with lock:
                    acknowledged[got.lease_id] = got.steps
                time.sleep(0.05)
        except BudgetError:
            refused.append(run_id)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=lease, args=(f"run {i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    pids = []
    for wait_for in (10, 40):
        while len(acknowledged) < wait_for and any(thread.is_alive() for thread in threads):
            time.sleep(0.01)
        pids.append(client.pid())
        os.kill(pids[-1], signal.SIGKILL)
    for thread in threads:
        thread.join()

    assert failures == [] and len(refused) == 4
    assert len({*pids, client.pid()}) == 3
    entries = [e for e in Ledger(path).history("clicks") if e.kind == "steps_reserved"]
    assert {str(e.lease_id): e.steps for e in entries} == acknowledged
    assert client.spent("clicks").steps_by_event == {EVENT: total}


@pytest.mark.usefixtures("ray_local")
def test_the_ledger_may_be_on_a_server(
    postgres_server: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One accountant for everybody's URL; the password is read from a file, by the actor."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    passfile = tmp_path / "pgpass"
    passfile.touch(mode=0o600)
    passfile.write_text(f"*:*:*:*:{PASSWORD}\n")
    monkeypatch.setenv("PGPASSFILE", str(passfile))
    url = postgres_server.tcp_url(postgres_server.new_database())
    client = start_accountant(url)
    client.register_dataset("clicks", fingerprint="f", num_records=10, epsilon=1.0, delta=DELTA)
    client.open_run("a", "clicks", StepCosts.constant(EVENT, 10))
    again = start_accountant(f"{url}?passfile={passfile}")
    assert again.pid() == client.pid() != os.getpid()
    sent = AccountantClient(url)
    lease = sent.reserve("a", 1, 4)
    os.kill(client.pid(), signal.SIGKILL)
    sent.settle(lease.lease_id, 2)
    position = sent.position()
    sent.check_contains(position)
    ledger = Ledger(url)
    assert ledger.position() == position and ledger.run_steps("a") == 2
    assert ledger._store.witness.read() == position  # where the driver keeps them
    with pytest.raises(LedgerError, match="entry 99 was seen"):
        sent.check_contains(Position(position.ledger_id, 99, ""))


@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("place", ["PGPASSWORD", "DIST_DP_LEDGER"])
def test_no_password_is_handed_to_ray(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an actor is started with, Ray keeps in clear; so it is refused before that."""
    url, password = f"postgresql://ann@127.0.0.1:9/{place.lower()}", uuid.uuid4().hex
    if place == "PGPASSWORD":
        monkeypatch.setenv("PGPASSWORD", password)
        monkeypatch.setenv("DIST_DP_LEDGER", url)
    else:
        monkeypatch.setenv("DIST_DP_LEDGER", url.replace("@", f":{password}@"))
    address = default_ledger()
    with pytest.raises(LedgerError, match=rf"is in \${place}.*PGPASSFILE") as caught:
        start_accountant(address)
    assert password not in str(caught.value)
    with pytest.raises(LedgerError, match="no accountant runs"):
        AccountantClient(address).datasets()
    assert "PGPASSWORD" not in _connecting()
    assert holding(password.encode()) == []
