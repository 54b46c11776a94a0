"""A conversion in parts: each is whole on disk or not there, and the parts make the store.

Parts lie in a folder beside the destination until the store is published. They are cut so that
their record batches, one part after the other, are those of one pass over the source: the store is
the same, down to its fingerprints, in whatever order and by whomever the parts were written.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dist_dp.arrow_file import ArrowFile
from dist_dp.datasets.convert import write_splits
from dist_dp.datasets.manifest import SplitInfo
from dist_dp.datasets.readers import Reader, open_reader
from dist_dp.datasets.readers.spans import Span, lines_before
from dist_dp.datasets.schema import DataSchema
from dist_dp.datasets.writing import SplitWriter
from dist_dp.errors import DataError
from dist_dp.file_names import why_no_name
from dist_dp.limits import read_json, read_whole

DEFAULT_PART_BYTES = 256 << 20
_PLAN = "plan.json"
_PART = "part.json"


@dataclass(frozen=True)
class PartsPlan:
    """What all parts have in common; of simple types, to be sent to whoever writes one.

    Attributes:
        source: The file or folder.
        format: Its format.
        schema: Label and features.
        split: Fractions by split name, or None.
        split_seed: Seed of the split.
        skip_bad_rows: Count bad rows and leave them out.
        chunk_bytes: Bytes of text parsed at a time.
        spans: What each part holds.
        identity: What tells the source from another, or from a later state of itself.
    """

    source: str
    format: str
    schema: dict[str, Any]
    split: dict[str, float] | None
    split_seed: int
    skip_bad_rows: bool
    chunk_bytes: int
    spans: tuple[Span, ...]
    identity: str

    @classmethod
    def of(cls, reader: Reader, split: Mapping[str, float] | None, part_bytes: int) -> PartsPlan:
        """The plan for what a reader reads."""
        return cls(
            source=str(reader.path.resolve()),
            format=reader.format,
            schema=reader.schema.model_dump(mode="json"),
            split=None if split is None else dict(split),
            split_seed=reader.split_seed,
            skip_bad_rows=reader.skip_bad_rows,
            chunk_bytes=reader.chunk_bytes,
            spans=tuple(reader.spans(part_bytes)),
            identity=json.dumps([file.model_dump(mode="json") for file in reader.identity()]),
        )

    def to_json(self) -> str:
        """The text of ``plan.json``."""
        return json.dumps(asdict(self), indent=1)

    def reader(self, index: int) -> Reader:
        """A reader of one part."""
        reader = open_reader(
            self.source,
            self.format,
            DataSchema.model_validate(self.schema),
            skip_bad_rows=self.skip_bad_rows,
            split_seed=self.split_seed,
            chunk_bytes=self.chunk_bytes,
        )
        reader.span = self.spans[index]
        return reader


@dataclass(frozen=True)
class Part:
    """A part that is whole: its files by split, and its bad rows by reason."""

    splits: dict[str, SplitInfo]
    skipped: dict[str, int]


def write_part(folder: Path, plan: PartsPlan, index: int) -> None:
    """Writes one part, unless it is there; another process may do the same at the same time.

    Raises:
        DataError: A bad row, with its file and line, or an unreadable source.
        OSError: The folder cannot be written.
    """
    final = part_folder(folder, index)
    if (final / _PART).exists():
        return
    partial = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=folder))
    try:
        reader = plan.reader(index)
        try:
            splits = write_splits(reader, partial, plan.split)
        except DataError:
            if not plan.spans[index].start:
                raise
            # Once more, for the message: nobody has counted the lines before this part.
            reader = plan.reader(index)
            reader.first_number += lines_before(plan.spans[index])
            splits = write_splits(reader, partial, plan.split)
        text = json.dumps(
            {
                "splits": {name: info.model_dump() for name, info in splits.items()},
                "skipped": dict(reader.skipped),
            }
        )
        with (partial / _PART).open("w") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        with contextlib.suppress(FileExistsError):  # the same part, by another process
            _rename(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def part_folder(folder: Path, index: int) -> Path:
    """Where a part lies when it is whole."""
    return folder / f"part-{index:06d}"


def read_part(folder: Path, index: int) -> Part | None:
    """A part, or None if it is not there whole."""
    place = part_folder(folder, index)
    try:
        values = read_json(place / _PART)
        splits = {name: SplitInfo.model_validate(info) for name, info in values["splits"].items()}
        skipped = {str(reason): int(count) for reason, count in values["skipped"].items()}
        whole = all(
            why_no_name(i.file) is None and (place / i.file).stat().st_size == i.bytes
            for i in splits.values()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return Part(splits, skipped) if whole else None


@contextlib.contextmanager
def parts_folder(destination: Path, plan: PartsPlan) -> Iterator[Path]:
    """The folder of the parts of a store, held by one conversion at a time.

    Parts of the same plan are kept for it, others are removed. It stays when the block is left.

    Raises:
        DataError: Another conversion to the same destination is at work.
    """
    folder = destination.absolute().with_name(f".{destination.name}.parts")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"{destination}: is being converted by another process; wait until it is done"
            ) from None
        path = folder / _PLAN
        same = _holds(path, plan.to_json())
        for left in folder.iterdir():
            if left.is_dir() and not (same and left.name.startswith("part-")):
                shutil.rmtree(left)
        if not same:
            path.write_text(plan.to_json())
        for index in range(len(plan.spans)):
            place = part_folder(folder, index)
            if place.exists() and read_part(folder, index) is None:
                shutil.rmtree(place)
        yield folder


def _holds(path: Path, text: str) -> bool:
    try:
        return read_whole(path) == text.encode()
    except (OSError, ValueError):
        return False


def assemble(
    folder: Path, parts: Sequence[Part], schema: DataSchema, destination: Path
) -> tuple[dict[str, SplitInfo], Counter[str]]:
    """Writes the splits of a store from its parts, in order.

    Args:
        folder: Of the parts.
        parts: All of them.
        schema: Of the records.
        destination: Folder of the split files.

    Returns:
        The splits, and all bad rows by reason.

    Raises:
        DataError: A part's file is damaged.
    """
    skipped: Counter[str] = Counter()
    for part in parts:
        skipped.update(part.skipped)
    splits = {}
    for name in parts[0].splits:
        with SplitWriter(destination, name, schema) as writer:
            for index, part in enumerate(parts):
                _append(writer, part_folder(folder, index), part.splits[name])
            splits[name] = writer.finish()
    return splits, skipped


def _append(writer: SplitWriter, folder: Path, info: SplitInfo) -> None:
    path = folder / info.file
    remedy = f"remove '{folder}' and convert again: the other parts are kept"
    with path.open("rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != info.sha256:
            raise DataError(f"{path}: is damaged (its sha256 is not the one noted); {remedy}")
    try:
        for batch in ArrowFile(path).batches(full=True):
            writer.write(batch)
    except ValueError as error:
        raise DataError(f"{path}: is damaged ({error}); {remedy}") from None


def _rename(partial: Path, final: Path) -> None:
    """Like ``Path.rename``; raises FileExistsError where a folder with content is there."""
    try:
        partial.rename(final)
    except OSError as error:
        if final.exists():
            raise FileExistsError(str(final)) from error
        raise
