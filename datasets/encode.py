"""From typed source columns to the stored form of a record, checked and vectorised."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dist_dp.datasets.hashing import TokenHasher, record_keys
from dist_dp.datasets.schema import DataSchema, DenseFeature, SparseFeature
from dist_dp.datasets.stored import RECORD_KEY, stored_schema
from dist_dp.errors import DataError


@dataclass(frozen=True)
class Problem:
    """Rows that break one rule: a short reason to count by, and the full message of a row."""

    rows: NDArray[np.int64]
    reason: str
    describe: Callable[[int], str]


@dataclass(frozen=True)
class Columns:
    """Typed columns of one chunk of the source, with what the stored form does not keep.

    Attributes:
        arrays: Source column name to Arrow array, all of ``num_rows``.
        num_rows: Number of records.
        keys: uint64 record keys (:func:`dist_dp.datasets.hashing.record_keys`), or None to have
            them computed from the columns that the schema names.
    """

    arrays: Mapping[str, Any]
    num_rows: int
    keys: NDArray[np.uint64] | None = None


class Encoder:
    """Encodes chunks of one source; keeps the token hashes it has already computed."""

    def __init__(self, schema: DataSchema, where: str) -> None:
        """Prepares for ``schema``; ``where`` names the source in messages about whole columns."""
        self.schema = schema
        self._where = where
        self._arrow_schema = stored_schema(schema).append(pa.field(RECORD_KEY, pa.uint64()))
        self._hashers = {f.table_name: TokenHasher(f.table_name) for f in schema.sparse}
        self._user_hasher = TokenHasher.of_users()

    def encode(self, columns: Columns, split_seed: int) -> tuple[Any, list[Problem]]:
        """Encodes one chunk.

        Args:
            columns: The chunk.
            split_seed: Seed for the record keys where ``columns`` has none.

        Returns:
            A record batch of the stored form with all rows, and the problems found; a row named
            by a problem holds an arbitrary value and must be dropped.

        Raises:
            DataError: A column is absent or has a type that no row could be read from.
        """
        schema, n = self.schema, columns.num_rows
        problems: list[Problem] = []
        raw: dict[str, Any] = {}
        raw_label, label = self._label(columns, problems)
        raw[schema.label] = raw_label
        dense = np.empty((n, len(schema.dense)), dtype=np.float32)
        for j, feature in enumerate(schema.dense):
            raw[feature.source_column], dense[:, j] = self._dense(feature, columns, problems)
        singles = [f for f in schema.sparse if not f.ragged]
        ids = np.empty((n, len(singles)), dtype=np.int64)
        for j, sparse in enumerate(singles):
            ids[:, j] = self._single(sparse, columns, problems)
            raw[f"id:{sparse.source_column}"] = ids[:, j]
        arrays = [pa.array(label)]
        if schema.dense:
            arrays.append(pa.FixedSizeListArray.from_arrays(dense.ravel(), dense.shape[1]))
        if singles:
            arrays.append(pa.FixedSizeListArray.from_arrays(ids.ravel(), ids.shape[1]))
        bags: list[tuple[NDArray[np.int64], NDArray[Any]]] = []
        for sparse in schema.sparse:
            if sparse.ragged:
                offsets, values, weights = self._bag(sparse, columns, problems)
                arrays.append(_list_array(offsets, values))
                bags.append((offsets, values))
                if weights is not None:
                    arrays.append(_list_array(offsets, weights))
                    bags.append((offsets, weights))
        if schema.user is not None:
            array = self._column(columns, schema.user)
            users, unknown = self._users(schema.user, array)
            arrays.append(pa.array(users))
            _report(problems, unknown, f"missing {schema.user}", lambda _: _no_user(schema.user))
        keys = columns.keys
        if keys is None:
            keys = _content_keys(raw, bags, n, split_seed)
        arrays.append(pa.array(keys))
        return pa.RecordBatch.from_arrays(arrays, schema=self._arrow_schema), problems

    def _column(self, columns: Columns, name: str) -> Any:
        if name not in columns.arrays:
            raise DataError(
                f"{self._where}: no column {name!r}; the columns are "
                f"{', '.join(sorted(columns.arrays))}; correct the schema"
            )
        array = columns.arrays[name]
        return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array

    def _numbers(
        self, columns: Columns, name: str
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """float64 values (0 where null) and the mask of nulls."""
        array = self._column(columns, name)
        if not (
            pa.types.is_integer(array.type)
            or pa.types.is_floating(array.type)
            or pa.types.is_boolean(array.type)
        ):
            raise DataError(
                f"{self._where}: column {name!r} holds {array.type}, not numbers; correct the "
                "schema or the file"
            )
        nulls = np.zeros(len(array), dtype=bool)
        if array.null_count:
            nulls = array.is_null().to_numpy(zero_copy_only=False)
            array = array.fill_null(0)
        # Through numpy, not an Arrow cast: that one refuses integers beyond 2**53.
        return array.to_numpy(zero_copy_only=False).astype(np.float64), nulls

    def _label(
        self, columns: Columns, problems: list[Problem]
    ) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
        name, threshold = self.schema.label, self.schema.label_threshold
        values, nulls = self._numbers(columns, name)
        if nulls.any():
            _report(problems, nulls, "missing label", lambda row: f"the label ({name}) is missing")
        if threshold is not None:
            bad = ~np.isfinite(values)
            _report(problems, bad, "label is not finite", lambda row: f"{name} is {values[row]}")
            return values, (values >= threshold).astype(np.float32)
        bad = (values != 0) & (values != 1)
        _report(
            problems,
            bad,
            "label is not 0 or 1",
            lambda row: (
                f"the label ({name}) is {values[row]:g}, not 0 or 1; correct it, or set "
                "label_threshold to make labels from a rating"
            ),
        )
        return values, values.astype(np.float32)

    def _dense(
        self, feature: DenseFeature, columns: Columns, problems: list[Problem]
    ) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
        name = feature.source_column
        values, nulls = self._numbers(columns, name)
        if nulls.any():
            if feature.missing is None:
                _report(
                    problems,
                    nulls,
                    f"missing {name}",
                    lambda row: (
                        f"{name} is missing; fill it in, or set `missing` of dense "
                        f"feature {feature.name!r}"
                    ),
                )
            else:
                values[nulls] = feature.missing
        scaled = np.log1p(np.maximum(values, 0)) if feature.transform == "log1p" else values
        with np.errstate(over="ignore", invalid="ignore"):
            out: NDArray[np.float32] = ((scaled - feature.shift) / feature.scale).astype(np.float32)
            bad = ~(np.isfinite(values) & np.isfinite(out))
        _report(
            problems,
            bad,
            f"{name} is not finite",
            lambda row: (
                f"{name} is {values[row]:g}, which is not a finite 32-bit number; correct it"
            ),
        )
        return values, out

    def _single(
        self, feature: SparseFeature, columns: Columns, problems: list[Problem]
    ) -> NDArray[np.int64]:
        array = self._column(columns, feature.source_column)
        ids, bad, nulls = self._ids(feature, array)
        _report(problems, bad, *_id_message(feature, array))
        if not feature.hashed:
            ids[nulls] = -1
        return ids

    def _bag(
        self, feature: SparseFeature, columns: Columns, problems: list[Problem]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32] | None]:
        name = feature.source_column
        lists = self._column(columns, name)
        if not _is_list(lists.type):
            raise DataError(
                f"{self._where}: column {name!r} of ragged feature {feature.name!r} holds "
                f"{lists.type}, not lists; set ragged: false"
            )
        lengths, flat = _unnest(lists)
        row_of = np.repeat(np.arange(len(lists)), lengths)
        ids, bad, nulls = self._ids(feature, flat)
        reason, describe_id = _id_message(feature, flat)
        starts = np.concatenate([[0], np.cumsum(lengths)])

        def describe(row: int) -> str:
            start, end = int(starts[row]), int(starts[row + 1])
            return describe_id(start + int(np.flatnonzero(bad[start:end])[0]))

        if bad.any():
            problems.append(Problem(np.unique(row_of[bad]), reason, describe))
        weights: NDArray[np.float32] | None = None
        if feature.weight_column is not None:
            weights = self._weights(feature, columns, lengths, row_of, problems)
        # A missing element of a bag is no element.
        keep = ~nulls
        if not keep.all():
            ids, row_of = ids[keep], row_of[keep]
            weights = None if weights is None else weights[keep]
            lengths = np.bincount(row_of, minlength=len(lists))
        return np.concatenate([[0], np.cumsum(lengths)]), ids, weights

    def _weights(
        self,
        feature: SparseFeature,
        columns: Columns,
        lengths: NDArray[np.int64],
        row_of: NDArray[np.int64],
        problems: list[Problem],
    ) -> NDArray[np.float32]:
        name = str(feature.weight_column)
        lists = self._column(columns, name)
        if not _is_list(lists.type):
            raise DataError(f"{self._where}: weight column {name!r} holds {lists.type}, not lists")
        own_lengths, flat = _unnest(lists)
        odd = own_lengths != lengths
        if odd.any():
            _report(
                problems,
                odd,
                f"{name} has another length",
                lambda row: (
                    f"{name} holds {own_lengths[row]} weights for {lengths[row]} ids of "
                    f"{feature.source_column}; give one weight for each id"
                ),
            )
            return np.ones(len(row_of), dtype=np.float32)
        values, nulls = self._numbers(Columns({name: flat}, len(flat)), name)
        with np.errstate(over="ignore"):
            weights = values.astype(np.float32)
        bad = nulls | ~np.isfinite(weights)
        if bad.any():
            problems.append(
                Problem(
                    np.unique(row_of[bad]),
                    f"{name} is not finite",
                    lambda row: f"{name} holds a weight that is missing or not finite; correct it",
                )
            )
        return weights

    def _ids(
        self, feature: SparseFeature, array: Any
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.bool_]]:
        """Ids of a flat array, the mask of bad ones, the mask of nulls."""
        encoded = array if pa.types.is_dictionary(array.type) else array.dictionary_encode()
        what = f"sparse feature {feature.name!r}"
        tokens = self._tokens(feature.source_column, what, encoded.dictionary)
        codes, nulls = _codes(encoded, len(tokens))
        if feature.hashed:
            table = self._hashers[feature.table_name]([*tokens, b""])
            return table[codes], np.zeros(len(array), dtype=bool), nulls
        table, bad_token = _parse_ids(tokens, feature.num_embeddings)
        if feature.ragged:
            return table[codes], bad_token[codes] & ~nulls, nulls
        empty = np.append(np.array([t == b"" for t in tokens], dtype=bool), True)[codes]
        return table[codes], bad_token[codes] & ~empty, empty

    def _users(self, name: str, array: Any) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Hashes of users' keys, and which records have none (null, or the empty text)."""
        encoded = array if pa.types.is_dictionary(array.type) else array.dictionary_encode()
        tokens = [*self._tokens(name, "the column of users", encoded.dictionary), b""]
        codes, _ = _codes(encoded, len(tokens) - 1)
        empty = np.array([token == b"" for token in tokens])
        return self._user_hasher(tokens)[codes], empty[codes]

    def _tokens(self, name: str, what: str, dictionary: Any) -> list[bytes]:
        """The distinct values as bytes: text as it is, integers in decimal."""
        kind = dictionary.type
        if pa.types.is_boolean(kind):
            dictionary = pc.cast(pc.cast(dictionary, pa.int8()), pa.string())
        elif pa.types.is_integer(kind):  # of 64 bits without a sign too
            dictionary = pc.cast(dictionary, pa.string())
        elif not (
            pa.types.is_string(kind)
            or pa.types.is_large_string(kind)
            or pa.types.is_binary(kind)
            or pa.types.is_large_binary(kind)
            or pa.types.is_null(kind)
        ):
            raise DataError(
                f"{self._where}: column {name!r} of {what} holds {kind}; it needs integers or "
                "text: cast the column"
            )
        return [t if isinstance(t, bytes) else (t or "").encode() for t in dictionary.to_pylist()]


