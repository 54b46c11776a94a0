"""Stale rows of several tables, found and settled in one go, against plain definitions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dist_dp import kernels
from dist_dp.kernels import dispatch, native
from tests.kernels.planted import Fault, compiled, use, with_fault

SIZES = (7, 200, 1)
COLUMNS = 21
KEYS = [bytes([i]) * 32 for i in range(3)]
OFFSETS = [0, 1 << 33, 5]
COLUMN_OFFSETS = [0, 3, 40]
PATHS = ["reference", *(native.isas() if native.available() else ())]


def tables(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and histories of three shards; the second is a view with strides."""
    g = torch.Generator().manual_seed(3)
    wide = torch.randn(SIZES[1], 2 * COLUMNS, generator=g).to(dtype)
    weights = [
        torch.randn(SIZES[0], COLUMNS, generator=g).to(dtype),
        wide[:, ::2],
        torch.randn(SIZES[2], COLUMNS, generator=g).to(dtype),
    ]
    histories = [torch.randint(0, 9, (n,), generator=g, dtype=torch.int32) for n in SIZES]
    return weights, histories


def lookups(kind: torch.dtype = torch.int64) -> list[Tensor]:
    """Rows with repeats, in any order; the last shard is not read."""
    g = torch.Generator().manual_seed(4)
    ids = [torch.randint(0, SIZES[i], (n,), generator=g) for i, n in ((0, 9), (1, 300))]
    return [*(i.to(kind) for i in ids), torch.empty(0, dtype=kind)]


def table_set(weights: list[Tensor], histories: list[Tensor]) -> kernels.TableSet:
    return kernels.TableSet(weights, histories, KEYS, OFFSETS, COLUMN_OFFSETS)


def factors(stale: kernels.Stale) -> tuple[Tensor, Tensor]:
    """Some decay and deviation for each row, by its from-step."""
    steps = stale.from_steps.double()
    return 1.0 - steps / 100, 0.1 + steps / 10


def by_definition(
    weights: list[Tensor], histories: list[Tensor], ids: list[Tensor], before: int, to_step: int
) -> None:
    """What a set must do, one row at a time."""
    for i, (weight, history) in enumerate(zip(weights, histories, strict=True)):
        for row in sorted(set(ids[i].tolist())):
            step = int(history[row])
            if step >= before:
                continue
            one = torch.tensor([step], dtype=torch.int32)
            decay, scale = factors(kernels.Stale(one, one, one))
            kernels.settle_rows(
                weight,
                torch.tensor([row]),
                key=KEYS[i],
                row_offset=OFFSETS[i],
                column_offset=COLUMN_OFFSETS[i],
                from_steps=step,
                to_step=to_step,
                decay=decay,
                scale=scale,
            )
            history[row] = to_step


def settle(
    made: kernels.TableSet, ids: list[Tensor], to_step: int, older: int | None = None
) -> int:
    stale = made.take_stale(ids, to_step, older_than=older)
    decay, scale = factors(stale)
    made.settle(stale, to_step=to_step, decay=decay, scale=scale)
    return stale.rows.numel()


def is_right(dtype: torch.dtype, kind: torch.dtype, older: int | None = None) -> bool:
    weights, histories = tables(dtype)
    wanted = [w.clone() for w in weights], [h.clone() for h in histories]
    by_definition(*wanted, lookups(kind), older or 9, 9)
    made = table_set(weights, histories)
    settle(made, lookups(kind), 9, older)
    return all(
        torch.equal(found, right)
        for pair in zip((weights, histories), wanted, strict=True)
        for found, right in zip(*pair, strict=True)
    )


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_row_at_a_time(dtype: torch.dtype, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, path)
    for kind in (torch.int64, torch.int32):
        for older in (None, 4):
            assert is_right(dtype, kind, older)


def test_ids_of_two_kinds() -> None:
    weights, histories = tables()
    ids = [lookups()[0].int(), *lookups()[1:]]
    assert settle(table_set(weights, histories), ids, 9) > 50


