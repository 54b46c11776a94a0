"""Random access to one split of a store, by record number.

Training draws Poisson batches, so every step reads a few thousand records from anywhere in the
file. An Arrow ``take`` would build each column anew; instead the whole file is seen as one array
of 4-byte or 8-byte words, in which the buffers of all record batches lie, and a row is a run of
words whose start is known. One numpy gather then serves all record batches at once, and touches
only the pages that the rows lie on.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from dist_dp.datasets.mapped_file import MappedFile
from dist_dp.datasets.schema import DataSchema, SparseFeature
from dist_dp.datasets.stored import USER
from dist_dp.errors import DataError

if TYPE_CHECKING:
    from dist_dp.datasets.batch import ClickBatch


class _Rows:
    """Gathers rows of fixed width from one column."""

    def __init__(self, file: MappedFile, column: str, buffer: int, dtype: Any, width: int) -> None:
        words = file.words(dtype)
        self._starts = file.starts(column, buffer, words.itemsize)
        self._stride = width
        self._view = _sliding(words, width)

    def __call__(self, part: NDArray[np.int64], local: NDArray[np.int64]) -> NDArray[Any]:
        """Rows ``local`` of record batches ``part``, as [n, width]."""
        return np.asarray(self._view[self._starts[part] + local * self._stride])


class _Bags:
    """Gathers lists of varying length from one column."""

    def __init__(self, file: MappedFile, column: str, dtype: Any) -> None:
        # A list column has four buffers: validity, offsets, validity of the values, values.
        offsets = file.words(np.int32)
        self._offset_starts = file.starts(column, 1, 4)
        self._offsets = _sliding(offsets, 2)
        self._words = file.words(dtype)
        self._value_starts = file.starts(column, 3, self._words.itemsize)
        self._values = file.list_values(column)
        self._path = file.path

    def __call__(
        self, part: NDArray[np.int64], local: NDArray[np.int64]
    ) -> tuple[NDArray[np.int32], NDArray[Any]]:
        """Lengths [n], and the values of all lists end to end."""
        ends = self._offsets[self._offset_starts[part] + local]
        # A damaged offset would give values of other records, or ask for gigabytes.
        first, last = ends[:, 0], ends[:, 1]
        if ((first < 0) | (last < first) | (last > self._values[part])).any():
            raise DataError(
                f"{self._path}: is damaged (lists that do not lie in their batch); convert the "
                "source again with overwrite=True"
            )
        lengths = last - first
        total = int(lengths.sum())
        first = self._value_starts[part] + first
        before = np.cumsum(lengths) - lengths
        index = np.arange(total, dtype=np.int64) + np.repeat(first - before, lengths)
        return lengths, self._words[index]


def _sliding(words: NDArray[Any], width: int) -> NDArray[Any]:
    """View whose row k is words k to k + width - 1 (no copy, read-only)."""
    size = words.itemsize
    count = max(0, len(words) - width + 1)
    return as_strided(words, (count, width), (size, size), writeable=False)


class ClickDataset:
    """One split of a converted data set, read by record number.

    It may be pickled: the receiver maps the same file again.

    Attributes:
        name: Name of the split.
        schema: Features, with the table sizes that batches are made for.
        fingerprint: Sha256 of the split's records, the same wherever they are stored. It does
            not depend on table sizes.
    """

    def __init__(
        self, path: Path, name: str, schema: DataSchema, rows: int, fingerprint: str
    ) -> None:
        """Maps the file; :meth:`dist_dp.datasets.store.ArrowStore.split` calls this.

        Raises:
            DataError: The file does not hold what the manifest says.
        """
        self.name = name
        self.schema = schema
        self.fingerprint = fingerprint
        self._arguments = (path, name, schema, rows, fingerprint)
        file = MappedFile(path, schema, rows)
        self._rows = rows
        self._first_row = file.first_row
        self._label = _Rows(file, "label", 1, np.float32, 1)
        self._dense: _Rows | None = None
        if schema.dense:
            # A fixed-size list has three buffers: validity, validity of the values, values.
            self._dense = _Rows(file, "dense", 2, np.float32, len(schema.dense))
        self._singles = [f for f in schema.sparse if not f.ragged]
        self._ids: _Rows | None = None
        if self._singles:
            self._ids = _Rows(file, "ids", 2, np.int64, len(self._singles))
        self._bags = {
            f.name: _Bags(file, f"bag:{f.name}", np.int64) for f in schema.sparse if f.ragged
        }
        self._weights = {
            f.name: _Bags(file, f"weights:{f.name}", np.float32)
            for f in schema.sparse
            if f.weight_column is not None
        }
        self._moduli = np.array(
            [f.num_embeddings if f.hashed else 2**63 - 1 for f in self._singles], dtype=np.int64
        )
        self._keys = [f.name for f in schema.sparse]
        self._plain = len(self._singles) == len(schema.sparse) and all(
            f.hashed for f in schema.sparse
        )

    def __len__(self) -> int:
        """Number of records."""
        return self._rows

    def user_keys(self) -> NDArray[np.int64]:
        """The hash of each record's user, int64 [len(self)]: 8 bytes a record, read anew.

        Raises:
            DataError: The data set was converted without users.
        """
        if self.schema.user is None:
            raise DataError(
                f"{self._arguments[0]}: was converted without users; name their column (data.user, "
                "or user of the schema) and convert the source again"
            )
        return MappedFile(self._arguments[0], self.schema, self._rows).whole(USER)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the arguments alone; the receiver maps the file again."""
        return (ClickDataset, self._arguments)

    def batch(self, indices: NDArray[np.int64], *, padded_size: int | None = None) -> ClickBatch:
        """Reads records by number.

        Args:
            indices: int64 [n], each in [0, len(self)); any order, repeats allowed, n may be 0.
            padded_size: Size B of the batch, at least n; the examples after the first n are
                padding. n by default.

        Raises:
            DataError: A number is out of range, or ``padded_size`` is too small.
        """
        import torch

        from dist_dp.datasets.batch import ClickBatch

        indices = np.asarray(indices, dtype=np.int64)
        n = len(indices)
        size = n if padded_size is None else padded_size
        if size < n:
            raise DataError(
                f"{n} records do not fit padded_size={size}; raise it, or split the batch"
            )
        if n and (indices.min() < 0 or indices.max() >= self._rows):
            wrong = indices[(indices < 0) | (indices >= self._rows)][0]
            raise DataError(f"record {wrong} is not in [0, {self._rows}) of split {self.name!r}")
        part = np.searchsorted(self._first_row, indices, side="right") - 1
        local = indices - self._first_row[part]
        labels = np.zeros(size, dtype=np.float32)
        labels[:n] = self._label(part, local)[:, 0]
        dense = np.zeros((size, len(self.schema.dense)), dtype=np.float32)
        if self._dense is not None:
            dense[:n] = self._dense(part, local)
        is_real = np.zeros(size, dtype=bool)
        is_real[:n] = True
        return ClickBatch(
            torch.from_numpy(dense),
            self._sparse(part, local, size),
            torch.from_numpy(labels),
            torch.from_numpy(is_real),
        )

    def _sparse(self, part: NDArray[np.int64], local: NDArray[np.int64], size: int) -> Any:
        import torch
        from torchrec import KeyedJaggedTensor

        n = len(part)
        lengths = np.zeros((len(self._keys), size), dtype=np.int32)
        weights: NDArray[np.float32] | None = None
        ids = self._single_ids(part, local)
        if self._plain:
            lengths[:, :n] = 1
            values = np.ascontiguousarray(ids.T).ravel()
        else:
            pieces: list[NDArray[np.int64]] = []
            weight_pieces: list[NDArray[np.float32]] = []
            column = 0
            for row, feature in enumerate(self.schema.sparse):
                if feature.ragged:
                    lengths[row, :n], found = self._bags[feature.name](part, local)
                    if feature.hashed:
                        found = found % feature.num_embeddings
                else:
                    lengths[row, :n], found = _present(feature, ids[:, column])
                    column += 1
                pieces.append(found)
                if self._weights:
                    weight_pieces.append(self._bag_weights(feature, len(found), part, local))
            values = np.concatenate(pieces)
            weights = np.concatenate(weight_pieces) if self._weights else None
        return KeyedJaggedTensor(
            keys=self._keys,
            values=torch.from_numpy(values),
            weights=None if weights is None else torch.from_numpy(weights),
            lengths=torch.from_numpy(lengths.ravel()),
            stride=size,
        )

    def _single_ids(self, part: NDArray[np.int64], local: NDArray[np.int64]) -> NDArray[np.int64]:
        if self._ids is None:
            return np.zeros((len(part), 0), dtype=np.int64)
        # Missing unhashed ids are -1; a truncated remainder keeps them so.
        return np.asarray(np.fmod(self._ids(part, local), self._moduli))

    def _bag_weights(
        self,
        feature: SparseFeature,
        count: int,
        part: NDArray[np.int64],
        local: NDArray[np.int64],
    ) -> NDArray[np.float32]:
        if feature.name in self._weights:
            return np.asarray(self._weights[feature.name](part, local)[1])
        return np.ones(count, dtype=np.float32)


def _present(
    feature: SparseFeature, ids: NDArray[np.int64]
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Bag lengths (0 or 1) and the ids that are there."""
    if feature.hashed:
        return np.ones(len(ids), dtype=np.int32), ids
    there = ids >= 0
    return there.astype(np.int32), ids[there]
