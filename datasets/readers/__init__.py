"""Readers of the supported source formats, and the choice of one.

A reader yields Arrow record batches of the stored form (:mod:`dist_dp.datasets.stored`) and
turns every bad row into a message with its file and line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

from dist_dp.datasets.readers.base import Reader
from dist_dp.datasets.schema import DataSchema
from dist_dp.errors import DataError

Format = Literal["auto", "criteo", "movielens-100k", "movielens-1m", "parquet"]

__all__ = ["Format", "Reader", "detect_format", "open_reader"]


def detect_format(path: Path) -> str:
    """Names the format of a file or folder from its name, contents of the folder or first line.

    Raises:
        DataError: Nothing fits, the path does not exist or the file is empty.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; check the path of the data")
    if path.is_dir():
        if (path / "u.data").is_file():
            return "movielens-100k"
        if (path / "ratings.dat").is_file():
            return "movielens-1m"
        if any(path.rglob("*.parquet")):
            return "parquet"
        raise DataError(
            f"{path}: the folder holds neither u.data, nor ratings.dat, nor *.parquet files; "
            "name the file, or give the format"
        )
    if path.suffix in (".parquet", ".pq"):
        return "parquet"
    if path.name == "ratings.dat":
        return "movielens-1m"
    from dist_dp.datasets.readers.text import first_line

    line = first_line(path)
    if line[:4] == b"PAR1":
        return "parquet"
    fields = line.count(b"\t") + 1
    if path.name == "u.data" or fields == 4:
        return "movielens-100k"
    if fields > 4:
        return "criteo"
    raise DataError(
        f"{path}: the format cannot be told from the first line; give one of "
        f"{', '.join(get_args(Format)[1:])}"
    )


def open_reader(
    path: str | Path,
    format: str = "auto",
    schema: DataSchema | None = None,
    *,
    skip_bad_rows: bool = False,
    split_seed: int = 0,
    chunk_bytes: int = 32 << 20,
    user: str | None = None,
) -> Reader:
    """Opens a source for reading.

    Args:
        path: File or folder.
        format: One of :data:`Format`.
        schema: Label and features; the format's default schema when None (Parquet has none).
        skip_bad_rows: Count bad rows by reason in ``reader.skipped`` instead of raising.
        split_seed: Seed of the record keys that decide the split.
        chunk_bytes: Bytes of text parsed at a time; results do not depend on it.
        user: Column with the key of each record's user, in place of the schema's.

    Raises:
        DataError: The source is absent or empty, or the format is unknown.
        ConfigError: The schema does not fit the format.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; check the path of the data")
    if not (path.is_file() or path.is_dir()):
        raise DataError(
            f"{path}: it is no regular file, and a source is read more than once; write what comes "
            "out of it to a file"
        )
    if format == "auto":
        format = detect_format(path)
    options = {
        "skip_bad_rows": skip_bad_rows,
        "split_seed": split_seed,
        "chunk_bytes": chunk_bytes,
    }
    reader = _reader(path, format, schema, options)
    if user is not None and user != reader.schema.user:
        reader = _reader(path, format, reader.schema.with_user(user), options)
    return reader


def _reader(path: Path, format: str, schema: DataSchema | None, options: dict[str, Any]) -> Reader:
    if format == "criteo":
        from dist_dp.datasets.readers.criteo import CriteoReader

        return CriteoReader(path, schema, **options)
    if format in ("movielens-100k", "movielens-1m"):
        from dist_dp.datasets.readers.movielens import MovieLensReader

        return MovieLensReader(path, schema, variant=format[len("movielens-") :], **options)
    if format == "parquet":
        from dist_dp.datasets.readers.parquet import ParquetReader

        return ParquetReader(path, schema, **options)
    raise DataError(f"unknown format {format!r}; the formats are {', '.join(get_args(Format))}")