@pytest.mark.parametrize("path", PATHS)
def test_every_row_once(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, path)
    weights, histories = tables()
    made = table_set(weights, histories)
    stale = made.take_stale(lookups(), 9)
    first = stale.rows[: int(stale.counts[0])]
    assert sorted(first.tolist()) == sorted(set(lookups()[0].tolist()))
    assert stale.counts.sum() == stale.rows.numel() and stale.counts[2] == 0
    assert made.take_stale(lookups(), 9).rows.numel() == 0
    moved = [int((h == 9).sum()) for h in histories]
    assert moved == stale.counts.tolist()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("wrong", [-1, 200, 2**40])
def test_a_row_that_is_none(path: str, wrong: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is marked: a mark without noise would be a row without noise."""
    monkeypatch.setenv(dispatch.VARIABLE, path)
    weights, histories = tables()
    before = [h.clone() for h in histories]
    ids = lookups()
    ids[1][-1] = wrong
    with pytest.raises(IndexError, match=str(wrong)):
        table_set(weights, histories).take_stale(ids, 9)
    if path != "reference":
        assert all(torch.equal(a, b) for a, b in zip(before, histories, strict=True))


def test_many_rows_are_found_by_several_threads() -> None:
    """The same rows in the same order as each table's alone."""
    g = torch.Generator().manual_seed(6)
    sizes, counts = (5_000, 3_000, 1), (9_000, 20, 2)
    weights = [torch.zeros(n, 1) for n in sizes]
    histories = [torch.randint(0, 9, (n,), generator=g, dtype=torch.int32) for n in sizes]
    ids = [torch.randint(0, n, (k,), generator=g) for n, k in zip(sizes, counts, strict=True)]
    alone = [
        kernels.TableSet([w], [h.clone()], KEYS[:1], [0], [0]).take_stale([i], 9, older_than=5)
        for w, h, i in zip(weights, histories, ids, strict=True)
    ]
    found = table_set(weights, histories).take_stale(ids, 9, older_than=5)
    for name in ("rows", "from_steps", "counts"):
        assert torch.equal(getattr(found, name), torch.cat([getattr(a, name) for a in alone]))
    assert found.counts[1] < counts[1] and found.counts.sum() > 2_000


def test_factors_are_checked_before_anything_is_written() -> None:
    weights, histories = tables()
    made, before = table_set(weights, histories), [w.clone() for w in tables()[0]]
    stale = made.take_stale(lookups(), 9)
    for value in (float("nan"), float("inf"), -1.0, 1e39):
        for name in ("decay", "scale"):
            given = {
                "decay": torch.ones(stale.rows.numel()),
                "scale": torch.ones(stale.rows.numel()),
            }
            given[name] = given[name].double()
            given[name][-1] = value
            with pytest.raises(ValueError, match="decay"):
                made.settle(stale, to_step=9, **given)
    assert all(torch.equal(a, b) for a, b in zip(before, weights, strict=True))
    with pytest.raises(ValueError, match="shape"):
        made.settle(stale, to_step=9, decay=torch.ones(1), scale=torch.ones(1))


def test_wrong_arguments() -> None:
    weights, histories = tables()
    with pytest.raises(TypeError, match="contiguous int32"):
        table_set(weights, [h.long() for h in histories])
    with pytest.raises(ValueError, match="one step for each row"):
        table_set(weights, [histories[1], *histories[1:]])
    with pytest.raises(ValueError, match="given twice"):
        kernels.TableSet(weights[:1] * 2, histories[:1] * 2, KEYS[:2], [0, 0], [0, 0])
    made = table_set(weights, histories)
    with pytest.raises(ValueError, match="3 tensors expected"):
        made.take_stale(lookups()[:2], 9)
    with pytest.raises(ValueError, match="older_than"):
        made.take_stale(lookups(), 9, older_than=10)
    assert repr(made) == "TableSet(3 shards)"


def test_a_weight_that_moved() -> None:
    weights, histories = tables()
    made = table_set(weights, histories)
    weights[0].set_(torch.zeros_like(weights[0]))  # type: ignore[call-overload]
    made._weights[0].set_(weights[0])  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="moved in memory"):
        made.take_stale(lookups(), 9)


def test_an_empty_set() -> None:
    made = kernels.TableSet([], [], [], [], [])
    stale = made.take_stale([], 4)
    made.settle(stale, to_step=4, decay=torch.empty(0), scale=torch.empty(0))


# Repeats of ids in bags.


