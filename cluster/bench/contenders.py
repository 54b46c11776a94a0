"""A step of each mechanism, and of plain TorchRec, on the same tables and the same batches."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dist_dp.cluster.bench.model import ClickModel, dense_parameters
from dist_dp.distributed import all_reduce_sum, world_size
from dist_dp.engine import PrivacyEngine
from dist_dp.leases import StepLeases
from dist_dp.loader import PoissonLoader
from dist_dp.mechanisms import Mechanism, SparseNoise
from dist_dp.mechanisms.comparison import ComparisonMechanism
from dist_dp.plan import PrivacyPlan
from dist_dp.step_state import StepState
from dist_dp.table_shard import TableShard
from dist_dp.timing import PhaseTimer

LEARNING_RATE = 0.01


@dataclass(frozen=True)
class Sample:
    """One step, as it was timed.

    Attributes:
        seconds: From the request for a batch to the end of its step.
        examples: Real examples on this rank.
        padded: Examples on this rank, padding included.
        phases_ms: Milliseconds by phase of the critical path.
    """

    seconds: float
    examples: int
    padded: int
    phases_ms: dict[str, float]


class Contender(Protocol):
    """Something whose steps are timed in turns with others."""

    name: str
    timer: PhaseTimer
    updates: Updates | None

    def activate(self) -> None:
        """Makes the tables ready for its turn."""

    def step(self) -> Sample:
        """Takes one step; every rank calls it."""

    def close(self) -> None:
        """Ends its batches."""

    @property
    def state_bytes(self) -> int:
        """Memory that it alone keeps between its turns, on this rank."""


class FreeLeases(StepLeases):
    """Leases that cost nothing: training without privacy has no ledger."""

    def __init__(self) -> None:
        """No accountant is asked."""
        self.refusal = None

    def cover(self, step: int) -> bool:
        """Always."""
        return True

    def close(self, last_begun_step: int) -> None:
        """Nothing was leased."""


class Updates:
    """Who updates the tables: FBGEMM's fused kernels, or a mechanism with noise on few rows.

    A run has one of them for good; here contenders of both kinds take turns on the same tables.

    Args:
        cut: The tables.
    """

    def __init__(self, cut: Any) -> None:
        self._local = cut.local
        self._mechanism: SparseNoise | None = None
        fused = [(k.module, k.module.forward) for k in self._local.kernels]
        self._local.give_updates(self._apply, self._survivors)
        self._owned = self._local.owned
        given = [(k.module, k.module.forward) for k in self._local.kernels]
        self._forwards = {False: fused, True: given}
        self.give(None)

    def _apply(self, shard: TableShard, rows: Tensor, gradient: Tensor) -> None:
        assert self._mechanism is not None
        self._mechanism.apply(shard, rows, gradient)

    def _survivors(self, shard: TableShard) -> Tensor:
        assert self._mechanism is not None
        return self._mechanism.survivors(shard)

    def give(self, mechanism: Mechanism | None) -> None:
        """Lets a mechanism update the tables if it does so itself, else FBGEMM."""
        self._mechanism = mechanism if isinstance(mechanism, SparseNoise) else None
        given = self._mechanism is not None
        self._local.owned = self._owned if given else []
        for module, forward in self._forwards[given]:
            module.forward = forward


class PlainStep:
    """``none``: TorchRec's sharded collection with its fused SGD, and PyTorch for the rest.

    Ordinary autograd, ``torch.optim.SGD(foreach=True)`` for the dense layers, and with several
    workers one all-reduce of their gradients. The graph cut, the recorder and the noise have no
    part in it; two hooks read the clock when the gradient reaches the tables and when it goes on,
    so that the fused update can be told from the rest of the backward.

    Args:
        twin: The plain model; see :func:`~dist_dp.cluster.bench.model.share_tables`.
        cut: The cut to set aside.
        loader: Poisson batches.
        state: The loader's.
    """

    name = "none"

    def __init__(self, twin: ClickModel, cut: Any, loader: PoissonLoader, state: StepState) -> None:
        self.timer = loader.timer
        self.updates: Updates | None = None
        self._twin = twin
        self._cut = cut
        self._state = state
        self._batches = iter(loader)
        self._dense = dense_parameters(twin)
        self._sgd = torch.optim.SGD(self._dense, lr=LEARNING_RATE, foreach=True)
        self._reached: dict[str, float] = {}
        for part in ("sparse_arch", "dense_arch"):
            getattr(twin.dlrm, part).register_forward_hook(self._clock(part))

    def _clock(self, part: str) -> Any:
        def note(_grad: Tensor) -> None:
            self._reached[part] = time.perf_counter()

        def after(_module: Any, _args: Any, output: Tensor) -> None:
            output.register_hook(note)

        return after

    @property
    def state_bytes(self) -> int:
        """Nothing."""
        return 0

    def activate(self) -> None:
        """Sets the cut aside; gradients of a rank's mean are summed, so the rate is shared out."""
        self._cut.local.plain = True
        if self.updates is not None:
            self.updates.give(None)
        for fused in self._cut.local.fused:
            fused.set_learning_rate(LEARNING_RATE / world_size())

    def step(self) -> Sample:
        """One step of ordinary training."""
        start = time.perf_counter()
        timer = self.timer
        batch = next(self._batches)
        examples = self._state.batch_size
        self._state.take(None)
        self._state.finish()
        with timer.phase("forward"):
            logits = self._twin(batch.dense_features, batch.sparse_features)
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, batch.labels)
        with timer.phase("backward"):
            loss.backward()
        if world_size() > 1:
            with timer.phase("communication"):
                self._average()
        with timer.phase("dense_update"):
            self._sgd.step()
            self._sgd.zero_grad()
        seconds = time.perf_counter() - start
        phases = timer.take()
        # The engine goes through the tables before it goes on into the dense layers' bottom.
        update = 1e3 * (self._reached["dense_arch"] - self._reached["sparse_arch"])
        phases["backward"] -= update
        phases["embedding_update"] = update
        return Sample(seconds, examples, len(batch), phases)

    def _average(self) -> None:
        grads = [p.grad for p in self._dense if p.grad is not None]
        flat = all_reduce_sum(torch.cat([g.reshape(-1) for g in grads])).div_(world_size())
        for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(part.view_as(grad))

    def close(self) -> None:
        """Ends the batches."""
        self._batches.close()  # type: ignore[attr-defined]


