"""Whose the records are: the column of users in the schema, the store and the generator."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dist_dp.datasets import manifest as manifests
from dist_dp.datasets.hashing import hash_tokens
from dist_dp.datasets.readers import open_reader
from dist_dp.datasets.schema import DataSchema
from dist_dp.datasets.store import ArrowStore, convert
from dist_dp.datasets.synthetic import (
    SyntheticSettings,
    criteo_like_schema,
    iter_chunks,
    write_criteo_like,
    write_synthetic_store,
)
from dist_dp.errors import ConfigError, DataError
from dist_dp.user_records import users_of
from tests.datasets.test_movielens import write_100k
from tests.datasets.test_store import SCHEMA, write_source

WITH_USERS = SCHEMA.with_user("who")
SPLIT = {"train": 0.7, "test": 0.3}


def write(folder: Path, who: Any, name: str = "source.parquet") -> Path:
    plain = write_source(folder / "plain.parquet", len(who))
    table = pq.read_table(plain).append_column("who", pa.array(who))
    pq.write_table(table, folder / name)
    return folder / name


@pytest.mark.parametrize("kind", ["text", "integers"])
def test_a_hash_of_the_user_lies_beside_the_record(tmp_path: Path, kind: str) -> None:
    numbers = np.random.default_rng(2).integers(0, 40, 500)
    who = [f"user-{n}" for n in numbers] if kind == "text" else numbers
    source = write(tmp_path, who)
    convert(source, tmp_path / "store", schema=WITH_USERS, split=None)
    data = ArrowStore.open(tmp_path / "store", verify=True).split("all")
    keys = data.user_keys()
    assert keys.dtype == np.int64 and len(keys) == 500 and keys.min() >= 0
    pairs = Counter(zip(numbers.tolist(), keys.tolist(), strict=True))
    assert len(pairs) == len(set(numbers.tolist())) == len(set(keys.tolist()))
    # Never the key itself, nor what a table would make of it.
    assert b"user-" not in (tmp_path / "store" / "all.arrow").read_bytes()
    assert not set(keys.tolist()) & set(hash_tokens("who", [str(w).encode() for w in who]))
    users = users_of(data)
    assert (users.num_users, users.num_records) == (len(set(numbers.tolist())), 500)


@pytest.mark.parametrize("kind", ["int64", "uint64"])
def test_users_may_be_any_integer_of_64_bits(tmp_path: Path, kind: str) -> None:
    """Hashes without a sign were said to be an unreadable file."""
    ends = np.iinfo(kind)
    who = [int(ends.max), int(ends.min), 7, int(ends.max) - 1] * 5
    source = write(tmp_path, pa.array(who, getattr(pa, kind)()))
    convert(source, tmp_path / "store", schema=WITH_USERS, split=None)
    keys = ArrowStore.open(tmp_path / "store").split("all").user_keys()
    assert len(set(zip(who, keys.tolist(), strict=True))) == len(set(keys.tolist())) == 4
    text = write(tmp_path, [str(key) for key in who], "text.parquet")
    convert(text, tmp_path / "other", schema=WITH_USERS, split=None)
    assert ArrowStore.open(tmp_path / "other").split("all").user_keys().tolist() == keys.tolist()


def test_records_and_split_do_not_depend_on_the_column(tmp_path: Path) -> None:
    """So the ledger knows the same records again, whatever their unit of privacy."""
    source = write(tmp_path, np.arange(500) % 7)
    with_users = convert(source, tmp_path / "with", schema=WITH_USERS, split=SPLIT)
    without = convert(source, tmp_path / "without", schema=SCHEMA, split=SPLIT)
    assert with_users.fingerprint == without.fingerprint
    assert (with_users.format_version, without.format_version) == (2, 1)
    one, other = (ArrowStore.open(tmp_path / name).split("test") for name in ("with", "without"))
    numbers = np.arange(len(one))
    assert one.batch(numbers).labels.tolist() == other.batch(numbers).labels.tolist()
    assert one.fingerprint == other.fingerprint


def test_a_store_without_users_opens_as_before(tmp_path: Path) -> None:
    """A manifest of the version before, whose schema does not name a user."""
    source = write(tmp_path, np.arange(500) % 7)
    convert(source, tmp_path / "store", schema=SCHEMA, split=SPLIT)
    path = tmp_path / "store" / "manifest.json"
    content = json.loads(path.read_text())
    assert content["format_version"] == 1 and content["schema"].pop("user") is None
    path.write_text(json.dumps(content))
    store = ArrowStore.open(tmp_path / "store", verify=True, schema=SCHEMA)
    assert len(store.split("train")) + len(store.split("test")) == 500
    with pytest.raises(DataError, match=r"converted without users.*data\.user"):
        store.split("train").user_keys()
    convert(source, tmp_path / "store", schema=SCHEMA, split=SPLIT)  # it is reused
    # What its storage hash was before schemas had users.
    assert "user" not in json.dumps(SCHEMA.model_dump(exclude_none=True))
    assert SCHEMA.storage_hash() != WITH_USERS.storage_hash()


def test_one_store_for_those_who_need_users_and_those_who_do_not(tmp_path: Path) -> None:
    source = write(tmp_path, np.arange(500) % 7)
    convert(source, tmp_path / "store", schema=WITH_USERS, split=SPLIT)
    assert ArrowStore.open(tmp_path / "store", schema=SCHEMA).schema.user == "who"
    reused = convert(source, tmp_path / "store", schema=SCHEMA, split=SPLIT)
    assert reused.data_schema.user == "who"
    other = SCHEMA.with_user("a")
    with pytest.raises(DataError, match="another column of users"):
        convert(source, tmp_path / "store", schema=other, split=SPLIT)
    with pytest.raises(DataError, match=r"of column 'a', but .* those of column 'who'"):
        ArrowStore.open(tmp_path / "store", schema=other)
    convert(source, tmp_path / "plain", schema=SCHEMA, split=SPLIT)
    with pytest.raises(DataError, match=r"of column 'who', but .* none"):
        ArrowStore.open(tmp_path / "plain", schema=WITH_USERS)
    with pytest.raises(DataError, match="another column of users"):
        convert(source, tmp_path / "plain", schema=WITH_USERS, split=SPLIT)


def test_an_older_program_refuses_a_store_with_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(write(tmp_path, np.arange(50)), tmp_path / "store", schema=WITH_USERS, split=None)
    monkeypatch.setattr(manifests, "FORMAT_VERSIONS", (1,))
    with pytest.raises(DataError, match="format version 2, this program reads 1"):
        ArrowStore.open(tmp_path / "store")


@pytest.mark.parametrize("missing", [None, ""])
def test_a_record_of_nobody_is_a_bad_row(tmp_path: Path, missing: str | None) -> None:
    who = [f"u{n}" for n in range(50)]
    who[17] = missing  # type: ignore[call-overload]
    source = write(tmp_path, who)
    with pytest.raises(DataError, match=r"row 17 .*the user \(who\) is missing"):
        convert(source, tmp_path / "store", schema=WITH_USERS)
    manifest = convert(
        source, tmp_path / "store", schema=WITH_USERS, split=None, skip_bad_rows=True
    )
    assert manifest.skipped_rows == {"missing who": 1} and manifest.num_rows == 49
    assert users_of(ArrowStore.open(tmp_path / "store").split("all")).num_users == 49


def test_users_are_text_or_integers(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'who' of the column of users holds double"):
        convert(write(tmp_path, np.arange(5.0)), tmp_path / "store", schema=WITH_USERS)
    with pytest.raises(DataError, match="no column 'nobody'"):
        convert(
            write(tmp_path, np.arange(5)), tmp_path / "store", schema=SCHEMA.with_user("nobody")
        )


def test_movielens(tmp_path: Path) -> None:
    convert(write_100k(tmp_path), tmp_path / "store", user="user_id", split=None)
    data = ArrowStore.open(tmp_path / "store").split("all")
    keys = data.user_keys().tolist()
    assert keys[1] == keys[2] != keys[0]
    assert data.schema.user == "user_id" and "user_id" in data.schema.table_rows()
    with pytest.raises(ConfigError, match="MovieLens has no column 'user'"):
        convert(tmp_path, tmp_path / "other", user="user")


def test_criteo_has_no_users(tmp_path: Path) -> None:
    write_criteo_like(tmp_path / "clicks.tsv", 20, seed=1)
    with pytest.raises(ConfigError, match=r"Criteo layout does not say whose.*Parquet"):
        open_reader(tmp_path / "clicks.tsv", user="C1")


SETTINGS = SyntheticSettings(seed=5, num_dense=2, cardinalities=(10, 20), num_users=400)


def test_generated_users_are_heavy_tailed_and_change_nothing_else() -> None:
    plain = SyntheticSettings(seed=5, num_dense=2, cardinalities=(10, 20))
    counts: Counter[int] = Counter()
    for one, other in zip(iter_chunks(SETTINGS, 70_000), iter_chunks(plain, 70_000), strict=True):
        assert other.users is None and one.users is not None
        assert np.array_equal(one.ranks, other.ranks) and np.array_equal(one.labels, other.labels)
        counts.update(one.users.tolist())
    assert set(counts) <= set(range(1, 401)) and len(counts) > 390
    sizes = sorted(counts.values())
    assert sizes[-1] > 10 * sizes[200]


def test_generated_logs(tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_dense": 2, "cardinalities": (10, 20)}
    write_criteo_like(tmp_path / "log.parquet", 500, seed=5, num_users=400, **options)
    table = pq.read_table(tmp_path / "log.parquet")
    assert table.column_names == ["label", "I1", "I2", "C1", "C2", "user"] and len(table) == 500
    schema = criteo_like_schema(SETTINGS)
    convert(tmp_path / "log.parquet", tmp_path / "store", schema=schema, split=None)
    write_synthetic_store(tmp_path / "direct", 500, settings=SETTINGS, split=None)
    one, other = (
        ArrowStore.open(tmp_path / name).split("all").user_keys() for name in ("store", "direct")
    )
    assert np.array_equal(one, other) and len(set(one.tolist())) > 100
    write_criteo_like(tmp_path / "log.tsv", 500, seed=5, **options)
    assert "num_users" not in (tmp_path / "log.tsv.truth.json").read_text()
    with pytest.raises(ConfigError, match=r"no place for users.*\.parquet"):
        write_criteo_like(tmp_path / "users.tsv", 500, seed=5, num_users=400, **options)
    with pytest.raises(ConfigError, match="num_users"):
        SyntheticSettings(num_users=-1)


def test_the_schema_lists_the_column() -> None:
    assert WITH_USERS.source_columns()[-1] == "who" and "who" not in SCHEMA.source_columns()
    assert WITH_USERS.with_user(None) == SCHEMA
    again = DataSchema.model_validate({**SCHEMA.model_dump(), "user": "who"})
    assert again == WITH_USERS
