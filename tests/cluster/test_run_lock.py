"""Two drivers are never at one run: the second is refused, and changes nothing."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dist_dp.cluster.config import parse_config
from dist_dp.cluster.run_lock import LOCK_FILE, driving
from dist_dp.cluster.trainer import Trainer
from dist_dp.errors import ConfigError
from tests.cluster.small import small

HOLD = """
import sys, time
from pathlib import Path
from dist_dp.cluster.run_lock import driving
with driving(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(1000)
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    """Another process that holds a run's folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_second_one_is_told_who_is_there(tmp_path: Path) -> None:
    with driving(tmp_path):
        assert stat.S_IMODE((tmp_path / LOCK_FILE).stat().st_mode) == 0o600
        with pytest.raises(ConfigError, match=f"process {os.getpid()} on .*--resume"):
            driving(tmp_path).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_it_ends_with_its_process(tmp_path: Path) -> None:
    process = holder(tmp_path)
    try:
        with pytest.raises(ConfigError, match=f"under way: process {process.pid} on"):
            driving(tmp_path).__enter__()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (tmp_path / LOCK_FILE).exists()
    with driving(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_blocks_never_overlap(tmp_path: Path) -> None:
    inside, most, passed = 0, 0, 0

    def work() -> None:
        nonlocal inside, most, passed
        for _ in range(400):
            try:
                with driving(tmp_path):
                    inside += 1
                    most = max(most, inside)
                    passed += 1
                    inside -= 1
            except ConfigError:
                continue

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1 and passed > 8


@pytest.mark.timeout(20)
def test_what_is_planted_in_its_place_is_refused(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("precious")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / LOCK_FILE).symlink_to(elsewhere)
    with pytest.raises(ConfigError, match="plain file"):
        driving(folder).__enter__()
    assert elsewhere.read_text() == "precious"
    (folder / LOCK_FILE).unlink()
    os.mkfifo(folder / LOCK_FILE)
    with pytest.raises(ConfigError, match="plain file"):
        driving(folder).__enter__()


def test_a_run_that_is_under_way_is_not_resumed(tmp_path: Path, clicks: Path) -> None:
    """Before anything of it is read or written, and before Ray is started."""
    folder = tmp_path / "runs" / "run"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("precious")
    process = holder(folder)
    try:
        trainer = Trainer(parse_config(small(tmp_path, clicks)), resume=folder)
        with pytest.raises(ConfigError, match=f"under way: process {process.pid} on"):
            trainer.fit()
    finally:
        process.kill()
        process.wait()
    assert sorted(p.name for p in folder.iterdir()) == [LOCK_FILE, "config.yaml"]
    assert (folder / "config.yaml").read_text() == "precious"
