"""A short private run that can be stopped, saved, moved, and killed; run in any world."""

from __future__ import annotations

import os
import signal
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_dp.accounting import GaussianEvent
from dist_dp.checkpoint import CheckpointWriter, save_checkpoint
from dist_dp.engine import PrivacyEngine
from dist_dp.loader import PoissonLoader
from dist_dp.sharding import TableOptimizer
from dist_dp.step_costs import StepCosts
from tests.dist_dp.gradients import pieces
from tests.dist_dp.placement import RECORDS, OpenHanded, model
from tests.dist_dp.test_engine import DATA, DELTA, LOSSES, data_loader

SECRET = bytes(range(32))
STEPS = 8
SIGMA = 0.8
# `data_loader` draws 10 records a step.
COSTS = StepCosts.constant(GaussianEvent(SIGMA, 10 / RECORDS), STEPS)


class NoBudget(OpenHanded):
    """Allows everything: calibration and composition take longer than such a run."""

    def register_dataset(self, *_args: Any, **_options: Any) -> None: ...

    def open_run(self, *_args: Any) -> None: ...

    def released_step(self, _run_id: str) -> int:
        return 0

    def run_steps(self, _run_id: str) -> int:
        return STEPS

    def run_charges(self, _run_id: str) -> dict[GaussianEvent, int]:
        return {}

    def run_costs(self, _run_id: str) -> StepCosts:
        return COSTS

    def record_release(self, *_args: Any) -> None: ...


class Run(PrivacyEngine):
    """An engine with its loader at hand."""

    loader: PoissonLoader

    @cached_property
    def batches(self) -> Iterator[Any]:
        return iter(self.loader)


def adam(module: nn.Module) -> torch.optim.Optimizer:
    """One group."""
    return torch.optim.Adam(module.parameters(), lr=0.05, weight_decay=0.01)


def go_on(
    home: Path,
    until: int = STEPS,
    *,
    zero: bool = False,
    every: int = 0,
    save: bool = False,
    fixed: float = 1.0,
    dropout: float = 0.2,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adam,
    table_lr: float | None = 0.5,
    falling: bool = True,
    tables: TableOptimizer | None = None,
    **options: Any,
) -> Run:
    """Trains from the start, or from the checkpoint in ``home``, to a step.

    The learning rate falls, dense layers have Adam and dropout, and every third step is followed
    by an evaluation, which settles rows.

    Args:
        home: For its checkpoints.
        until: The last step.
        zero: No gradients, noise alone.
        every: Steps between checkpoints in the background.
        save: Save one at the end.
        fixed: Fills a buffer that nothing changes.
        dropout: Its rate; each rank draws for its own examples.
        optimizer: Of all parameters.
        tables: The tables' own; by default SGD.
        table_lr: The tables' learning rate at the start, where it is not their group's.
        falling: Set every learning rate at each step.
        **options: Of the engine.
    """
    module = model(meta=False)
    module.top.append(torch.nn.Dropout(dropout))
    module.register_buffer("fixed", torch.full((3,), fixed))
    saved = home / "checkpoint"
    start: dict[str, Any] = {"resume_from": saved} if saved.exists() else {"secret": SECRET}
    options = {"sharding": "table_wise", **start, **options}
    made = Run(dataset="clicks", run_id="run", accountant=NoBudget(), **options)
    _, _, made.loader = made.make_private(
        module=module,
        optimizer=optimizer(module),
        data_loader=data_loader(),
        table_optimizer=tables or TableOptimizer("sgd"),
        table_lr=table_lr,
        noise_multiplier=SIGMA,
        max_grad_norm=1.0,
        steps=STEPS,
        budget=(4.0, DELTA),
        stop_at_budget=True,
    )
    if not saved.exists():
        torch.manual_seed(5)
    writer = CheckpointWriter(made, saved) if every else None
    for step in range(made.parts.mechanism.schedule.step + 1, until + 1):
        train_on(made, step, zero=zero, falling=falling)
        if writer is not None and step % every == 0:
            writer.save()
    if writer is not None:
        writer.close()
    if save:
        save_checkpoint(made, saved)
    return made


def train_on(made: Run, until: int, *, zero: bool = False, falling: bool = True) -> None:
    """Steps up to one, with the rate of each if it is falling; after every third an evaluation."""
    module, optimizer, loader = made.parts.model, made.parts.optimizer, made.loader
    while loader.steps_drawn < until:
        batch = next(made.batches)
        step = loader.steps_drawn
        for group in optimizer.param_groups if falling else ():
            group["lr"] = 0.5 / step
        loss = LOSSES(module(*batch.inputs), batch.labels)
        (loss * (0.0 if zero else 1.0)).backward()
        optimizer.step()
        if step % 3 == 0:
            module.eval()
            with torch.no_grad():
                module(*DATA.select([1, 5, 7, 20]).inputs)
            module.train()


