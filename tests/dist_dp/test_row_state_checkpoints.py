"""States of updated rows are saved and restored, whatever the workers and the sharding."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from dist_dp.checkpoint import CheckpointWriter, save_checkpoint
from dist_dp.checkpoint_rows import RestoredRows, row_state_pieces
from dist_dp.checkpoint_tensors import PieceSavePlanner
from dist_dp.errors import CheckpointError
from dist_dp.mechanisms import LazyDP
from dist_dp.row_optimizers import RowOptimizer
from dist_dp.sharding import TableOptimizer
from dist_dp.table_shard import TableShard
from dist_dp.wide_rows import widen
from tests.dist_dp.checkpoint_runs import Run, go_on
from tests.dist_dp.placement import model
from tests.dist_dp.worlds import run_world

DIM = 8
KINDS = {
    "sgd": TableOptimizer("sgd", momentum=0.9),
    "adagrad": TableOptimizer("adagrad"),
    "rowwise_adagrad": TableOptimizer("rowwise_adagrad"),
    "adam": TableOptimizer("adam"),
}
MIXED = {"a": "row_wise", "b": "data_parallel", "s": "row_wise"}
WAYS: dict[str, list[tuple[int, Any]]] = {
    "worlds": [(1, "table_wise"), (2, "row_wise"), (3, MIXED), (1, "table_wise")],
    "kinds": [
        (2, "table_wise"),
        (2, "row_wise"),
        (2, "column_wise"),
        (2, "data_parallel"),
        (2, "column_wise"),
    ],
}
"""Chains of stages, each in a world of some workers and with a sharding."""

State = dict[str, Tensor]
Place = tuple[str, int, int]


@contextmanager
def keeping(kind: str) -> Iterator[None]:
    """Runs give their shards the state of an optimizer of rows, as a mechanism would."""
    with mock.patch.object(
        LazyDP, "prepare", lambda _, shard: RowOptimizer(KINDS[kind]).prepare(shard)
    ):
        yield


def rows_of(shard: TableShard, stage: int) -> Tensor:
    """The global rows of a table that a stage updates; none of one table at first."""
    rows = torch.arange(shard.num_rows)
    if shard.table == "sequence.s" and stage == 0:
        return rows[:0]
    return rows[(rows * 7 + stage) % 3 == 0]


def update(shard: TableShard, kind: str, stage: int) -> None:
    """A stage's update of what a shard has of its rows; gradients depend on the place alone."""
    whole = rows_of(shard, stage).double().unsqueeze(1) + 1
    columns = torch.arange(DIM).double() + 3
    gradient = torch.sin(whole * columns * (stage + 1) + len(shard.table)).float()
    count, width = shard.weight.shape
    rows = rows_of(shard, stage) - shard.row_offset
    here = (rows >= 0) & (rows < count)
    mine = gradient[here, shard.column_offset : shard.column_offset + width].contiguous()
    # In falling order, so that slots are not in the order of the rows.
    RowOptimizer(KINDS[kind]).update(
        shard, rows[here].flip(0), mine.flip(0), learning_rate=0.1, weight_decay=0.01
    )


def found_in(made: Run) -> dict[Place, State]:
    """Weight, global rows and their state, of each shard here."""
    found = {}
    for s in made.parts.shards:
        assert s.row_state is not None
        order = s.row_state.rows.argsort()
        values = {name: t[order] for name, t in s.row_state.values.items()}
        rows = s.row_state.rows[order] + s.row_offset
        place = (s.table, s.row_offset, s.column_offset)
        found[place] = {"weight": s.weight.clone(), "rows": rows, **values}
    return found


def visit(home: Path, kind: str, stage: int, sharding: Any) -> dict[Place, State]:
    """Goes on from the last stage, takes this one's updates and saves."""
    with keeping(kind):
        made = go_on(home, 0, sharding=sharding)
    before = found_in(made)
    for shard in made.parts.shards:
        update(shard, kind, stage)
    save_checkpoint(made, home / "checkpoint")
    return before


