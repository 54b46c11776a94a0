"""Training checkpoints: everything a run needs to go on, and nothing that may be published.

Written through torch.distributed.checkpoint, so that a run may go on with other workers and
another sharding. :mod:`dist_dp.checkpoint_state` says what is in one,
:mod:`dist_dp.checkpoint_folder` how it lies on disk. Rows in it lack the noise that still waits
for them, so the loader for serving refuses it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from dist_dp import checkpoint_folder as folders
from dist_dp.checkpoint_description import check_same_run, describe
from dist_dp.checkpoint_folder import find_checkpoint, read_checkpoint_info, read_secret
from dist_dp.checkpoint_state import Restored, pieces_of
from dist_dp.checkpoint_storage import TensorReader, TensorWriter
from dist_dp.checkpoint_tensors import Piece, PieceLoadPlanner, Pieces, PieceSavePlanner
from dist_dp.distributed import all_together, broadcast_object, rank, world_size
from dist_dp.errors import CheckpointError, DistDpError
from dist_dp.fence import take_away

if TYPE_CHECKING:
    from dist_dp.engine import PrivacyEngine
    from dist_dp.private_model import PrivateModel

__all__ = [
    "CheckpointWriter",
    "find_checkpoint",
    "load_checkpoint",
    "read_checkpoint_info",
    "read_secret",
    "save_checkpoint",
]

WRITE = "write the checkpoint"


class CheckpointWriter:
    """Saves a run's checkpoints, one at a time. Same calls on every rank.

    In the background, :meth:`save` copies this rank's shards to host memory (the bytes of its
    tables once more, until they are written) and returns; a thread writes the copy. Otherwise it
    writes straight from the live tensors and returns when all is on disk. What is written
    is the same. Collectives of the thread have a process group of their own, so they do not mix
    with the training's.

    Guarantee:
        None: a checkpoint is as secret as the records. It holds unsettled rows and the key from
        which all noise of the run can be computed. A run that goes on from it takes the steps,
        the batches and the noise that it would have taken, so its release is as private as if it
        had never stopped; steps that run again are charged again.

    Args:
        engine: The engine, made private.
        home: Folder of the run's checkpoints, on storage that all ranks share.
        background: Go on training while it is written.
    """

    def __init__(self, engine: PrivacyEngine, home: Path, *, background: bool = True) -> None:
        self._engine = engine
        self._home = home
        self._group = dist.new_group(backend="gloo")
        self._threads = (
            ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if background else None
        )
        self._pending: Future[None] | None = None
        if engine.checkpoints is not None:
            engine.checkpoints.wait()
        if background:
            engine.checkpoints = self

    @property
    def failed(self) -> bool:
        """Whether a checkpoint in flight is known here to have failed; never waits."""
        pending = self._pending
        return pending is not None and pending.done() and pending.exception() is not None

    def save(self) -> None:
        """Saves the engine's state between two steps.

        Waits for the one in flight, if any.

        Raises:
            CheckpointError: This one, or the one before, could not be written; the last whole one
                is kept.
        """
        self.wait()
        engine, parts = self._engine, self._engine.parts
        if any(not cut.linear for cut in parts.cuts):
            raise CheckpointError(
                "checkpoints support the table optimizer sgd; set train.checkpoint_every to 0"
            )
        all_together(lambda: _check_may_be_saved(parts), CheckpointError, WRITE)
        info = describe(engine)
        pieces: Pieces = pieces_of(parts)
        partial: list[Path] = []

        def begin() -> None:
            nonlocal pieces
            if rank() == 0:
                if engine.fence is None:  # else the attempt did so, as it began
                    take_away(folders.half_written(self._home))
                self._check_fence()
                partial.append(folders.begin(self._home, engine.secret))
            if self._threads is not None:
                pieces = {name: [p.copied() for p in held] for name, held in pieces.items()}

        try:
            all_together(begin, CheckpointError, WRITE)
        except BaseException:
            # The secret is in it, and nothing else will be.
            for made in partial:
                shutil.rmtree(made, ignore_errors=True)
            raise
        folder = broadcast_object(partial[0] if partial else None)
        assert folder is not None
        if self._threads is None:
            all_together(lambda: self._write(pieces, folder, info), CheckpointError, WRITE)
        else:
            self._pending = self._threads.submit(self._write, pieces, folder, info)

    def _write(self, pieces: Pieces, partial: Path, info: dict[str, Any]) -> None:
        """Writes and publishes; rank 0 removes what it could not finish."""

        def publish() -> None:
            self._check_fence()
            _publish(partial, info)

        writer = TensorWriter(partial, rank(), publish)
        try:
            _through_dcp(
                lambda: dcp.save(
                    dict(pieces),
                    storage_writer=writer,
                    planner=PieceSavePlanner(),
                    process_group=self._group,
                )
            )
        except Exception:
            if rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise

    def _check_fence(self) -> None:
        if self._engine.fence is not None:
            self._engine.fence.check()

    def wait(self) -> None:
        """Waits until the checkpoint in flight is whole.

        Raises:
            CheckpointError: On every rank, if it could not be written; said once.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            all_together(lambda: pending.result(), CheckpointError, WRITE)

    def close(self) -> None:
        """Waits, then gives thread and process group back; the last call."""
        try:
            self.wait()
        finally:
            if self._threads is not None:
                self._engine.checkpoints = None
                self._threads.shutdown()
            dist.destroy_process_group(self._group)


