"""The tables of a release: settled and written chunk by chunk, one beside the other.

While the kernels settle chunk i + 1 of a shard, a thread writes chunk i and another one hashes it.
Every rank does so with its own shards, at once. A table is never copied: what is written is the
shard's own memory, or, where that is not float32 on the CPU, a chunk's worth of copies.

A shard is an Arrow IPC file (also known as Feather), a record batch a chunk. Its bytes are those in
memory, so writing costs no work, and it can be mapped instead of read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import torch
from torch import Tensor

from dist_dp.distributed import rank
from dist_dp.durable import sync_folder
from dist_dp.errors import ReleaseError
from dist_dp.mechanisms import Mechanism
from dist_dp.release_files import FileFacts, HashedFile
from dist_dp.release_progress import Report
from dist_dp.table_shard import TableShard

if TYPE_CHECKING:
    from dist_dp.private_model import PrivateModel

CHUNK_BYTES = 32 << 20
"""Values settled and written at a time."""
CHUNKS_WAITING = 2
"""Settled chunks that may wait for the disk."""


def write_tables(
    parts: PrivateModel, folder: Path, progress: Report | None = None
) -> dict[str, FileFacts]:
    """Settles all shards of this rank and writes them; no collectives inside.

    Args:
        parts: The private model, between two steps.
        folder: The release's folder, on storage that all ranks share.
        progress: Called on this thread, at the start, after each chunk, and at the end.

    Returns:
        What was written, by path in the folder. It is on the disk.

    Raises:
        ReleaseError: A shard's settling was cut short before, or the model was trained meanwhile.
        OSError: Writing failed.

    Guarantee:
        A chunk is settled to the last finished step, and its history says so, before its first byte
        is handed to the writer; it is final then: a step that is taken meanwhile is an error.
        Should the disk fail, the remaining rows are settled all the same, since ranks that hold
        copies or other columns of the same rows have to agree on their history; should settling
        itself be cut short, nothing can be saved or released from this process any more. So
        whatever happens, no row of a later release or checkpoint passes for settled that is not.
    """
    parts.ready_to_settle()
    mechanism = parts.mechanism
    step = mechanism.schedule.step
    written = [s for s in parts.shards if s.weight.numel() and (rank() == 0 or not s.replicated)]
    writing = {id(shard) for shard in written}
    with _Writer(sum(4 * s.weight.numel() for s in written), progress) as writer:
        try:
            for number, shard in enumerate(parts.shards):
                file = None
                if id(shard) in writing:
                    file = writer.file(shard, folder, f"part-{rank():05d}-{number:03d}.arrow")
                for first, last in _chunks(shard):
                    mechanism.settle(shard, first, last)
                    _check_final(mechanism, step, shard, first, last)
                    if file is not None:
                        writer.write(file, first, released_values(shard, first, last))
        except BaseException:
            for shard in parts.shards:
                shard.settling = True
            raise
        facts = writer.finish()
    if mechanism.schedule.step != step:
        raise _trained_meanwhile()
    return {str(path.relative_to(folder)): fact for path, fact in facts.items()}


def released_values(shard: TableShard, first: int, last: int) -> Tensor:
    """What a release holds of a range of settled rows: what a lookup reads there, as float32.

    Args:
        shard: Of any precision. Of a half-precision table the weight is released, not the float32
            value it is rounded from: rounding after the noise is post-processing.
        first: First local row.
        last: One past the last local row.

    Returns:
        float32 ``[last - first, local columns]`` on the CPU, contiguous; the shard's own memory
        where that is all this already.
    """
    return shard.weight[first:last].detach().float().cpu().contiguous()


def _chunks(shard: TableShard) -> Iterator[tuple[int, int]]:
    rows, columns = shard.weight.shape
    step = max(1, CHUNK_BYTES // (4 * max(1, columns)))
    for first in range(0, rows, step):
        yield first, min(rows, first + step)


def _check_final(mechanism: Mechanism, step: int, shard: TableShard, first: int, last: int) -> None:
    if mechanism.schedule.step != step:
        raise _trained_meanwhile()
    if not mechanism.is_settled(shard, first, last):
        raise ReleaseError(
            f"table '{shard.table}': some of its rows {first} to {last} are not settled to step "
            f"{step}, so they lack noise; nothing is released. Train and release in one thread."
        )


def _trained_meanwhile() -> ReleaseError:
    return ReleaseError(
        "the model was trained while it was being released, so some rows lack noise; nothing is "
        "released. Train and release in one thread."
    )


class _TableFile:
    """One shard's file, from its first row to its last; written in the writing thread."""

    def __init__(self, shard: TableShard, path: Path, hasher: ThreadPoolExecutor) -> None:
        self._shard, self.path, self._hasher = shard, path, hasher
        self._file: HashedFile | None = None
        self.facts: FileFacts | None = None

    def write(self, first: int, values: Tensor) -> int:
        """Writes rows from local row ``first`` on; returns the bytes of values.

        The last row finishes the file.
        """
        rows, columns = values.shape
        if first == 0:
            self._open(columns)
        start = self._shard.row_offset + first
        numbers = pa.array(torch.arange(start, start + rows).numpy())
        flat = pa.array(values.reshape(-1).numpy())
        embedding = pa.FixedSizeListArray.from_arrays(flat, columns)
        self._batches.write_batch(pa.record_batch([numbers, embedding], schema=self._schema))
        if first + rows == self._shard.weight.shape[0]:
            self._batches.close()
            assert self._file is not None
            self.facts = self._file.finish()
            sync_folder(self.path.parent)
        return 4 * values.numel()

    def _open(self, columns: int) -> None:
        shard = self._shard
        self._schema = pa.schema(
            [("row", pa.int64()), ("embedding", pa.list_(pa.float32(), columns))],
            metadata={
                "table": shard.table,
                "num_rows": str(shard.num_rows),
                "dim": str(shard.dim),
                "column_offset": str(shard.column_offset),
            },
        )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = HashedFile(self.path, self._hasher)
        self._batches = pa.ipc.new_file(self._file, self._schema)

    def close(self) -> None:
        """Closes the file, finished or not."""
        if self._file is not None:
            self._file.close()


