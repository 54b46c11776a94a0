"""Conversion of a source to Arrow files, once, all or nothing."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_dp.datasets.manifest import (
    MANIFEST_NAME,
    FileIdentity,
    Manifest,
    SplitInfo,
    check_schema_fits,
    combined_fingerprint,
    load_manifest,
)
from dist_dp.datasets.readers import Reader, open_reader
from dist_dp.datasets.schema import DataSchema
from dist_dp.datasets.stored import RECORD_KEY
from dist_dp.datasets.writing import SplitWriter, partial_folder, publish
from dist_dp.errors import ConfigError, DataError

Fill = Callable[[Reader, Path, dict[str, float] | None], dict[str, SplitInfo]]
"""Writes the splits of a reader into a folder; adds to the reader's ``skipped``."""

DEFAULT_SPLIT: Mapping[str, float] = {"train": 0.8, "valid": 0.1, "test": 0.1}


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    format: str = "auto",
    schema: DataSchema | None = None,
    split: Mapping[str, float] | None = DEFAULT_SPLIT,
    split_seed: int = 0,
    skip_bad_rows: bool = False,
    max_bad_rows: int | None = None,
    progress: bool = True,
    overwrite: bool = False,
    user: str | None = None,
) -> Manifest:
    """Converts a source to a store of memory-mapped Arrow files, unless that is done already.

    The store is written beside ``destination`` and renamed when it is whole, so that a crash or
    a full disk leaves nothing half-written. A store already there is reused when it was made
    from the same source (size, time of change and sampled content of every file), format, split
    and schema; only pooling and table sizes may differ, and the returned manifest holds the
    requested ones (the file keeps those of the first conversion).

    Args:
        source: File or folder.
        destination: Folder to make.
        format: See :func:`dist_dp.datasets.readers.open_reader`.
        schema: Label and features; the format's default when None.
        split: Fraction of the records by split name, summing to 1; None puts all in ``all``.
            A record's split depends on a hash of its content and the seed alone.
        split_seed: Seed of the split.
        skip_bad_rows: Leave bad rows out and count them in ``skipped_rows``, instead of an error.
        max_bad_rows: With ``skip_bad_rows``: more than this many are an error all the same.
        progress: Show a progress bar on stderr if that is a terminal.
        overwrite: Replace a store that does not fit.
        user: Column with the key of each record's user, in place of the schema's; a hash of the key
            is stored.

    Returns:
        The manifest.

    Raises:
        DataError: A bad row, an unreadable source, a full disk, or a store in the way.
        ConfigError: Impossible fractions, or a schema that does not fit the format.
    """
    reader = open_reader(
        source,
        format,
        schema,
        skip_bad_rows=skip_bad_rows,
        split_seed=_checked_seed(split_seed),
        user=user,
    )
    reader.max_bad_rows = max_bad_rows
    return write_store(reader, destination, split=split, progress=progress, overwrite=overwrite)


def write_store(
    reader: Reader,
    destination: str | Path,
    *,
    split: Mapping[str, float] | None = DEFAULT_SPLIT,
    progress: bool = True,
    overwrite: bool = False,
    fill: Fill | None = None,
) -> Manifest:
    """:func:`convert` for a reader already open; its ``split_seed`` is used.

    ``fill`` writes the splits in another way than by reading from start to end.
    """
    destination = Path(destination)
    split = _checked_split(split)
    identity = reader.identity()
    if destination.exists() and not overwrite:
        return _reused(destination, reader, identity, split)
    if destination.exists() and not (destination / MANIFEST_NAME).exists():
        raise DataError(
            f"{destination}: exists and is not a converted data set; it is not overwritten: "
            "choose another destination"
        )
    try:
        with partial_folder(destination) as folder:
            if fill is None:
                splits = write_splits(reader, folder, split, progress)
            else:
                splits = fill(reader, folder, split)
            if not any(info.rows for info in splits.values()):
                raise DataError(
                    f"{reader.path}: no usable row is left ({sum(reader.skipped.values())} "
                    "skipped); check the format"
                )
            if reader.identity() != identity:
                raise DataError(f"{reader.path}: changed while it was read; convert it again")
            manifest = Manifest(
                format_version=1 if reader.schema.user is None else 2,
                source_format=reader.format,
                source=identity,
                schema=reader.schema,
                split=split,
                split_seed=reader.split_seed,
                splits=splits,
                skipped_rows=dict(sorted(reader.skipped.items())),
                fingerprint=combined_fingerprint(splits),
            )
            with (folder / MANIFEST_NAME).open("w") as stream:
                stream.write(manifest.to_json())
                stream.flush()
                os.fsync(stream.fileno())
            if publish(folder, destination, overwrite, reader.files):
                return manifest
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise DataError(
            f"{destination}: cannot be written ({error.strerror or error}); "
            f"{'free some space' if full else 'check the path and its permissions'} and convert "
            "again; nothing was left behind"
        ) from error
    # Another process has made the same store meanwhile.
    return _reused(destination, reader, identity, split)