class PrivateStep:
    """A step as a private run takes it, with one of the mechanisms in the optimizer.

    Args:
        name: The mechanism's name.
        mechanism: The mechanism.
        engine: With the private model; shared by all.
        loader: Poisson batches, charged to a ledger.
        plan: What the mechanism's noise follows.
    """

    def __init__(
        self,
        name: str,
        mechanism: Mechanism,
        engine: PrivacyEngine,
        loader: PoissonLoader,
        plan: PrivacyPlan,
    ) -> None:
        self.name = name
        self.mechanism = mechanism
        self.plan = plan
        self.timer = engine.timer
        self.updates: Updates | None = None
        self._parts = engine.parts
        self._batches = iter(loader)

    @property
    def state_bytes(self) -> int:
        """The history of ``lazydp``, the marks of ``eana``."""
        if isinstance(self.mechanism, ComparisonMechanism):
            return self.mechanism.state_bytes
        if self.name != "lazydp":
            return 0
        return sum(s.last_step.numel() * s.last_step.element_size() for s in self._parts.shards)

    def activate(self) -> None:
        """Puts the mechanism into the optimizer."""
        for cut in self._parts.cuts:
            cut.local.plain = False
            cut.kept = self.mechanism.kept if isinstance(self.mechanism, SparseNoise) else {}
        self._parts.optimizer.mechanism = self.mechanism
        self._parts.optimizer.plan = self.plan
        if self.updates is not None:
            self.updates.give(self.mechanism)

    def step(self) -> Sample:
        """One private step, as the loop of a run has it."""
        start = time.perf_counter()
        timer, optimizer = self.timer, self._parts.optimizer
        batch = next(self._batches)
        examples = self._parts.state.batch_size
        with timer.phase("forward"):
            logits = self._parts.model(batch.dense_features, batch.sparse_features)
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, batch.labels)
        with timer.phase("backward"):
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - start
        phases = timer.take()
        phases["embedding_update"] = phases.pop("update", 0.0)
        if "select" in phases:
            phases["noise"] = phases.get("noise", 0.0) + phases.pop("select")
        return Sample(seconds, examples, len(batch), phases)

    def close(self) -> None:
        """Ends the batches."""
        self._batches.close()  # type: ignore[attr-defined]
