"""How many units (records or users) hold each row of the tables: counted once, before training.

Every rank counts its own part of the units, and the counts are summed. Tables are counted some at
a time, so that a rank holds the counts of about the largest table and not of all together; that
takes as many passes over the data set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dist_dp.batch_features import FeaturesOf, only_features
from dist_dp.distributed import all_reduce_sum, all_together, rank, world_size
from dist_dp.errors import ConfigError, DataError
from dist_dp.loader import BatchSource
from dist_dp.sharding import embedding_collections, table_configs
from dist_dp.user_records import UserRecords

Int64Array = NDArray[np.int64]
UInt64Array = NDArray[np.uint64]

_RECORDS_AT_ONCE = 1 << 14
_ROWS_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class TableFeatures:
    """A table, and where its ids stand in a batch.

    Attributes:
        table: Unique name: path of the collection, a dot, name of the table.
        num_rows: Rows of the whole table.
        features: The features that look it up.
        path: Path of its collection.
    """

    table: str
    num_rows: int
    features: tuple[str, ...]
    path: str = ""


def tables_of(model: nn.Module) -> list[TableFeatures]:
    """The tables of every collection of a model that is not sharded yet."""
    return [
        TableFeatures(f"{path}.{c.name}", c.num_embeddings, tuple(c.feature_names), path)
        for path, collection in embedding_collections(model).items()
        for c in table_configs(collection)
    ]


def row_counts(
    source: BatchSource,
    tables: Sequence[TableFeatures],
    max_rows_per_unit: int,
    *,
    users: UserRecords | None = None,
    features_of: FeaturesOf | None = None,
    device: torch.device | str = "cpu",
    rows_at_once: int = _ROWS_AT_ONCE,
) -> Iterator[tuple[TableFeatures, Tensor]]:
    """Counts the units that hold each row, table by table; a collective, the same on every rank.

    A unit counts once for a row, however often it holds it. Where it holds more than
    ``max_rows_per_unit`` rows of a table, so many of them count, picked by a fixed hash of the row
    and of all its rows of that table.

    Guarantee:
        One unit added or removed changes at most ``max_rows_per_unit`` counts of a table, each by
        1, all in one direction: which rows of a unit count depends on its own records alone, and a
        user is counted whole, on one rank, wherever its records lie. The counts themselves are not
        private.

    Args:
        source: The records.
        tables: What to count.
        max_rows_per_unit: Most rows of a table that a unit counts for.
        users: Whose the records are, where the unit is a user; by default each is a unit.
        features_of: From a batch to the ids of its collections; see `dist_dp.batch_features`.
        device: Where collectives run.
        rows_at_once: Tables are counted together up to so many rows.

    Yields:
        The table, and int64 ``[num_rows]`` on the CPU.

    Raises:
        ConfigError: An argument is out of its range, or a collection gets no features.
        DataError: A feature is missing, or an id lies outside its table.
    """
    if isinstance(max_rows_per_unit, bool) or not isinstance(max_rows_per_unit, int):
        raise ConfigError(f"max_rows_per_unit is {max_rows_per_unit!r}: give an integer")
    if max_rows_per_unit < 1:
        raise ConfigError(f"max_rows_per_unit is {max_rows_per_unit}: give 1 or more")
    if users is not None and users.num_records != len(source):
        raise ConfigError(
            f"users: {users.num_records} records have one, but the data set holds {len(source)}; "
            "give one for each record"
        )
    for group in _groups(tables, rows_at_once):
        counts = [np.zeros(table.num_rows, dtype=np.int64) for table in group]
        counter = _Counter(group, counts, max_rows_per_unit, features_of or only_features)
        all_together(_pass_over(source, users, counter), DataError, "count the rows of tables")
        for table in group:
            mine = torch.from_numpy(counts.pop(0))
            yield table, all_reduce_sum(mine.to(device)).cpu()


def _pass_over(
    source: BatchSource, users: UserRecords | None, counter: _Counter
) -> Callable[[], None]:
    """Counts this rank's part of the units; without collectives."""

    def count() -> None:
        units = len(source) if users is None else users.num_users
        first, last = (units * r // world_size() for r in (rank(), rank() + 1))
        for begin, end in _spans(users, first, last):
            numbers = np.arange(begin, end, dtype=np.int64)
            records, unit = numbers, numbers - begin
            if users is not None:
                sizes = users.counts(numbers)
                records = users.windows(numbers, np.zeros_like(numbers), sizes)
                unit = np.repeat(unit, sizes)
            pieces = []
            for at in range(0, len(records), _RECORDS_AT_ONCE):
                piece = slice(at, at + _RECORDS_AT_ONCE)
                batch = source.fetch(records[piece], len(records[piece]))
                pieces.append(counter.pairs_of(batch, unit[piece]))
            counter.add(pieces)

    return count


def _spans(users: UserRecords | None, first: int, last: int) -> Iterator[tuple[int, int]]:
    """Cuts units into stretches of so many records, or of one user with more."""
    if users is None:
        for begin in range(first, last, _RECORDS_AT_ONCE):
            yield begin, min(last, begin + _RECORDS_AT_ONCE)
        return
    ends = np.cumsum(users.counts(np.arange(first, last, dtype=np.int64)))
    begin = 0
    while begin < len(ends):
        done = int(ends[begin - 1]) if begin else 0
        end = int(np.searchsorted(ends, done + _RECORDS_AT_ONCE, side="right"))
        end = max(end, begin + 1)
        yield first + begin, first + end
        begin = end


class _Counter:
    """Adds units to the counts of some tables."""

    def __init__(
        self,
        tables: Sequence[TableFeatures],
        counts: Sequence[Int64Array],
        most: int,
        features_of: FeaturesOf,
    ) -> None:
        self._tables = tables
        self._counts = list(counts)
        self._most = most
        self._features_of = features_of

    def pairs_of(self, batch: Any, unit: Int64Array) -> list[Int64Array]:
        """By table, the distinct (unit, row) of a batch as unit · rows + row."""
        features = self._features_of(batch)
        found = []
        for table in self._tables:
            mine = features
            if isinstance(features, dict):
                if table.path not in features:
                    raise ConfigError(
                        f"features_of gives nothing for collection '{table.path}'; give one "
                        "KeyedJaggedTensor for each collection"
                    )
                mine = features[table.path]
            parts = [self._ids(mine, name, table, unit) for name in table.features]
            found.append(_distinct(parts))
        return found

    def _ids(self, features: Any, name: str, table: TableFeatures, unit: Int64Array) -> Int64Array:
        if name not in features.keys():  # noqa: SIM118 - no dict
            raise DataError(
                f"feature '{name}' of table '{table.table}' is missing from a batch; give a "
                "feature without ids empty bags"
            )
        bags = features[name]
        ids = bags.values().cpu().numpy().astype(np.int64)
        lengths = bags.lengths().cpu().numpy()
        if len(lengths) != len(unit):
            raise DataError(
                f"feature '{name}' has {len(lengths)} bags for {len(unit)} records; give one for "
                "each record"
            )
        outside = (ids < 0) | (ids >= table.num_rows)
        if outside.any():
            raise DataError(
                f"feature '{name}' holds the id {ids[outside][0]}, outside table '{table.table}' "
                f"of {table.num_rows} rows; hash the ids, or enlarge the table"
            )
        pairs: Int64Array = np.repeat(unit, lengths) * table.num_rows + ids
        return pairs

    def add(self, pieces: Sequence[Sequence[Int64Array]]) -> None:
        """Counts units that are complete; each piece has the pairs of every table."""
        for place, (table, counts) in enumerate(zip(self._tables, self._counts, strict=True)):
            pairs = _distinct([piece[place] for piece in pieces])
            unit, row = np.divmod(pairs, table.num_rows)
            np.add.at(counts, within_bound(unit, row, self._most), 1)


def _distinct(parts: Sequence[Int64Array]) -> Int64Array:
    """The distinct values of some arrays, ascending; fast where they are nearly in order."""
    values = np.concatenate([np.empty(0, dtype=np.int64), *parts])
    if len(values) > 1 and not (values[1:] > values[:-1]).all():
        values.sort(kind="stable")
        values = values[np.diff(values, prepend=-1) > 0]
    return values


def within_bound(unit: Int64Array, row: Int64Array, most: int) -> Int64Array:
    """The rows that count: of each unit all, or ``most`` of them.

    Guarantee:
        A unit gives at most ``most`` distinct rows, which depend on its own rows alone, not on its
        number nor on other units.

    Args:
        unit: Ascending, int64 ``[pairs]``.
        row: Distinct for each unit and ascending, int64 ``[pairs]``.
        most: The bound.
    """
    sizes = np.bincount(unit) if len(unit) else np.empty(0, dtype=np.int64)
    if sizes.max(initial=0) <= most:
        return row
    over = (sizes > most)[unit]
    kept = [row[~over]]
    unit, row = unit[over], row[over]
    starts = np.flatnonzero(np.diff(unit, prepend=-1))
    sizes = np.diff(starts, append=len(unit))
    # Rows that come together in one unit come together in no fixed order in another.
    own = np.add.reduceat(_mixed(row.astype(np.uint64)), starts)
    place = _mixed(row.astype(np.uint64) ^ np.repeat(own, sizes))
    order = np.lexsort((row, place, unit))
    within = np.arange(len(unit)) - np.repeat(starts, sizes)
    kept.append(row[order][within < most])
    return np.concatenate(kept)


def _mixed(value: UInt64Array) -> UInt64Array:
    """A fixed permutation of 64 bits without visible order (the finaliser of SplitMix64)."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _groups(tables: Sequence[TableFeatures], rows_at_once: int) -> Iterator[list[TableFeatures]]:
    """Tables in order, as many together as have no more rows than the largest, or so many."""
    limit = max([rows_at_once, *(table.num_rows for table in tables)])
    group: list[TableFeatures] = []
    for table in tables:
        if group and sum(t.num_rows for t in group) + table.num_rows > limit:
            yield group
            group = []
        group.append(table)
    if group:
        yield group
