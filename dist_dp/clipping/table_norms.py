"""Exact per-example gradient norms of embedding tables, on the example's home rank.

For example b and row r of a table, the gradient is the sum over every use of that row by the
example: Σ_u m_u · δ_u, where δ_u is the gradient of the pooled (or sequence) output the use went
into, and m_u its weight in the bag (1 for sum, 1/length for mean, the given weight otherwise).
Repeated ids, and equal ids in features that share the table, add up *before* the norm is taken:
treating them one by one under-clips.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dist_dp import kernels


@dataclass(frozen=True)
class TableUse:
    """One feature's use of one table in one forward.

    Attributes:
        rows: int64 ``[entries]``, global row ids, grouped by example.
        lengths: int64 ``[batch]``, entries of each example.
        entry_weights: float ``[entries]`` or None for all ones; the weight of each entry in its
            bag's output.
        delta: float ``[batch, dim]`` for pooled output (one row a bag), or ``[entries, dim]`` for
            sequence output.
        pooled: Which of the two ``delta`` is.
    """

    rows: Tensor
    lengths: Tensor
    entry_weights: Tensor | None
    delta: Tensor
    pooled: bool

    @property
    def examples(self) -> Tensor:
        """int64 ``[entries]``: the example each entry belongs to."""
        return torch.repeat_interleave(
            torch.arange(self.lengths.numel(), device=self.lengths.device),
            self.lengths,
            output_size=self.rows.numel(),
        )

    def contributions(self, examples: Tensor) -> Tensor:
        """float ``[entries, dim]``: the gradient each entry adds to its row."""
        delta = self.delta[examples] if self.pooled else self.delta
        return delta if self.entry_weights is None else delta * self.entry_weights.unsqueeze(1)


def squared_norms(uses: list[TableUse], num_rows: int, batch: int) -> Tensor:
    """Squared norm of each example's gradient with respect to one table.

    Args:
        uses: Every use of the table in this step.
        num_rows: Rows of the table.
        batch: Examples on this rank.

    Returns:
        float ``[batch]``.
    """
    if len(uses) == 1 and uses[0].pooled:
        return _one_pooled_use(uses[0], num_rows, batch)
    device = uses[0].delta.device
    examples = [use.examples for use in uses]
    keys = torch.cat([e * num_rows + use.rows for e, use in zip(examples, uses, strict=True)])
    if keys.numel() == 0:
        return torch.zeros(batch, device=device)
    pairs, group = torch.unique(keys, return_inverse=True)
    dim = uses[0].delta.shape[1]
    summed = torch.zeros(pairs.numel(), dim, dtype=uses[0].delta.dtype, device=device)
    start = 0
    for e, use in zip(examples, uses, strict=True):
        count = e.numel()
        summed.index_add_(0, group[start : start + count], use.contributions(e))
        start += count
    result = torch.zeros(batch, dtype=summed.dtype, device=device)
    return result.index_add_(0, pairs // num_rows, summed.square().sum(1))


def _one_pooled_use(use: TableUse, num_rows: int, batch: int) -> Tensor:
    """‖δ_b‖² · Σ_r (Σ m)²: with one pooled use the row gradients are all multiples of δ_b."""
    delta2: Tensor = torch.linalg.vector_norm(use.delta, dim=1).square_()
    return delta2 * kernels.bag_repeats(use.rows, use.lengths, use.entry_weights)


def squared_norms_of_bags(features: Any, keys: list[str], deltas: Tensor, mean: Tensor) -> Tensor:
    """Squared norms over many tables of one width, each used once, by one pooled feature.

    As :func:`squared_norms` for each of them, added up: one pass over the ids of all features and
    one over the gradients.

    Args:
        features: KeyedJaggedTensor ``[keys, batch]``.
        keys: The feature of each table.
        deltas: float ``[batch, tables, dim]``, the gradients of the bags' outputs.
        mean: bool ``[tables]``: whether the table averages its bags.

    Returns:
        float ``[batch]``.
    """
    names = features.keys()
    lengths = features.lengths()
    repeats = kernels.bag_repeats(features.values(), lengths, features.weights_or_none())
    repeats = repeats.view(len(names), -1)
    lengths = lengths.view(len(names), -1)
    if keys != names:
        places = [names.index(key) for key in keys]
        repeats, lengths = repeats[places], lengths[places]
    if bool(mean.any()):
        each = torch.where(mean.unsqueeze(1), lengths.clamp_min(1), 1).to(repeats.dtype)
        repeats = repeats / each.square()
    delta2: Tensor = torch.linalg.vector_norm(deltas, dim=2).square_()
    return (delta2 * repeats.t()).sum(1)
