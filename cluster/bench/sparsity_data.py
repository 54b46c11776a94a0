"""The records that ``dist-dp bench sparsity`` trains on: generated in memory, or a real set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from dist_dp.cluster.config import load_config
from dist_dp.cluster.prepare import open_data
from dist_dp.datasets.auc import ScoreHistogram
from dist_dp.datasets.readers.criteo import PUBLISHED_CARDINALITIES
from dist_dp.datasets.schema import DataSchema, DenseFeature, SparseFeature
from dist_dp.datasets.synthetic import SyntheticSettings, iter_chunks
from dist_dp.errors import DataError

SPLITS = ("train", "valid", "test")
LOG_MEAN, LOG_DEVIATION = 1.5, 1.2
"""What generated integers are standardised by: the generator's own, no statistics of records."""


@dataclass(frozen=True)
class SparsityData:
    """What all mechanisms are given alike.

    Attributes:
        schema: Features and table sizes.
        train: The private records.
        public: Other records, declared public: rows' frequencies for FEST are counted on them, and
            learning rates chosen.
        test: Where the reported quality is measured.
        about: What it is, for the JSON file.
    """

    schema: DataSchema
    train: Any
    public: Any
    test: Any
    about: dict[str, Any]


class GeneratedClicks:
    """Records of :mod:`dist_dp.datasets.truth` in memory: a token's row is its rank, from 0.

    No token is hashed, so none shares a row with another. A missing token is an empty bag.

    Args:
        schema: As :func:`generated_schema` makes it.
        dense: float32 ``[records, integers]``, transformed.
        rows: int32 ``[records, columns]``, -1 where missing.
        labels: float32 ``[records]``.
    """

    def __init__(
        self,
        schema: DataSchema,
        dense: NDArray[np.float32],
        rows: NDArray[np.int32],
        labels: NDArray[np.float32],
    ) -> None:
        self.schema = schema
        self._dense, self._rows, self._labels = dense, rows, labels

    def __len__(self) -> int:
        """Number of records."""
        return len(self._labels)

    def part(self, first: int, last: int) -> GeneratedClicks:
        """Some of the records, without a copy."""
        here = slice(first, last)
        return GeneratedClicks(self.schema, self._dense[here], self._rows[here], self._labels[here])

    def batch(self, indices: NDArray[np.int64], *, padded_size: int | None = None) -> Any:
        """A :class:`~dist_dp.datasets.batch.ClickBatch`; see ``ClickDataset.batch``."""
        from torchrec import KeyedJaggedTensor

        from dist_dp.datasets.batch import ClickBatch

        count = len(indices)
        size = count if padded_size is None else padded_size
        dense = np.zeros((size, self._dense.shape[1]), dtype=np.float32)
        dense[:count] = self._dense[indices]
        labels = np.zeros(size, dtype=np.float32)
        labels[:count] = self._labels[indices]
        rows = self._rows[indices].T
        there = rows >= 0
        lengths = np.zeros((len(rows), size), dtype=np.int32)
        lengths[:, :count] = there
        sparse = KeyedJaggedTensor(
            keys=[f.name for f in self.schema.sparse],
            values=torch.from_numpy(rows[there].astype(np.int64)),
            lengths=torch.from_numpy(lengths.ravel()),
            stride=size,
        )
        is_real = torch.arange(size) < count
        return ClickBatch(torch.from_numpy(dense), sparse, torch.from_numpy(labels), is_real)


def generated_schema(settings: SyntheticSettings) -> DataSchema:
    """Integers by log(1 + x), standardised, and a table of as many rows as a column has tokens."""
    return DataSchema(
        label="label",
        dense=tuple(
            DenseFeature(name=f"I{j + 1}", transform="log1p", missing=0.0)
            for j in range(settings.num_dense)
        ),
        sparse=tuple(
            SparseFeature(name=f"C{f + 1}", num_embeddings=count, hashed=False)
            for f, count in enumerate(settings.cardinalities)
        ),
    )