Jobs = Sequence[tuple[Path, str, int, Any]]


def visits(jobs: Jobs) -> list[dict[Place, State]]:
    return [visit(*job) for job in jobs]


@pytest.fixture(scope="module")
def chains(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, int], Any]:
    """What each rank restored, by (chain, kind, stage)."""
    root, keys = tmp_path_factory.mktemp("rows"), []
    jobs: dict[tuple[str, int], list[Any]] = {}
    for chain, way in WAYS.items():
        for kind in KINDS:
            for stage, (_, sharding) in enumerate(way):
                # One world does all that comes one after the other in a chain.
                group = (chain, 0) if chain == "kinds" else (chain, stage)
                jobs.setdefault(group, []).append(
                    ((chain, kind, stage), (root / f"{chain}-{kind}", kind, stage, sharding))
                )
    found: dict[tuple[str, str, int], Any] = {}
    for (chain, stage), listed in jobs.items():
        keys = [key for key, _ in listed]
        ranks = run_world(visits, WAYS[chain][stage][0], [job for _, job in listed])
        found |= dict(zip(keys, zip(*ranks, strict=True), strict=True))
    return found


@cache
def reference(kind: str, stages: int) -> dict[str, TableShard]:
    """Whole tables after some stages, never saved."""
    found = {}
    for name, parameter in model(meta=False).named_parameters():
        if "embedding" in name:
            path, _, table, _ = name.split(".")
            weight = parameter.detach().clone()
            whole = TableShard(
                f"{path}.{table}", len(weight), DIM, 0, 0, weight, False, "table_wise"
            )
            RowOptimizer(KINDS[kind]).prepare(whole)
            for stage in range(stages):
                update(whole, kind, stage)
            found[whole.table] = whole
    return found


def assert_is(ranks: Sequence[Mapping[Place, State]], kind: str, stages: int) -> None:
    """Every shard has its part of the whole tables, bit for bit, and nothing else."""
    covered: dict[str, int] = {}
    for rank in ranks:
        for (table, row, column), state in rank.items():
            whole = reference(kind, stages)[table]
            assert whole.row_state is not None
            count, width = state["weight"].shape
            covered[table] = covered.get(table, 0) + count * width
            columns = slice(column, column + width)
            assert torch.equal(state["weight"], whole.weight[row : row + count, columns]), table
            order = whole.row_state.rows.argsort()
            rows = whole.row_state.rows[order]
            here = (rows >= row) & (rows < row + count)
            assert torch.equal(state["rows"], rows[here]), table
            for name, values in whole.row_state.values.items():
                wanted = values[order][here]
                wanted = wanted[:, columns] if wanted.dim() == 2 else wanted
                assert torch.equal(state[name], wanted), (table, name)
    for table, numbers in covered.items():
        assert numbers >= reference(kind, 0)[table].weight.numel()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chain", WAYS)
def test_the_state_moves_with_its_rows(chains: Any, chain: str, kind: str) -> None:
    split = False
    for stage, (_, sharding) in enumerate(WAYS[chain]):
        if split and kind in ("rowwise_adagrad", "adam"):
            # From the first update of a part of the columns on, the result depends on the split.
            break
        assert_is(chains[chain, kind, stage], kind, stage)
        split |= sharding == "column_wise"
    tables = {table for rank in chains[chain, kind, 0] for table, _, _ in rank}
    assert tables == {"pooled.a", "pooled.b", "sequence.s"}


