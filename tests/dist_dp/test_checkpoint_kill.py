"""A run that is killed at any moment, while it saves too, goes on and ends with the same bits."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from dist_dp.checkpoint import find_checkpoint, read_checkpoint_info
from dist_dp.checkpoint_folder import has_checkpoint
from dist_dp.errors import CheckpointError
from tests.dist_dp.checkpoint_runs import STEPS, assert_is_the_run, end_of, go_on, run_and_die

pytestmark = pytest.mark.chaos


def live_or_die(home: Path, die_before: int) -> int | None:
    """A run in a process of its own; its exit code."""
    # Forked from a server that has imported everything: importing takes seconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.dist_dp.checkpoint_runs"])
    process = context.Process(target=run_and_die, args=(home, die_before))
    process.start()
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


@pytest.fixture(scope="module")
def operations(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Operations on files of a run that lives, in order, from 1; [0] is none."""
    home = tmp_path_factory.mktemp("operations")
    assert live_or_die(home, 0) == 0
    return ["", *(home / "operations.txt").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Tensor]:
    """The end of a run that never stopped."""
    return end_of(go_on(tmp_path_factory.mktemp("whole")))


def kill_and_go_on(home: Path, die_before: int, saved_before: int, whole: Any) -> int | None:
    """Kills a run, goes on, compares; the step it went on from.

    Args:
        home: Of the run.
        die_before: The operation it does not live to do.
        saved_before: Checkpoints that were whole by then, at least.
        whole: What it must end with.
    """
    assert live_or_die(home, die_before) == -signal.SIGKILL
    checkpoints = home / "checkpoint"
    if saved_before == 0 and not has_checkpoint(checkpoints):
        with pytest.raises(CheckpointError, match="no checkpoint"):
            find_checkpoint(checkpoints)
        return None
    step = int(read_checkpoint_info(checkpoints)["numbers"]["step"])
    assert step >= 2 * saved_before
    assert_is_the_run(end_of(go_on(home, every=2)), whole, exact=True)
    # What the dead process left is gone with the next save.
    assert step == STEPS or len([*checkpoints.iterdir()]) == 1
    return step


def saves(operations: list[str]) -> Iterator[tuple[int, int]]:
    """Each operation, and how many checkpoints were whole before it."""
    done = 0
    for number, name in enumerate(operations[1:], start=1):
        yield number, done
        done += name.startswith("os.rename")


def test_the_list_of_operations_is_whole(operations: list[str]) -> None:
    """Else nothing would be tested below: four saves, each renamed once, synced before."""
    assert sum(name.startswith("os.rename") for name in operations) == 4
    for name in (
        "os.mkdir",
        "open secret",
        "open tensors-00000.bin",
        "chunk",
        "fsync",
        "os.remove",
    ):
        assert sum(o.startswith(name) for o in operations) >= 3, name
    first = next(i for i, name in enumerate(operations) if name.startswith("os.rename"))
    assert (
        operations[first - 2].startswith("open .save-000001-") and operations[first - 1] == "fsync"
    )
    assert operations[first + 1 : first + 3] == ["open checkpoint", "fsync"]


@pytest.mark.parametrize(
    ("what", "step"),
    [
        ("open tensors-00000.bin", 2),
        ("chunk", 2),
        ("open checkpoint.json", 2),
        ("os.rename", 2),
        ("shutil.rmtree", 4),
        ("os.rmdir", 4),
    ],
)
def test_killed_within_the_second_save(
    tmp_path: Path, operations: list[str], whole: dict[Any, Tensor], what: str, step: int
) -> None:
    number = next(
        number
        for number, done in saves(operations)
        if done == (2 if step == 4 else 1) and operations[number].startswith(what)
    )
    assert kill_and_go_on(tmp_path, number, step // 2, whole) == step


@pytest.mark.slow
def test_killed_before_every_operation(
    tmp_path: Path, operations: list[str], whole: dict[Any, Tensor]
) -> None:
    went_on_from = []
    for number, done in saves(operations):
        # Of the many chunks of a file every tenth; the third save is as the second.
        if done != 2 and (operations[number] != "chunk" or number % 10 == 0):
            home = tmp_path / str(number)
            home.mkdir()  # as in `operations`: making it would count as an operation more
            went_on_from.append(kill_and_go_on(home, number, done, whole))
    assert {*went_on_from} == {None, 2, 6, 8}
