"""Half-precision tables whose rows carry float32: lookups read the half, updates go to the whole.

Rounding an update to bfloat16 or float16 before its noise is there moves the row by up to half a
unit in the last place, far more than a step's noise, and by an amount that depends on the data:
the sensitivity would no longer be the clip norm. So a half-precision shard keeps, beside the weight
that lookups read, the rest of a float32 value, and every gradient and every draw of noise goes into
that value; the weight is its rounding, which is post-processing.

The guarantee is that of a float32 table, and a release holds the weights: the rounded values.
The memory is a float32 table's (bfloat16: 2 + 2 bytes a number) or more (float16: 2 + 4, since its
range is not float32's). What is gained is half the bytes read by a lookup.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dist_dp.table_shard import TableShard

HALF_DTYPES = (torch.bfloat16, torch.float16)

_QUIET_NAN = 0x7FC00000
_INFINITY = 0x7F800000


def split(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A float32 value as a half-precision weight and the rest of it.

    Args:
        values: float32, any shape.
        dtype: ``bfloat16`` or ``float16``.

    Returns:
        The weight, nearest to the value (bfloat16: ties away from 0), and the rest: int16 for
        bfloat16, the float32 value itself for float16. :func:`join` gives the value back, bit for
        bit (every NaN as the same one).
    """
    if dtype == torch.float16:
        return values.to(torch.float16), values.clone()
    bits = values.contiguous().view(torch.int32)
    bits = torch.where((bits & 0x7FFFFFFF) > _INFINITY, _QUIET_NAN, bits)
    high = (bits + 0x8000) >> 16
    low = bits - (high << 16)
    return high.to(torch.int16).view(torch.bfloat16), low.to(torch.int16)


def join(weight: Tensor, low: Tensor) -> Tensor:
    """The float32 value that :func:`split` took apart."""
    if weight.dtype == torch.float16:
        return low.clone()
    high = weight.contiguous().view(torch.int16).to(torch.int32) << 16
    return (high + low).view(torch.float32)


def widen(shard: TableShard) -> None:
    """Gives a half-precision shard the rest of its values, starting from its present weights."""
    if shard.weight.dtype == torch.float16:
        shard.low = shard.weight.float()
    else:
        shard.low = torch.zeros(shard.weight.shape, dtype=torch.int16, device=shard.weight.device)


def read_rows(shard: TableShard, rows: Tensor) -> Tensor:
    """The float32 values of rows, ``[n, local columns]``; a copy.

    Args:
        shard: Of any precision.
        rows: int64 ``[n]``, local rows.
    """
    if shard.low is None:
        return shard.weight.index_select(0, rows).float()
    return join(shard.weight.index_select(0, rows), shard.low.index_select(0, rows))


def write_rows(shard: TableShard, rows: Tensor, values: Tensor) -> None:
    """Puts float32 values ``[n, local columns]`` into distinct rows."""
    if shard.low is None:
        shard.weight.index_copy_(0, rows, values.to(shard.weight.dtype))
        return
    weight, low = split(values, shard.weight.dtype)
    shard.weight.index_copy_(0, rows, weight)
    shard.low.index_copy_(0, rows, low)
