from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from dist_dp.datasets.hashing import hash_tokens
from dist_dp.datasets.readers import detect_format, open_reader
from dist_dp.datasets.readers.criteo import default_schema
from dist_dp.datasets.schema import DataSchema, DenseFeature, SparseFeature
from dist_dp.errors import ConfigError, DataError


def line(row: int, **fields: str) -> str:
    values = {"label": str(row % 2)}
    values |= {f"I{i}": str(row + i) for i in range(1, 14)}
    values |= {f"C{i}": f"{row * 26 + i:08x}" for i in range(1, 27)}
    return "\t".join((values | fields).values())


def write(path: Path, lines: list[str], end: str = "\n") -> Path:
    path.write_bytes((end.join(lines) + end).encode())
    return path


def read(path: Path, **options: object) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]:
    batches = list(open_reader(path, "criteo", **options))  # type: ignore[arg-type]
    label = np.concatenate([b.column("label").to_numpy() for b in batches])
    dense = np.concatenate([b.column("dense").flatten().to_numpy() for b in batches])
    ids = np.concatenate([b.column("ids").flatten().to_numpy() for b in batches])
    keys = [k for b in batches for k in b.column("record_key").to_pylist()]
    return label, dense.reshape(-1, 13), ids.reshape(-1, 26), keys


