"""SGD with momentum end to end: against torch.optim.SGD, and against itself on other placements."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from dist_dp.errors import ConfigError
from dist_dp.momentum_schedule import MomentumSchedule
from dist_dp.optimizer_settings import optimizer_settings
from dist_dp.sharding import TableOptimizer
from tests.dist_dp.gradients import build, pieces
from tests.dist_dp.placement import LOSSES, RECORDS, loader_of, model, records
from tests.dist_dp.worlds import run_world

STEPS = 6
EXPECTED = 0.3 * RECORDS
SETTINGS = {"lr": 0.4, "momentum": 0.9, "weight_decay": 0.2}
MIXED = {"a": "row_wise", "b": "column_wise", "s": "table_wise"}


def private_end(mechanism: str, kind: Any, *, sigma: float, clip: float) -> dict[str, Any]:
    """Final pieces of tables and dense weights; the rate jumps up and down on the way."""
    whole = model(meta=False)
    made = torch.optim.SGD(whole.parameters(), **SETTINGS)
    private = build(
        whole,
        kind=kind,
        mechanism=mechanism,
        clip=clip,
        sigma=sigma,
        optimizer=made,
        expected=EXPECTED,
    )
    jumping = torch.optim.lr_scheduler.LambdaLR(private.optimizer, lambda t: (1.0, 0.1, 0.5)[t % 3])
    for batch in loader_of(private, records(), STEPS):
        private.optimizer.zero_grad()
        LOSSES(whole(*batch.inputs), batch.labels).backward()
        private.optimizer.step()
        jumping.step()
        if private.mechanism.schedule.step == 3:
            with torch.no_grad():  # reads some rows, and settles them in the middle
                whole(*records().select([1, 5, 7, 20]).inputs)
    private.settle()
    return {
        "tables": pieces(private),
        "dense": {n: p.detach().clone() for n, p in private.recorder.parameters.items()},
    }


@cache
def plain_end() -> dict[str, Tensor]:
    """The unsharded model under torch.optim.SGD on the same batches."""
    from dist_dp.sampling import PoissonSampler
    from tests.dist_dp.gradients import SECRET

    whole, data = model(meta=False), records()
    made = torch.optim.SGD(whole.parameters(), **SETTINGS)
    jumping = torch.optim.lr_scheduler.LambdaLR(made, lambda t: (1.0, 0.1, 0.5)[t % 3])
    sampler = PoissonSampler(SECRET, len(data), 0.3)
    for step in range(1, STEPS + 1):
        batch = data.select(sampler.sample(step).tolist())
        made.zero_grad()
        losses = LOSSES(whole(*batch.inputs), batch.labels, reduction="sum")
        (losses / EXPECTED).backward()
        made.step()
        jumping.step()
    return {n: p.detach() for n, p in whole.named_parameters()}


def assert_same(ranks: list[dict[str, Any]], wanted: dict[str, Tensor]) -> None:
    """Dense weights and every table piece of every rank."""
    seen = set()
    for found in ranks:
        for name, value in found["dense"].items():
            torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=2e-6)
            seen.add(name)
        for (name, row, column), piece in found["tables"].items():
            part = wanted[name][row : row + piece.shape[0], column : column + piece.shape[1]]
            torch.testing.assert_close(piece, part, rtol=1e-5, atol=2e-6)
            seen.add(name)
    assert seen == set(wanted)


def without_noise(mechanism: str, kind: Any) -> dict[str, Any]:
    return private_end(mechanism, kind, sigma=0.0, clip=1e4)


@pytest.mark.parametrize(
    ("mechanism", "kind"),
    [
        ("lazydp", "table_wise"),
        ("lazydp", "row_wise"),
        ("lazydp", "column_wise"),
        ("lazydp", "data_parallel"),
        ("dpsgd", "row_wise"),
        ("none", "row_wise"),
        ("none", "data_parallel"),
    ],
)
def test_without_noise_it_is_torch_sgd(mechanism: str, kind: Any) -> None:
    """Rows' decayed momentum comes late, and they end where every step had moved them."""
    assert_same(run_world(without_noise, 1, mechanism, kind), plain_end())


