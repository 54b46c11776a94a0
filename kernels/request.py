"""What an implementation is asked to do: one update of rows in place, with checked arguments."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Update:
    """weight[r] <- decay * weight[r] + scale * z for `count` rows.

    Tensors are on the weight's device. Columns of numbers may repeat one number (stride 0).

    Attributes:
        weight: float32, bfloat16 or float16 [R, D]; any strides.
        rows: local row numbers, int64 or int32 [count], each once; None: the rows first_row,
            first_row + 1, …
        first_row: first local row of a range.
        count: how many rows; may be 0.
        key: 32 bytes.
        row_offset: global number of local row 0.
        column_offset: global number of local column 0.
        from_steps: int64 or int32 [count].
        to_step: below 2^31.
        decay: float32 or float64 [count].
        scale: float32 or float64 [count].
        rounds: ChaCha rounds.
        stochastic: half precision is rounded up or down at random, else to nearest.
        grid: 0, or the spacing, a power of two, of the grid that weights are put on (float32 only).
    """

    weight: torch.Tensor
    rows: torch.Tensor | None
    first_row: int
    count: int
    key: bytes
    row_offset: int
    column_offset: int
    from_steps: torch.Tensor
    to_step: int
    decay: torch.Tensor
    scale: torch.Tensor
    rounds: int
    stochastic: bool
    grid: float

    def __repr__(self) -> str:
        """Without the key."""
        return (
            f"Update({self.count} rows of {tuple(self.weight.shape)} {self.weight.dtype}, "
            f"to step {self.to_step})"
        )


def rounded_up(value: torch.Tensor) -> torch.Tensor:
    """float64 to the float32 at or above it: rounding never weakens noise. float32 stays."""
    result = value.to(torch.float32)
    if value.dtype == torch.float64:
        larger = torch.nextafter(result, torch.full_like(result, float("inf")))
        result = torch.where(result.to(torch.float64) < value, larger, result)
    return result