class _Writer:
    """Writes in a thread, a few chunks behind; after a failure it takes chunks and drops them."""

    def __init__(self, total: int, progress: Report | None) -> None:
        self._total, self._done = total, 0
        self._progress = progress
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="release-write")
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="release-hash")
        self._waiting: deque[Future[int]] = deque()
        self._failure: Exception | None = None
        self._files: list[_TableFile] = []

    def __enter__(self) -> _Writer:
        self._report(0)
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)
        self._hasher.shutdown()
        for table in self._files:
            table.close()

    def file(self, shard: TableShard, folder: Path, name: str) -> _TableFile:
        table = _TableFile(shard, folder / "tables" / shard.table / name, self._hasher)
        self._files.append(table)
        return table

    def write(self, table: _TableFile, first: int, values: Tensor) -> None:
        """Hands a chunk over; waits if too many wait."""
        if self._failure is None:
            self._waiting.append(self._thread.submit(table.write, first, values))
        self._wait(CHUNKS_WAITING)

    def finish(self) -> dict[Path, FileFacts]:
        """Waits for all that was handed over; raises what went wrong with it."""
        self._wait(0)
        if self._failure is not None:
            raise self._failure
        return {table.path: table.facts for table in self._files if table.facts is not None}

    def _wait(self, most: int) -> None:
        while len(self._waiting) > most:
            try:
                self._report(self._waiting.popleft().result())
            except Exception as failure:
                self._failure = self._failure or failure
                for later in self._waiting:
                    later.cancel()
                self._waiting.clear()

    def _report(self, more: int) -> None:
        self._done += more
        if self._progress is not None:
            self._progress(self._done, self._total)
