"""MovieLens ratings joined with their users and movies.

- 100k: a folder with ``u.data`` (tabs), ``u.user`` and ``u.item`` (bars), or ``u.data`` alone;
- 1M: a folder with ``ratings.dat``, ``users.dat`` and ``movies.dat`` (double colons).

Columns offered to a schema: user_id, item_id, rating, timestamp, and with the side files age,
gender, occupation, zip_code, zip_region (its first character), release_year, genres (a list).
User and item numbers are taken as ids: their range is part of the data sets' public
description, not counted here. In 1M, occupation is a code and age the lower end of a band.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dist_dp.datasets.encode import Columns, Problem
from dist_dp.datasets.hashing import record_keys
from dist_dp.datasets.readers.base import Reader
from dist_dp.datasets.readers.spans import Span, text_spans
from dist_dp.datasets.readers.text import parse_chunk, read_chunks
from dist_dp.datasets.schema import DataSchema, DenseFeature, SparseFeature
from dist_dp.errors import ConfigError, DataError

RATING_COLUMNS = ("user_id", "item_id", "rating", "timestamp")
USER_COLUMNS = ("age", "gender", "occupation", "zip_code", "zip_region")
ITEM_COLUMNS = ("release_year", "genres")
GENRES_100K = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime",
    "Documentary", "Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance",
    "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip

_YEAR = re.compile(r"\((\d{4})\)\s*$")
# First and last second of collection, in round numbers, from the public descriptions:
# September 1997 to April 1998, and the years 2000 to 2003.
_TIME = {"100k": (873_072_000, 20_000_000), "1m": (946_684_800, 95_000_000)}
_IDS = {"100k": (944, 1683), "1m": (6041, 3953)}
_FILES = {"100k": ("u.data", "u.user", "u.item"), "1m": ("ratings.dat", "users.dat", "movies.dat")}


def default_schema(
    variant: str = "100k", *, side_features: bool = True, timestamp: bool = True
) -> DataSchema:
    """Label: rating of 4 or more; user, item, gender, occupation, genres; time, age, release year.

    Args:
        variant: ``100k`` or ``1m``.
        side_features: False when only the ratings file is at hand.
        timestamp: Whether the time of the rating is a dense feature. Without side features it
            is the only one.
    """
    users, items = _IDS[variant]
    start, span = _TIME[variant]
    dense = []
    sparse = [
        SparseFeature(name="user_id", num_embeddings=users, hashed=False),
        SparseFeature(name="item_id", num_embeddings=items, hashed=False),
    ]
    if timestamp:
        dense.append(DenseFeature(name="timestamp", shift=start + span / 2, scale=span / 2))
    if side_features:
        dense += [
            DenseFeature(name="age", shift=35, scale=15),
            DenseFeature(name="release_year", shift=1985, scale=15, missing=1985),
        ]
        sparse += [
            # Sizes at which the publicly listed tokens fall into rows of their own.
            SparseFeature(name="gender", num_embeddings=8),
            SparseFeature(name="occupation", num_embeddings=768),
            SparseFeature(name="genres", num_embeddings=256, ragged=True),
        ]
    return DataSchema(label="rating", label_threshold=4.0, dense=tuple(dense), sparse=tuple(sparse))


@dataclass(frozen=True)
class _Side:
    """Users or items: their ids, sorted, and one Arrow array for each column, in that order."""

    file: Path
    ids: NDArray[np.int64]
    arrays: dict[str, Any]

    def find(self, ids: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Position of each id (0 where absent) and which are absent."""
        position = np.searchsorted(self.ids, ids)
        position[position == len(self.ids)] = 0
        absent = self.ids[position] != ids
        position[absent] = 0
        return position, absent


class MovieLensReader(Reader):
    """Reads one MovieLens data set; see the module."""

    def __init__(
        self, path: Path, schema: DataSchema | None = None, *, variant: str, **options: Any
    ) -> None:
        """Finds the files and checks the schema against their columns.

        Raises:
            DataError: A file is absent.
            ConfigError: The schema needs a column that these files do not hold.
        """
        self.variant = variant
        self.format = f"movielens-{variant}"
        names = _FILES[variant]
        folder = path if path.is_dir() else path.parent
        ratings = path / names[0] if path.is_dir() else path
        sides = [folder / name for name in names[1:]] if path.is_dir() else []
        if schema is None:
            schema = default_schema(variant, side_features=bool(sides))
        needed = set(schema.source_columns())
        if not needed & {*USER_COLUMNS, *ITEM_COLUMNS}:
            sides = []
        if needed & {*USER_COLUMNS, *ITEM_COLUMNS} and not sides:
            column = sorted(needed & {*USER_COLUMNS, *ITEM_COLUMNS})[0]
            raise ConfigError(
                f"{path}: column {column!r} is not in the ratings file; name the folder that "
                f"also holds {names[1]} and {names[2]}"
            )
        known = {*RATING_COLUMNS, *USER_COLUMNS, *ITEM_COLUMNS}
        for column in schema.source_columns():
            if column not in known:
                raise ConfigError(
                    f"MovieLens has no column {column!r}; the columns are "
                    f"{', '.join([*RATING_COLUMNS, *USER_COLUMNS, *ITEM_COLUMNS])}"
                )
        for file in [ratings, *sides]:
            if not file.is_file():
                raise DataError(f"{file}: no such file; MovieLens {variant} needs it")
        super().__init__(path, schema, [ratings, *sides], **options)
        self._ratings, self._sides = ratings, sides

    def spans(self, size: int) -> list[Span]:
        """Parts of the ratings; users and movies are read with each."""
        return text_spans(self._ratings, size, self.chunk_bytes)

    def batches(self) -> Iterator[Any]:
        """Yields record batches; see the base class."""
        skipped = self.skipped if self.skip_bad_rows else None
        sides = []
        if self._sides:
            read_users, read_items = (
                (_users_100k, _items_100k) if self.variant == "100k" else (_users_1m, _items_1m)
            )
            sides = [("user_id", read_users(self._sides[0])),
                     ("item_id", read_items(self._sides[1]))]  # fmt: skip
            self.bytes_read = sum(file.stat().st_size for file in self._sides)
        before = self.bytes_read
        separator = b"\t" if self.variant == "100k" else b"::"
        for chunk in read_chunks(
            self._ratings, self.chunk_bytes, separator, self.span, self.first_number
        ):
            table = parse_chunk(chunk, RATING_COLUMNS, RATING_COLUMNS, RATING_COLUMNS, skipped)
            arrays = {name: table.column(name).combine_chunks() for name in RATING_COLUMNS}
            n = len(chunk.lines)
            problems = []
            for key in ("user_id", "item_id"):
                ids = arrays[key].to_numpy(zero_copy_only=False)
                odd = ~(np.isfinite(ids) & (ids == np.floor(ids)) & (np.abs(ids) < 2**53))
                if odd.any():
                    problems.append(_odd_id(key, ids, odd))
                arrays[key] = pa.array(np.where(odd, 0, ids).astype(np.int64))
            for key, side in sides:
                ids = arrays[key].to_numpy(zero_copy_only=False)
                position, absent = side.find(ids)
                if absent.any():
                    problems.append(_unknown_id(key, ids, absent, side.file))
                arrays |= {name: array.take(position) for name, array in side.arrays.items()}
            keys = record_keys(chunk.lines, self.split_seed)
            yield self._encode(Columns(arrays, n, keys), chunk.where, problems)
            self.bytes_read = before + chunk.position


