"""How often ids occur in their bags, which clipping needs; nothing is sorted on a CPU."""

from __future__ import annotations

import torch

from dist_dp.kernels import checks, dispatch, native
from dist_dp.kernels.graphs import outside_graphs


@outside_graphs
@torch.no_grad()
def bag_repeats(
    ids: torch.Tensor, lengths: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """For each bag, the sum over its distinct ids of the squared sum of their weights.

    With one pooled use of a table an example's gradient norm is the output's times the root of
    this (design: row r gets (multiplicity of r) times the output's gradient).

    Args:
        ids: int64 or int32 [n], bag after bag.
        lengths: int64 or int32 [b], the length of each bag.
        weights: float32 [n], or None for all ones.

    Returns:
        float32 [b]; 0 for an empty bag.

    Raises:
        ValueError: the lengths do not add up to n.
    """
    numbers = checks.integers(ids, "ids").contiguous()
    sizes = checks.integers(lengths, "lengths").to(torch.int64).contiguous()
    factors = None if weights is None else weights.detach().to(torch.float32).contiguous()
    if factors is not None and factors.shape != numbers.shape:
        raise ValueError(f"weights: {tuple(numbers.shape)} expected, {tuple(factors.shape)} given")
    if numbers.device.type == "cpu" and dispatch.chosen_isa() is not None:
        return native.bag_repeats(numbers, sizes, factors)
    if bool((sizes < 0).any()) or int(sizes.sum()) != numbers.numel():
        raise ValueError(f"lengths: they do not fit the {numbers.numel()} ids")
    bags = torch.repeat_interleave(
        torch.arange(sizes.numel(), device=sizes.device), sizes, output_size=numbers.numel()
    )
    pairs, group = torch.unique(
        torch.stack([bags, numbers.to(torch.int64)]), dim=1, return_inverse=True
    )
    each = torch.ones(numbers.numel(), device=sizes.device) if factors is None else factors
    sums = torch.zeros(pairs.shape[1], dtype=torch.float64, device=sizes.device)
    sums.index_add_(0, group, each.to(torch.float64))
    squares = torch.zeros(sizes.numel(), dtype=torch.float64, device=sizes.device)
    squares.index_add_(0, pairs[0], sums.square())
    return squares.to(torch.float32)
