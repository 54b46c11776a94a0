"""Settling the next batch's rows beside the dense part of this one.

As TorchRec's training pipelines do, the ids of batch i+1 are sent to the owners of their rows while
the dense layers work on batch i; here the rows are settled there too, on a CUDA device on a stream
of its own. It begins when the model's forward is over (all lookups of batch i have been made) and
ends with ``optimizer.step()``, so evaluation, checkpoints and releases never meet it.

Rows that batch i reads as well are left alone: they must not move before the gradient of step i is
in, and are settled at their next lookup, as without look-ahead. The others are settled to step i at
once, whose noise the schedule already knows: nothing in it depends on the records.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from dist_dp.batch_features import FeaturesOf, only_features
from dist_dp.cut import CutEmbeddings
from dist_dp.errors import ConfigError, ModelError
from dist_dp.loader import PoissonLoader
from dist_dp.mechanisms import LazyDP
from dist_dp.optimizer import PrivateOptimizer

__all__ = ["FeaturesOf", "LookAhead"]


class LookAhead:
    """Sends and settles the next batch while the backward of this one runs.

    Guarantee:
        Values read have the law they have without look-ahead, and are equal to them up to the
        order of float32 additions: a row settled early is not read before the step in flight is
        over, and rows of the batch in flight are not touched. Lookups between a forward and its
        ``optimizer.step()`` would see the noise of a step that is not over and are refused.

    Args:
        model: The cut model.
        optimizer: Its private optimizer, with the mechanism ``lazydp``.
        loader: Where the next batch comes from.
        features_of: What each collection will be given from a batch; by default the batch's
            ``sparse_features``, or its only KeyedJaggedTensor.

    Raises:
        ConfigError: Another mechanism, or several collections without ``features_of``.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: PrivateOptimizer,
        loader: PoissonLoader,
        features_of: FeaturesOf | None = None,
    ) -> None:
        mechanism = optimizer.mechanism
        if not isinstance(mechanism, LazyDP):
            raise ConfigError(
                f"look_ahead: mechanism '{mechanism.name}' has nothing to settle before a lookup; "
                "use it with lazydp, or leave it out"
            )
        if features_of is None and len(optimizer.cuts) > 1:
            raise ConfigError(
                f"look_ahead: the model has {len(optimizer.cuts)} collections; say which features "
                "of a batch each of them gets (look_ahead=function from a batch to "
                "{path: KeyedJaggedTensor})"
            )
        self._mechanism = mechanism
        self._optimizer = optimizer
        self._loader = loader
        self._features_of = features_of or only_features
        self._device = optimizer.device
        cuda = self._device.type == "cuda"
        self._stream = torch.cuda.Stream(self._device) if cuda else None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="settle-ahead")
        self._settling: Future[None] | None = None
        self._model = model
        model.register_forward_hook(self._after_forward)
        for cut in optimizer.cuts:
            cut.register_forward_pre_hook(self._before_lookup)
        optimizer.before_step_ends.append(self.finish)

    def _before_lookup(self, cut: nn.Module, _args: Any) -> None:
        if self._settling is not None:
            assert isinstance(cut, CutEmbeddings)
            raise ModelError(
                f"collection '{cut.path}' is looked up between a forward in training mode and "
                "optimizer.step(), when look_ahead already draws that step's noise; evaluate after "
                "optimizer.step(), or leave look_ahead out"
            )

    def _after_forward(self, model: nn.Module, _args: Any, _output: Any) -> None:
        if not (model.training and torch.is_grad_enabled()):
            return
        if self._optimizer.mechanism is not self._mechanism:
            return  # a benchmark has another one's turn
        if self._optimizer.is_accumulating:
            # The next micro-batch is of the same step: its rows must not have this step's noise.
            return
        batch = self._loader.peek()
        if batch is None:
            return
        features = self._features_of(batch)
        by_path = (
            features if isinstance(features, dict) else {self._optimizer.cuts[0].path: features}
        )
        for cut in self._optimizer.cuts:
            if cut.path not in by_path:
                raise ConfigError(
                    f"look_ahead: no features for collection '{cut.path}'; give one "
                    "KeyedJaggedTensor for each of "
                    f"{', '.join(c.path for c in self._optimizer.cuts)}"
                )
            cut.look_ahead(by_path[cut.path].to(self._device))
        self._optimizer.record_step()
        self._settling = self._pool.submit(self._settle, torch.get_num_threads())

    def _settle(self, threads: int) -> None:
        torch.set_num_threads(threads)
        if self._stream is None:
            self._settle_all()
            return
        # The lookups of this batch, and the ids that arrive, were ordered on the main stream.
        self._stream.wait_stream(torch.cuda.default_stream(self._device))
        with torch.cuda.stream(self._stream):
            self._settle_all()

    def _settle_all(self) -> None:
        for cut in self._optimizer.cuts:
            for reads in cut.reads_ahead():
                self._mechanism.settle_ahead(reads)

    def finish(self) -> None:
        """Waits for the settling; what went wrong there goes wrong here."""
        if self._settling is None:
            return
        settling, self._settling = self._settling, None
        with self._optimizer.timer.phase("settle"):
            settling.result()
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
