"""Parquet files with a declared schema: one file, or all ``*.parquet`` files under a folder.

Sparse columns hold integers or text, ragged ones lists of them; dense columns and weights hold
numbers. A null is a missing value: an error in a dense column (unless the feature says what to
take instead), the empty token in a hashed sparse one, an empty bag in an unhashed or ragged one.
A NaN is always an error. Rows are named by file and row, counted from 0 as data frames do.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from dist_dp.datasets.encode import Columns
from dist_dp.datasets.readers.base import Reader
from dist_dp.datasets.readers.spans import Span
from dist_dp.datasets.schema import DataSchema
from dist_dp.errors import ConfigError, DataError

_ROWS_PER_BATCH = 65_536


class ParquetReader(Reader):
    """Reads Parquet by a declared schema; see the module."""

    format = "parquet"

    def __init__(self, path: Path, schema: DataSchema | None = None, **options: Any) -> None:
        """Finds the files.

        Raises:
            ConfigError: No schema is given.
            DataError: The folder holds no Parquet file.
        """
        if schema is None:
            raise ConfigError(
                f"{path}: Parquet needs a declared schema (label, dense, sparse): column types "
                "do not tell features from labels"
            )
        files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
        if not files:
            raise DataError(f"{path}: the folder holds no *.parquet file")
        super().__init__(path, schema, files, **options)

    def spans(self, size: int) -> list[Span]:
        """One part for each file, whatever its size."""
        return [Span(str(file)) for file in self.files]

    def batches(self) -> Iterator[Any]:
        """Yields record batches; see the base class."""
        import pyarrow.parquet as pq

        total = 0
        for file in self.files if self.span is None else [Path(self.span.file)]:
            try:
                with pq.ParquetFile(file) as source:
                    available = set(source.schema_arrow.names)
                    columns = [c for c in self.schema.source_columns() if c in available]
                    first_row = 0
                    for batch in source.iter_batches(_ROWS_PER_BATCH, columns=columns):
                        yield self._encode_batch(file, batch, first_row, available)
                        first_row += batch.num_rows
            except (pa.ArrowInvalid, OSError) as error:
                raise DataError(
                    f"{file}: is not a readable Parquet file ({error}); write it again"
                ) from error
            total += first_row
            self.bytes_read += file.stat().st_size
        if total == 0 and self.span is None:
            raise DataError(f"{self.path}: the data set has no rows")

    def _encode_batch(self, file: Path, batch: Any, first_row: int, available: set[str]) -> Any:
        for column in self.schema.source_columns():
            if column not in available:
                raise DataError(
                    f"{file}: no column {column!r}; the columns are "
                    f"{', '.join(sorted(available))}; correct the schema"
                )
        arrays = dict(zip(batch.schema.names, batch.columns, strict=True))
        return self._encode(
            Columns(arrays, batch.num_rows),
            lambda row: f"{file}: row {first_row + row} (counted from 0)",
        )
