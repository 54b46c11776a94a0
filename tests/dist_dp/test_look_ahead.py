"""Settling the next batch beside this one's dense part changes no bit of the result."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torchrec import KeyedJaggedTensor

from dist_dp.batch_features import only_features
from dist_dp.checkpoint import _check_may_be_saved
from dist_dp.errors import ConfigError, DistDpError, ModelError
from dist_dp.id_distribution import IdDistribution
from dist_dp.look_ahead import LookAhead
from dist_dp.mechanisms import LazyDP
from tests.dist_dp.clicks import random_bags
from tests.dist_dp.gradients import build
from tests.dist_dp.placement import features_of, loader_of, model, private_run, records
from tests.dist_dp.test_wide_rows import halve
from tests.dist_dp.worlds import run_world

KINDS = {
    "row_wise": "row_wise",
    "mixed": {"a": "table_wise", "b": "column_wise", "s": "data_parallel"},
}

ROWS: dict[str, dict[str, Any]] = {
    "float32": {},
    "momentum": {"momentum": 0.9},
    "float16": {"prepare": partial(halve, data_type="FP16")},
    "bfloat16 with momentum": {"momentum": 0.9, "prepare": partial(halve, data_type="BF16")},
}


def ahead_and_plain(rows: str) -> dict[str, Any]:
    found: dict[str, Any] = {"settled ahead": 0, "different": []}
    settle = LazyDP.settle_ahead

    def counting(self: LazyDP, reads: Any) -> None:
        before = [s.last_step.clone() for s, _ in reads]
        settle(self, reads)
        for (shard, _), old in zip(reads, before, strict=True):
            found["settled ahead"] += int((shard.last_step != old).sum())

    for name, kind in KINDS.items():
        plain = private_run(kind, "lazydp", zero=False, **ROWS[rows])
        with mock.patch.object(LazyDP, "settle_ahead", counting):
            ahead = private_run(kind, "lazydp", zero=False, look_ahead=True, **ROWS[rows])
        found["different"] += [
            (name, what)
            for what in ("states", "dense")
            for key, value in plain[what].items()
            if not torch.equal(value, ahead[what][key])
        ]
        if not torch.equal(plain["seen"], ahead["seen"]):
            found["different"].append((name, "seen"))
    return found


def all_rows() -> dict[str, dict[str, Any]]:
    return {rows: ahead_and_plain(rows) for rows in ROWS}


@pytest.fixture(scope="module", params=[1, 2])
def every_rank(request: pytest.FixtureRequest) -> list[dict[str, dict[str, Any]]]:
    return run_world(all_rows, request.param)


@pytest.mark.parametrize("rows", ROWS)
def test_bit_for_bit(rows: str, every_rank: list[dict[str, dict[str, Any]]]) -> None:
    for found in (of_rank[rows] for of_rank in every_rank):
        assert found["settled ahead"] > 0
        assert found["different"] == []


def private_with_look_ahead(mechanism: str = "lazydp") -> Any:
    run_world(int, 1)
    whole, data = model(meta=False), records()
    private = build(whole, kind="table_wise", clip=0.5, sigma=0.8, mechanism=mechanism)
    loader = loader_of(private, data, 4)
    LookAhead(whole, private.optimizer, loader, features_of)
    return whole, private, loader


def test_rows_of_the_batch_in_flight_are_left_alone() -> None:
    """Planted: a row that both batches read, settled ahead, moves before its gradient is in."""
    whole, private, loader = private_with_look_ahead()
    iterator = iter(loader)
    for _ in range(2):
        batch = next(iterator)
        whole(*batch.inputs).sum().backward()
        step = private.optimizer.step_in_flight
        read: set[tuple[str, int]] = set()
        for shard in private.shards:
            names = {"a": ["f0", "f1"], "b": ["f2"], "s": ["h0", "h1"]}[shard.table.split(".")[-1]]
            for kjt in batch.inputs[1:]:
                for name in set(names) & set(kjt.keys()):
                    read |= {(shard.table, int(r)) for r in kjt[name].values()}
        private.optimizer.before_step_ends[0]()  # the settling is over, the update has not begun
        for shard in private.shards:
            for row, last in enumerate(shard.last_step.tolist()):
                assert not ((shard.table, row) in read and last > step - 1)
        private.optimizer.step()


def test_no_lookup_between_forward_and_step() -> None:
    whole, private, loader = private_with_look_ahead()
    iterator = iter(loader)
    batch = next(iterator)
    loss = whole(*batch.inputs).sum()
    whole.eval()
    with pytest.raises(ModelError, match="between a forward in training mode and"):
        whole(*batch.inputs)
    whole.train()
    loss.backward()
    private.optimizer.step()
    whole.eval()
    whole(*batch.inputs)


def test_nothing_leaves_between_forward_and_step() -> None:
    """Rows hold step 1's noise by then: published twice, its gradient would stand there bare."""
    whole, private, loader = private_with_look_ahead()
    batches = iter(loader)
    batch = next(batches)
    loss = whole(*batch.inputs).sum()
    with pytest.raises(DistDpError, match="step 1 is not over: look_ahead"):
        private.settle()
    with pytest.raises(DistDpError, match="step 1 is not over: look_ahead"):
        _check_may_be_saved(private)
    loss.backward()
    private.optimizer.step()
    private.settle()
    _check_may_be_saved(private)