def generate(
    train: int,
    other: int,
    *,
    seed: int = 0,
    cardinalities: tuple[int, ...] = PUBLISHED_CARDINALITIES,
) -> SparsityData:
    """Generates Criteo-shaped records: for training, as many public as for the test.

    Args:
        train: Records to train on.
        other: Public records; the test has as many.
        seed: Of truth and records.
        cardinalities: Tokens of each column; by default those published for Criteo Kaggle, 33.8
            million in all.
    """
    settings = SyntheticSettings(seed=seed, cardinalities=cardinalities)
    schema = generated_schema(settings)
    total = train + 2 * other
    dense = np.empty((total, settings.num_dense), dtype=np.float32)
    rows = np.empty((total, len(cardinalities)), dtype=np.int32)
    labels = np.empty(total, dtype=np.float32)
    best = ScoreHistogram()
    start = 0
    for chunk in iter_chunks(settings, total):
        here = slice(start, start + len(chunk.labels))
        dense[here] = (np.log1p(np.maximum(chunk.dense, 0)) - LOG_MEAN) / LOG_DEVIATION
        rows[here] = chunk.ranks - 1
        labels[here] = chunk.labels
        # the last records are the test's
        mine = max(0, train + other - start)
        best.add(chunk.probability[mine:], chunk.labels[mine:])
        start += len(chunk.labels)
    clicks = GeneratedClicks(schema, dense, rows, labels)
    about = {
        "source": "generated",
        "seed": seed,
        "zipf_exponent": settings.zipf_exponent,
        "best_auc": best.auc(),
    }
    return SparsityData(
        schema,
        clicks.part(0, train),
        clicks.part(train, train + other),
        clicks.part(train + other, total),
        about,
    )


def read(
    path: Path, format: str, store: Path, overrides: Mapping[str, Any] | None = None
) -> SparsityData:
    """Reads a real set, as the ``data`` section of a configuration does.

    Args:
        path: Its file, folder or store.
        format: See :class:`~dist_dp.cluster.config.DataConfig`.
        store: Folder for the converted records.
        overrides: Further settings of the section, by name (``max_num_embeddings``).

    Raises:
        ConfigError: A setting is wrong.
        DataError: It cannot be read, or a split has no records.
    """
    values: dict[str, Any] = {
        "privacy.mechanism": "none",
        "train.steps": 1,
        "data.path": str(path),
        "data.format": format,
        "data.store": str(store),
    }
    values |= {f"data.{name}": value for name, value in (overrides or {}).items()}
    opened, schema = open_data(load_config(None, values), progress=False)
    found = {}
    for name in SPLITS:
        found[name] = opened.split(name) if name in opened.split_names() else ()
        if not len(found[name]):
            raise DataError(
                f"'{path}': the {name} split is empty, but train, valid (as public records) and "
                "test are all needed: give more data, or another data.split"
            )
    about = {"source": format, "name": path.resolve().name.split(".")[0]}
    return SparsityData(schema, found["train"], found["valid"], found["test"], about)


COLLECTION = "sparse_arch.embedding_bag_collection"
"""Where TorchRec's DLRM has its tables."""


def write_counts(data: SparsityData, path: Path, chunk: int = 65_536) -> None:
    """Writes how often public records read each row: FEST's rows are chosen by that file.

    The private records have no part in it. Rows that no public record reads are not listed.

    Args:
        data: Its public records are counted.
        path: Parquet file; see :mod:`dist_dp.public_counts`.
        chunk: Records at a time.
    """
    schema, public = data.schema, data.public
    seen: dict[str, list[NDArray[np.int64]]] = {f.table_name: [] for f in schema.sparse}
    for start in range(0, len(public), chunk):
        numbers = np.arange(start, min(start + chunk, len(public)), dtype=np.int64)
        sparse = public.batch(numbers).sparse_features
        bounds, values = sparse.offset_per_key(), sparse.values().numpy()
        for number, feature in enumerate(schema.sparse):
            seen[feature.table_name].append(values[bounds[number] : bounds[number + 1]])
    with pq.ParquetWriter(path, _COUNTS) as writer:
        for table, parts in seen.items():
            rows, counts = np.unique(np.concatenate(parts), return_counts=True)
            names = pa.array([f"{COLLECTION}.{table}"] * len(rows))
            writer.write_table(pa.table([names, rows, counts], schema=_COUNTS))


_COUNTS = pa.schema([("table", pa.string()), ("row", pa.int64()), ("count", pa.int64())])