def save_checkpoint(engine: PrivacyEngine, home: Path) -> Path:
    """Writes a checkpoint, whole or not at all, in place of older ones; every rank calls it.

    Args:
        engine: The engine, between two steps.
        home: Folder of the run's checkpoints, on storage that all ranks share.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: It could not be written; the older one is kept.

    Guarantee:
        See :class:`CheckpointWriter`.
    """
    writer = CheckpointWriter(engine, home, background=False)
    try:
        writer.save()
    finally:
        writer.close()
    return find_checkpoint(home)


def load_checkpoint(engine: PrivacyEngine, folder: Path) -> tuple[int, bool]:
    """Loads a checkpoint into an engine that was just made private; every rank calls it.

    Number of workers and sharding may differ from those it was saved with: they bear on the
    order in which gradients are added, and on nothing else. Each rank reads what it needs, in
    place. Settings of the optimizers (learning rates) come back too, as with torch's own.

    Args:
        engine: Same model, plan and settings as the one saved.
        folder: The checkpoint, or the home of the run's checkpoints.

    Returns:
        The last finished step, and whether every row was settled.

    Raises:
        CheckpointError: It is damaged, or of another run, plan or model.
    """
    parts = engine.parts
    what = "read it"
    folder = find_checkpoint(folder)
    info = read_checkpoint_info(folder)
    reader = TensorReader(folder)
    restored: list[Restored] = []

    def begin() -> None:
        check_same_run(engine, info)
        folders.check_index(folder, info)
        same_world = info["world_size"] == world_size()
        restored.append(Restored(parts, reader.read_metadata(), same_world))

    def read(pieces: Pieces) -> None:
        _through_dcp(
            lambda: dcp.load(
                dict(pieces),
                storage_reader=reader,
                planner=PieceLoadPlanner(),
                process_group=group,
            )
        )

    group = dist.new_group(backend="gloo")
    try:
        with torch.no_grad():
            all_together(begin, CheckpointError, what)
            all_together(lambda: read(restored[0].pieces), CheckpointError, what)
            if info.get("row_states"):
                states: dict[str, list[Piece]] = {}
                make_place = restored[0].row_states.allocate
                all_together(lambda: states.update(make_place()), CheckpointError, what)
                all_together(lambda: read(states), CheckpointError, what)
            all_together(lambda: restored[0].finish(info["numbers"]), CheckpointError, what)
    except CheckpointError as error:
        raise CheckpointError(f"cannot go on from '{folder}': {error}") from error
    finally:
        dist.destroy_process_group(group)
    return int(info["numbers"]["step"]), bool(info["settled"])


def _check_may_be_saved(parts: PrivateModel) -> None:
    """Refuses what could not be released from a run that goes on, either."""
    parts.check_mechanism()
    parts.state.check_nothing_failed()
    parts.optimizer.check_between_steps()
    for shard in parts.shards:
        shard.check_whole()
    parts.check_fixed_unchanged()


def _publish(partial: Path, info: Mapping[str, Any]) -> None:
    folders.publish(partial, info)


def _through_dcp(action: Callable[[], Any]) -> None:
    """Runs a save or load of torch's; its failure is every rank's, whichever rank it struck.

    Raises:
        Exception: The first rank's that failed, our own before others.
    """
    try:
        action()
    except CheckpointException as failure:
        errors = [error for error, _ in failure.failures.values()]
        raise next((e for e in errors if isinstance(e, DistDpError)), errors[0]) from None
