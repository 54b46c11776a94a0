"""Mechanisms against plain PyTorch, the optimizers they refuse, and the history table."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_dp.distributed import ensure_process_group
from dist_dp.errors import ConfigError
from dist_dp.mechanisms import DPSGD, LazyDP, NoMechanism, mechanism_class
from dist_dp.mechanisms.base import Mechanism
from dist_dp.noise_schedule import NoiseSchedule
from dist_dp.optimizer_settings import optimizer_settings
from dist_dp.sharding import TableOptimizer
from dist_dp.table_shard import TableShard
from tests.dist_dp.gradients import build, pieces
from tests.dist_dp.placement import LOSSES, loader_of, model, records

STEPS = 5
EXPECTED = 12.0


def private_end(mechanism: str, optimizer: str, kind: Any, **settings: float) -> dict[str, Tensor]:
    whole = model(meta=False)
    made = getattr(torch.optim, optimizer)(whole.parameters(), **settings)
    private = build(
        whole, kind=kind, mechanism=mechanism, clip=1e4, optimizer=made, expected=EXPECTED
    )
    falling = torch.optim.lr_scheduler.StepLR(private.optimizer, 2, 0.5)
    for batch in loader_of(private, records(), STEPS):
        private.optimizer.zero_grad()
        LOSSES(whole(*batch.inputs), batch.labels).backward()
        private.optimizer.step()
        falling.step()
    private.settle()
    end = {n: p.detach() for n, p in private.recorder.parameters.items()}
    for (name, row, column), piece in pieces(private).items():
        table = end.setdefault(name, torch.full((row + 20, 8), float("nan")))
        table[row : row + piece.shape[0], column : column + piece.shape[1]] = piece
    return end


def plain_end(optimizer: str, **settings: float) -> dict[str, Tensor]:
    """The unsharded model with PyTorch's own optimizer on the same batches."""
    from dist_dp.sampling import PoissonSampler
    from tests.dist_dp.gradients import SECRET

    whole = model(meta=False)
    made = getattr(torch.optim, optimizer)(whole.parameters(), **settings)
    falling = torch.optim.lr_scheduler.StepLR(made, 2, 0.5)
    data = records()
    sampler = PoissonSampler(SECRET, len(data), 0.3)
    for step in range(1, STEPS + 1):
        batch = data.select(sampler.sample(step).tolist())
        made.zero_grad()
        loss = LOSSES(whole(*batch.inputs), batch.labels, reduction="sum") / EXPECTED
        loss.backward()
        made.step()
        falling.step()
    return {n: p.detach() for n, p in whole.named_parameters()}


@pytest.mark.parametrize("kind", ["row_wise", "data_parallel"])
@pytest.mark.parametrize("mechanism", ["none", "lazydp", "dpsgd"])
def test_without_noise_it_is_plain_sgd(mechanism: str, kind: str) -> None:
    """Weight decay comes late to rows, and is the same in the end."""
    ensure_process_group()
    wanted = plain_end("SGD", lr=0.5, weight_decay=0.2)
    found = private_end(mechanism, "SGD", kind, lr=0.5, weight_decay=0.2)
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        rows = value.shape[0]
        torch.testing.assert_close(found[name][:rows], value, rtol=1e-5, atol=1e-6)


