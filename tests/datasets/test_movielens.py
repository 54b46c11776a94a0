from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_dp.datasets.hashing import hash_tokens
from dist_dp.datasets.readers import detect_format, open_reader
from dist_dp.datasets.readers.movielens import GENRES_100K, default_schema
from dist_dp.errors import ConfigError, DataError

OCCUPATIONS = (
    "administrator",
    "artist",
    "doctor",
    "educator",
    "engineer",
    "entertainment",
    "executive",
    "healthcare",
    "homemaker",
    "lawyer",
    "librarian",
    "marketing",
    "none",
    "other",
    "programmer",
    "retired",
    "salesman",
    "scientist",
    "student",
    "technician",
    "writer",
)


def write_100k(folder: Path) -> Path:
    flags = ["0"] * 19
    first, second = flags.copy(), flags.copy()
    first[3] = first[5] = "1"
    (folder / "u.item").write_text(
        "\n".join(
            [
                "|".join(["1", "Toys (1995)", "01-Jan-1995", "", "url", *first]),
                "|".join(["2", "Caf\xe9 (1980)", "", "", "url", *second]),
                "|".join(["3", "unknown", "", "", "", *second]),
            ]
        )
        + "\n",
        encoding="latin-1",
    )
    (folder / "u.user").write_text("1|24|M|technician|85711\n9|53|F|other|T8H1N\n")
    (folder / "u.data").write_text("9\t1\t3\t881250949\n1\t2\t5\t881250950\n1\t3\t4\t881250951\n")
    return folder


def write_1m(folder: Path) -> Path:
    (folder / "movies.dat").write_text("7::Caf\xe9 (1994)::Drama|Comedy\n", encoding="latin-1")
    (folder / "users.dat").write_text("3::M::25::15::55117\n")
    (folder / "ratings.dat").write_text("3::7::5::978300760\n3::7::2::978300761\n")
    return folder


def only(reader: Any) -> Any:
    (batch,) = list(reader)
    return batch


def test_100k(tmp_path: Path) -> None:
    folder = write_100k(tmp_path)
    assert detect_format(folder) == "movielens-100k"
    batch = only(open_reader(folder))
    assert batch.column("label").to_pylist() == [0, 1, 1]
    ids = np.array(batch.column("ids").to_pylist())
    assert ids[:, :2].tolist() == [[9, 1], [1, 2], [1, 3]]
    assert ids[:, 2].tolist() == hash_tokens("gender", [b"F", b"M", b"M"]).tolist()
    assert ids[0, 3] == hash_tokens("occupation", [b"other"])[0]
    genres = hash_tokens("genres", [b"Animation", b"Comedy"]).tolist()
    assert batch.column("bag:genres").to_pylist() == [genres, [], []]
    dense = np.array(batch.column("dense").to_pylist())
    assert dense[0, 0] == pytest.approx((881250949 - 883072000) / 1e7, rel=1e-6)
    np.testing.assert_allclose(dense[:, 1], (np.array([53, 24, 24]) - 35) / 15, rtol=1e-6)
    np.testing.assert_allclose(dense[:, 2], (np.array([1995, 1980, 1985]) - 1985) / 15, rtol=1e-6)


def test_1m(tmp_path: Path) -> None:
    folder = write_1m(tmp_path)
    assert detect_format(folder) == "movielens-1m"
    batch = only(open_reader(folder, schema=default_schema("1m")))
    assert batch.column("label").to_pylist() == [1, 0]
    assert [row[:2] for row in batch.column("ids").to_pylist()] == [[3, 7], [3, 7]]
    genres = hash_tokens("genres", [b"Drama", b"Comedy"]).tolist()
    assert batch.column("bag:genres").to_pylist() == [genres, genres]
    dense = np.array(batch.column("dense").to_pylist())
    assert (np.abs(dense[:, 0]) <= 1).all()
    np.testing.assert_allclose(dense[0, 1:], [(25 - 35) / 15, (1994 - 1985) / 15], rtol=1e-6)


def test_ratings_alone(tmp_path: Path) -> None:
    write_100k(tmp_path)
    for name in ("u.user", "u.item"):
        (tmp_path / name).unlink()
    reader = open_reader(tmp_path / "u.data")
    assert reader.format == "movielens-100k"
    assert [f.name for f in reader.schema.sparse] == ["user_id", "item_id"]
    assert only(reader).num_rows == 3
    with pytest.raises(ConfigError, match="name the folder"):
        open_reader(tmp_path / "u.data", schema=default_schema())
    with pytest.raises(DataError, match=r"u\.user: no such file"):
        open_reader(tmp_path)


@pytest.mark.parametrize(
    ("ratings", "message", "reason"),
    [
        ("9\t1\t3\n", "u.data:2: 3 fields where 4 belong", "wrong number of fields"),
        ("9\t1\tgood\t1\n", "u.data:2: rating is 'good', not a number", "rating is not a number"),
        ("9.5\t1\t3\t1\n", "u.data:2: user_id is 9.5, not an integer", "user_id is not an integer"),
        ("9\t\t3\t1\n", "u.data:2: item_id is nan, not an integer", "item_id is not an integer"),
        ("8\t1\t3\t1\n", "u.data:2: user_id 8 does not occur in u.user", "unknown user_id"),
        ("9\t4\t3\t1\n", "u.data:2: item_id 4 does not occur in u.item", "unknown item_id"),
        ("9\t1\t\t1\n", "u.data:2: the label (rating) is missing", "missing label"),
    ],
)
def test_bad_ratings(tmp_path: Path, ratings: str, message: str, reason: str) -> None:
    folder = write_100k(tmp_path)
    (folder / "u.data").write_text("9\t1\t3\t1\n" + ratings + "1\t1\t4\t1\n")
    with pytest.raises(DataError) as caught:
        list(open_reader(folder))
    assert message in str(caught.value)
    reader = open_reader(folder, skip_bad_rows=True)
    assert only(reader).num_rows == 2
    assert dict(reader.skipped) == {reason: 1}


def test_bad_side_files(tmp_path: Path) -> None:
    folder = write_100k(tmp_path)
    (folder / "u.user").write_text("1|24|M|technician|85711\n9|53|F|other\n")
    with pytest.raises(DataError, match=r"u\.user:2: 4 fields where 5 belong"):
        list(open_reader(folder))
    (folder / "u.user").write_text("1|old|M|technician|85711\n")
    with pytest.raises(DataError, match=r"u\.user:1: age is 'old'"):
        list(open_reader(folder))


def test_default_tables_keep_the_public_tokens_apart() -> None:
    for schema in (default_schema("100k"), default_schema("1m")):
        rows = schema.table_rows()
        for table, tokens in (
            ("gender", ["M", "F"]),
            ("occupation", OCCUPATIONS),
            ("occupation", [str(i) for i in range(21)]),
            ("genres", list(GENRES_100K)),
        ):
            ids = hash_tokens(table, [t.encode() for t in tokens]) % rows[table]
            assert len(set(ids.tolist())) == len(tokens), table


@pytest.mark.real_data
def test_real_100k(real_data: Path) -> None:
    batch = only(open_reader(real_data / "ml-100k"))
    assert batch.num_rows == 100_000
    assert sum(batch.column("label").to_pylist()) == 34174 + 21201
    ids = np.array(batch.column("ids").flatten()).reshape(-1, 4)
    assert [len(np.unique(ids[:, c])) for c in range(4)] == [943, 1682, 2, 21]
    assert len(np.unique(batch.column("bag:genres").flatten())) == 19
    assert np.abs(np.array(batch.column("dense").flatten())).max() < 5