def restored(saved: Sequence[TableShard], shards: Sequence[TableShard], kind: str) -> None:
    """Shards get the state that others saved, by the planners and without files."""
    from torch.distributed.checkpoint.metadata import Metadata

    pieces: dict[str, list[Any]] = {}
    for shard in saved:
        pieces |= row_state_pieces([shard])
    planner = PieceSavePlanner()
    planner.set_up_planner(pieces, is_coordinator=True)
    _, metadata = planner.create_global_plan([planner.create_local_plan()])
    assert isinstance(metadata, Metadata)
    for shard in shards:
        RowOptimizer(KINDS[kind]).prepare(shard)
    rows = RestoredRows(shards, metadata)
    for wanted in (rows.rows, rows.allocate):
        targets = wanted if isinstance(wanted, dict) else wanted()
        for name, boxes in targets.items():
            for box in boxes:
                (source,) = pieces[name]
                assert box.size == source.size
                part = tuple(
                    slice(o, o + n) for o, n in zip(box.offsets, box.tensor.shape, strict=True)
                )
                box.tensor.copy_(source.tensor[part])
    rows.finish()


def columns_of(first: int, width: int) -> TableShard:
    weight = torch.zeros(20, width)
    return TableShard("t", 20, DIM, 0, first, weight, False, "column_wise")


@pytest.mark.parametrize(("kind", "name"), [("rowwise_adagrad", "sum"), ("adam", "exp_avg_sq")])
def test_a_rows_mean_square_is_that_of_its_columns(kind: str, name: str) -> None:
    """Joined columns have the mean, weighted by their number; parted ones what the row had."""
    whole, parts = columns_of(0, DIM), [columns_of(0, 2), columns_of(2, 6)]
    for stage in range(3):
        for shard in (whole, *parts):
            update(shard, kind, stage)
    joined, parted, odd = columns_of(0, DIM), columns_of(4, 4), columns_of(1, 2)
    restored(parts, [joined, odd], kind)
    restored([whole], [parted], kind)
    assert whole.row_state is not None and joined.row_state is not None
    assert parted.row_state is not None and odd.row_state is not None
    for state in (joined.row_state, parted.row_state, odd.row_state):
        assert torch.equal(state.rows, whole.row_state.rows)
        if kind == "adam":
            assert torch.equal(state.values["step"], whole.row_state.values["step"])
    value = whole.row_state.values[name]
    torch.testing.assert_close(joined.row_state.values[name], value, rtol=1e-5, atol=0)
    assert torch.equal(parted.row_state.values[name], value)
    values = [p.row_state.values[name] for p in parts if p.row_state is not None]
    torch.testing.assert_close(odd.row_state.values[name], sum(values) / 2, rtol=1e-6, atol=0)
    if kind == "adam":
        assert torch.equal(
            odd.row_state.values["exp_avg"], whole.row_state.values["exp_avg"][:, 1:3]
        )


def test_columns_with_other_rows() -> None:
    """A row that was updated in some of its columns alone: the rest is as if it never was."""
    parts = [columns_of(0, 4), columns_of(4, 4)]
    optimizer = RowOptimizer(KINDS["adam"])
    for part, rows in zip(parts, ([1, 5, 9], [5, 6]), strict=True):
        gradient = torch.full((len(rows), 4), 2.0)
        optimizer.update(part, torch.tensor(rows), gradient, learning_rate=0.1)
    joined = columns_of(0, DIM)
    restored(parts, [joined], "adam")
    state = joined.row_state
    assert state is not None and state.rows.tolist() == [1, 5, 6, 9]
    assert state.values["step"].tolist() == [1, 1, 1, 1]
    left, right = torch.tensor([1.0, 1, 0, 1]), torch.tensor([0.0, 1, 1, 0])
    mean = torch.cat([0.2 * left.outer(torch.ones(4)), 0.2 * right.outer(torch.ones(4))], 1)
    torch.testing.assert_close(state.values["exp_avg"], mean)
    torch.testing.assert_close(state.values["exp_avg_sq"], 0.004 * (left + right) / 2)


