"""Criteo-shaped click logs of any size, whose best possible AUC is known.

Every record's click probability is known (:mod:`dist_dp.datasets.truth`), so the AUC of that
probability on the generated records is the best that any model can be expected to reach on them.
Records are drawn in blocks keyed by (seed, block number): a longer log begins with the shorter
one, and memory does not depend on the length.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.csv as pacsv

from dist_dp.datasets.auc import ScoreHistogram
from dist_dp.datasets.convert import DEFAULT_SPLIT, write_store
from dist_dp.datasets.encode import Columns
from dist_dp.datasets.manifest import FileIdentity, Manifest
from dist_dp.datasets.readers.base import Reader
from dist_dp.datasets.schema import DataSchema, DenseFeature, SparseFeature
from dist_dp.datasets.truth import (
    BLOCK_ROWS,
    DEFAULT_CARDINALITIES,
    SyntheticChunk,
    SyntheticSettings,
    Truth,
)
from dist_dp.errors import ConfigError, DataError

__all__ = [
    "DEFAULT_CARDINALITIES",
    "SyntheticChunk",
    "SyntheticReader",
    "SyntheticSettings",
    "Truth",
    "criteo_like_schema",
    "iter_chunks",
    "write_criteo_like",
    "write_synthetic_store",
]


USER_COLUMN = "user"


def iter_chunks(settings: SyntheticSettings, num_records: int) -> Iterator[SyntheticChunk]:
    """Generates ``num_records`` records in chunks, in memory.

    Raises:
        ConfigError: ``num_records`` is not positive.
    """
    if num_records < 1:
        raise ConfigError(f"synthetic data: num_records is {num_records}; it must be positive")
    truth = Truth(settings)
    for number in range(-(-num_records // BLOCK_ROWS)):
        chunk = truth.block(number)
        left = num_records - number * BLOCK_ROWS
        if left < BLOCK_ROWS:
            chunk = SyntheticChunk(
                chunk.dense[:left],
                chunk.ranks[:left],
                chunk.labels[:left],
                chunk.probability[:left],
                None if chunk.users is None else chunk.users[:left],
            )
        yield chunk


def criteo_like_schema(
    settings: SyntheticSettings, num_embeddings: int | None = None
) -> DataSchema:
    """Schema of a synthetic log: I1.. by log(1 + max(x, 0)), hashed C1.., and users if it has any.

    Args:
        settings: Of the log.
        num_embeddings: Rows of every table; by default twice the column's cardinality, at
            least 64.
    """
    return DataSchema(
        label="label",
        dense=tuple(
            DenseFeature(name=f"I{j + 1}", transform="log1p", missing=0.0)
            for j in range(settings.num_dense)
        ),
        sparse=tuple(
            SparseFeature(name=f"C{f + 1}", num_embeddings=num_embeddings or max(64, 2 * n))
            for f, n in enumerate(settings.cardinalities)
        ),
        user=USER_COLUMN if settings.num_users else None,
    )


def _table(truth: Truth, chunk: SyntheticChunk) -> dict[str, Any]:
    """Source columns of a chunk, in the order of the Criteo layout."""
    columns = {"label": pa.array(chunk.labels)}
    for j in range(chunk.dense.shape[1]):
        values = chunk.dense[:, j]
        columns[f"I{j + 1}"] = pa.array(values, mask=values < 0)
    for f in range(chunk.ranks.shape[1]):
        columns[f"C{f + 1}"] = truth.tokens(f, chunk.ranks[:, f])
    if chunk.users is not None:
        columns[USER_COLUMN] = truth.tokens(len(chunk.ranks[0]), chunk.users)
    return columns


def write_criteo_like(
    path: str | Path,
    num_records: int,
    *,
    seed: int,
    num_dense: int = 13,
    cardinalities: Sequence[int] = DEFAULT_CARDINALITIES,
    zipf_exponent: float = 1.05,
    **settings: Any,
) -> dict[str, Any]:
    """Writes a synthetic log and its truth.

    The log is a TSV (Criteo's layout with the default columns), or Parquet with the same columns by
    name if the file's ending says so. Only Parquet has a place for users, in the column ``user``.

    Args:
        path: File to write; ``PATH.truth.json`` is written beside it.
        num_records: Lines.
        seed: Seed of records and truth.
        num_dense: Integer columns.
        cardinalities: Possible tokens of each token column.
        zipf_exponent: Exponent of the power law of the tokens.
        **settings: Further fields of :class:`SyntheticSettings`.

    Returns:
        The content of the truth file: ``settings``, ``num_records``, ``bias``, ``click_rate``
        (of the labels drawn), and of the true probability on these records ``best_auc``,
        ``best_log_loss`` and ``best_normalized_entropy``.

    Raises:
        ConfigError: Impossible settings.
        DataError: The file cannot be written; nothing is left behind.
    """
    chosen = SyntheticSettings(
        seed=seed,
        num_dense=num_dense,
        cardinalities=tuple(cardinalities),
        zipf_exponent=zipf_exponent,
        **settings,
    )
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    as_parquet = path.suffix == ".parquet"
    if chosen.num_users and not as_parquet:
        raise ConfigError(
            f"{path}: Criteo's layout has no place for users; give a file that ends in .parquet"
        )
    write = _parquet_writer if as_parquet else _tsv_writer
    truth = Truth(chosen)
    scores = ScoreHistogram()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as stream, write(stream) as add:
            for chunk in iter_chunks(chosen, num_records):
                add(pa.table(_table(truth, chunk)))
                scores.add(chunk.probability, chunk.labels)
        summary = _summary(truth, scores, num_records)
        truth_path = path.with_name(path.name + ".truth.json")
        truth_path.write_text(json.dumps(summary, indent=2) + "\n")
        partial.rename(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        partial.unlink(missing_ok=True)
    return summary


@contextlib.contextmanager
def _tsv_writer(stream: IO[bytes]) -> Iterator[Callable[[Any], None]]:
    options = pacsv.WriteOptions(include_header=False, delimiter="\t", quoting_style="none")
    yield lambda table: pacsv.write_csv(table, stream, options)


@contextlib.contextmanager
def _parquet_writer(stream: IO[bytes]) -> Iterator[Callable[[Any], None]]:
    import pyarrow.parquet as pq

    with contextlib.ExitStack() as stack:
        writers: list[Any] = []

        def add(table: Any) -> None:
            if not writers:
                writers.append(stack.enter_context(pq.ParquetWriter(stream, table.schema)))
            writers[0].write_table(table)

        yield add


def _summary(truth: Truth, scores: ScoreHistogram, num_records: int) -> dict[str, Any]:
    return {
        "settings": {
            **_settings_of(truth.settings),
            "cardinalities": [*truth.settings.cardinalities],
        },
        "num_records": num_records,
        "bias": truth.bias,
        "click_rate": scores.click_rate(),
        "best_auc": scores.auc(),
        "best_log_loss": scores.log_loss(),
        "best_normalized_entropy": scores.normalized_entropy(),
    }


def _settings_of(settings: SyntheticSettings) -> dict[str, Any]:
    """By name; a log without users is described as before there were any."""
    values = asdict(settings)
    if not settings.num_users:
        del values["num_users"]
    return values


class SyntheticReader(Reader):
    """Yields the same record batches as reading the TSV would, without writing it.

    Only the split may differ from that of the TSV: there it hashes lines, here stored values.

    Attributes:
        truth_summary: As :func:`write_criteo_like` returns it; complete once all is read.
    """

    format = "synthetic"

    def __init__(
        self,
        settings: SyntheticSettings,
        num_records: int,
        schema: DataSchema | None = None,
        split_seed: int = 0,
    ) -> None:
        """Prepares; nothing is generated yet."""
        schema = schema or criteo_like_schema(settings)
        super().__init__(Path("synthetic"), schema, [], split_seed=split_seed)
        self.settings = settings
        self.num_records = num_records
        self.truth_summary: dict[str, Any] = {}

    @property
    def total_bytes(self) -> int:
        """Records, for the progress bar."""
        return self.num_records

    def identity(self) -> tuple[FileIdentity, ...]:
        """Hash of the settings in place of a file."""
        text = json.dumps([_settings_of(self.settings), self.num_records], sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        return (
            FileIdentity(
                name="synthetic", size=self.num_records, mtime_ns=0, sampled_sha256=digest
            ),
        )

    def batches(self) -> Iterator[Any]:
        """Yields record batches of the stored form."""
        truth = Truth(self.settings)
        scores = ScoreHistogram()
        for chunk in iter_chunks(self.settings, self.num_records):
            first = self.bytes_read
            yield self._encode(
                Columns(_table(truth, chunk), len(chunk.labels)),
                lambda row, first=first: f"synthetic record {first + row}",  # type: ignore[misc]
            )
            self.bytes_read += len(chunk.labels)
            scores.add(chunk.probability, chunk.labels)
        self.truth_summary = _summary(truth, scores, self.num_records)


def write_synthetic_store(
    destination: str | Path,
    num_records: int,
    *,
    settings: SyntheticSettings | None = None,
    schema: DataSchema | None = None,
    split: Mapping[str, float] | None = DEFAULT_SPLIT,
    split_seed: int = 0,
    progress: bool = False,
    overwrite: bool = False,
) -> Manifest:
    """Generates records straight into a store (see :func:`dist_dp.datasets.store.convert`).

    ``truth.json`` in the store's folder holds what :func:`write_criteo_like` returns.
    """
    reader = SyntheticReader(settings or SyntheticSettings(), num_records, schema, split_seed)
    manifest = write_store(reader, destination, split=split, progress=progress, overwrite=overwrite)
    if reader.truth_summary:
        text = json.dumps(reader.truth_summary, indent=2) + "\n"
        (Path(destination) / "truth.json").write_text(text)
    return manifest
