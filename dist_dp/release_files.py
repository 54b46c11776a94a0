"""Files of a release: hashed while they are written, and visible all at once or not at all.

::

    .NAME.partial/          being written (for its owner alone), or left by a process that died
        manifest.pending    the manifest, once everything else is on the disk
    NAME/                   released: always whole
        release.json        the manifest

Nothing in a partial folder loads: it has no ``release.json``. That name and the folder's own are
given last, by two renames.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from dist_dp.durable import sync_folder
from dist_dp.errors import ReleaseError

MANIFEST = "release.json"
_PENDING = "manifest.pending"
_BESIDE_BYTES = 1 << 20
"""Pieces from this size on are hashed in another thread while they are written."""


@dataclass(frozen=True)
class FileFacts:
    """What the manifest says about a file.

    Attributes:
        bytes: Its size.
        sha256: Hex digest of its content.
    """

    bytes: int
    sha256: str


class HashedFile:
    """A new file whose sha256 is computed while it is written, so that it is not read again.

    Made for pyarrow, which writes to any object with the methods of a file.

    Args:
        path: The file; it must not exist.
        hasher: Threads to hash in while this one writes; None hashes in this one.

    Raises:
        OSError: The file exists or cannot be made.
    """

    def __init__(self, path: Path, hasher: Executor | None = None) -> None:
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115 (closed by close)
        self._hasher = hasher
        self._digest = hashlib.sha256()
        self._bytes = 0

    def write(self, data: Any) -> int:
        """Writes all of a buffer; returns its size in bytes."""
        view = memoryview(data).cast("B")
        beside = self._hasher is not None and view.nbytes >= _BESIDE_BYTES
        if beside:
            assert self._hasher is not None
            hashing = self._hasher.submit(self._digest.update, view)
        else:
            self._digest.update(view)
        try:
            rest = view
            while rest:
                rest = rest[self._file.write(rest) :]
        finally:
            if beside:
                hashing.result()
        self._bytes += view.nbytes
        return view.nbytes

    def finish(self) -> FileFacts:
        """Waits until the content is on the disk and closes the file."""
        os.fsync(self._file.fileno())
        self._file.close()
        return FileFacts(self._bytes, self._digest.hexdigest())

    def close(self) -> None:
        """Closes the file, finished or not."""
        self._file.close()

    @property
    def closed(self) -> bool:
        """Whether it is closed."""
        return self._file.closed

    def tell(self) -> int:
        """Bytes written."""
        return self._bytes

    def flush(self) -> None:
        """Nothing waits here."""

    def readable(self) -> bool:
        """False."""
        return False

    def writable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """False."""
        return False

    def __enter__(self) -> HashedFile:
        """Itself."""
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        """Closes it."""
        self.close()


def write_file(path: Path, content: bytes) -> FileFacts:
    """Writes a small file and waits until it is on the disk."""
    with HashedFile(path) as file:
        file.write(content)
        return file.finish()


def partial_folder(destination: Path) -> Path:
    """Where a release is written before it appears."""
    return destination.with_name(f".{destination.name}.partial")


def begin(destination: Path) -> None:
    """Makes the partial folder of a release; one that a dead process left is removed.

    Raises:
        ReleaseError: The release exists already.
    """
    if destination.exists():
        raise ReleaseError(f"'{destination}' exists; choose another folder or remove it first")
    partial = partial_folder(destination)
    if partial.exists():
        shutil.rmtree(partial)
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.mkdir(mode=0o700)
    (partial / "tables").mkdir()


def discard(destination: Path) -> None:
    """Removes what there is of a release that was not finished."""
    shutil.rmtree(partial_folder(destination), ignore_errors=True)


def make_ready(destination: Path, manifest: bytes) -> None:
    """Puts the manifest beside the files; from here on only :func:`publish` is missing.

    Args:
        destination: The release; everything else of it is written and on the disk.
        manifest: Content of ``release.json``.
    """
    partial = partial_folder(destination)
    write_file(partial / _PENDING, manifest)
    for folder in (partial / "tables", partial):
        sync_folder(folder)


def ready_manifest(destination: Path) -> bytes | None:
    """The manifest of a release that only :func:`publish` is missing for; None if there is none."""
    for name in (_PENDING, MANIFEST):
        path = partial_folder(destination) / name
        if path.is_file():
            return path.read_bytes()
    return None


def publish(destination: Path) -> None:
    """Makes the release appear, whole; goes on where a process died in the middle.

    Raises:
        ReleaseError: Something has taken the name meanwhile.
    """
    partial = partial_folder(destination)
    if destination.exists():
        raise ReleaseError(f"'{destination}' exists; choose another folder or remove it first")
    # Readable like the folders in it, which were made with the process's usual rights.
    partial.chmod((partial / "tables").stat().st_mode & 0o777)
    if (partial / _PENDING).exists():
        (partial / _PENDING).rename(partial / MANIFEST)
        sync_folder(partial)
    partial.rename(destination)
    sync_folder(destination.parent)


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
