"""The kernels in NumPy and plain torch: slow, portable, and obviously right.

Faster implementations stand behind the same face (`dist_dp.kernels`) and return the same bits.
The face has checked every argument before it comes here.

Counters. A block of 16 random words belongs to one row and 16 columns. Its ChaCha words are
12: the upper 16 of the row's 48 bits, 3 bits of domain, 13 bits of column block;
13: the lower 32 bits of the row; 14 and 15: the two steps, 31 bits each.
Domains tell apart what one place needs: 0 the normals, 1 more bits for far tails, 2 and 3 normals
in float64 (columns 0-7 and 8-15 of the block), 4 random rounding. Normals use from < to, numbers
for sampling from = to, and table initialisation the reserved pair 2^32 - 1: the three never meet,
even under one key.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from dist_dp.kernels import box_muller, chacha
from dist_dp.kernels.request import Update, rounded_up

NAME = "reference (NumPy)"

Int64Array = NDArray[np.int64]
Float32Array = NDArray[np.float32]
Float64Array = NDArray[np.float64]

COLUMNS_PER_BLOCK = 16
UNIFORMS_PER_BLOCK = 8

NORMAL, TAIL, WIDE_LOW, WIDE_HIGH, ROUNDING = range(5)
"""The domains of a block."""

GRID_LIMIT = 2.0**24
"""Weights on a grid stay within this many spacings of 0, where float32 is exact."""

_INITIALISATION_STEP = 0xFFFFFFFF
_CHUNK = 1 << 17  # numbers made at a time: arrays of a MiB or so


def inputs(
    rows: Int64Array,
    first_block: int,
    num_blocks: int,
    from_steps: Int64Array,
    to_step: int,
    domain: int = NORMAL,
) -> chacha.UInt32Array:
    """Words 12..15 for every (row, column block), column block fastest: uint32 [4, n * blocks]."""
    words = np.empty((4, len(rows), num_blocks), np.uint32)
    columns = np.arange(first_block, first_block + num_blocks, dtype=np.int64)
    words[0] = ((rows >> 32) << 16)[:, None] | (domain << 13) | columns
    words[1] = (rows & 0xFFFFFFFF)[:, None]
    words[2] = from_steps[:, None]
    words[3] = to_step
    return words.reshape(4, -1)


def _blocks_of(column_offset: int, num_columns: int) -> tuple[int, int, int]:
    """First column block, number of blocks, columns of the first block to skip."""
    first = column_offset // COLUMNS_PER_BLOCK
    last = (column_offset + num_columns - 1) // COLUMNS_PER_BLOCK
    return first, last - first + 1, column_offset - first * COLUMNS_PER_BLOCK


def _draw(
    key: bytes,
    rows: Int64Array,
    from_steps: Int64Array,
    to_step: int,
    column_offset: int,
    num_columns: int,
    rounds: int,
    wide: bool,
) -> Float32Array | Float64Array:
    """Standard normals [n, num_columns] of a few rows; float64 if `wide`."""
    first, number, skip = _blocks_of(column_offset, num_columns)

    def words(domain: int) -> chacha.UInt32Array:
        counters = inputs(rows, first, number, from_steps, to_step, domain)
        return chacha.blocks(key, counters, rounds)

    drawn: Float32Array | Float64Array
    if wide:
        halves = [box_muller.wide_normals(words(domain)) for domain in (WIDE_LOW, WIDE_HIGH)]
        drawn = np.concatenate(halves, axis=1)
    else:
        block = words(NORMAL)
        extra = np.zeros_like(block)
        short = (block[0::2] < box_muller.TAIL_BELOW).any(axis=0)
        if short.any():
            counters = inputs(rows, first, number, from_steps, to_step, TAIL)
            extra[:, short] = chacha.blocks(key, counters[:, short], rounds)
        drawn = box_muller.normals(block, extra)
    return drawn.reshape(len(rows), -1)[:, skip : skip + num_columns]


def normals(
    key: bytes,
    rows: Int64Array,
    from_steps: Int64Array,
    to_step: int,
    column_offset: int,
    num_columns: int,
    rounds: int,
) -> Float32Array:
    """Standard normals float32 [n, num_columns]; see `dist_dp.kernels.normal`."""
    output = np.empty((len(rows), num_columns), np.float32)
    if output.size == 0:
        return output
    step = max(1, _CHUNK // num_columns)
    for first in range(0, len(rows), step):
        part = slice(first, first + step)
        output[part] = _draw(
            key, rows[part], from_steps[part], to_step, column_offset, num_columns, rounds, False
        )
    return output


def blocks(key: bytes, counters: chacha.UInt32Array, rounds: int) -> chacha.UInt32Array:
    """Raw words uint32 [16, n] of the blocks whose words 12..15 are counters [4, n]."""
    return chacha.blocks(key, counters, rounds)


def settle(update: Update) -> None:
    """In place; see `dist_dp.kernels.settle_rows` and `settle_range`."""
    width = update.weight.shape[1]
    size = max(1, _CHUNK // max(1, width))
    for first in range(0, update.count, size):
        chunk = slice(first, min(first + size, update.count))
        if update.rows is None:
            start = update.first_row + first
            part = update.weight[start : start + chunk.stop - chunk.start]
            _settle(update, part, np.arange(start, start + len(part)), chunk)
        else:
            index = update.rows[chunk].to(torch.int64)
            part = update.weight[index]
            _settle(update, part, index.cpu().numpy(), chunk)
            update.weight.index_copy_(0, index, part)


def _settle(update: Update, part: torch.Tensor, rows: Int64Array, chunk: slice) -> None:
    """Settles `part`, the rows `chunk` of the update's list, whose local numbers are `rows`."""
    if part.numel() == 0:
        return
    decay = update.decay[chunk].to(torch.float32)[:, None]
    scale = rounded_up(update.scale[chunk])[:, None]
    # three separate operations: a fused multiply-add would round differently
    kept = part.to(torch.float32) * decay
    noise = torch.zeros(part.shape, dtype=torch.float64 if update.grid else torch.float32)
    noisy = np.flatnonzero(scale.cpu().numpy())
    steps = update.from_steps[chunk].cpu().numpy().astype(np.int64)
    if len(noisy):
        drawn = _draw(
            update.key, rows[noisy] + update.row_offset, steps[noisy], update.to_step,
            update.column_offset, part.shape[1], update.rounds, wide=bool(update.grid),
        )  # fmt: skip
        noise[noisy] = torch.from_numpy(np.ascontiguousarray(drawn))
    noise = noise.to(part.device)
    if update.grid:
        exact = part.to(torch.float64) * decay.to(torch.float64) / update.grid
        whole = exact.round()
        noise *= scale.to(torch.float64) / update.grid
        whole += ((exact - whole) + noise).round()
        # adding 0 turns -0 into 0: the sign of a zero would tell of the weight's
        part.copy_(whole.clamp(-GRID_LIMIT, GRID_LIMIT) * update.grid + 0.0)
        return
    # a row without noise is decayed alone: adding a zero would turn -0 into 0
    result = torch.where(scale > 0, kept + noise * scale, kept)
    if part.dtype == torch.float32 or not update.stochastic:
        part.copy_(result)
        return
    first, number, skip = _blocks_of(update.column_offset, part.shape[1])
    counters = inputs(
        rows + update.row_offset, first, number, steps, update.to_step, domain=ROUNDING
    )
    words = chacha.blocks(update.key, counters, update.rounds)[:8].T
    bits = np.ascontiguousarray(words).view("<u2").reshape(len(rows), -1)
    random = torch.from_numpy(bits[:, skip : skip + part.shape[1]].astype(np.int32))
    rounded = stochastically(result, random.to(part.device), part.dtype)
    part.copy_(torch.where(scale > 0, rounded, kept.to(part.dtype)))


