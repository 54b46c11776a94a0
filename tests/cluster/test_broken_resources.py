"""Runs whose ledger, disk or data fail under them: the same model in the end, or a clear error."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dist_dp.checkpoint import find_checkpoint, read_checkpoint_info
from dist_dp.cluster.accountant import NAMESPACE, AccountantClient, _actor_name
from dist_dp.cluster.config import parse_config
from dist_dp.cluster.finish import checkpoint_folder
from dist_dp.cluster.trainer import Trainer
from dist_dp.datasets.manifest import load_manifest
from dist_dp.errors import CheckpointError, DataError, DistDpError, LedgerError
from dist_dp.ledger import Ledger
from dist_dp.ledger_address import ledger_address
from dist_dp.trail import StepTrail
from tests.cluster.small import assert_one_line_error, charged_steps, run
from tests.cluster.test_faults import (
    STEPS,
    came_true,
    charged,
    fit,
    harm,
    same_model,
    values_of,
)
from tests.postgres_server import PostgresServer

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.chaos]


@pytest.fixture(scope="module")
def undisturbed(ray_local: None, tmp_path_factory: pytest.TempPathFactory, clicks: Path) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    fit(folder, clicks, [])
    return folder


@contextmanager
def meeting(folder: Path, *deeds: Callable[[], None]) -> Iterator[None]:
    """Does something when the worker has come to the moment of each harm, which waits for it."""
    over = threading.Event()

    def watch() -> None:
        for number, deed in enumerate(deeds):
            while not (folder / f"harm-{number}").exists():
                if over.wait(0.01):
                    return
            try:
                deed()
            finally:
                (folder / f"harm-{number}.over").touch()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def train(values: dict[str, Any]) -> list[str]:
    """A run to its end; what was said to be read."""
    said: list[str] = []
    watch: Callable[[dict[str, Any]], None] = lambda now: said.extend(  # noqa: E731
        [now["notice"]] if "notice" in now else []
    )
    Trainer(parse_config(values), watch=watch).fit()
    return said


# --- the ledger ---------------------------------------------------------------------------------


def test_the_accountant_is_killed_within_a_lease(
    undisturbed: Path, tmp_path: Path, clicks: Path
) -> None:
    """By the system, by Ray, and just as it is asked for the next lease."""
    import ray

    ledger = tmp_path / "ledger.sqlite"
    pids: list[int] = []

    def kill() -> None:
        pids.append(AccountantClient(ledger).pid())
        os.kill(pids[-1], signal.SIGKILL)

    def let_ray_kill() -> None:
        pids.append(AccountantClient(ledger).pid())
        actor = ray.get_actor(_actor_name(ledger_address(ledger)), NAMESPACE)
        ray.kill(actor, no_restart=False)

    harms = [
        harm("in the forward", kind="met", step=7),
        harm("in the forward", kind="met", step=13),
        harm("before charge", kind="met", step=26),
    ]
    with meeting(tmp_path, kill, let_ray_kill, kill):
        train(values_of(tmp_path, clicks, harms))
    assert came_true(tmp_path, harms)
    assert len({*pids, AccountantClient(ledger).pid()}) == 4
    assert same_model(tmp_path, undisturbed) and charged(tmp_path) == STEPS
    assert Ledger(ledger).open_leases("run") == []


@pytest.mark.timeout(900)
def test_the_accountant_is_killed_at_every_moment(
    undisturbed: Path, tmp_path: Path, clicks: Path
) -> None:
    """Whatever the worker is at: asking, training, saving, releasing."""
    ledger = tmp_path / "ledger.sqlite"
    pids: list[int] = []

    def kill() -> None:
        pids.append(AccountantClient(ledger).pid())
        os.kill(pids[-1], signal.SIGKILL)

    moments = ("before charge", "after charge", "mid-update", "mid-checkpoint", "mid-release")
    moments += ("after the release is recorded", "after the release is out")
    harms = [harm(moment, kind="met") for moment in moments]
    with meeting(tmp_path, *[kill] * len(harms)):
        train(values_of(tmp_path, clicks, harms))
    assert came_true(tmp_path, harms) and len(set(pids)) == len(harms)
    assert same_model(tmp_path, undisturbed) and charged(tmp_path) == STEPS
    assert Ledger(ledger).open_leases("run") == [] and Ledger(ledger).run_status("run") != "open"


def test_the_ledgers_file_is_locked_for_a_while(
    undisturbed: Path, tmp_path: Path, clicks: Path
) -> None:
    def lock() -> None:
        held = sqlite3.connect(
            tmp_path / "ledger.sqlite", isolation_level=None, check_same_thread=False
        )
        held.execute("BEGIN EXCLUSIVE")
        threading.Timer(8.0, held.close).start()

    harms = [harm("before charge", kind="met", step=11)]
    with meeting(tmp_path, lock):
        said = train(values_of(tmp_path, clicks, harms))
    assert came_true(tmp_path, harms)
    assert same_model(tmp_path, undisturbed) and charged(tmp_path) == STEPS
    assert any("no answer from the ledger to 'reserve'" in text for text in said)


@pytest.mark.timeout(900)
def test_the_ledgers_server_is_down_for_a_while(
    undisturbed: Path, tmp_path: Path, clicks: Path, postgres_server: PostgresServer
) -> None:
    """Longer than a connection is tried for: the lease is asked for again."""
    url = postgres_server.socket_url(postgres_server.new_database())
    restart = threading.Timer(40.0, postgres_server.start)

    def stop() -> None:
        postgres_server.stop(at_once=True)
        restart.start()

    harms = [harm("before charge", kind="met", step=11)]
    values = values_of(tmp_path, clicks, harms, privacy={"ledger": url})
    try:
        with meeting(tmp_path, stop):
            said = train(values)
    finally:
        restart.join()
    assert came_true(tmp_path, harms)
    assert same_model(tmp_path, undisturbed)
    assert charged_steps(url, "clicks", "run") == STEPS
    assert any("no answer from the ledger to 'reserve'" in text for text in said)


# --- the disk -----------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of eight megabytes."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a small file system")
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount a small file system: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path, *, but: int = 0) -> None:
    """Leaves so many bytes."""
    with open(disk / "filler", "wb", buffering=0) as file:
        left = os.statvfs(disk)
        file.write(bytes(max(0, left.f_bavail * left.f_bsize - but)))


def test_the_disk_is_full_at_a_checkpoint(
    undisturbed: Path, tmp_path: Path, clicks: Path, small_disk: Path
) -> None:
    harms = [harm("in the forward", kind="met", step=21)]
    values = values_of(
        tmp_path,
        clicks,
        harms,
        data={"store": str(tmp_path / "store")},
        output={"folder": str(small_disk), "tensorboard": False},
        cluster={"max_failures": 3},
    )
    trainer = Trainer(parse_config(values))
    with (
        meeting(tmp_path, lambda: fill(small_disk, but=64 << 10)),
        pytest.raises(CheckpointError, match=r"the disk is full.*free some space"),
    ):
        trainer.fit()
    folder = small_disk / "run"
    home = checkpoint_folder(folder)
    assert read_checkpoint_info(home)["numbers"]["step"] in (16, 20)
    assert [path.name for path in home.iterdir()] == [find_checkpoint(home).name]
    # It would have come again, so nobody tried.
    assert [p.name for p in (folder / "private" / "attempts").iterdir()] == ["000001"]
    assert Ledger(tmp_path / "ledger.sqlite").run_status("run") == "open"
    (small_disk / "filler").unlink()
    Trainer.resumed(folder).fit()
    (tmp_path / "runs").symlink_to(small_disk)
    assert same_model(tmp_path, undisturbed) and charged(tmp_path) == STEPS


def test_the_ledgers_disk_is_full(
    undisturbed: Path, tmp_path: Path, clicks: Path, small_disk: Path
) -> None:
    harms = [harm("before charge", kind="met", step=16)]
    ledger = small_disk / "ledger.sqlite"
    values = values_of(tmp_path, clicks, harms, privacy={"ledger": str(ledger)})
    with (
        meeting(tmp_path, lambda: fill(small_disk)),
        pytest.raises(LedgerError, match="make room"),
    ):
        train(values)
    folder = tmp_path / "runs" / "run"
    trail = folder / "private" / "trail"
    taken = StepTrail(trail).last_step_after(0)
    (small_disk / "filler").unlink()
    assert taken >= 10 and Ledger(ledger).run_steps("run") >= taken
    Trainer.resumed(folder).fit()
    assert same_model(tmp_path, undisturbed)
    assert charged_steps(ledger, "clicks", "run") == STEPS


# --- the data -----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["removed, then a worker killed", "cut short"])
def test_a_data_file_vanishes(undisturbed: Path, tmp_path: Path, clicks: Path, how: str) -> None:
    store = tmp_path / "store"
    harms = [harm("in the forward", kind="met" if how == "cut short" else "met, then killed")]
    values = values_of(
        tmp_path, clicks, harms, data={"store": str(store)}, cluster={"max_failures": 3}
    )
    records, kept = store / "train", tmp_path / "kept"

    def harm_file() -> None:
        nonlocal records
        records = store / load_manifest(store).splits["train"].file
        shutil.copy(records, kept)
        if how == "cut short":
            os.truncate(records, 4096)  # pages that a worker has mapped are gone: SIGBUS
        else:
            records.unlink()

    with meeting(tmp_path, harm_file), pytest.raises(DataError) as caught:
        train(values)
    assert came_true(tmp_path, harms) and str(records) in str(caught.value)
    assert "\n" not in str(caught.value)
    folder = tmp_path / "runs" / "run"
    attempts = sorted(p.name for p in (folder / "private" / "attempts").iterdir())
    assert attempts == ["000001", "000002"]
    assert Ledger(tmp_path / "ledger.sqlite").run_status("run") == "open"
    with pytest.raises(DataError, match=records.name):
        Trainer.resumed(folder).fit()
    assert Ledger(tmp_path / "ledger.sqlite").run_status("run") == "open"
    shutil.copy(kept, records)
    Trainer.resumed(folder).fit()
    assert same_model(tmp_path, undisturbed) and charged(tmp_path) == STEPS


# --- the checkpoint -----------------------------------------------------------------------------


def test_a_damaged_checkpoint_is_refused(undisturbed: Path, tmp_path: Path, clicks: Path) -> None:
    """Its tensors are cut short, or a bit of them flips, while the run is down."""
    harms = [harm("in the forward", step=14)]
    values = values_of(tmp_path, clicks, harms, cluster={"max_failures": 0})
    with pytest.raises(DistDpError):
        train(values)
    folder = tmp_path / "runs" / "run"
    (tensors,) = find_checkpoint(checkpoint_folder(folder)).glob("tensors-00001.bin")
    whole = tensors.read_bytes()
    middle = len(whole) // 2
    for damaged in (whole[:-8], whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :]):
        tensors.write_bytes(damaged)
        refused = run("train", "--resume", folder)
        assert_one_line_error(refused, str(tensors), "damaged", "put a copy")
        assert Ledger(tmp_path / "ledger.sqlite").run_status("run") == "open"
    tensors.write_bytes(whole)
    Trainer.resumed(folder).fit()
    assert same_model(tmp_path, undisturbed) and charged(tmp_path) == STEPS
