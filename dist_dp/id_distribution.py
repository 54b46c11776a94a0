"""Ids on their way to the owners of their rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class IdDistribution:
    """The exchange of one batch's ids: begun, and perhaps not yet over.

    A collective: every rank begins it at the same point of a step.

    Args:
        sharded: TorchRec's sharded collection.
        features: KeyedJaggedTensor of this rank's examples.
    """

    def __init__(self, sharded: Any, features: Any) -> None:
        self.context = sharded.create_context()
        self._sent_parts = _parts(features)
        self._versions = [part._version for part in self._sent_parts]
        # Once the lengths are there the ids are sent: here, so that ranks agree on the order of
        # their collectives whichever thread waits for the ids.
        self._sent = sharded.input_dist(self.context, features).wait()
        self._local: Any = None

    def serves(self, features: Any) -> bool:
        """Whether these are the features that were sent: ids, lengths and weights, unchanged."""
        parts = _parts(features)
        if len(parts) != len(self._sent_parts):
            return False
        if [part._version for part in self._sent_parts] != self._versions:
            return False
        return all(
            (now.data_ptr() == sent.data_ptr() and now.shape == sent.shape)
            or torch.equal(now, sent)
            for now, sent in zip(parts, self._sent_parts, strict=True)
        )

    def wait(self) -> Any:
        """The ids that arrived here: one KeyedJaggedTensor for each lookup of the collection."""
        if self._local is None:
            self._local = self._sent.wait()
        return self._local


def _parts(features: Any) -> list[Tensor]:
    weights = features.weights_or_none()
    return [features.values(), features.lengths(), *([] if weights is None else [weights])]
