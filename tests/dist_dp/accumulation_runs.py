"""The private runs of ``test_accumulation``: batches in parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from dist_dp.cut import CutEmbeddings
from dist_dp.optimizer import PrivateOptimizer
from dist_dp.private_model import PrivateModel
from tests.dist_dp import group_runs, sharding_runs
from tests.dist_dp.gradients import build
from tests.dist_dp.models import bags

KINDS: dict[str, Any] = {
    "row_wise": "row_wise",
    "mixed": sharding_runs.KINDS["mixed"],
    "mixed too": sharding_runs.KINDS["mixed too"],
}
SIZES: list[int | None] = [None, 4, 1]


def all_runs(faults: list[str]) -> dict[Any, dict[str, Any]]:
    """Every kind by micro-batch size; eager and without privacy; groups with momentum; faults."""
    run = sharding_runs.private_run
    found: dict[Any, dict[str, Any]] = {}
    for size in SIZES:
        for name, kind in KINDS.items():
            found["lazydp", name, size] = run(kind, micro_batch_size=size)
        mixed = KINDS["mixed"]
        found["dpsgd", "mixed", size] = run(mixed, mechanism="dpsgd", micro_batch_size=size)
        found["none", "mixed", size] = run(
            mixed, mechanism="none", sigma=0.0, micro_batch_size=size
        )
        found["momentum", "mixed", size] = run(
            mixed, optimizer=group_runs.with_momentum, sigma=0.0, micro_batch_size=size
        )
    found["look ahead", "mixed", 4] = run(KINDS["mixed"], micro_batch_size=4, look_ahead=True)
    for fault in faults:
        with FAULTS[fault]():
            found[fault, "row_wise", 4] = run("row_wise", micro_batch_size=4)
    return found


@contextmanager
def _noise_each_time() -> Iterator[None]:
    """Dense noise and a step of the schedules for every micro-batch."""
    hold = CutEmbeddings.hold

    def noisy(self: CutEmbeddings, coefficients: Tensor) -> None:
        hold(self, coefficients)
        optimizer = self.optimizer_under_test
        if self is optimizer.cuts[-1]:
            optimizer._noise_dense(optimizer._sums, 1000 + optimizer.step_in_flight)
            optimizer.record_step()
            optimizer._recorded = None

    with _known_to_cuts(), mock.patch.object(CutEmbeddings, "hold", noisy):
        yield


@contextmanager
def _update_at_once() -> Iterator[None]:
    """Each micro-batch updates the tables, and the next one reads them."""

    def update(self: CutEmbeddings, coefficients: Tensor) -> None:
        self.backward(coefficients, self.optimizer_under_test._table_rates())

    with _known_to_cuts(), mock.patch.object(CutEmbeddings, "hold", update):
        yield


@contextmanager
def _known_to_cuts() -> Iterator[None]:
    init = PrivateOptimizer.__init__

    def remember(self: PrivateOptimizer, **options: Any) -> None:
        init(self, **options)
        for cut in self.cuts:
            object.__setattr__(cut, "optimizer_under_test", self)

    with mock.patch.object(PrivateOptimizer, "__init__", remember):
        yield


@contextmanager
def _mean_kept() -> Iterator[None]:
    """Losses that stay divided by the size of their micro-batch."""
    coefficients = PrivateOptimizer._coefficients

    def undivided(self: PrivateOptimizer, is_real: Tensor, users: Any) -> tuple[Tensor, Tensor]:
        self.loss_reduction = "sum"
        return coefficients(self, is_real, users)

    with mock.patch.object(PrivateOptimizer, "_coefficients", undivided):
        yield


@contextmanager
def _last_alone() -> Iterator[None]:
    """The update of the last micro-batch, without what was held."""

    def drop(self: CutEmbeddings, coefficients: Tensor) -> None:
        del coefficients
        self._calls.clear()

    with mock.patch.object(CutEmbeddings, "hold", drop):
        yield


FAULTS: dict[str, Callable[[], Any]] = {
    "noise each time": _noise_each_time,
    "update at once": _update_at_once,
    "mean kept": _mean_kept,
    "last alone": _last_alone,
}

# A model in which every column of a table is one independent experiment.
COLUMNS = 2048
STEPS = 4
RATES = [0.6, 0.45, 0.3, 0.2]
DECAY = 0.2
SIGMA, CLIP, EXPECTED = 0.005, 300.0, 3.0
START = (0.5, -1.0, 2.0)
FEEDBACK = 0.5  # an example's gradient is 1 + FEEDBACK * (value read)
# Rows that the examples of each step read, two micro-batches of two.
BATCHES: list[list[int]] = [[0, 0, 0, 1], [1, 1, 1, 1], [0, 1, 1, 0], [0, 0, 1, 0]]
READINGS = ("row 0, third step, last part", "row 1, third step, first part", "0", "1", "2")


class Rows(nn.Module):
    """The rows themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = bags({"t": (3, ["f"])}, COLUMNS)
        with torch.no_grad():
            weight = next(self.tables.parameters())
            weight.copy_(torch.tensor(START).unsqueeze(1).expand(3, COLUMNS))

    def forward(self, features: Any) -> Tensor:
        values: Tensor = self.tables(features).values()
        return values


def experiment(mechanism: str, secret: bytes, parts: int) -> Tensor:
    """The readings of every column, float64 ``[COLUMNS, 5]``."""
    from torchrec import KeyedJaggedTensor

    whole = Rows()
    private: PrivateModel = build(
        whole,
        mechanism=mechanism,
        clip=CLIP,
        sigma=SIGMA,
        expected=EXPECTED,
        secret=secret,
        optimizer=torch.optim.SGD(whole.parameters(), lr=1.0, weight_decay=DECAY),
        loss_reduction="sum",
        probe_first_forward=False,
    )
    read: list[Tensor] = []
    for step, rows in enumerate(BATCHES, start=1):
        private.optimizer.param_groups[0]["lr"] = RATES[step - 1]
        size = len(rows) // parts
        values = []
        for part in range(parts):
            ids = torch.tensor(rows[part * size : (part + 1) * size])
            private.state.begin(step, size, size, part=part, is_last=part == parts - 1)
            found = whole(KeyedJaggedTensor(["f"], ids, lengths=torch.ones(size, dtype=torch.int)))
            (found + FEEDBACK / 2 * found.square()).sum().backward()
            private.optimizer.step()
            values.append(found.detach())
        if step == 3:
            every = torch.cat(values)
            read = [every[3], every[1]]
    private.settle()
    (shard,) = private.shards
    return torch.stack([*read, *shard.weight], dim=1).double()
