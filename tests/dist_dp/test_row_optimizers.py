"""Updates of single rows are those of PyTorch's optimizers, and of no other row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dist_dp.errors import ConfigError
from dist_dp.optimizer_settings import optimizer_settings
from dist_dp.row_optimizers import ROW_OPTIMIZERS, RowOptimizer
from dist_dp.sharding import TableOptimizer, make_sharders
from dist_dp.table_shard import TableShard
from dist_dp.wide_rows import read_rows, widen

ROWS, COLUMNS, STEPS = 40, 8, 12
KINDS = {
    "sgd": TableOptimizer("sgd"),
    "momentum": TableOptimizer("sgd", momentum=0.9),
    "adagrad": TableOptimizer("adagrad", eps=1e-3),
    "rowwise_adagrad": TableOptimizer("rowwise_adagrad", eps=1e-3),
    "adam": TableOptimizer("adam", eps=1e-4, betas=(0.8, 0.95)),
}


def shard_of(
    dtype: torch.dtype = torch.float32, rows: int = ROWS, columns: int = COLUMNS
) -> TableShard:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    shard = TableShard("t", rows, columns, 0, 0, weight, False, "table_wise")
    if dtype != torch.float32:
        widen(shard)
    return shard


def steps(rows: int = ROWS, columns: int = COLUMNS) -> list[tuple[Tensor, Tensor, float]]:
    """Rows, gradient and learning rate of each step; the last rows are never updated."""
    g = torch.Generator().manual_seed(2)
    found = []
    for step in range(STEPS):
        chosen = torch.randperm(rows - 5, generator=g)[: int(torch.randint(1, 20, (), generator=g))]
        gradient = torch.randn(len(chosen), columns, generator=g) * (0.1 + step)
        found.append((chosen, gradient, 0.1 / (1 + step)))
    return found


def rate_of(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def by_torch(name: str, weight: Tensor, decay: float) -> Tensor:
    """PyTorch's optimizer in float64 with a parameter for each row, or each number.

    A row that is not updated has no gradient, so the optimizer passes it by.
    """
    settings, kept = KINDS[name], weight.double()
    parameters = [torch.nn.Parameter(row) for row in kept.clone()]
    made: torch.optim.Optimizer
    if settings.kind == "sgd":
        made = torch.optim.SGD(parameters, momentum=settings.momentum, weight_decay=decay)
    else:
        made = torch.optim.Adagrad(parameters, eps=settings.eps, weight_decay=decay)
    for rows, gradient, learning_rate in steps():
        made.zero_grad()
        for row, values in zip(rows.tolist(), gradient.double(), strict=True):
            parameters[row].grad = values
        rate_of(made, learning_rate)
        made.step()
    return torch.stack([p.detach() for p in parameters])


def written_out(name: str, weight: Tensor, decay: float) -> Tensor:
    """The row-wise optimizers, number by number."""
    settings, weights = KINDS[name], weight.double().tolist()
    sums: dict[int, float] = {}
    moments: dict[int, list[float]] = {}
    counts: dict[int, int] = {}
    first, second = settings.betas
    for rows, gradient, learning_rate in steps():
        for row, values in zip(rows.tolist(), gradient.tolist(), strict=True):
            values = [v + decay * w for v, w in zip(values, weights[row], strict=True)]
            square = sum(v * v for v in values) / len(values)
            if name == "rowwise_adagrad":
                sums[row] = sums.get(row, 0.0) + square
                directions, root = values, sums[row] ** 0.5
            else:
                count = counts[row] = counts.get(row, 0) + 1
                held = moments.get(row, [0.0] * len(values))
                moments[row] = [
                    first * m + (1 - first) * v for m, v in zip(held, values, strict=True)
                ]
                sums[row] = second * sums.get(row, 0.0) + (1 - second) * square
                directions = [m / (1 - first**count) for m in moments[row]]
                root = (sums[row] / (1 - second**count)) ** 0.5
            factor = learning_rate / (root + settings.eps)
            weights[row] = [w - factor * d for w, d in zip(weights[row], directions, strict=True)]
    return torch.tensor(weights, dtype=torch.float64)


def trained(shard: TableShard, name: str, decay: float = 0.0) -> RowOptimizer:
    optimizer = RowOptimizer(KINDS[name])
    for rows, gradient, learning_rate in steps(*shard.weight.shape):
        before = gradient.clone()
        optimizer.update(shard, rows, gradient, learning_rate=learning_rate, weight_decay=decay)
        assert torch.equal(gradient, before)
    return optimizer


@pytest.mark.parametrize("decay", [0.0, 0.2])
@pytest.mark.parametrize("name", KINDS)
def test_it_is_the_optimizer_it_is_named_after(name: str, decay: float) -> None:
    shard = shard_of()
    reference = written_out if name in ("rowwise_adagrad", "adam") else by_torch
    wanted = reference(name, shard.weight, decay)
    trained(shard, name, decay)
    torch.testing.assert_close(shard.weight.double(), wanted, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("kind", ["adam", "rowwise_adagrad"])
def test_with_one_column_it_is_pytorchs(kind: str) -> None:
    """The mean square of one number is its square: Adam and Adagrad as they are."""
    shard = shard_of(columns=1)
    parameters = [torch.nn.Parameter(row) for row in shard.weight.double()]
    made: torch.optim.Optimizer
    if kind == "adam":
        made = torch.optim.Adam(parameters, betas=KINDS[kind].betas, eps=KINDS[kind].eps)
    else:
        made = torch.optim.Adagrad(parameters, eps=KINDS[kind].eps)
    for rows, gradient, learning_rate in steps(columns=1):
        made.zero_grad()
        for row, values in zip(rows.tolist(), gradient.double(), strict=True):
            parameters[row].grad = values
        rate_of(made, learning_rate)
        made.step()
    trained(shard, kind)
    wanted = torch.stack([p.detach() for p in parameters])
    torch.testing.assert_close(shard.weight.double(), wanted, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    ("kind", "fused"),
    [
        ("adagrad", "EXACT_ADAGRAD"),
        ("rowwise_adagrad", "EXACT_ROWWISE_ADAGRAD"),
        ("sgd", "EXACT_SGD"),
    ],
)
def test_it_is_fbgemms(kind: str, fused: str) -> None:
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    shard = shard_of()
    theirs: Any = SplitTableBatchedEmbeddingBagsCodegen(
        [(ROWS, COLUMNS, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        optimizer=EmbOptimType[fused],
        learning_rate=0.0,
        eps=KINDS[kind].eps,
        stochastic_rounding=False,
    )
    theirs.split_embedding_weights()[0].copy_(shard.weight)
    for rows, gradient, learning_rate in steps():
        theirs.set_learning_rate(learning_rate)
        theirs(rows, torch.arange(len(rows) + 1)).backward(gradient)
    trained(shard, kind)
    torch.testing.assert_close(
        shard.weight, theirs.split_embedding_weights()[0].detach(), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", KINDS)
def test_no_other_row_is_touched(name: str, dtype: torch.dtype) -> None:
    """Weight, rest and state, bit for bit, at every step."""
    shard, optimizer = shard_of(dtype), RowOptimizer(KINDS[name])
    seen: set[int] = set()
    for rows, gradient, learning_rate in steps():
        others = torch.tensor(sorted(set(range(ROWS)) - set(rows.tolist())))
        before = {n: t.clone() for n, t in shard.state_tensors().items()}
        state = shard.row_state
        slots = torch.empty(0, dtype=torch.int64) if state is None else state.lookup(others)
        slots = slots[slots >= 0]
        held = {} if state is None else {n: t[slots].clone() for n, t in state.values.items()}
        optimizer.update(shard, rows, gradient, learning_rate=learning_rate, weight_decay=0.1)
        seen |= set(rows.tolist())
        for field, tensor in shard.state_tensors().items():
            assert torch.equal(tensor[others], before[field][others]), field
            assert not torch.equal(tensor[rows], before[field][rows]), field
        for field, tensor in held.items():
            assert state is not None and torch.equal(state.values[field][slots], tensor), field
        if optimizer.fields:
            assert shard.row_state is not None
            assert sorted(shard.row_state.rows.tolist()) == sorted(seen)
        else:
            assert shard.row_state is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", KINDS)
def test_half_precision_tables_are_updated_in_float32(name: str, dtype: torch.dtype) -> None:
    half, whole = shard_of(dtype), shard_of()
    whole.weight = half.weight.float()
    trained(half, name)
    trained(whole, name)
    every = torch.arange(ROWS)
    assert torch.equal(read_rows(half, every), whole.weight)
    torch.testing.assert_close(half.weight, whole.weight.to(dtype), rtol=2**-8, atol=0)


@pytest.mark.parametrize("name", KINDS)
def test_blocks_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = shard_of(), shard_of()
    trained(one, name)
    monkeypatch.setattr("dist_dp.row_optimizers._BLOCK_NUMBERS", 3 * COLUMNS)
    trained(other, name)
    assert torch.equal(one.weight, other.weight)


@pytest.mark.parametrize("name", KINDS)
def test_the_order_of_slots_changes_nothing(name: str) -> None:
    one, other, optimizer = shard_of(), shard_of(), RowOptimizer(KINDS[name])
    trained(one, name)
    for rows, gradient, learning_rate in steps():
        optimizer.update(other, rows, gradient, learning_rate=learning_rate)
        if other.row_state is not None:
            other.row_state.sort()
            assert other.row_state.rows.tolist() == sorted(other.row_state.rows.tolist())
    assert torch.equal(one.weight, other.weight)


def test_memory_is_that_of_the_updated_rows() -> None:
    """A shard of a million rows whose state is of the few that were updated."""
    weight = torch.zeros(1_000_000, 4)
    shard = TableShard("t", 10**6, 4, 0, 0, weight, False, "row_wise")
    optimizer = RowOptimizer(TableOptimizer("adam"))
    optimizer.prepare(shard)
    assert shard.row_state is not None and shard.row_state.nbytes < 10_000
    for start in range(0, 2000, 500):
        rows = torch.arange(start, start + 500) * 499
        optimizer.update(shard, rows, torch.ones(500, 4), learning_rate=0.1)
    state = shard.row_state
    assert len(state) == 2000 and set(state.values) == {"exp_avg", "exp_avg_sq", "step"}
    assert state.nbytes < 2000 * (2 * (4 * 4 + 4 + 4) + 32) + 10_000
    small = shard_of(rows=300)
    optimizer.update(small, torch.arange(299), torch.ones(299, COLUMNS), learning_rate=0.1)
    optimizer.update(small, torch.arange(300), torch.ones(300, COLUMNS), learning_rate=0.1)
    assert small.row_state is not None and small.row_state._capacity == 300


def test_no_rows() -> None:
    none = torch.empty(0, dtype=torch.int64)
    for settings in KINDS.values():
        shard = shard_of()
        RowOptimizer(settings).update(shard, none, torch.zeros(0, COLUMNS), learning_rate=0.1)
        assert torch.equal(shard.weight, shard_of().weight)


def test_what_does_not_fit_is_refused() -> None:
    shard, optimizer = shard_of(), RowOptimizer(KINDS["adagrad"])
    some = torch.tensor([1, 2])
    for rows, gradient, words in (
        (some.int(), torch.zeros(2, COLUMNS), "rows are torch.int32"),
        (some, torch.zeros(2, COLUMNS - 1), r"float32 \(2, 7\); pass float32 \[2, 8\]"),
        (some, torch.zeros(2, COLUMNS).double(), "float64"),
        (some - 2, torch.zeros(2, COLUMNS), "row -1 is not among the 40 local rows"),
        (some + 38, torch.zeros(2, COLUMNS), "row 40 is not among.*row_offset"),
        (torch.tensor([2, 2]), torch.zeros(2, COLUMNS), "row 2 comes twice"),
    ):
        with pytest.raises(ValueError, match=words):
            optimizer.update(shard, rows, gradient, learning_rate=0.1)
    assert torch.equal(shard.weight, shard_of().weight) and not len(shard.row_state or ())
    optimizer.update(shard, some, torch.zeros(2, COLUMNS), learning_rate=0.1)
    with pytest.raises(ValueError, match="row 1 comes twice"):
        optimizer.update(shard, some[[0, 1, 0]], torch.zeros(3, COLUMNS), learning_rate=0.1)
    with pytest.raises(ConfigError, match=r"'t'.*state of 'adagrad', not of 'adam'"):
        RowOptimizer(KINDS["adam"]).prepare(shard)
    with pytest.raises(ConfigError, match=r"state of 'adagrad', not of 'sgd'"):
        RowOptimizer(KINDS["sgd"]).prepare(shard)
    unknown: Any = "lamb"
    with pytest.raises(ConfigError, match=r"'lamb' cannot update single rows.*adagrad, adam"):
        RowOptimizer(TableOptimizer(unknown))


def test_settings() -> None:
    assert set(ROW_OPTIMIZERS) == {"sgd", "adagrad", "rowwise_adagrad", "adam"}
    layer = torch.nn.Linear(2, 2)
    adam = torch.optim.Adam(layer.parameters(), betas=(0.8, 0.9), eps=1e-5)
    wanted = TableOptimizer("adam", eps=1e-5, betas=(0.8, 0.9))
    assert optimizer_settings(adam).tables == wanted
    assert optimizer_settings(adam, TableOptimizer("sgd")).tables.kind == "sgd"
    amsgrad = torch.optim.Adam(layer.parameters(), amsgrad=True)
    with pytest.raises(ConfigError, match=r"amsgrad=True.*TableOptimizer\('adam'\)"):
        optimizer_settings(amsgrad)
    assert optimizer_settings(amsgrad, TableOptimizer("adam")).tables == TableOptimizer("adam")
    with pytest.raises(ConfigError, match=r"betas \(0\.9, 1\.0\).*below 1"):
        TableOptimizer("adam", betas=(0.9, 1.0))
    with pytest.raises(ConfigError, match="'adam' cannot be fused"):
        make_sharders(TableOptimizer("adam"))
