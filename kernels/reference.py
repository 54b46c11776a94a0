"""The kernels in NumPy and plain torch: slow, portable, and obviously right.

Faster implementations replace this module behind the face (`dist_dp.kernels`); they must return
the same numbers. The face has checked every argument before it comes here.

Speed, one core with AVX-512, 64 columns: 20 million normals a second with 20 rounds, 25 with 12,
31 with 8; a call has a fixed cost of about half a millisecond.

Counters. Word 12 of a ChaCha block holds the upper 16 of the row's 48 bits and a 16-bit column
block, word 13 the lower 32 bits of the row, words 14 and 15 the two steps. Steps have 31 bits.
Normals use from < to, numbers for sampling from = to, and table initialisation the reserved pair
2^32 - 1: the three never meet, even under one key.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from dist_dp.kernels import chacha, portable

NAME = "reference (NumPy ChaCha)"

Int64Array = NDArray[np.int64]
Float32Array = NDArray[np.float32]
Float64Array = NDArray[np.float64]

NORMALS_PER_BLOCK = 8
UNIFORMS_PER_BLOCK = 8
UNIFORM_COLUMNS_PER_BLOCK = 16

LARGEST_NORMAL = math.sqrt(2.0 * 65.0 * math.log(2.0))
"""No |z| exceeds this (9.49): the radius uniform is at least 2^-65. Lost mass: 2^-65 a pair."""

_INITIALISATION_STEP = 0xFFFFFFFF
_SETTLE_CHUNK = 1 << 18  # normals made at a time while settling: 1 MiB


def _inputs(
    rows: Int64Array, first_block: int, num_blocks: int, from_steps: Int64Array, to_step: int
) -> chacha.UInt32Array:
    """Words 12..15 for every (row, column block), column block fastest: uint32 [4, n * blocks]."""
    words = np.empty((4, len(rows), num_blocks), np.uint32)
    columns = np.arange(first_block, first_block + num_blocks, dtype=np.int64)
    words[0] = ((rows >> 32) << 16)[:, None] | columns
    words[1] = (rows & 0xFFFFFFFF)[:, None]
    words[2] = from_steps[:, None]
    words[3] = to_step
    return words.reshape(4, -1)


def box_muller(words: chacha.UInt32Array) -> Float32Array:
    """Turn blocks of random words into standard normals.

    Each pair of normals takes four words: 64 bits for the radius r = sqrt(-2 log u) with
    u = (k + 1/2) 2^-64, and 64 bits for the angle: 62 for t in [-pi/4, pi/4), one that exchanges
    sine and cosine, and one sign for both. All in float64, rounded once to float32.

    Args:
        words: uint32 [16, n], as `chacha.blocks` returns them.

    Returns:
        float32 [n, 8]; |z| is at most `LARGEST_NORMAL`.
    """
    uniform = words[1::4].astype(np.float64)
    uniform *= 2.0**32
    uniform += words[0::4].astype(np.float64)
    uniform += 0.5
    uniform *= 2.0**-64
    radius = portable.log(uniform)
    radius *= -2.0
    np.sqrt(radius, out=radius)

    upper = words[3::4]
    angle = (upper << 2).view(np.int32).astype(np.float64)
    angle *= 2.0**32
    angle += words[2::4].astype(np.float64) * 4.0 + 2.0
    angle *= math.pi / 2.0 * 2.0**-64
    sine, cosine = portable.sin_cos(angle)
    exchange = (upper & 0x40000000) != 0
    np.copysign(radius, upper.view(np.int32), out=radius)
    normals = np.empty((words.shape[1], NORMALS_PER_BLOCK), np.float32)
    normals[:, 0::2] = (radius * np.where(exchange, sine, cosine)).T
    normals[:, 1::2] = (radius * np.where(exchange, cosine, sine)).T
    return normals


def _unit_interval(low: chacha.UInt32Array, high: chacha.UInt32Array) -> Float64Array:
    """64 random bits to float64 in (0, 1), rounded to nearest, never 1."""
    values = high.astype(np.float64)
    values *= 2.0**32
    values += low.astype(np.float64)
    values += 0.5
    values *= 2.0**-64
    return np.minimum(values, 1.0 - 2.0**-53)


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
    first_block = column_offset // NORMALS_PER_BLOCK
    num_blocks = (column_offset + num_columns - 1) // NORMALS_PER_BLOCK - first_block + 1
    skip = column_offset - first_block * NORMALS_PER_BLOCK
    step = max(1, chacha.CHUNK_BLOCKS // num_blocks)
    for first in range(0, len(rows), step):
        part = slice(first, first + step)
        inputs = _inputs(rows[part], first_block, num_blocks, from_steps[part], to_step)
        block = box_muller(chacha.blocks(key, inputs, rounds))
        wide = block.reshape(-1, num_blocks * NORMALS_PER_BLOCK)
        output[part] = wide[:, skip : skip + num_columns]
    return output


def uniforms(key: bytes, step: int, count: int, first: int, rounds: int) -> Float64Array:
    """Uniform float64 [count]; see `dist_dp.kernels.uniforms`."""
    if count == 0:
        return np.empty(0, np.float64)
    first_block = first // UNIFORMS_PER_BLOCK
    num_blocks = (first + count - 1) // UNIFORMS_PER_BLOCK - first_block + 1
    rows = np.arange(first_block, first_block + num_blocks, dtype=np.int64)
    steps = np.full(num_blocks, step, np.int64)
    words = chacha.blocks(key, _inputs(rows, 0, 1, steps, step), rounds)
    skip = first - first_block * UNIFORMS_PER_BLOCK
    return _unit_interval(words[0::2], words[1::2]).T.reshape(-1)[skip : skip + count]


def uniform_rows(
    key: bytes,
    rows: Int64Array,
    column_offset: int,
    num_columns: int,
    low: float,
    high: float,
    rounds: int,
) -> Float32Array:
    """Uniform float32 [n, num_columns]; see `dist_dp.kernels.uniform_rows`."""
    output = np.empty((len(rows), num_columns), np.float32)
    if output.size == 0:
        return output
    width = UNIFORM_COLUMNS_PER_BLOCK
    first_block = column_offset // width
    num_blocks = (column_offset + num_columns - 1) // width - first_block + 1
    skip = column_offset - first_block * width
    step = max(1, chacha.CHUNK_BLOCKS // num_blocks)
    for first in range(0, len(rows), step):
        part = slice(first, first + step)
        reserved = np.full(len(rows[part]), _INITIALISATION_STEP, np.int64)
        inputs = _inputs(rows[part], first_block, num_blocks, reserved, _INITIALISATION_STEP)
        values = chacha.blocks(key, inputs, rounds).T.astype(np.float64)
        values += 0.5
        values *= (high - low) * 2.0**-32
        values += low
        output[part] = values.reshape(-1, num_blocks * width)[:, skip : skip + num_columns]
    return np.clip(output, np.float32(low), np.float32(high), out=output)


def _settle(
    part: torch.Tensor,
    rows: Int64Array,
    key: bytes,
    column_offset: int,
    from_steps: Int64Array,
    to_step: int,
    decay: torch.Tensor,
    scale: torch.Tensor,
    rounds: int,
) -> None:
    """part[i] <- decay[i] * part[i] + scale[i] * z(i); a row of scale 0 draws nothing."""
    # three separate operations: a fused multiply-add would round differently on another device
    part.mul_(decay[:, None])
    noisy = np.flatnonzero(scale.cpu().numpy())
    if len(noisy) == 0:
        return
    drawn = normals(
        key, rows[noisy], from_steps[noisy], to_step, column_offset, part.shape[1], rounds
    )
    noise = torch.from_numpy(drawn).to(part.device)
    if len(noisy) == len(rows):
        part.add_(noise.mul_(scale[:, None]))
    else:
        index = torch.from_numpy(noisy).to(part.device)
        part.index_copy_(0, index, part[index] + noise.mul_(scale[index, None]))


def settle_rows(
    weight: torch.Tensor,
    rows: torch.Tensor,
    key: bytes,
    row_offset: int,
    column_offset: int,
    from_steps: torch.Tensor,
    to_step: int,
    decay: torch.Tensor,
    scale: torch.Tensor,
    rounds: int,
) -> None:
    """In place on a list of local rows; see `dist_dp.kernels.settle_rows`."""
    global_rows = rows.cpu().numpy() + row_offset
    steps = from_steps.cpu().numpy().astype(np.int64)
    size = max(1, _SETTLE_CHUNK // max(1, weight.shape[1]))
    for first in range(0, len(global_rows), size):
        chunk = slice(first, first + size)
        part = weight[rows[chunk]]
        _settle(
            part, global_rows[chunk], key, column_offset, steps[chunk], to_step,
            decay[chunk], scale[chunk], rounds,
        )  # fmt: skip
        weight.index_copy_(0, rows[chunk], part)


def settle_range(
    weight: torch.Tensor,
    first_row: int,
    key: bytes,
    row_offset: int,
    column_offset: int,
    from_steps: torch.Tensor,
    to_step: int,
    decay: torch.Tensor,
    scale: torch.Tensor,
    rounds: int,
) -> None:
    """In place on the rows first_row, first_row + 1, …; see `dist_dp.kernels.settle_range`."""
    size = max(1, _SETTLE_CHUNK // max(1, weight.shape[1]))
    for first in range(0, len(from_steps), size):
        chunk = slice(first, first + size)
        steps = from_steps[chunk].cpu().numpy().astype(np.int64)
        start = first_row + first
        rows = np.arange(start, start + len(steps), dtype=np.int64) + row_offset
        _settle(
            weight[start : start + len(steps)], rows, key, column_offset, steps, to_step,
            decay[chunk], scale[chunk], rounds,
        )  # fmt: skip
