"""Row optimizers against torch's own, on the rows of a step alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_dp.mechanisms.row_states import give_state
from dist_dp.optimizer_settings import optimizer_settings
from dist_dp.row_optimizers import RowOptimizer
from dist_dp.sharding import TableOptimizer
from dist_dp.table_shard import TableShard
from dist_dp.wide_rows import read_rows

ROWS, COLUMNS, STEPS, RATE = 40, 6, 12, 0.3


def shard_of(dtype: torch.dtype = torch.float32) -> TableShard:
    torch.manual_seed(2)
    weight = torch.randn(ROWS, COLUMNS).to(dtype)
    shard = TableShard("t", ROWS, COLUMNS, 0, 0, weight, False, "row_wise")
    give_state(shard, momentum=False)
    return shard


def steps() -> list[tuple[Tensor, Tensor]]:
    """Distinct rows and their gradients, step by step; some rows in most steps, some in none."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(STEPS):
        rows = torch.randperm(ROWS - 5, generator=generator)[:15].sort().values
        found.append((rows, torch.randn(15, COLUMNS, generator=generator)))
    return found


def rows_alone(make: Callable[[Any], torch.optim.Optimizer]) -> Tensor:
    """Each row as a parameter of its own, in float64, which only its steps know."""
    weight = shard_of().weight.double()
    parameters = [torch.nn.Parameter(weight[r].clone()) for r in range(ROWS)]
    optimizers = [make([p]) for p in parameters]
    for rows, gradient in steps():
        for row, g in zip(rows.tolist(), gradient.double(), strict=True):
            parameters[row].grad = g.clone()
            optimizers[row].step()
    return torch.stack([p.detach() for p in parameters])


def run(settings: TableOptimizer, weight_decay: float = 0.0, dtype: Any = torch.float32) -> Any:
    shard = shard_of(dtype)
    optimizer = RowOptimizer(settings)
    for rows, gradient in steps():
        optimizer.update(
            shard, rows, gradient.clone(), learning_rate=RATE, weight_decay=weight_decay
        )
    return shard


class RowWise(torch.optim.Optimizer):
    """Row-wise Adagrad and Adam of one row, written out."""

    def __init__(self, parameters: Any, kind: str) -> None:
        super().__init__(parameters, {})
        self.kind, self.sum, self.first, self.second, self.count = kind, 0.0, 0.0, 0.0, 0

    def step(self) -> None:  # type: ignore[override]
        (parameter,) = self.param_groups[0]["params"]
        gradient, square = parameter.grad, float(parameter.grad.square().mean())
        self.count += 1
        if self.kind == "rowwise_adagrad":
            self.sum += square
            parameter.data -= RATE * gradient / (self.sum**0.5 + 1e-8)
            return
        self.first = 0.9 * self.first + 0.1 * gradient
        self.second = 0.999 * self.second + 0.001 * square
        first = self.first / (1 - 0.9**self.count)
        second = self.second / (1 - 0.999**self.count)
        parameter.data -= RATE * first / (second**0.5 + 1e-8)


CASES: dict[str, tuple[TableOptimizer, float, Callable[[Any], torch.optim.Optimizer]]] = {
    "sgd": (TableOptimizer(), 0.0, lambda p: torch.optim.SGD(p, RATE)),
    "sgd, decay": (TableOptimizer(), 0.1, lambda p: torch.optim.SGD(p, RATE, weight_decay=0.1)),
    "momentum": (
        TableOptimizer(momentum=0.9),
        0.05,
        lambda p: torch.optim.SGD(p, RATE, momentum=0.9, weight_decay=0.05),
    ),
    "adagrad": (
        TableOptimizer("adagrad"),
        0.0,
        lambda p: torch.optim.Adagrad(p, RATE, eps=1e-8),
    ),
    "rowwise_adagrad": (
        TableOptimizer("rowwise_adagrad"),
        0.0,
        lambda p: RowWise(p, "rowwise_adagrad"),
    ),
    "adam": (TableOptimizer("adam"), 0.0, lambda p: RowWise(p, "adam")),
}


@pytest.mark.parametrize("case", CASES)
def test_rows_go_as_parameters_of_their_own_would(case: str) -> None:
    settings, decay, make = CASES[case]
    found = run(settings, decay).weight.double()
    torch.testing.assert_close(found, rows_alone(make), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("case", CASES)
def test_rows_of_no_step_do_not_move_and_have_no_state(case: str) -> None:
    settings, decay, _ = CASES[case]
    shard = run(settings, decay)
    assert torch.equal(shard.weight[ROWS - 5 :], shard_of().weight[ROWS - 5 :])
    touched = torch.cat([rows for rows, _ in steps()]).unique()
    if shard.row_state is None:
        assert case in ("sgd", "sgd, decay")
    else:
        assert torch.equal(shard.row_state.index.rows.sort().values, touched)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", ["sgd, decay", "adagrad"])
def test_half_precision_rows_keep_their_float32_value(case: str, dtype: torch.dtype) -> None:
    settings, decay, _ = CASES[case]
    shard = run(settings, decay, dtype)
    whole = shard_of()
    whole.weight.copy_(shard_of(dtype).weight.float())
    optimizer = RowOptimizer(settings)
    for rows, gradient in steps():
        optimizer.update(whole, rows, gradient.clone(), learning_rate=RATE, weight_decay=decay)
    assert torch.equal(read_rows(shard, torch.arange(ROWS)), whole.weight)


def test_torchs_adam_is_read_as_adam() -> None:
    model = torch.nn.Linear(2, 2)
    made = torch.optim.Adam(model.parameters(), lr=0.1, betas=(0.8, 0.99), eps=1e-7)
    assert optimizer_settings(made).tables == TableOptimizer("adam", 1e-7, 0.0, (0.8, 0.99))
