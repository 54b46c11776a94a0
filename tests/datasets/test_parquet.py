from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dist_dp.datasets.hashing import hash_tokens
from dist_dp.datasets.readers import open_reader
from dist_dp.datasets.schema import DataSchema
from dist_dp.datasets.store import convert
from dist_dp.errors import ConfigError, DataError

SCHEMA = DataSchema.model_validate(
    {
        "label": "click",
        "dense": [{"name": "price", "shift": 1, "scale": 2}, {"name": "age", "missing": 40}],
        "sparse": [
            {"name": "city", "num_embeddings": 100},
            {"name": "shop", "num_embeddings": 5, "hashed": False},
            {"name": "words", "num_embeddings": 50, "ragged": True, "weight_column": "w"},
            {"name": "seen", "num_embeddings": 5, "ragged": True, "hashed": False},
        ],
    }
)


def columns() -> dict[str, Any]:
    return {
        "click": [True, False, True],
        "price": [3.0, 5.0, 1.0],
        "age": pa.array([20, None, 30], pa.int32()),
        "city": pa.array(["a", None, "a"]).dictionary_encode(),
        "shop": pa.array([4, None, 0], pa.int16()),
        "words": [["x", "y"], None, [None, "y"]],
        "w": [[1.0, 0.5], [], [9.0, 2.0]],
        "seen": [[], [1, 1, None], [4]],
        "unused": [object.__doc__] * 3,
    }


def write(path: Path, **changes: Any) -> Path:
    pq.write_table(pa.table(columns() | changes), path)
    return path


def test_values(tmp_path: Path) -> None:
    (batch,) = open_reader(write(tmp_path / "a.parquet"), schema=SCHEMA)
    assert batch.column("label").to_pylist() == [1, 0, 1]
    assert batch.column("dense").to_pylist() == [[1, 20], [2, 40], [0, 30]]
    a, none = hash_tokens("city", [b"a", b""]).tolist()
    assert batch.column("ids").to_pylist() == [[a, 4], [none, -1], [a, 0]]
    x, y = hash_tokens("words", [b"x", b"y"]).tolist()
    assert batch.column("bag:words").to_pylist() == [[x, y], [], [y]]
    assert batch.column("weights:words").to_pylist() == [[1, 0.5], [], [2]]
    assert batch.column("bag:seen").to_pylist() == [[], [1, 1], [4]]


def test_integers_and_their_text_are_the_same_token(tmp_path: Path) -> None:
    a, b = (
        next(iter(open_reader(write(tmp_path / f"{i}.parquet", city=city), schema=SCHEMA)))
        for i, city in enumerate([[1, 22, 1], ["1", "22", "1"]])
    )
    assert a.column("ids").to_pylist() == b.column("ids").to_pylist()
    assert a.column("record_key").to_pylist() == b.column("record_key").to_pylist()


def test_a_folder_is_read_in_order_of_names(tmp_path: Path) -> None:
    write(tmp_path / "b.parquet", price=[7.0, 7.0, 7.0])
    write(tmp_path / "a.parquet")
    reader = open_reader(tmp_path, schema=SCHEMA)
    prices = [row[0] for batch in reader for row in batch.column("dense").to_pylist()]
    assert prices == [1, 2, 0, 3, 3, 3]
    assert reader.bytes_read == reader.total_bytes


def test_the_same_records_in_other_files_have_the_same_fingerprint(tmp_path: Path) -> None:
    """Otherwise the ledger takes them for others, and gives them a budget of their own."""
    table = pq.read_table(write(tmp_path / "whole.parquet"))
    (tmp_path / "parts").mkdir()
    for row in range(3):
        pq.write_table(table.slice(row, 1), tmp_path / "parts" / f"{row}.parquet")
    found = {
        convert(
            tmp_path / name,
            tmp_path / f"{name} store",
            format="parquet",
            schema=SCHEMA,
            split=None,
        ).fingerprint
        for name in ("whole.parquet", "parts")
    }
    assert len(found) == 1
    # Nor are ids taken for those of the record beside.
    moved = write(tmp_path / "moved.parquet", seen=[[1], [1, None], [4]])
    other = convert(moved, tmp_path / "moved store", schema=SCHEMA, split=None).fingerprint
    assert other not in found


@pytest.mark.parametrize(
    ("changes", "message", "reason"),
    [
        ({"click": [0, 0, 2]}, "row 2 .*label .* is 2", "label is not 0 or 1"),
        ({"click": [0, None, 1]}, "row 1 .*label .* missing", "missing label"),
        ({"price": [0.0, np.nan, 1.0]}, "row 1 .*price is nan", "price is not finite"),
        ({"price": [0.0, 1.0, None]}, "row 2 .*price is missing", "missing price"),
        ({"age": [0.0, 1.0, np.inf]}, "row 2 .*age is inf", "age is not finite"),
        ({"shop": [0, 5, 0]}, r"row 1 .*shop is 5, not an id in \[0, 5\)", "shop out of range"),
        ({"seen": [[0], [1], [1, -1]]}, "row 2 .*seen is -1", "seen out of range"),
        ({"w": [[1.0, 2.0], [], [1.0]]}, "row 2 .*1 weights for 2", "w has another length"),
        ({"w": [[1.0, np.nan], [], [1.0, 2.0]]}, "row 0 .*w holds", "w is not finite"),
    ],
)
def test_bad_rows(tmp_path: Path, changes: dict[str, Any], message: str, reason: str) -> None:
    path = write(tmp_path / "a.parquet", **changes)
    with pytest.raises(DataError, match=f"a.parquet: {message}"):
        list(open_reader(path, schema=SCHEMA))
    reader = open_reader(path, schema=SCHEMA, skip_bad_rows=True)
    assert sum(b.num_rows for b in reader) == 2
    assert dict(reader.skipped) == {reason: 1}


def test_rows_are_counted_over_batches(tmp_path: Path) -> None:
    schema = DataSchema.model_validate(
        {"label": "y", "sparse": [{"name": "a", "num_embeddings": 5}]}
    )
    labels = np.zeros(150_000, dtype=np.int64)
    labels[140_001] = 3
    pq.write_table(pa.table({"y": labels, "a": labels}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="row 140001"):
        list(open_reader(tmp_path / "a.parquet", schema=schema))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"price": ["a", "b", "c"]}, "'price' holds string, not numbers"),
        ({"city": [1.0, 2.0, 3.0]}, "'city' .* holds double; .* cast"),
        ({"seen": [1, 2, 3]}, "not lists"),
        ({"w": [1.0, 2.0, 3.0]}, "not lists"),
    ],
)
def test_wrong_types(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    path = write(tmp_path / "a.parquet", **changes)
    with pytest.raises(DataError, match=words):
        list(open_reader(path, schema=SCHEMA, skip_bad_rows=True))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="declared schema"):
        open_reader(write(tmp_path / "a.parquet"))
    (tmp_path / "b.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        list(open_reader(tmp_path / "b.parquet", schema=SCHEMA))
    pq.write_table(pa.table(columns()).slice(0, 0), tmp_path / "c.parquet")
    with pytest.raises(DataError, match="no rows"):
        list(open_reader(tmp_path / "c.parquet", schema=SCHEMA))
    pq.write_table(pa.table(columns()).drop_columns(["city"]), tmp_path / "d.parquet")
    with pytest.raises(DataError, match="no column 'city'"):
        list(open_reader(tmp_path / "d.parquet", schema=SCHEMA))