@pytest.mark.parametrize("part", ["ids", "lengths", "weights"])
def test_only_what_was_sent_is_looked_up(part: str) -> None:
    """Planted: a batch changed in place, or built anew with other weights, passes for the old."""

    class Sharded:
        def create_context(self) -> None:
            pass

        def input_dist(self, _context: None, features: Any) -> Any:
            return mock.Mock(wait=lambda: mock.Mock(wait=lambda: features))

    def made(**other: Any) -> KeyedJaggedTensor:
        parts = {"ids": [3, 1, 2], "lengths": [2, 1], "weights": [1.0, 2.0, 3.0], **other}
        return KeyedJaggedTensor(
            keys=["f"],
            values=torch.tensor(parts["ids"]),
            lengths=torch.tensor(parts["lengths"]),
            weights=torch.tensor(parts["weights"]),
        )

    features = made()
    sent = IdDistribution(Sharded(), features)
    assert sent.serves(features) and sent.serves(made())
    other = {"ids": [3, 1, 4], "lengths": [1, 2], "weights": [1.0, 2.0, 4.0]}
    assert not sent.serves(made(**{part: other[part]}))
    changed = {
        "ids": features.values(), "lengths": features.lengths(), "weights": features.weights()
    }[part]  # fmt: skip
    changed.add_(1)
    assert not sent.serves(features)


def test_the_rate_may_not_change_in_between() -> None:
    whole, private, loader = private_with_look_ahead()
    iterator = iter(loader)
    batch = next(iterator)
    whole(*batch.inputs).sum().backward()
    private.optimizer.param_groups[0]["lr"] *= 0.5
    with pytest.raises(ConfigError, match="call schedulers after"):
        private.optimizer.step()


def test_what_cannot_look_ahead() -> None:
    with pytest.raises(ConfigError, match="has nothing to settle before a lookup"):
        private_with_look_ahead("dpsgd")
    run_world(int, 1)
    whole, data = model(meta=False), records()
    private = build(whole, kind="table_wise", clip=0.5, sigma=0.8)
    with pytest.raises(ConfigError, match="the model has 2 collections"):
        LookAhead(whole, private.optimizer, loader_of(private, data, 4))


def test_features_are_found_in_a_batch() -> None:
    kjt = random_bags({"f0": 3}, 2, torch.Generator().manual_seed(0))
    assert only_features((torch.ones(2), kjt, torch.ones(2))) is kjt
    assert only_features({"dense": torch.ones(2), "sparse": kjt}) is kjt
    with pytest.raises(ConfigError, match="holds 2 KeyedJaggedTensors"):
        only_features((kjt, kjt))