def _odd_id(key: str, ids: NDArray[np.float64], odd: NDArray[np.bool_]) -> Problem:
    return Problem(
        np.flatnonzero(odd),
        f"{key} is not an integer",
        lambda row: f"{key} is {ids[row]:g}, not an integer; correct it",
    )


def _unknown_id(key: str, ids: NDArray[np.int64], absent: NDArray[np.bool_], file: Path) -> Problem:
    return Problem(
        np.flatnonzero(absent),
        f"unknown {key}",
        lambda row: (
            f"{key} {ids[row]} does not occur in {file.name}; add it there, or name the "
            "ratings file alone"
        ),
    )


def _rows(path: Path, separator: str, fields: int) -> Iterator[tuple[str, list[str]]]:
    """Place and fields of each line; the files are Latin-1 by their descriptions."""
    number = 0
    for number, line in enumerate(path.read_text("latin-1").split("\n"), start=1):
        if not line.strip():
            continue
        values = line.rstrip("\r").split(separator)
        if len(values) != fields:
            raise DataError(
                f"{path}:{number}: {len(values)} fields where {fields} belong; complete the line"
            )
        yield f"{path}:{number}", values


def _integer(text: str, name: str, where: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise DataError(f"{where}: {name} is {text!r}, not an integer; correct it") from None


def _side(path: Path, rows: dict[int, dict[str, Any]], types: dict[str, Any]) -> _Side:
    if not rows:
        raise DataError(f"{path}: the file is empty; check that it was written completely")
    ids = sorted(rows)
    arrays = {name: pa.array([rows[i][name] for i in ids], kind) for name, kind in types.items()}
    return _Side(path, np.array(ids, dtype=np.int64), arrays)


_USER_TYPES = {
    "age": pa.int64(),
    "gender": pa.string(),
    "occupation": pa.string(),
    "zip_code": pa.string(),
    "zip_region": pa.string(),
}
_ITEM_TYPES = {"release_year": pa.int64(), "genres": pa.list_(pa.string())}


def _user(age: int, gender: str, occupation: str, zip_code: str) -> dict[str, Any]:
    return {
        "age": age,
        "gender": gender,
        "occupation": occupation,
        "zip_code": zip_code,
        "zip_region": zip_code[:1],
    }


def _users_100k(path: Path) -> _Side:
    rows = {
        _integer(v[0], "user_id", where): _user(_integer(v[1], "age", where), *v[2:])
        for where, v in _rows(path, "|", 5)
    }
    return _side(path, rows, _USER_TYPES)


def _users_1m(path: Path) -> _Side:
    rows = {
        _integer(v[0], "user_id", where): _user(_integer(v[2], "age", where), v[1], v[3], v[4])
        for where, v in _rows(path, "::", 5)
    }
    return _side(path, rows, _USER_TYPES)


def _year(title: str) -> int | None:
    match = _YEAR.search(title)
    return int(match.group(1)) if match else None


def _items_100k(path: Path) -> _Side:
    rows: dict[int, dict[str, Any]] = {}
    for where, values in _rows(path, "|", 24):
        year = values[2][-4:]
        rows[_integer(values[0], "item_id", where)] = {
            "release_year": int(year) if year.isdigit() else _year(values[1]),
            "genres": [g for g, flag in zip(GENRES_100K, values[5:], strict=True) if flag == "1"],
        }
    return _side(path, rows, _ITEM_TYPES)


def _items_1m(path: Path) -> _Side:
    rows = {
        _integer(v[0], "item_id", where): {
            "release_year": _year(v[1]),
            "genres": [genre for genre in v[2].split("|") if genre],
        }
        for where, v in _rows(path, "::", 3)
    }
    return _side(path, rows, _ITEM_TYPES)