def repeats_by_definition(ids: Tensor, lengths: Tensor, weights: Tensor | None) -> Tensor:
    sums: list[float] = []
    start = 0
    for length in lengths.tolist():
        rows: dict[int, float] = {}
        for entry in range(start, start + length):
            weight = 1.0 if weights is None else float(weights[entry])
            rows[int(ids[entry])] = rows.get(int(ids[entry]), 0.0) + weight
        sums.append(sum(w * w for w in rows.values()))
        start += length
    return torch.tensor(sums)


def bags(longest: int, weighted: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    g = torch.Generator().manual_seed(longest)
    lengths = torch.randint(0, longest + 1, (200,), generator=g)
    lengths[:2] = torch.tensor([0, longest])
    total = int(lengths.sum())
    rows = torch.randint(-(2**40), 2**40, (max(2, longest // 2),), generator=g)
    ids = rows[torch.randint(rows.numel(), (total,), generator=g)]
    return ids, lengths, torch.randn(total, generator=g) if weighted else None


def repeats_are_right(longest: int, weighted: bool) -> bool:
    ids, lengths, weights = bags(longest, weighted)
    found = kernels.bag_repeats(ids, lengths, weights)
    wanted = repeats_by_definition(ids, lengths, weights)
    return torch.allclose(found, wanted, rtol=1e-5, atol=1e-6) and bool((found >= 0).all())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("longest", [1, 5, 15, 16, 17, 200])
def test_repeats(path: str, longest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, path)
    for weighted in (False, True):
        assert repeats_are_right(longest, weighted)


@pytest.mark.parametrize("path", PATHS)
def test_lengths_that_do_not_fit(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, path)
    ids = torch.arange(4)
    for lengths in ([2, 1], [2, 3], [5, -1], [-1, 5]):
        with pytest.raises(ValueError, match="lengths"):
            kernels.bag_repeats(ids, torch.tensor(lengths))
    with pytest.raises(ValueError, match="weights"):
        kernels.bag_repeats(ids, torch.tensor([4]), torch.ones(3))
    assert kernels.bag_repeats(ids[:0], torch.zeros(2, dtype=torch.int32)).tolist() == [0.0, 0.0]


# Planted faults.

FAULTS = {
    "a row is settled again at each repeat": Fault(
        "lookups.cpp", "history[row] = to_step;", "if (taken < 0) history[row] = 0;", ("rows",)
    ),
    "rows settled one step ago are left out": Fault(
        "lookups.cpp", "if (step >= older_than) continue;", "if (step >= older_than - 1) continue;",
        ("rows",),
    ),
    "rows of all tables begin at the first": Fault(
        "library.cpp", "job.rows = {rows + first, 1, kInt64};", "job.rows = {rows, 1, kInt64};",
        ("rows",),
    ),
    "row offset forgotten": Fault(
        "library.cpp", "job.row_offset = table.row_offset;", "job.row_offset = 0;", ("rows",)
    ),
    "column offset forgotten": Fault(
        "library.cpp", "job.column_offset = table.column_offset;", "job.column_offset = 0;",
        ("rows",),
    ),
    "repeats counted one by one": Fault(
        "lookups.cpp", "if (ids[j] == ids[i]) sum +=", "if (j == i) sum +=", ("repeats",)
    ),
    "repeats in long bags counted one by one": Fault(
        "lookups.cpp", "sums_[entry] += weight;", "rows_.push_back(row), sums_.push_back(weight);",
        ("repeats",),
    ),
    "rows that meet in the hash table are taken for one": Fault(
        "lookups.cpp", "if (rows_[entry] == row) {", "{",
        ("repeats",),
    ),
    "the steps of rows are lost when tables' rows are moved together": Fault(
        "lookups.cpp",
        "std::copy(from_steps + start, from_steps + start + taken[t], from_steps + end);",
        "std::fill(from_steps + end, from_steps + end + taken[t], 1);", ("rows",),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("unchanged"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [None, *FAULTS])
def test_planted(
    name: str | None, unchanged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library, caught_by = unchanged / "library.so", tuple[str, ...]()
    if name is not None:
        library, caught_by = with_fault(FAULTS[name], unchanged, tmp_path), FAULTS[name].caught_by
    use(library, monkeypatch)
    found = {
        "rows": is_right(torch.float32, torch.int64),
        "repeats": repeats_are_right(90, True) and repeats_are_right(90, False),
    }
    assert found == {check: check not in caught_by for check in found}
