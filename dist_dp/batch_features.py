"""From a batch to the ids that its collections look up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dist_dp.errors import ConfigError

FeaturesOf = Callable[[Any], Any]
"""From a batch of the loader to a KeyedJaggedTensor, or to one for each collection by its path."""


def only_features(batch: Any) -> Any:
    """A batch's ``sparse_features``, or the one KeyedJaggedTensor in it.

    Raises:
        ConfigError: There is none, or more than one.
    """
    from torchrec import KeyedJaggedTensor

    if hasattr(batch, "sparse_features"):
        return batch.sparse_features
    if isinstance(batch, KeyedJaggedTensor):
        return batch
    values = batch.values() if isinstance(batch, dict) else batch
    found = [v for v in values if isinstance(v, KeyedJaggedTensor)]
    if len(found) != 1:
        raise ConfigError(
            f"the batch holds {len(found)} KeyedJaggedTensors; say which one with a function from "
            "a batch to its features (look_ahead, features_of)"
        )
    return found[0]