def _codes(encoded: Any, null_code: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Places in the dictionary of a dictionary array, ``null_code`` for nulls; and the nulls."""
    nulls = np.zeros(len(encoded), dtype=bool)
    indices = encoded.indices
    if encoded.null_count:
        nulls = encoded.is_null().to_numpy(zero_copy_only=False)
        indices = indices.fill_null(0)
    codes = indices.to_numpy(zero_copy_only=False).astype(np.int64)
    # Behind the dictionary, where the empty token is.
    codes[nulls] = null_code
    return codes, nulls


def _no_user(name: str | None) -> str:
    return (
        f"the user ({name}) is missing, so it is not known whose the record is; fill it in, or "
        "leave such rows out (skip_bad_rows)"
    )


def _parse_ids(tokens: list[bytes], limit: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Integers of the tokens (0 where bad), and which are no integer in [0, limit)."""
    table = np.zeros(len(tokens) + 1, dtype=np.int64)
    bad = np.zeros(len(tokens) + 1, dtype=bool)
    for i, token in enumerate(tokens):
        value = int(token) if token.isdigit() else -1
        bad[i] = not 0 <= value < limit
        table[i] = 0 if bad[i] else value
    return table, bad


def _id_message(feature: SparseFeature, array: Any) -> tuple[str, Callable[[int], str]]:
    name = feature.source_column

    def describe(row: int) -> str:
        value = array[row].as_py()
        text = value.decode(errors="replace") if isinstance(value, bytes) else value
        return (
            f"{name} is {text!r}, not an id in [0, {feature.num_embeddings}); raise "
            f"num_embeddings of {feature.name!r}, or set hashed: true"
        )

    return f"{name} out of range", describe


def _report(
    problems: list[Problem],
    bad: NDArray[np.bool_],
    reason: str,
    describe: Callable[[int], str],
) -> None:
    if bad.any():
        problems.append(Problem(np.flatnonzero(bad), reason, describe))


def _is_list(kind: Any) -> bool:
    return bool(
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def _unnest(lists: Any) -> tuple[NDArray[np.int64], Any]:
    """Length of each list (0 for null) and the elements end to end."""
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    return lengths.astype(np.int64), lists.flatten()


def _list_array(offsets: NDArray[np.int64], values: NDArray[Any]) -> Any:
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values))


def _content_keys(
    raw: Mapping[str, NDArray[Any]],
    bags: list[tuple[NDArray[np.int64], NDArray[Any]]],
    num_rows: int,
    split_seed: int,
) -> NDArray[np.uint64]:
    """Record keys from the values before any transform, columns in order of name."""
    words = [
        raw[name].astype("<i8" if name.startswith("id:") else "<f8").view("<u8")
        for name in sorted(raw)
    ]
    fixed = np.column_stack(words)
    width = fixed.shape[1] * 8
    data = fixed.tobytes()
    records = [data[i * width : (i + 1) * width] for i in range(num_rows)]
    for offsets, values in bags:
        size = values.dtype.itemsize
        content = values.tobytes()
        ends = (offsets * size).tolist()
        records = [
            record + (ends[i + 1] - ends[i]).to_bytes(8, "little") + content[ends[i] : ends[i + 1]]
            for i, record in enumerate(records)
        ]
    return record_keys(records, split_seed)