def test_adagrad_without_privacy_is_plain_adagrad() -> None:
    ensure_process_group()
    wanted = plain_end("Adagrad", lr=0.1, eps=1e-8)
    found = private_end("none", "Adagrad", "table_wise", lr=0.1, eps=1e-8)
    for name, value in wanted.items():
        rows = value.shape[0]
        torch.testing.assert_close(found[name][:rows], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mechanism", ["lazydp", "dpsgd"])
@pytest.mark.parametrize("optimizer", ["adagrad", "rowwise_adagrad", "adam"])
def test_optimizers_that_do_not_merge_are_refused(mechanism: str, optimizer: str) -> None:
    with pytest.raises(ConfigError, match=rf"'{mechanism}'.*'{optimizer}'.*Use sgd"):
        mechanism_class(mechanism).check_optimizer(optimizer)
    mechanism_class(mechanism).check_optimizer("sgd")


def test_optimizer_settings() -> None:
    layer = torch.nn.Linear(2, 2)
    settings = optimizer_settings(torch.optim.SGD(layer.parameters(), lr=0.3, weight_decay=0.1))
    assert settings.tables.kind == "sgd"
    assert dict(settings.groups[0].defaults) | {"lr": 0.3, "weight_decay": 0.1} == dict(
        settings.groups[0].defaults
    )
    adam = optimizer_settings(
        torch.optim.Adam(layer.parameters(), lr=0.1), TableOptimizer("sgd"), table_lr=2.0
    )
    assert isinstance(adam.rebuild(dict(layer.named_parameters())), torch.optim.Adam)
    assert (adam.tables.kind, adam.table_lr) == ("sgd", 2.0)
    for wrong, words in (
        (torch.optim.SGD(layer.parameters(), lr=0.1, maximize=True), "maximize"),
        (torch.optim.Adagrad(layer.parameters(), weight_decay=0.1), "weight_decay.*use sgd"),
    ):
        with pytest.raises(ConfigError, match=words):
            optimizer_settings(wrong)


def test_unknown_mechanism() -> None:
    with pytest.raises(ConfigError, match="'dpftrl' is unknown; choose one of none, dpsgd, lazydp"):
        mechanism_class("dpftrl")


def shard(rows: int = 4) -> TableShard:
    return TableShard(
        "t", rows, 2, 0, 0, torch.ones(rows, 2), False, "table_wise", noise_key=bytes(32)
    )


def advance(
    mechanism: Mechanism, table: TableShard, sigma: float = 1.0, decay: float = 0.0
) -> None:
    mechanism.schedule.advance(0.1, sigma, 1.0, 2.0, decay)
    mechanism.after_update([table])


def test_history_of_lazy_rows() -> None:
    table, mechanism = shard(), LazyDP(NoiseSchedule())
    advance(mechanism, table)
    assert table.last_step.dtype == torch.int32
    assert table.last_step.tolist() == [0, 0, 0, 0] and bool((table.weight == 1).all())
    advance(mechanism, table)
    mechanism.before_lookup([(table, torch.tensor([1, 3]))])
    assert table.last_step.tolist() == [0, 2, 0, 2]
    moved = table.weight.clone()
    assert bool((moved[[1, 3]] != 1).all()) and bool((moved[[0, 2]] == 1).all())
    mechanism.before_lookup([(table, torch.tensor([1, 3]))])  # once a step is enough
    assert torch.equal(table.weight, moved)
    mechanism.settle(table)
    assert table.last_step.tolist() == [2] * 4
    assert torch.equal(table.weight[[1, 3]], moved[[1, 3]])
    assert bool((table.weight[[0, 2]] != 1).all())
    settled = table.weight.clone()
    mechanism.settle(table)
    mechanism.before_lookup([(table, torch.arange(4))])
    mechanism.before_lookup([(table, torch.empty(0, dtype=torch.int64))])
    assert torch.equal(table.weight, settled)


def test_history_of_eager_rows() -> None:
    table, mechanism = shard(), DPSGD(NoiseSchedule())
    for step in (1, 2):
        before = table.weight.clone()
        advance(mechanism, table)
        assert mechanism.schedule.step == step and bool((table.weight != before).all())
    assert not table.has_history  # nothing waits, so nothing is remembered
    before = table.weight.clone()
    mechanism.before_lookup([(table, torch.arange(4))])
    mechanism.settle(table)
    assert torch.equal(table.weight, before) and mechanism.is_settled(table)


def test_decay_without_noise() -> None:
    table, mechanism = shard(), NoMechanism(NoiseSchedule())
    advance(mechanism, table, sigma=0.0)
    mechanism.settle(table)
    assert bool((table.weight == 1).all())
    for _ in range(2):
        advance(mechanism, table, sigma=0.0, decay=0.5)
    mechanism.before_lookup([(table, torch.tensor([2]))])
    torch.testing.assert_close(table.weight[2], torch.full((2,), 0.95**2))
    mechanism.settle(table)
    torch.testing.assert_close(table.weight, torch.full((4, 2), 0.95**2))


def test_a_shard_does_not_show_its_key() -> None:
    table = shard()
    assert repr(bytes(32)) not in repr(table) and "key" not in repr(table)
    assert copy.copy(table).noise_key == table.noise_key
