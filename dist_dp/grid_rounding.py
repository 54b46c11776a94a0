"""What putting rows on a grid adds to a record's influence, and how clipping makes room for it.

A row is put on the grid when it is *read*, and its gradient is subtracted in float32; which rows
these happen to is itself private. A number that a record alone reads moves by up to half a spacing
at the read and half a spacing at the subtraction (float32 is at least as fine as the grid inside
its range); one that others read too, by up to a whole spacing at the subtraction. So a record
moves each number it reads by at most one spacing more than its gradient does, and its gradient is
clipped to a norm that is smaller by as much.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dist_dp import kernels
from dist_dp.cut import CutEmbeddings
from dist_dp.errors import ConfigError
from dist_dp.noise_grid import MULTIPLES, spacing_text
from dist_dp.table_shard import TableShard


def clip_limits(limit: float, numbers: Tensor, spacing: float, step_size: float) -> Tensor:
    """What is left of the clip norm for each record's gradient when rounding has its share.

    Args:
        limit: The clip norm C.
        numbers: float ``[batch]``, table numbers each example reads.
        spacing: Of the tables' grid.
        step_size: What a gradient of 1 moves a weight by: learning rate over batch size; above 0.

    Returns:
        float32 ``[batch]``.

    Raises:
        ConfigError: It is less than half the clip norm for some example.

    Guarantee:
        A record that is added or removed moves the sum of gradients by at most the returned
        limit, and by rounding each of the numbers it reads by at most spacing / step_size in the
        sum's units: by at most `limit` in all, in the Euclidean norm.
    """
    most = float(numbers.max()) if numbers.numel() else 0.0
    if most**0.5 * spacing / step_size > limit / 2:
        raise ConfigError(
            f"noise.grid: an example reads {most:,.0f} numbers of the tables, and rounding them to "
            f"{spacing_text(spacing)} takes more than half of max_grad_norm at this step's "
            "learning rate; give a finer grid"
        )
    return (limit - numbers.double().sqrt() * (spacing / step_size)).to(torch.float32)


class NumbersRead:
    """Counts the table numbers that each example of the step in flight reads.

    Every id counts with its table's columns, over all collections and training forwards; ids that
    occur twice count twice.

    Args:
        cuts: The cut collections, whose forwards it watches.
    """

    def __init__(self, cuts: Sequence[CutEmbeddings]) -> None:
        self._counts: list[Tensor] = []
        for cut in cuts:
            cut.register_forward_hook(self._after, with_kwargs=True)

    def _after(
        self, cut: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any
    ) -> None:
        if not (cut.training and torch.is_grad_enabled()):
            return
        assert isinstance(cut, CutEmbeddings)
        features = args[0] if args else kwargs["features"]
        for config in cut.configs:
            for feature in config.feature_names:
                self._counts.append(features[feature].lengths() * config.embedding_dim)

    def counts(self, batch: int, device: torch.device) -> Tensor:
        """float ``[batch]``."""
        total = torch.zeros(batch, dtype=torch.float64, device=device)
        for count in self._counts:
            total += count
        return total

    def clear(self) -> None:
        """Forgets the forwards."""
        self._counts.clear()


def put_on_grid(shard: TableShard, spacing: float) -> None:
    """Rounds a table's initial weights, which are public, to the grid, in place.

    Args:
        shard: The shard, with its key.
        spacing: Of the grid.

    Raises:
        ConfigError: A weight lies outside the grid's range, where it would be held.
    """
    reach = MULTIPLES * spacing
    ends = torch.aminmax(shard.weight) if shard.weight.numel() else ()
    largest = max((abs(float(end)) for end in ends), default=0.0)
    if largest > reach:
        raise ConfigError(
            f"noise.grid: table '{shard.table}' starts with a weight of {largest:g}, outside the "
            f"range ±{reach:g} of the grid {spacing_text(spacing)}; give a coarser grid, or scale "
            "the initial weights down"
        )
    kernels.settle_range(
        shard.weight,
        key=shard.noise_key,
        from_steps=0,
        to_step=0,
        decay=1.0,
        scale=0.0,
        grid=spacing,
    )
