"""Counts of the units that hold each row: against plain sets, on several ranks, and their bound."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor

from dist_dp.datasets.store import ArrowStore, convert
from dist_dp.distributed import ensure_process_group
from dist_dp.errors import ConfigError, DataError
from dist_dp.loader import StoreSource, as_source
from dist_dp.row_counts import TableFeatures, row_counts, tables_of, within_bound
from dist_dp.user_records import UserRecords, users_of
from tests.datasets.test_users import WITH_USERS, write
from tests.dist_dp.clicks import Clicks, random_bags
from tests.dist_dp.worlds import run_world

ROWS = {"a": 13, "b": 5, "c": 13}
# Features a and c look up one table.
TABLES = [TableFeatures("x.ac", 13, ("a", "c")), TableFeatures("x.b", 5, ("b",))]


def clicks(records: int = 60, seed: int = 3) -> Clicks:
    generator = torch.Generator().manual_seed(seed)
    bags = random_bags(ROWS, records, generator)
    return Clicks(torch.zeros(records, 1), (bags,), torch.zeros(records))


def keys_of(records: int) -> np.ndarray[Any, Any]:
    """Users whose records lie all over the data set."""
    return np.random.default_rng(5).integers(0, 17, records) * 7919


def only(batch: Clicks) -> KeyedJaggedTensor:
    return batch.sparse[0]


def counted(
    data: Clicks, most: int, keys: Any = None, rows_at_once: int = 1 << 24
) -> dict[str, list[int]]:
    users = None if keys is None else UserRecords(keys)
    found = row_counts(
        StoreSource(data), TABLES, most, users=users, features_of=only, rows_at_once=rows_at_once
    )
    return {table.table: counts.tolist() for table, counts in found}


def sets_of(data: Clicks, keys: Any = None) -> dict[str, dict[int, set[int]]]:
    """By table the rows of each unit."""
    found: dict[str, dict[int, set[int]]] = {t.table: defaultdict(set) for t in TABLES}
    for record in range(len(data)):
        unit = record if keys is None else int(keys[record])
        bags = data.select([record]).sparse[0]
        for table in TABLES:
            for name in table.features:
                found[table.table][unit] |= set(bags[name].values().tolist())
    return found


def by_sets(data: Clicks, keys: Any = None) -> dict[str, list[int]]:
    return {
        t.table: [
            sum(row in rows for rows in sets_of(data, keys)[t.table].values())
            for row in range(t.num_rows)
        ]
        for t in TABLES
    }


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of few records: users with more come in several."""
    monkeypatch.setattr("dist_dp.row_counts._RECORDS_AT_ONCE", 4)


@pytest.mark.parametrize("by_user", [False, True])
def test_every_unit_counts_once_for_a_row(by_user: bool) -> None:
    ensure_process_group()
    data = clicks()
    keys = keys_of(len(data)) if by_user else None
    expected = by_sets(data, keys)
    assert counted(data, 100, keys) == expected
    assert counted(data, 100, keys, rows_at_once=1) == expected  # a pass for each table
    assert max(expected["x.b"]) > 5


def one_less(data: Clicks, keys: Any, unit: int) -> tuple[Clicks, Any]:
    kept = [record for record in range(len(data)) if keys[record] != unit]
    return data.select(kept), keys[kept]


def largest_changes(data: Clicks, keys: Any, most: int, *, as_users: bool = True) -> set[int]:
    """Counts that change when a user is removed: how many, over all users and tables."""
    before = counted(data, most, keys if as_users else None)
    found = set()
    for unit in sorted(set(keys.tolist())):
        less, fewer = one_less(data, keys, unit)
        after = counted(less, most, fewer if as_users else None)
        for table, counts in before.items():
            change = np.array(counts) - np.array(after[table])
            assert change.min() >= 0
            assert not as_users or change.max() <= 1
            found.add(int(change.sum()))
    return found


def test_a_unit_changes_no_more_counts_than_its_bound() -> None:
    """Exact for users too; counting records, as if each were a unit, breaks it."""
    ensure_process_group()
    data = clicks(40)
    keys = keys_of(len(data))
    assert max(largest_changes(data, keys, 3)) == 3
    assert max(largest_changes(data, keys, 3, as_users=False)) > 3
    for bound in (1, 2):
        units = sets_of(data, keys)
        totals = {t: sum(min(bound, len(rows)) for rows in u.values()) for t, u in units.items()}
        assert {t: sum(c) for t, c in counted(data, bound, keys).items()} == totals