def stochastically(value: torch.Tensor, random: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round float32 to half precision, up with the probability of the part cut off.

    Args:
        value: float32, any shape.
        random: int32 of the same shape, uniform in [0, 2^16).
        dtype: bfloat16 or float16. Beyond float16's range the result is infinite.

    Returns:
        A tensor of `dtype`: the magnitude in units of the last place, cut to 16 bits after the
        point, plus random / 2^16, cut to a whole number.
    """
    info = torch.finfo(dtype)
    digits = 7 if dtype == torch.bfloat16 else 10
    lowest = -126 if dtype == torch.bfloat16 else -14
    _, exponent = torch.frexp(value.to(torch.float64))
    unit = (exponent - 1).clamp(min=lowest) - digits
    magnitude = torch.ldexp(value.abs().to(torch.float64), -unit)
    whole = magnitude.floor()
    cut = ((magnitude - whole) * 65536.0).floor().nan_to_num().to(torch.int32)
    whole += ((cut + random) >> 16).to(torch.float64)
    rounded = torch.ldexp(whole, unit)
    rounded = torch.where(rounded > info.max, torch.inf, rounded)
    signed = torch.copysign(rounded, value.to(torch.float64))
    return torch.where(torch.isfinite(value), signed, value.to(torch.float64)).to(dtype)


def uniforms(words: chacha.UInt32Array) -> Float64Array:
    """Blocks uint32 [16, n] to float64 [8 n] in (0, 1): 64 bits each, to nearest, never 1."""
    values = words[1::2].astype(np.float64)
    values *= 2.0**32
    values += words[0::2].astype(np.float64)
    values += 0.5
    values *= 2.0**-64
    return np.minimum(values, 1.0 - 2.0**-53).T.reshape(-1)


def uniform_counters(step: int, first_block: int, num_blocks: int) -> chacha.UInt32Array:
    """Words 12..15 of the blocks that `dist_dp.kernels.uniforms` uses: uint32 [4, num_blocks]."""
    rows = np.arange(first_block, first_block + num_blocks, dtype=np.int64)
    return inputs(rows, 0, 1, np.full(num_blocks, step, np.int64), step)


def initial_counters(rows: Int64Array, first_block: int, num_blocks: int) -> chacha.UInt32Array:
    """Words 12..15 of the blocks that `dist_dp.kernels.uniform_rows` uses."""
    reserved = np.full(len(rows), _INITIALISATION_STEP, np.int64)
    return inputs(rows, first_block, num_blocks, reserved, _INITIALISATION_STEP)