def test_values(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", [line(5), line(6, I1="", I2="-3", C1="", C26="")])
    label, dense, ids, _ = read(path)
    assert label.tolist() == [1, 0]
    np.testing.assert_allclose(dense[0], np.log1p(np.arange(6, 19)), rtol=1e-6)
    assert dense[1, 0] == 0  # missing
    assert dense[1, 1] == 0  # log(1 + max(x, 0))
    expected = [hash_tokens(f"C{i}", [f"{5 * 26 + i:08x}".encode()])[0] for i in range(1, 27)]
    assert ids[0].tolist() == expected
    assert ids[1, 0] == hash_tokens("C1", [b""])[0]
    assert ids[1, 25] == hash_tokens("C26", [b""])[0]


def test_chunks_ends_of_lines_and_compression_change_nothing(tmp_path: Path) -> None:
    lines = [line(i) for i in range(300)]
    path = write(tmp_path / "a.tsv", lines)
    whole = read(path)
    variants = [read(path, chunk_bytes=1000)]
    variants.append(read(write(tmp_path / "crlf.tsv", lines, "\r\n")))
    (tmp_path / "cut.tsv").write_bytes(path.read_bytes().rstrip(b"\n"))
    variants.append(read(tmp_path / "cut.tsv"))
    with gzip.open(tmp_path / "a.tsv.gz", "wb") as stream:
        stream.write(path.read_bytes())
    variants.append(read(tmp_path / "a.tsv.gz"))
    for variant in variants:
        for a, b in zip(whole, variant, strict=True):
            assert np.array_equal(a, b)


@pytest.mark.parametrize(
    ("bad", "message", "reason"),
    [
        (line(7).rsplit("\t", 1)[0], "39 fields where 40 belong", "wrong number of fields"),
        (line(7) + "\textra", "41 fields where 40 belong", "wrong number of fields"),
        ("", "empty", "empty line"),
        (line(7, I3="x1"), "I3 is 'x1', not a number", "I3 is not a number"),
        (line(7, I3="NaN"), "I3 is nan", "I3 is not finite"),
        (line(7, I3="inf"), "I3 is inf", "I3 is not finite"),
        (line(7, I3="1e300"), "I3 is 1e+300", None),
        (line(7, label="2"), "is 2, not 0 or 1", "label is not 0 or 1"),
        (line(7, label="0.5"), "is 0.5, not 0 or 1", "label is not 0 or 1"),
        (line(7, label=""), "label (label) is missing", "missing label"),
        (line(7, label="nan"), "is nan, not 0 or 1", "label is not 0 or 1"),
        (line(7, C4="a\rb"), "carriage return", "carriage return"),
    ],
)
@pytest.mark.parametrize("chunk_bytes", [500, 1 << 20])
def test_bad_rows_are_named_or_counted(
    tmp_path: Path, bad: str, message: str, reason: str | None, chunk_bytes: int
) -> None:
    # log1p brings 1e300 back into range, so that one needs a feature without a transform.
    schema = default_schema()
    if reason is None:
        plain = tuple(DenseFeature(name=f"I{i}", missing=0) for i in range(1, 14))
        schema = schema.model_copy(update={"dense": plain})
        reason = "I3 is not finite"
    lines = [line(i) for i in range(20)]
    lines[11] = bad
    path = write(tmp_path / "a.tsv", lines)
    with pytest.raises(DataError) as caught:
        list(open_reader(path, "criteo", schema, chunk_bytes=chunk_bytes))
    assert str(caught.value).startswith(f"{path}:12: ")
    assert message in str(caught.value)

    lines[15] = bad
    write(path, lines)
    reader = open_reader(path, "criteo", schema, skip_bad_rows=True, chunk_bytes=chunk_bytes)
    rows = [r for b in reader for r in b.column("label").to_pylist()]
    assert rows == [i % 2 for i in range(20) if i not in (11, 15)]
    assert dict(reader.skipped) == {reason: 2}


def test_different_faults_in_one_chunk_are_counted_apart(tmp_path: Path) -> None:
    lines = [line(i) for i in range(10)]
    lines[2] = lines[2].replace("\t", " ", 1)
    lines[4] = line(4, I1="abc", I2="def")
    lines[5] = line(5, I1="nan", label="3")
    lines[7] = line(7, label="-1")
    reader = open_reader(write(tmp_path / "a.tsv", lines), "criteo", skip_bad_rows=True)
    assert sum(b.num_rows for b in reader) == 6
    assert dict(reader.skipped) == {
        "wrong number of fields": 1,
        "I1 is not a number": 1,
        "label is not 0 or 1": 2,
    }


def test_the_first_bad_row_is_the_one_named(tmp_path: Path) -> None:
    lines = [line(i) for i in range(10)]
    lines[3], lines[6] = line(3, I2="nan"), line(6, label="4")  # the label is looked at first
    with pytest.raises(DataError, match=r"a\.tsv:4: I2 is nan"):
        list(open_reader(write(tmp_path / "a.tsv", lines), "criteo"))


def test_ids_out_of_range(tmp_path: Path) -> None:
    schema = DataSchema(
        label="label", sparse=[SparseFeature(name="C1", num_embeddings=10, hashed=False)]
    )
    path = write(tmp_path / "a.tsv", [line(i, C1=str(i)) for i in range(10)])
    (batch,) = open_reader(path, "criteo", schema)
    assert batch.column("ids").flatten().to_pylist() == list(range(10))
    for bad in ("10", "-1", "a", "1.0"):
        write(path, [line(i, C1="" if i == 3 else str(i)) for i in range(9)] + [line(9, C1=bad)])
        with pytest.raises(DataError, match=rf"a.tsv:10: C1 is '{bad}', not an id in \[0, 10\)"):
            list(open_reader(path, "criteo", schema))
    (batch,) = open_reader(path, "criteo", schema, skip_bad_rows=True)
    assert batch.column("ids").flatten().to_pylist() == [0, 1, 2, -1, 4, 5, 6, 7, 8]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    empty = tmp_path / "empty.tsv"
    empty.touch()
    for format in ("auto", "criteo"):
        with pytest.raises(DataError, match="empty"):
            list(open_reader(empty, format))
    with pytest.raises(DataError, match="no such file"):
        open_reader(tmp_path / "absent.tsv")
    with pytest.raises(DataError, match="unknown format 'csv'"):
        open_reader(empty, "csv")
    whole = gzip.compress((line(1) + "\n").encode() * 1000)
    (tmp_path / "cut.tsv.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cannot be read"):
        list(open_reader(tmp_path / "cut.tsv.gz", "criteo"))
    (tmp_path / "text.tsv.gz").write_text("not gzip")
    with pytest.raises(DataError, match="cannot be read"):
        open_reader(tmp_path / "text.tsv.gz")


def test_detection(tmp_path: Path) -> None:
    assert detect_format(write(tmp_path / "a", [line(1)])) == "criteo"
    assert detect_format(write(tmp_path / "b", [line(1).rsplit("\t", 1)[0]])) == "criteo"
    assert detect_format(write(tmp_path / "c", ["1\t2\t3\t4"])) == "movielens-100k"
    with pytest.raises(DataError, match="give one of criteo"):
        detect_format(write(tmp_path / "d", ["a,b"]))
    with pytest.raises(DataError, match="neither"):
        detect_format(tmp_path)


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"label": "click", "sparse": [{"name": "C1", "num_embeddings": 5}]}, "no column 'click'"),
        ({"label": "C2", "sparse": [{"name": "C1", "num_embeddings": 5}]}, "holds tokens"),
        (
            {"label": "label", "sparse": [{"name": "C1", "num_embeddings": 5, "ragged": True}]},
            "ragged",
        ),
        (
            {
                "label": "label",
                "dense": [{"name": "I1"}],
                "sparse": [{"name": "x", "column": "I1", "num_embeddings": 5}],
            },
            "both dense",
        ),
    ],
)
def test_schemas_that_do_not_fit(tmp_path: Path, schema: dict[str, object], words: str) -> None:
    path = write(tmp_path / "a.tsv", [line(1)])
    with pytest.raises(ConfigError, match=words):
        open_reader(path, "criteo", DataSchema.model_validate(schema))


def test_other_features_do_not_move_a_record_to_another_split(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", [line(i) for i in range(20)])
    few = DataSchema(label="label", sparse=[SparseFeature(name="C3", num_embeddings=5)])
    keys = [k for b in open_reader(path, "criteo", few) for k in b.column("record_key").to_pylist()]
    assert keys == read(path)[3]


@pytest.mark.real_data
def test_real_head(real_data: Path) -> None:
    label, dense, ids, keys = read(real_data / "criteo_head10k" / "train_first10000.tsv")
    assert label.shape == (10_000,)
    assert label.sum() == 2182
    assert dense.max() <= np.log1p(1e7)
    np.testing.assert_allclose(dense[0, :4], np.log1p([1, 1, 5, 0]), rtol=1e-6)
    assert ids[0, 0] == hash_tokens("C1", [b"68fd1e64"])[0]
    assert [len(np.unique(ids[:, c])) for c in (8, 19)] == [3, 4]
    assert len(set(keys)) == 10_000
