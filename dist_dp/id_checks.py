"""What a collection is given to look up, checked before anything is sent or read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_dp.errors import DataError, ModelError

_UNSIGNED = {torch.int32: np.uint32, torch.int64: np.uint64}


class FeatureOrder:
    """Gives a collection its features in one order, that of its first batch, whatever comes.

    TorchRec notes at the first batch at which place each feature stands, and goes by place from
    then on. Clipping and the checks of ids go by name. Were the two to part, bags would be looked
    up in other features' tables and updated there, clipped by the wrong norm.

    Guarantee:
        What is looked up, checked and clipped for a feature is what the batch holds under its
        name.

    Args:
        names: The features that the collection looks up.
        path: The collection's path in the model, for messages.
    """

    def __init__(self, names: Sequence[str], path: str) -> None:
        self._names = names
        self._path = path
        self._order: list[str] | None = None

    def apply(self, features: Any) -> Any:
        """The same features in the order of the first ones.

        Args:
            features: KeyedJaggedTensor.

        Raises:
            DataError: A feature is missing or comes twice.
        """
        keys: list[str] = features.keys()
        if keys == self._order:
            return features
        missing = [name for name in self._order or self._names if name not in keys]
        if missing:
            why = "the first batch had" if self._order else "one of its tables needs"
            raise DataError(
                f"collection '{self._path}': feature '{missing[0]}' is missing from a batch, and "
                f"{why} it; give a feature without ids empty bags"
            )
        twice = {name for name in keys if keys.count(name) > 1}
        if twice:
            raise DataError(
                f"collection '{self._path}': feature '{min(twice)}' comes twice in a batch; "
                "put its ids into one bag"
            )
        if self._order is None:
            self._order = list(keys)
            return features
        return features.permute([keys.index(name) for name in self._order])


def check_features(features: Any, configs: Sequence[Any], path: str) -> None:
    """Refuses ids outside their table, and weights that are trained.

    Args:
        features: KeyedJaggedTensor.
        configs: The collection's table configurations.
        path: The collection's path in the model, for messages.

    Raises:
        DataError: An id lies outside its table.
        ModelError: The id weights are themselves trained: they have no clipping rule.
    """
    rows = {name: c.num_embeddings for c in configs for name in c.feature_names}
    keys: list[str] = features.keys()
    limits = [rows.get(name, torch.iinfo(torch.int64).max) for name in keys]
    key = _first_key_outside(features.values(), features.offset_per_key(), limits)
    if key is not None:
        name = keys[key]
        ids = features[name].values()
        wrong = int(ids[(ids < 0) | (ids >= rows[name])][0])
        table = next(c.name for c in configs if name in c.feature_names)
        raise DataError(
            f"feature '{name}' holds the id {wrong}, outside table '{table}' of {rows[name]} "
            "rows; hash the ids, or enlarge the table"
        )
    weights = features.weights_or_none()
    if weights is not None and weights.requires_grad:
        raise ModelError(
            f"collection '{path}' got id weights that are themselves trained; they have no "
            "clipping rule. Detach them, or use unweighted bags."
        )


def _first_key_outside(ids: Tensor, bounds: list[int], limits: list[int]) -> int | None:
    """The first key with an id below 0 or not below its limit.

    Args:
        ids: int32 or int64 ``[bounds[-1]]``.
        bounds: Where each key's ids begin, and where the last one's end.
        limits: By key.
    """
    filled = [k for k in range(len(limits)) if bounds[k] < bounds[k + 1]]
    if not filled:
        return None
    if ids.device.type == "cpu" and ids.dtype in _UNSIGNED:
        # Without its sign an id below 0 is larger than any table: one pass for both ends.
        values = ids.detach().contiguous().numpy().view(_UNSIGNED[ids.dtype])
        largest = np.maximum.reduceat(values[: bounds[-1]], [bounds[k] for k in filled])
        outside = largest >= np.array([limits[k] for k in filled], dtype=np.uint64)
        return filled[int(outside.argmax())] if outside.any() else None
    sizes = torch.tensor(bounds).diff()
    limit = torch.repeat_interleave(torch.tensor(limits), sizes).to(ids.device)
    wrong = (ids < 0) | (ids >= limit)
    if not bool(wrong.any()):
        return None
    place = int(wrong.nonzero()[0])
    return int(torch.searchsorted(torch.tensor(bounds), place, right=True)) - 1


def without_weights(features: Any) -> Any:
    """The same ids in bags without weights.

    A sharded collection whose unsharded original ignores weights would not ignore them.
    """
    from torchrec import KeyedJaggedTensor

    return KeyedJaggedTensor(
        keys=features.keys(),
        values=features.values(),
        lengths=features.lengths(),
        stride=features.stride(),
    )


def is_among(rows: Tensor, kept: Tensor) -> Tensor:
    """Whether each row is one of the kept ones (int64, sorted), bool of the shape of `rows`."""
    if not kept.numel():
        return torch.zeros_like(rows, dtype=torch.bool)
    kept = kept.to(rows.device)
    places = torch.searchsorted(kept, rows).clamp_max_(kept.numel() - 1)
    return kept[places] == rows
