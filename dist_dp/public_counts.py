"""Public row counts from a file, and the most frequent rows by them.

An Arrow IPC (uncompressed) or Parquet file with the columns ``table`` (text), ``row`` (integer) and
``count`` (a number of 0 or more), one line for each row of a table; rows that are not listed count
0. A table is named as in the model: path of its collection, a dot, its name; or by its name alone
where no other has it. Such counts cost no privacy, if they come from data that is public: counts of
the training records are none.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_dp.arrow_file import ArrowFile
from dist_dp.errors import DataError
from dist_dp.limits import MAX_COUNT_BYTES, MAX_COUNT_ROWS
from dist_dp.top_rows import check_rows_fit, largest

Int64Array = NDArray[np.int64]
Float64Array = NDArray[np.float64]

COLUMNS = ("table", "row", "count")
_ROWS_PER_BATCH = 1 << 16


def public_rows(
    path: str | Path, num_rows: Mapping[str, int], rows: Mapping[str, int]
) -> dict[str, Tensor]:
    """The most frequent rows of tables by a file of public counts.

    Of rows with equal counts those with the smaller numbers come first.

    Guarantee:
        Depends on the file alone, so it costs no privacy where the file does not depend on the
        training records.

    Args:
        path: The file; see the module.
        num_rows: Rows of every table of the model, by unique name.
        rows: How many rows to take, by unique name of the table.

    Returns:
        By unique name, int64, sorted.

    Raises:
        ConfigError: More rows are asked for than a table has.
        DataError: The file cannot be used; the message names the place.
    """
    check_rows_fit(rows, num_rows)
    counts = read_counts(path, num_rows)
    found = {}
    for table, wanted in rows.items():
        if table not in counts:
            raise DataError(
                f"{path}: has no counts of table '{table}' (it has those of "
                f"{', '.join(sorted(counts)) or 'none'}); add them, or leave 'frequencies' out to "
                "have the rows chosen privately"
            )
        listed, values = counts[table]
        here = values > 0
        chosen = listed[here][largest(values[here], wanted)]
        if len(chosen) < wanted:  # rows that count nothing, from the first on
            others = np.setdiff1d(np.arange(min(2 * wanted, num_rows[table])), chosen)
            chosen = np.concatenate([chosen, others[: wanted - len(chosen)]])
        found[table] = torch.from_numpy(np.sort(chosen))
    return found


def read_counts(
    path: str | Path, num_rows: Mapping[str, int]
) -> dict[str, tuple[Int64Array, Float64Array]]:
    """The rows and counts of a file by unique table name, rows ascending.

    Raises:
        DataError: The file is no such file, is damaged or too large, or a line makes no sense.
    """
    path = Path(path)
    parts: dict[str, list[tuple[Int64Array, Float64Array]]] = {}
    first, remedy = 0, "write it again, with the columns table, row and count"
    try:
        for batch in _batches(path):
            if first + batch.num_rows > MAX_COUNT_ROWS:
                raise ValueError(
                    f"it has more than {MAX_COUNT_ROWS:,} lines; keep the most frequent rows"
                )
            for name, where, row, count in _by_table(batch, first):
                table = _unique_name(name, num_rows)
                outside = (row < 0) | (row >= num_rows[table])
                if outside.any():
                    line = where[outside][0]
                    raise ValueError(
                        f"line {line}: row {row[outside][0]} is outside table '{table}' of "
                        f"{num_rows[table]} rows"
                    )
                parts.setdefault(table, []).append((row, count))
            first += batch.num_rows
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise DataError(f"{path}: is no file of row counts ({said}); {remedy}") from None
    return {table: _joined(path, table, some) for table, some in parts.items()}


def _joined(
    path: Path, table: str, parts: list[tuple[Int64Array, Float64Array]]
) -> tuple[Int64Array, Float64Array]:
    rows = np.concatenate([row for row, _ in parts])
    counts = np.concatenate([count for _, count in parts])
    order = np.argsort(rows, kind="stable")
    rows, counts = rows[order], counts[order]
    twice = np.flatnonzero(rows[1:] == rows[:-1])
    if len(twice):
        raise DataError(
            f"{path}: row {rows[twice[0]]} of table '{table}' is listed twice; add its counts up"
        )
    return rows, counts


def _batches(path: Path) -> Iterator[Any]:
    import pyarrow.parquet as pq

    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is no regular file")
        if status.st_size > MAX_COUNT_BYTES:
            raise ValueError(f"it has {status.st_size:,} bytes, {MAX_COUNT_BYTES:,} are read")
        kind = file.read(6)
    if kind == b"ARROW1":
        arrow = ArrowFile(path)
        _check_columns(arrow.schema)
        yield from arrow.batches(full=True)
    elif kind[:4] == b"PAR1":
        with pq.ParquetFile(path) as parquet:
            _check_columns(parquet.schema_arrow)
            groups = (parquet.metadata.row_group(g) for g in range(parquet.num_row_groups))
            if sum(group.total_byte_size for group in groups) > MAX_COUNT_BYTES:
                raise ValueError(f"it unpacks to more than {MAX_COUNT_BYTES:,} bytes")
            yield from parquet.iter_batches(_ROWS_PER_BATCH)
    else:
        raise ValueError("it is neither Arrow nor Parquet")


def _check_columns(schema: Any) -> None:
    if sorted(schema.names) != sorted(COLUMNS):
        raise ValueError(f"its columns are {', '.join(schema.names) or 'none'}")
    table, row, count = (schema.field(name).type for name in COLUMNS)
    if pa.types.is_dictionary(table):
        table = table.value_type
    if not (pa.types.is_string(table) or pa.types.is_large_string(table)):
        raise ValueError(f"its column table holds {table}, not text")
    if not pa.types.is_integer(row):
        raise ValueError(f"its column row holds {row}, not integers")
    if not (pa.types.is_integer(count) or pa.types.is_floating(count)):
        raise ValueError(f"its column count holds {count}, not numbers")


def _by_table(batch: Any, first: int) -> Iterator[tuple[str, Int64Array, Int64Array, Float64Array]]:
    """The parts of a batch by table name: line numbers from 0, rows, counts."""
    for name in COLUMNS:
        column = batch.column(name)
        if column.null_count:
            line = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
            raise ValueError(f"line {first + line}: its {name} is missing")
    rows = pc.cast(batch.column("row"), pa.int64()).to_numpy()
    counts = pc.cast(batch.column("count"), pa.float64(), safe=False).to_numpy()
    wrong = ~(np.isfinite(counts) & (counts >= 0))
    if wrong.any():
        line = int(np.flatnonzero(wrong)[0])
        raise ValueError(f"line {first + line}: its count is {counts[line]}, not 0 or more")
    names = batch.column("table")
    if not pa.types.is_dictionary(names.type):
        names = names.dictionary_encode()
    codes = names.indices.to_numpy(zero_copy_only=False)
    for code in np.unique(codes):
        where = np.flatnonzero(codes == code)
        yield names.dictionary[int(code)].as_py(), first + where, rows[where], counts[where]


def _unique_name(name: str, num_rows: Mapping[str, int]) -> str:
    if name in num_rows:
        return name
    found = [table for table in num_rows if table.rpartition(".")[2] == name]
    if len(found) != 1:
        why = f"is one of {', '.join(found)}" if found else "is not in the model"
        known = ", ".join(sorted(num_rows)[:8])
        raise ValueError(f"table '{name[:100]}' {why}; its tables are {known}")
    return found[0]
