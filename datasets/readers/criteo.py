"""Criteo click logs: label, 13 integers I1..I13, 26 tokens C1..C26, separated by tabs.

This is the layout of the Display Advertising Challenge (Kaggle) and of the Terabyte logs, plain
or gzip. An empty field is a missing value.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dist_dp.datasets.encode import Columns
from dist_dp.datasets.hashing import record_keys
from dist_dp.datasets.readers.base import Reader
from dist_dp.datasets.readers.spans import Span, text_spans
from dist_dp.datasets.readers.text import parse_chunk, read_chunks
from dist_dp.datasets.schema import DataSchema, DenseFeature, SparseFeature
from dist_dp.errors import ConfigError

DENSE_COLUMNS = tuple(f"I{i}" for i in range(1, 14))
SPARSE_COLUMNS = tuple(f"C{i}" for i in range(1, 27))
COLUMNS = ("label", *DENSE_COLUMNS, *SPARSE_COLUMNS)

# Distinct tokens a column as published for the challenge's training file: a constant of this
# program, so table sizes made from it say nothing about the data at hand.
PUBLISHED_CARDINALITIES = (
    1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194,
    27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572,
)  # fmt: skip


def default_schema(maximum_num_embeddings: int = 100_000) -> DataSchema:
    """All 39 features: log(1 + max(x, 0)) of the integers, missing as 0; hashed tokens.

    Args:
        maximum_num_embeddings: Cap on the rows of a table. Below it a table has four times the
            published number of tokens, and at least 256 rows, so that few tokens collide.
    """
    return DataSchema(
        label="label",
        dense=tuple(DenseFeature(name=c, transform="log1p", missing=0.0) for c in DENSE_COLUMNS),
        sparse=tuple(
            SparseFeature(name=c, num_embeddings=min(maximum_num_embeddings, max(256, 4 * n)))
            for c, n in zip(SPARSE_COLUMNS, PUBLISHED_CARDINALITIES, strict=True)
        ),
    )


class CriteoReader(Reader):
    """Reads one Criteo file; see the module for the layout."""

    format = "criteo"

    def __init__(self, path: Path, schema: DataSchema | None = None, **options: Any) -> None:
        """Checks the schema against the layout.

        Raises:
            ConfigError: The schema names a column that the layout does not have, reads a token
                column as a number, or declares a ragged feature.
        """
        schema = schema or default_schema()
        if schema.user is not None:
            raise ConfigError(
                f"user {schema.user!r}: the Criteo layout does not say whose a record is, so users "
                "cannot be protected in it, only records; convert the logs to Parquet with a "
                "column of users, or remove user"
            )
        for column in schema.source_columns():
            if column not in COLUMNS:
                raise ConfigError(
                    f"the Criteo layout has no column {column!r}; its columns are label, "
                    "I1 to I13 and C1 to C26"
                )
        numbers = [schema.label, *(f.source_column for f in schema.dense)]
        for column in numbers:
            if column in SPARSE_COLUMNS:
                raise ConfigError(f"column {column!r} holds tokens; declare it as sparse")
        for feature in schema.sparse:
            if feature.ragged or feature.source_column in numbers:
                what = "ragged" if feature.ragged else "both dense (or the label) and sparse"
                raise ConfigError(
                    f"feature {feature.name!r} cannot be {what} in the Criteo layout; correct "
                    "the schema"
                )
        super().__init__(path, schema, [path], **options)
        self._numeric = [c for c in COLUMNS[:14] if c not in self._sparse_columns()]

    def _sparse_columns(self) -> set[str]:
        return {f.source_column for f in self.schema.sparse}

    def spans(self, size: int) -> list[Span]:
        """Parts of the file; a compressed one is read whole."""
        return text_spans(self.path, size, self.chunk_bytes)

    def batches(self) -> Iterator[Any]:
        """Yields record batches; see the base class."""
        skipped = self.skipped if self.skip_bad_rows else None
        wanted = self.schema.source_columns()
        for chunk in read_chunks(
            self.path, self.chunk_bytes, span=self.span, first_number=self.first_number
        ):
            table = parse_chunk(chunk, COLUMNS, self._numeric, wanted, skipped)
            arrays = {name: table.column(name) for name in wanted}
            keys = record_keys(chunk.lines, self.split_seed)
            yield self._encode(Columns(arrays, len(chunk.lines), keys), chunk.where)
            self.bytes_read = chunk.position