def two_workers() -> dict[str, dict[str, Any]]:
    found = {}
    for name, kind in {"mixed": MIXED, "row_wise": "row_wise", "replicas": "data_parallel"}.items():
        found[f"{name} without noise"] = without_noise("lazydp", kind)
        found[name] = private_end("lazydp", kind, sigma=0.8, clip=0.5)
    return found


def test_two_workers() -> None:
    """Without noise they are torch.optim.SGD; with it, one worker's tables."""
    ranks = run_world(two_workers, 2)
    (alone,) = run_world(private_end_of_one, 1)
    wanted = {**alone["dense"], **{name: t for (name, _, _), t in alone["tables"].items()}}
    for name in ranks[0]:
        exact = plain_end() if name.endswith("without noise") else wanted
        assert_same([r[name] for r in ranks], exact)


def private_end_of_one() -> dict[str, Any]:
    return private_end("lazydp", "table_wise", sigma=0.8, clip=0.5)


@contextmanager
def _undivided() -> Iterator[None]:
    """The gradient put into the momentum as it is."""
    with mock.patch("dist_dp.optimizer.PrivateOptimizer._table_rates", lambda _: [1.0]):
        yield


@contextmanager
def _not_waiting() -> Iterator[None]:
    """Gaps taken for one step: the momentum does not act on the steps a row missed."""
    proper = MomentumSchedule.propagate

    def one_step(self: MomentumSchedule, from_steps: Tensor, to_step: int) -> Any:
        return proper(self, torch.full_like(from_steps, to_step - 1), to_step)

    with mock.patch.object(MomentumSchedule, "propagate", one_step):
        yield


@pytest.mark.parametrize("fault", [_undivided, _not_waiting])
def test_a_fault_is_caught(fault: Any) -> None:
    with fault(), pytest.raises(AssertionError):
        assert_same(run_world(without_noise, 1, "lazydp", "row_wise"), plain_end())


def test_settings() -> None:
    layer = torch.nn.Linear(2, 2)
    sgd = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    assert optimizer_settings(sgd).tables == TableOptimizer("sgd", momentum=0.9)
    # momentum of the dense layers only
    assert optimizer_settings(sgd, TableOptimizer("sgd")).tables.momentum == 0
    for options in ({"nesterov": True}, {"dampening": 0.1}):
        other = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, **options)
        with pytest.raises(ConfigError, match=r"nesterov or dampening.*table_optimizer"):
            optimizer_settings(other)
        assert optimizer_settings(other, TableOptimizer("sgd", momentum=0.5)).tables.momentum == 0.5
    with pytest.raises(ConfigError, match=r"momentum 0\.9.*adagrad"):
        optimizer_settings(sgd, TableOptimizer("adagrad", momentum=0.9))


def test_the_momentum_of_tables_stays() -> None:
    whole = model(meta=False)
    made = torch.optim.SGD(whole.parameters(), **SETTINGS)
    run_world(int, 1)
    private = build(whole, kind="table_wise", sigma=1.0, optimizer=made, expected=EXPECTED)
    private.optimizer.param_groups[0]["momentum"] = 0.5
    for batch in loader_of(private, records(), 1):
        LOSSES(whole(*batch.inputs), batch.labels).backward()
        with pytest.raises(ConfigError, match=r"momentum changed from \[0\.9\] to \[0\.5\]"):
            private.optimizer.step()
    assert private.mechanism.schedule.step == 0


def test_no_grid_with_momentum() -> None:
    whole = model(meta=False)
    made = torch.optim.SGD(whole.parameters(), **SETTINGS)
    run_world(int, 1)
    with pytest.raises(ConfigError, match=r"noise\.grid does not go with momentum"):
        build(whole, kind="table_wise", sigma=1.0, optimizer=made, grid=2.0**-20)


def test_what_a_shard_keeps() -> None:
    """A momentum beside every weight, for the checkpoint; plain SGD keeps none."""
    run_world(int, 1)
    for momentum, names in (
        (0.9, {"weight", "last_step", "momentum"}),
        (0, {"weight", "last_step"}),
    ):
        whole = model(meta=False)
        made = torch.optim.SGD(whole.parameters(), lr=0.1, momentum=momentum)
        private = build(whole, kind="row_wise", sigma=1.0, optimizer=made)
        for shard in private.shards:
            state = shard.state_tensors()
            assert set(state) == names
            if momentum:
                assert state["momentum"].shape == shard.weight.shape
                assert state["momentum"].dtype == torch.float32
