"""Ids on their way to the owners of their rows."""

from __future__ import annotations

from typing import Any


class IdDistribution:
    """The exchange of one batch's ids: begun, and perhaps not yet over.

    A collective: every rank begins it at the same point of a step.

    Args:
        sharded: TorchRec's sharded collection.
        features: KeyedJaggedTensor of this rank's examples.
    """

    def __init__(self, sharded: Any, features: Any) -> None:
        self.context = sharded.create_context()
        self._values = features.values()
        # Once the lengths are there the ids are sent: here, so that ranks agree on the order of
        # their collectives whichever thread waits for the ids.
        self._sent = sharded.input_dist(self.context, features).wait()
        self._local: Any = None

    def serves(self, features: Any) -> bool:
        """Whether these are the features that were sent: the same memory, unchanged."""
        values = features.values()
        same = values.data_ptr() == self._values.data_ptr() and values.shape == self._values.shape
        return bool(same)

    def wait(self) -> Any:
        """The ids that arrived here: one KeyedJaggedTensor for each lookup of the collection."""
        if self._local is None:
            self._local = self._sent.wait()
        return self._local
