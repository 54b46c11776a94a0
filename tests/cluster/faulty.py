"""Models whose workers come to harm at given moments, each once: ``tests.cluster.faulty:doomed``.

The harm is real (SIGKILL of the worker's own process, a sleep without end, or what a test does to
the ledger, the disk or the data while the worker waits); only its moment is arranged, by wrapping
the function that does what is interrupted.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from dist_dp.datasets.schema import DataSchema
from tests.cluster.factories import Additive

MOMENTS = (
    "before charge",
    "after charge",
    "in the forward",
    "mid-update",
    "mid-checkpoint",
    "mid-release",
    "after the release is recorded",
    "after the release is out",
)


def doomed(schema: DataSchema, harms: list[dict[str, Any]], folder: str) -> nn.Module:
    """A model; ``harms`` are {moment, rank, step, kind}, and ``folder`` notes which came true."""
    for number, harm in enumerate(harms):
        _arrange(harm, Path(folder) / f"harm-{number}")
    return Additive(schema, 8)


def _arrange(harm: dict[str, Any], done: Path) -> None:
    import dist_dp.checkpoint as checkpoint
    import dist_dp.cluster.finish as finish
    import dist_dp.release as release
    from dist_dp.distributed import rank
    from dist_dp.leases import StepLeases
    from dist_dp.optimizer import PrivateOptimizer

    if rank() != harm["rank"] or done.exists():
        return

    def come_true() -> None:
        if done.exists():
            return
        done.touch()
        kind = harm.get("kind", "killed")
        if kind == "raised":
            raise ArithmeticError("this worker's own trouble")
        if kind == "hung":
            time.sleep(10_000)
        if kind.startswith("met"):  # by what the test does now
            while not done.with_suffix(".over").exists():
                time.sleep(0.01)
        if kind != "met":
            os.kill(os.getpid(), signal.SIGKILL)

    def wrap(owner: Any, name: str, *, after: bool = False, step: Any = None) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def wrapped(*args: Any, **options: Any) -> Any:
            due = step is None or step(*args) >= harm["step"]
            if due and not after:
                come_true()
            result = original(*args, **options)
            if due and after:
                come_true()
            return result

        setattr(owner, name, wrapped)

    match harm["moment"]:
        case "before charge":
            wrap(StepLeases, "_reserve", step=lambda _, first: first)
        case "after charge":
            wrap(StepLeases, "_reserve", after=True, step=lambda _, first: first)
        case "in the forward":
            wrap(Additive, "forward", step=lambda model, *_: _training_step(model))
        case "mid-update":  # the tables have moved, the dense layers have not
            wrap(PrivateOptimizer, "_update_dense", step=lambda made, _: made.schedule.step)
        case "mid-checkpoint":  # its tensors are written, it is not published
            wrap(checkpoint, "_publish", step=lambda _, info: info["numbers"]["step"])
        case "mid-release":
            wrap(release, "write_tables", after=True)
        case "after the release is recorded":
            wrap(release.files, "publish")
        case "after the release is out":
            wrap(finish, "_conclude")


_forwards = 0


def _training_step(model: nn.Module) -> int:
    global _forwards
    _forwards += model.training
    return _forwards