def test_values_are_read_into_place() -> None:
    """No second copy of the state of whole columns, nor at the save of one that is sorted."""
    saved = columns_of(0, DIM)
    update(saved, "adagrad", 0)
    (name,) = (n for n in row_state_pieces([saved]) if n.endswith("/sum"))
    (piece,) = row_state_pieces([saved])[name]
    assert saved.row_state is not None
    assert piece.tensor.data_ptr() == saved.row_state.values["sum"].data_ptr()
    half = columns_of(4, 4)
    update(half, "adagrad", 1)  # forgotten: what is restored is what was saved
    restored([saved], [half], "adagrad")
    assert half.row_state is not None
    assert torch.equal(half.row_state.rows, saved.row_state.rows)
    assert torch.equal(half.row_state.values["sum"], saved.row_state.values["sum"][:, 4:])


def test_half_precision_tables_keep_their_state_beside_the_rest() -> None:
    """The state of a bfloat16 shard is float32 too."""
    shard = columns_of(0, DIM)
    shard.weight = shard.weight.bfloat16()
    widen(shard)
    update(shard, "adam", 1)
    other = columns_of(0, DIM)
    restored([shard], [other], "adam")
    assert shard.row_state is not None and other.row_state is not None
    for name, values in shard.row_state.values.items():
        assert torch.equal(other.row_state.values[name], values)


@pytest.mark.parametrize("background", [False, True])
def test_a_checkpoint_is_of_the_step_it_was_saved_at(tmp_path: Path, background: bool) -> None:
    with keeping("adam"):
        made = go_on(tmp_path, 0)
    for shard in made.parts.shards:
        update(shard, "adam", 0)
    writer = CheckpointWriter(made, tmp_path / "checkpoint", background=background)
    writer.save()
    # Updates go on meanwhile, in the same tensors.
    for shard in made.parts.shards:
        update(shard, "adam", 0)
    writer.close()
    with keeping("adam"):
        assert_is([found_in(go_on(tmp_path, 0))], "adam", 1)


@pytest.mark.parametrize(
    ("saved", "now", "words"),
    [
        ("adagrad", "adam", r"'pooled\.a' was saved with rows in the state of 'adagrad'.*'adam'"),
        ("adam", None, r"rows in the state of 'adam' and has no state of its rows now"),
        (None, "sgd", r"saved with no state of its rows.*'sgd' now.*train\.table_optimizer"),
    ],
)
def test_another_optimizer_is_refused(
    tmp_path: Path, saved: str | None, now: str | None, words: str
) -> None:
    def begin(kind: str | None) -> Run:
        if kind is None:
            return go_on(tmp_path, 0)
        with keeping(kind):
            return go_on(tmp_path, 0)

    save_checkpoint(begin(saved), tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match=words):
        begin(now)


@pytest.mark.parametrize(
    ("from_name", "to_name", "words"),
    [
        ("sum", "product", "'row_states/.*/product', which this model does not have"),
        ("sum", "sum/x", "'row_states/.*/sum/x', which is no state of a table's rows"),
        ("rows", "sums", "lacks 'row_states/.*/rows', whose values it has"),
    ],
)
def test_unknown_tensors_are_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    from_name: str,
    to_name: str,
    words: str,
) -> None:
    with keeping("adagrad"):
        made = go_on(tmp_path, 0)
    for shard in made.parts.shards:
        update(shard, "adagrad", 1)

    def renamed(shards: Sequence[TableShard]) -> dict[str, Any]:
        return {
            name.removesuffix(from_name) + to_name if name.endswith(from_name) else name: pieces
            for name, pieces in row_state_pieces(shards).items()
        }

    monkeypatch.setattr("dist_dp.checkpoint_state.row_state_pieces", renamed)
    folder = save_checkpoint(made, tmp_path / "checkpoint")
    assert json.loads((folder / "checkpoint.json").read_text())["row_states"] == dict.fromkeys(
        ("pooled.a", "pooled.b", "sequence.s"), "adagrad"
    )
    with keeping("adagrad"), pytest.raises(CheckpointError, match=words):
        go_on(tmp_path, 0)