def test_which_rows_count_depends_on_the_unit_alone() -> None:
    rows = np.arange(10)
    alone = within_bound(np.zeros(10, dtype=np.int64), rows, 4)
    assert len(set(alone.tolist())) == 4
    three = np.repeat(np.arange(3), [2, 10, 3])
    among = within_bound(three, np.concatenate([[4, 5], rows, [7, 8, 9]]), 4)
    assert sorted(among.tolist()) == sorted([4, 5, *alone.tolist(), 7, 8, 9])
    # No row is favoured over all units: of 400 units with 10 of 20 rows each row is kept evenly.
    rng = np.random.default_rng(0)
    sets = [np.sort(rng.choice(20, 10, replace=False)) for _ in range(400)]
    kept = within_bound(np.repeat(np.arange(400), 10), np.concatenate(sets), 5)
    shares = np.bincount(kept, minlength=20) / np.bincount(np.concatenate(sets), minlength=20)
    assert len(kept) == 2000 and shares.min() > 0.35 and shares.max() < 0.65


def in_world(most: int, by_user: bool) -> dict[str, list[int]]:
    data = clicks()
    return counted(data, most, keys_of(len(data)) if by_user else None)


def all_in_world() -> list[dict[str, list[int]]]:
    found = [in_world(most, by_user) for most in (2, 100) for by_user in (False, True)]
    message = ""
    try:
        broken = [TableFeatures("x.b", 4, ("b",))]
        list(row_counts(StoreSource(clicks(12)), broken, 1, features_of=only))
    except DataError as error:
        message = str(error)
    return [*found, {message: []}]


def test_ranks_count_together() -> None:
    """The same on every rank as on one; what fails on one rank fails on all."""
    alone = all_in_world()
    for found in run_world(all_in_world, 3):
        assert found[:-1] == alone[:-1]
        assert "outside table 'x.b' of 4 rows" in next(iter(found[-1]))


def test_a_converted_data_set_is_counted(tmp_path: Path) -> None:
    """Hashed, ragged and plain features of a store, with its users; padding counts nowhere."""
    ensure_process_group()
    who = np.random.default_rng(1).integers(0, 30, 200)
    convert(write(tmp_path, who), tmp_path / "store", schema=WITH_USERS, split=None)
    data = ArrowStore.open(tmp_path / "store").split("all")
    tables = [TableFeatures(f.table_name, f.num_embeddings, (f.name,)) for f in data.schema.sparse]
    whole = data.batch(np.arange(200)).sparse_features
    found = row_counts(as_source(data), tables, 10**6, users=users_of(data))
    for table, counts in found:
        bags = whole[table.features[0]]
        held: dict[int, set[int]] = defaultdict(set)
        unit = np.repeat(who, bags.lengths().numpy())
        for user, row in zip(unit.tolist(), bags.values().tolist(), strict=True):
            held[row].add(user)
        assert counts.tolist() == [len(held[row]) for row in range(table.num_rows)]
    rows = [int(counts.sum()) for _, counts in row_counts(as_source(data), tables, 10**6)]
    assert rows[0] == rows[2] == 200


def collate(examples: Sequence[tuple[int, int]]) -> dict[str, Any]:
    values = torch.tensor([row for _, row in examples])
    bags = KeyedJaggedTensor(["f"], values, lengths=torch.ones(len(examples), dtype=torch.int32))
    return {"label": torch.zeros(len(examples)), "ids": bags}


def test_a_data_loader_is_counted() -> None:
    ensure_process_group()
    loader = DataLoader([(n, n % 3) for n in range(10)], batch_size=4, collate_fn=collate)  # type: ignore[arg-type]
    ((_, counts),) = row_counts(as_source(loader), [TableFeatures("t", 4, ("f",))], 1)
    assert counts.tolist() == [4, 3, 3, 0]


def test_tables_of_a_model() -> None:
    model = torch.nn.Module()
    model.bags = EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name="t", embedding_dim=4, num_embeddings=9, feature_names=["f", "g"]
            )
        ]
    )
    assert tables_of(model) == [TableFeatures("bags.t", 9, ("f", "g"), "bags")]


def test_what_makes_no_sense_is_named() -> None:
    ensure_process_group()
    source = StoreSource(clicks(8))

    def refused(kind: type[Exception], words: str, tables: Any = TABLES, **settings: Any) -> None:
        given: dict[str, Any] = {"max_rows_per_unit": 2, "features_of": only, **settings}
        with pytest.raises(kind, match=words):
            list(row_counts(source, tables, **given))

    refused(ConfigError, "max_rows_per_unit is 0", max_rows_per_unit=0)
    refused(ConfigError, "max_rows_per_unit is True", max_rows_per_unit=True)
    refused(ConfigError, "5 records have one, but the data set holds 8", users=UserRecords([1] * 5))
    refused(DataError, "feature 'z' of table 't' is missing", [TableFeatures("t", 5, ("z",))])
    refused(DataError, "outside table 't' of 2 rows", [TableFeatures("t", 2, ("a",))])
    refused(
        ConfigError, "nothing for collection 'y'",
        [TableFeatures("y.b", 5, ("b",), "y")], features_of=lambda b: {"x": b.sparse[0]},
    )  # fmt: skip