def _reused(
    destination: Path,
    reader: Reader,
    identity: tuple[FileIdentity, ...],
    split: dict[str, float] | None,
) -> Manifest:
    manifest = load_manifest(destination)
    differences = [
        what
        for what, same in (
            ("source", manifest.source == identity),
            ("format", manifest.source_format == reader.format),
            ("column of users", reader.schema.user in (None, manifest.data_schema.user)),
            ("schema", _features(manifest.data_schema) == _features(reader.schema)),
            ("split", manifest.split == split and manifest.split_seed == reader.split_seed),
            ("skip_bad_rows", reader.skip_bad_rows or not manifest.skipped_rows),
        )
        if not same
    ]
    if manifest.split and split and list(manifest.split) != list(split):
        differences.append("order of the splits")
    if differences:
        raise DataError(
            f"{destination}: holds a data set converted with another {', '.join(differences)}; "
            "choose another destination, or pass overwrite=True to replace it"
        )
    check_schema_fits(manifest, reader.schema, destination)
    schema = reader.schema.with_user(manifest.data_schema.user)
    return manifest.model_copy(update={"data_schema": schema})


def _features(schema: DataSchema) -> str:
    """What two schemas share that differ in the column of users only."""
    return schema.with_user(None).storage_hash()


def _checked_seed(seed: int) -> int:
    if not 0 <= seed < 2**64:
        raise ConfigError(f"split_seed is {seed}; it must lie in [0, 2**64)")
    return seed


def _checked_split(split: Mapping[str, float] | None) -> dict[str, float] | None:
    if split is None:
        return None
    for name, fraction in split.items():
        if not name.isidentifier():
            raise ConfigError(f"split: {name!r} cannot name a split; use letters and digits")
        if not 0 < fraction <= 1:
            raise ConfigError(f"split: {name} is {fraction}; a fraction lies in (0, 1]")
    if abs(sum(split.values()) - 1) > 1e-9:
        raise ConfigError(
            f"split: the fractions sum to {sum(split.values()):g}; they must sum to 1"
        )
    return {name: float(fraction) for name, fraction in split.items()}


def assign_splits(keys: NDArray[np.uint64], split: Mapping[str, float]) -> NDArray[np.int64]:
    """Position of the split of each record key, by the cumulated fractions."""
    uniform = (keys >> np.uint64(11)).astype(np.float64) * 2.0**-53
    bounds = np.cumsum(list(split.values()))
    bounds[-1] = 1.0
    return np.searchsorted(bounds, uniform, side="right")


def write_splits(
    reader: Reader, folder: Path, split: Mapping[str, float] | None, progress: bool = False
) -> dict[str, SplitInfo]:
    """Reads all that a reader gives, and writes one Arrow file for each split."""
    names = list(split) if split else ["all"]
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(SplitWriter(folder, name, reader.schema)) for name in names]
        advance = stack.enter_context(_progress(reader, progress))
        for batch in reader:
            reader.check_skipped()
            keys = batch.column(RECORD_KEY).to_numpy(zero_copy_only=False)
            content = batch.drop_columns([RECORD_KEY])
            if split is None:
                writers[0].write(content)
            else:
                assigned = assign_splits(keys, split)
                for position, writer in enumerate(writers):
                    writer.write(content.take(np.flatnonzero(assigned == position)))
            advance()
        reader.check_skipped()
        advance()
        return {name: writer.finish() for name, writer in zip(names, writers, strict=True)}


@contextlib.contextmanager
def _progress(reader: Reader, wanted: bool) -> Iterator[Any]:
    """Gives a function to call after each batch; draws only on a terminal."""
    if not wanted or not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    console = Console(stderr=True)
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task(f"converting {reader.path.name}", total=reader.total_bytes)
        yield lambda: bar.update(task, completed=reader.bytes_read)
