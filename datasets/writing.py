"""Writing a store: Arrow files with their hashes, in a folder that appears only when whole."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
import pyarrow as pa

from dist_dp.datasets.manifest import SplitInfo
from dist_dp.datasets.schema import DataSchema
from dist_dp.datasets.stored import USER, stored_schema


class _HashingFile:
    """A file object that keeps the sha256 of what is written."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.digest = hashlib.sha256()
        self.closed = False

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self._stream.write(data)

    def flush(self) -> None:
        self._stream.flush()

    def tell(self) -> int:
        return self._stream.tell()

    def close(self) -> None:
        self.closed = True


class SplitWriter:
    """Writes one split's Arrow file, and hashes the values in it."""

    def __init__(self, folder: Path, name: str, schema: DataSchema) -> None:
        self._path = folder / f"{name}.arrow"
        self._schema = stored_schema(schema)
        # Users are no part of a record's content: with and without them it is the same record.
        self._columns = {f.name: hashlib.sha256() for f in self._schema if f.name != USER}
        # Apart from the values, or the hash would tell in which batches they came.
        self._lengths = {
            f.name: hashlib.sha256()
            for f in self._schema
            if f.name != USER and pa.types.is_list(f.type)
        }
        self._rows = 0

    def __enter__(self) -> Self:
        self._stream = self._path.open("wb")
        self._file = _HashingFile(self._stream)
        self._writer = pa.ipc.new_file(pa.PythonFile(self._file, "w"), self._schema)
        return self

    def __exit__(self, *_: object) -> None:
        # Closing the Arrow writer belongs to finish() alone: a second time adds a second footer.
        with contextlib.suppress(OSError):
            self._stream.close()

    def write(self, batch: Any) -> None:
        """Appends a record batch of the stored form."""
        if batch.num_rows == 0:
            return
        self._rows += batch.num_rows
        for name, digest in self._columns.items():
            array = batch.column(name)
            if pa.types.is_list(array.type):
                self._lengths[name].update(np.asarray(array.value_lengths()).tobytes())
            flat = array if pa.types.is_float32(array.type) else array.flatten()
            digest.update(np.asarray(flat).tobytes())
        self._writer.write_batch(batch)

    def finish(self) -> SplitInfo:
        """Completes the file, and describes it."""
        self._writer.close()
        self._stream.flush()
        os.fsync(self._stream.fileno())
        content = [[name, digest.hexdigest()] for name, digest in self._columns.items()]
        content += [[name, "lengths", of.hexdigest()] for name, of in self._lengths.items()]
        text = json.dumps([self._rows, content])
        return SplitInfo(
            file=self._path.name,
            rows=self._rows,
            bytes=self._path.stat().st_size,
            sha256=self._file.digest.hexdigest(),
            fingerprint=hashlib.sha256(text.encode()).hexdigest(),
        )


@contextlib.contextmanager
def partial_folder(destination: Path) -> Iterator[Path]:
    """A locked temporary folder beside the destination, removed at the end if still there.

    Folders that a killed process has left are recognised by their free lock, and removed.
    """
    parent = destination.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{destination.name}.partial-"
    for left in parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError), _locked(left / "lock"):
            shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        with _locked(folder / "lock"):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds the lock of a file; raises BlockingIOError when another process does."""
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def publish(folder: Path, destination: Path, overwrite: bool, sources: Sequence[Path]) -> bool:
    """Renames the finished folder; False if another process's store is there by now.

    It holds the records: whoever may not read all of the sources may not read it either, nor
    whom the umask leaves out.
    """
    lock = folder / "lock"
    rights = [path.stat().st_mode for path in (*sources, lock)]
    lock.unlink()
    shared = [who for who in (3, 0) if all(mode & (4 << who) for mode in rights)]
    folder.chmod(0o700 | sum(5 << who for who in shared))
    if overwrite and destination.exists():
        old = folder.with_name(folder.name.replace(".partial-", ".replaced-"))
        destination.rename(old)
        try:
            folder.rename(destination)
        except OSError:
            old.rename(destination)
            raise
        shutil.rmtree(old, ignore_errors=True)
        return True
    try:
        folder.rename(destination)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True
