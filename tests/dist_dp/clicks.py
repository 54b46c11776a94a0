"""Small click records with ragged bags, and what is needed to cut them into examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchrec import KeyedJaggedTensor

PADDING = -1


@dataclass
class Clicks:
    """A batch: dense features, one KeyedJaggedTensor for each collection, labels."""

    dense: Tensor
    sparse: tuple[KeyedJaggedTensor, ...]
    labels: Tensor

    def __len__(self) -> int:
        return self.labels.numel()

    @property
    def inputs(self) -> tuple[object, ...]:
        """What a model's forward takes."""
        return (self.dense, *self.sparse)

    def select(self, examples: Sequence[int]) -> Clicks:
        """The given examples; ``PADDING`` stands for one with empty bags."""
        index = torch.tensor(examples, dtype=torch.int64)
        real = (index != PADDING).float()
        safe = index.clamp_min(0)
        return Clicks(
            self.dense[safe] * real.unsqueeze(1),
            tuple(select(k, examples) for k in self.sparse),
            self.labels[safe] * real,
        )

    def batch(self, indices: NDArray[np.int64], *, padded_size: int) -> Clicks:
        """As a data set of the package gives it."""
        numbers = [int(i) for i in indices]
        return self.select(numbers + [PADDING] * (padded_size - len(numbers)))


def select(features: KeyedJaggedTensor, examples: Sequence[int]) -> KeyedJaggedTensor:
    values, lengths, weights = [], [], []
    for key in features.keys():  # noqa: SIM118 - no dict
        bag = features[key]
        offsets = bag.offsets().tolist()
        for b in examples:
            part = slice(0, 0) if b == PADDING else slice(offsets[b], offsets[b + 1])
            values.append(bag.values()[part])
            lengths.append(values[-1].numel())
            if features.weights_or_none() is not None:
                weights.append(bag.weights()[part])
    return KeyedJaggedTensor(
        keys=features.keys(),
        values=torch.cat(values),
        lengths=torch.tensor(lengths, dtype=torch.int32),
        weights=torch.cat(weights) if weights else None,
        stride=len(examples),
    )


def random_bags(
    rows: dict[str, int],
    batch: int,
    generator: torch.Generator,
    *,
    longest: int = 4,
    weighted: bool = False,
    one_each: bool = False,
) -> KeyedJaggedTensor:
    """Bags of 0..longest ids; tables of few rows make repeats within a bag common."""
    keys = list(rows)
    shape = (len(keys) * batch,)
    lengths = torch.randint(0, longest + 1, shape, generator=generator, dtype=torch.int32)
    if one_each:
        lengths = torch.ones(shape, dtype=torch.int32)
    counts = lengths.view(len(keys), batch).sum(1).tolist()
    values = torch.cat(
        [
            torch.randint(0, rows[k], (n,), generator=generator)
            for k, n in zip(keys, counts, strict=True)
        ]
    )
    weights = torch.rand(values.numel(), generator=generator) + 0.5 if weighted else None
    return KeyedJaggedTensor(
        keys=keys, values=values, lengths=lengths, weights=weights, stride=batch
    )
