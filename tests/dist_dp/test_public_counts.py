"""Most frequent rows by a file of public counts: which they are, and files that make no sense."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dist_dp import public_counts
from dist_dp.errors import ConfigError, DataError
from dist_dp.public_counts import public_rows, read_counts

NUM_ROWS = {"bags.t": 10, "bags.u": 4, "seq.v": 6, "other.v": 6}
COLUMNS: dict[str, Any] = {
    "table": ["bags.t", "u", "bags.t", "t", "bags.u", "bags.t"],
    "row": [7, 3, 2, 9, 0, 4],
    "count": [5, 1, 8, 5, 0, 1],
}


def write(path: Path, columns: dict[str, Any] | pa.Table = COLUMNS, **options: Any) -> Path:
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    if path.suffix == ".parquet":
        pq.write_table(table, path, **options)
    else:
        given = pa.ipc.IpcWriteOptions(**options)
        with pa.ipc.new_file(path, table.schema, options=given) as file:
            file.write_table(table, max_chunksize=2)
    return path


@pytest.mark.parametrize("name", ["counts.parquet", "counts.arrow"])
def test_the_most_frequent_rows(tmp_path: Path, name: str) -> None:
    """Ties go to the smaller number; rows that nobody counted come last, from 0 on."""
    path = write(tmp_path / name)

    def rows(**wanted: int) -> dict[str, list[int]]:
        found = public_rows(path, NUM_ROWS, {f"bags.{t}": k for t, k in wanted.items()})
        return {table: chosen.tolist() for table, chosen in found.items()}

    assert rows(t=1, u=1) == {"bags.t": [2], "bags.u": [3]}
    assert rows(t=2) == {"bags.t": [2, 7]}
    assert rows(t=3) == {"bags.t": [2, 7, 9]}
    assert rows(t=6, u=2) == {"bags.t": [0, 1, 2, 4, 7, 9], "bags.u": [0, 3]}
    assert rows(t=10, u=4) == {"bags.t": list(range(10)), "bags.u": [0, 1, 2, 3]}


@pytest.mark.parametrize("text", [pa.string(), pa.large_string(), pa.dictionary("int8", "string")])
def test_kinds_of_columns(tmp_path: Path, text: Any) -> None:
    table = pa.table(
        {
            "count": pa.array([0.5, 2.5, 1.0], pa.float32()),
            "row": pa.array([1, 2, 3], pa.uint16()),
            "table": pa.array(["u", "u", "u"]).cast(text),
        }
    )
    for name in ("counts.parquet", "counts.arrow"):
        rows, counts = read_counts(write(tmp_path / name, table), NUM_ROWS)["bags.u"]
        assert rows.tolist() == [1, 2, 3] and counts.tolist() == [0.5, 2.5, 1.0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"row": [7, 3, 2, 10, 0, 4]}, "line 3: row 10 is outside table 'bags.t' of 10 rows"),
        ({"row": [7, 3, 2, 9, -1, 4]}, "line 4: row -1 is outside table 'bags.u' of 4 rows"),
        ({"row": [7, 3, 7, 9, 0, 4]}, "row 7 of table 'bags.t' is listed twice"),
        ({"row": [7, None, 2, 9, 0, 4]}, "line 1: its row is missing"),
        ({"table": ["t", "t", None, "t", "t", "t"]}, "line 2: its table is missing"),
        ({"count": [1, 2, 3, 4, 5, -6]}, "line 5: its count is -6"),
        ({"count": [1.0, float("nan"), 3, 4, 5, 6]}, "line 1: its count is nan"),
        ({"count": list("abcdef")}, "its column count holds string"),
        ({"row": [0.5] * 6}, "its column row holds double"),
        ({"table": [1] * 6}, "its column table holds int64"),
        ({"more": [1] * 6}, "its columns are table, row, count, more"),
        ({"table": ["w"] * 6}, "table 'w' is not in the model"),
        ({"table": ["v"] * 6}, "table 'v' is one of seq.v, other.v"),
        ({"row": pa.array([2**63] * 6, pa.uint64())}, "is no file of row counts"),
    ],
)
@pytest.mark.parametrize("name", ["counts.parquet", "counts.arrow"])
def test_lines_that_make_no_sense(
    tmp_path: Path, name: str, changes: dict[str, Any], words: str
) -> None:
    path = write(tmp_path / name, {**COLUMNS, **changes})
    with pytest.raises(DataError, match=words) as caught:
        public_rows(path, NUM_ROWS, {"bags.t": 2})
    assert str(path) in str(caught.value)


def test_files_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path, words: str) -> None:
        with pytest.raises(DataError, match=words):
            read_counts(path, NUM_ROWS)

    refused(tmp_path / "missing", "No such file")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "no regular file")
    (tmp_path / "text.csv").write_text("table,row,count\n")
    refused(tmp_path / "text.csv", "neither Arrow nor Parquet")
    refused(write(tmp_path / "small.arrow", compression="zstd"), "compressed")
    for name in ("cut.parquet", "cut.arrow"):
        path = write(tmp_path / name)
        whole = path.read_bytes()
        for size in (6, len(whole) // 2, len(whole) - 5):
            path.write_bytes(whole[:size])
            refused(path, "is no file of row counts")
        for place in range(8, len(whole), 7):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
            try:  # damage is refused with a name, or harmless, but never anything else
                public_rows(path, NUM_ROWS, {"bags.t": 3})
            except DataError as error:
                assert str(path) in str(error)
    good = write(tmp_path / "good.parquet")
    monkeypatch.setattr(public_counts, "MAX_COUNT_ROWS", 5)
    refused(good, "more than 5 lines; keep the most frequent rows")
    monkeypatch.setattr(public_counts, "MAX_COUNT_BYTES", 100)
    refused(good, "bytes, 100 are read")


def test_a_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = 200_000
    columns = {"table": ["t"] * lines, "row": [1] * lines, "count": [1] * lines}
    path = write(tmp_path / "bomb.parquet", columns, use_dictionary=False, compression="zstd")
    assert path.stat().st_size < 200_000
    monkeypatch.setattr(public_counts, "MAX_COUNT_BYTES", 1_000_000)
    with pytest.raises(DataError, match="unpacks to more than 1,000,000 bytes"):
        read_counts(path, NUM_ROWS)


def test_what_cannot_be_taken_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "counts.parquet")
    with pytest.raises(ConfigError, match=r"11 of table 'bags.t' are to be kept.* only 10 rows"):
        public_rows(path, NUM_ROWS, {"bags.t": 11})
    with pytest.raises(ConfigError, match=r"no table is called 'x'; there are bags.t"):
        public_rows(path, NUM_ROWS, {"x": 1})
    with pytest.raises(ConfigError, match="is 0: give an integer from 1 on"):
        public_rows(path, NUM_ROWS, {"bags.t": 0})
    with pytest.raises(DataError, match=r"has no counts of table 'seq.v' .it has .* bags.u"):
        public_rows(path, NUM_ROWS, {"seq.v": 1})