def end_of(made: Run) -> dict[Any, Tensor]:
    """Everything trained that is here, settled."""
    made.parts.settle()
    dense = {n: p.detach().clone() for n, p in made.parts.recorder.parameters.items()}
    return {**pieces(made.parts), **dense}


def assert_is_the_run(found: dict[Any, Tensor], whole: dict[Any, Tensor], *, exact: bool) -> None:
    """Pieces of any sharding against those of one unsharded run."""
    for key, value in found.items():
        wanted = whole[key] if isinstance(key, str) else whole[key[0], 0, 0]
        if not isinstance(key, str):
            _, row, column = key
            wanted = wanted[row : row + value.shape[0], column : column + value.shape[1]]
        if exact:
            assert torch.equal(value, wanted), key
        else:
            torch.testing.assert_close(value, wanted, rtol=0, atol=1e-5, msg=str(key))


def stages(
    home: Path, shardings: Sequence[tuple[int, Any]], **options: Any
) -> dict[Any, Tensor] | None:
    """Stages of a run, each with another sharding; the end, if the last one finished it."""
    made = None
    for until, kind in shardings:
        made = go_on(home, until, sharding=kind, save=until < STEPS, dropout=0.0, **options)
    assert made is not None
    return end_of(made) if made.parts.mechanism.schedule.step == STEPS else None


Homes = dict[tuple[str, bool], Path]
"""Homes of runs by (name of the chain, gradients are zero)."""


def in_two(homes: Homes) -> dict[Any, Any]:
    """What a world of two runs: its part of a chain of worlds, and all of a chain of kinds."""
    ways: dict[str, list[tuple[int, Any]]] = {
        "worlds": [(4, "row_wise")],
        "kinds": [(2, "table_wise"), (4, "row_wise"), (6, "column_wise"), (8, "data_parallel")],
        "dense": [(4, "row_wise"), (8, "column_wise")],
    }
    found = {}
    for (chain, zero), home in homes.items():
        mechanism = "dpsgd" if chain == "dense" else "lazydp"
        # One chain is saved at every step too, beside the training and its collectives.
        every = int(chain == "kinds")
        options = {"zero": zero, "mechanism": mechanism, "every": every}
        found[chain, zero] = stages(home, ways[chain], **options)
    return found


def in_three(homes: Homes) -> list[list[str]]:
    """What a world of three runs of the chain of worlds; the tables that each stage had here."""
    here = []
    kinds = {"a": "row_wise", "b": "data_parallel", "s": "row_wise"}
    tables_of_two = {"a": "table_wise", "b": "table_wise", "s": "data_parallel"}
    for (chain, zero), home in homes.items():
        if chain == "worlds":
            for until, sharding in ((5, kinds), (6, tables_of_two)):
                made = go_on(home, until, sharding=sharding, save=True, zero=zero, dropout=0.0)
                here.append([s.table for s in made.parts.shards])
    return here


class Operations:
    """Counts operations on the files below a folder, and kills this process before one of them.

    Opening, making, renaming and removing come as audit events; fsync and checksums (one before
    every chunk is written) are counted where they are called.
    """

    EVENTS = frozenset({"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"})

    def __init__(self, folder: Path, die_before: int) -> None:
        self.folder, self.die_before = str(folder), die_before
        self.seen: list[str] = []
        fsync, crc32 = os.fsync, zlib.crc32

        def counted_fsync(descriptor: int) -> None:
            self.count("fsync")
            fsync(descriptor)

        def counted_crc32(data: Any, value: int = 0) -> int:
            self.count("chunk")
            return crc32(data, value)

        os.fsync = counted_fsync
        zlib.crc32 = counted_crc32
        sys.addaudithook(self.on_event)

    def on_event(self, event: str, args: tuple[Any, ...]) -> None:
        if event not in self.EVENTS or not isinstance(args[0], str | Path):
            return
        # Trees are removed by names relative to an open folder.
        below = str(args[0]).startswith(self.folder)
        if below or (event == "os.remove" and args[1] != -1):
            self.count(f"{event} {Path(args[0]).name}")

    def count(self, what: str) -> None:
        self.seen.append(what)
        if len(self.seen) == self.die_before:
            os.kill(os.getpid(), signal.SIGKILL)


def run_and_die(home: Path, die_before: int) -> None:
    """A run with a checkpoint every other step, killed before an operation (0: it lives)."""
    operations = Operations(home / "checkpoint", die_before)
    go_on(home, every=2)
    (home / "operations.txt").write_text("\n".join(operations.seen), encoding="utf-8")
