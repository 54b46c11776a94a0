"""The kernels proper, in Triton: raw blocks, normals, and updates of rows in place.

Shape of the work. A lane is one (row, block of 16 columns) pair, its ChaCha state in registers.
A program has LANES of them: GROUP neighbouring blocks of LANES / GROUP neighbouring rows, with
GROUP the largest power of two that divides the number of blocks, so that no lane idles and rows
are touched in runs of 16 GROUP columns. The 16 numbers of a lane are neighbouring columns, held
by one thread. Memory is accessed as a tile [LANES, 16], for which the compiler picks the widest
coalesced access (16 bytes a thread where strides, offset and width are multiples of 16 elements)
and passes numbers between threads. One warp for 32 lanes: no warp waits for another,
and the second block for far tails is made by one program in 16 (with 128 lanes it would be one in
five).

Scalars that change from call to call have one type and are not specialised, so that one compiled
kernel serves all steps and shards; strides and widths are, because their divisibility decides how
wide accesses are. The key is read from device memory. Addresses are computed in 64 bits.
"""

# Triton reads annotations as strings; the `tl.tensor` ones are for people.
from __future__ import annotations

import triton
import triton.language as tl

from dist_dp.kernels import gpu_words as words
from dist_dp.kernels.reference import GRID_LIMIT

# a name of this module, as every constant that a kernel uses
_ROUNDING = words.ROUNDING
_LIMIT = tl.constexpr(GRID_LIMIT)
_TWO_52 = tl.constexpr(2.0**52)

FLOAT32 = tl.constexpr(0)
BFLOAT16 = tl.constexpr(1)
FLOAT16 = tl.constexpr(2)


@triton.jit(do_not_specialize=["count"])
def blocks_kernel(
    output: tl.tensor,
    counters: tl.tensor,
    key: tl.tensor,
    count: tl.int64,
    ROUNDS: tl.constexpr,
    LANES: tl.constexpr,
) -> None:
    """output int32 [16, count] <- the blocks of counters [4, count], both contiguous."""
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    live = lane < count
    w12 = tl.load(counters + lane, mask=live, other=0).to(tl.uint32)
    w13 = tl.load(counters + count + lane, mask=live, other=0).to(tl.uint32)
    w14 = tl.load(counters + 2 * count + lane, mask=live, other=0).to(tl.uint32)
    w15 = tl.load(counters + 3 * count + lane, mask=live, other=0).to(tl.uint32)
    made = words.block(key, w12, w13, w14, w15, ROUNDS)
    for i in tl.static_range(16):
        tl.store(output + i * count + lane, made[i].to(tl.int32, bitcast=True), mask=live)


@triton.jit
def _pairs(num_groups: tl.tensor, GROUP: tl.constexpr, LANES: tl.constexpr) -> tl.tuple:
    """Which row (int64, counted in the list) and column block (int32) each lane works on."""
    program = tl.program_id(0)
    tile = program // num_groups
    lane = tl.arange(0, LANES)
    index = tile.to(tl.int64) * (LANES // GROUP) + lane // GROUP
    return index, (program - tile * num_groups) * GROUP + lane % GROUP


@triton.jit
def _columns(
    block: tl.tensor, live: tl.tensor, skip: tl.tensor, num_columns: tl.tensor
) -> tl.tuple:
    """Local columns [LANES, 16] of the lanes' blocks, and which of them exist."""
    column = (block * 16)[:, None] + tl.arange(0, 16)[None, :] - skip
    return column, live[:, None] & (column >= 0) & (column < num_columns)


@triton.jit
def _word12(row: tl.tensor, block: tl.tensor) -> tl.tensor:
    return ((row >> 32) << 16).to(tl.uint32) | block.to(tl.uint32)


@triton.jit(
    do_not_specialize=[
        "rows_stride", "steps_stride", "count", "to_step", "first_block", "num_groups",
    ],
    do_not_specialize_on_alignment=["rows", "from_steps", "key"],
)  # fmt: skip
def normals_kernel(
    output: tl.tensor,
    rows: tl.tensor,
    from_steps: tl.tensor,
    key: tl.tensor,
    rows_stride: tl.int64,
    steps_stride: tl.int64,
    count: tl.int64,
    to_step: tl.int64,
    first_block: tl.int32,
    num_groups: tl.int32,
    skip: tl.tensor,
    num_columns: tl.tensor,
    ROUNDS: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
) -> None:
    """output float32 [count, num_columns], contiguous <- normals of the global rows listed.

    `first_block` holds the first column, `skip` columns after its start.
    """
    index, block = _pairs(num_groups, GROUP, LANES)
    live = index < count
    row = tl.load(rows + index * rows_stride, mask=live, other=0).to(tl.int64)
    w14 = tl.load(from_steps + index * steps_stride, mask=live, other=0).to(tl.uint32)
    w15 = tl.zeros_like(w14) + to_step.to(tl.uint32)
    w12 = _word12(row, block + first_block)
    z = words.normals(key, w12, row.to(tl.uint32), w14, w15, ROUNDS)
    column, inside = _columns(block, live, skip, num_columns)
    tl.store(output + (index * num_columns)[:, None] + column, z, mask=inside)


@triton.jit
def _to_nearest_whole(x: tl.tensor) -> tl.tensor:
    """float64 to the nearest whole number, ties to even, keeping the sign of a zero."""
    size = tl.abs(x)
    size = tl.where(size < _TWO_52, (size + _TWO_52) - _TWO_52, size)
    sign = (x.to(tl.int64, bitcast=True) >> 63) << 63
    return (size.to(tl.int64, bitcast=True) | sign).to(tl.float64, bitcast=True)


@triton.jit
def _on_grid(w: tl.tensor, decay: tl.tensor, noise: tl.tensor, spacing: tl.tensor) -> tl.tensor:
    """w <- g (n + rint(r + noise)), where decay w / g = n + r with n whole: one rounding."""
    exact = w.to(tl.float64) * decay.to(tl.float64) / spacing
    whole = _to_nearest_whole(exact)
    steps = whole + _to_nearest_whole((exact - whole) + noise)
    steps = tl.where(steps > _LIMIT, _LIMIT, steps)
    steps = tl.where(steps < -_LIMIT, -_LIMIT, steps)
    # adding 0 turns -0 into 0: the sign of a zero would tell of the weight's
    return (steps * spacing + 0.0).to(tl.float32)


@triton.jit
def _float_of(stored: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """What a weight in memory stands for; halves are loaded as int16."""
    if KIND == BFLOAT16:
        return (stored.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif KIND == FLOAT16:
        return stored.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return stored


@triton.jit
def _nearest(value: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """The pattern of the nearest half, ties to even: int16."""
    if KIND == FLOAT16:
        return value.to(tl.float16).to(tl.int16, bitcast=True)
    else:
        bits = value.to(tl.int32, bitcast=True)
        rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
        rounded = tl.where(value != value, (bits >> 16) | 0x40, rounded)
        return rounded.to(tl.int16)


@triton.jit
def _at_random(value: tl.tensor, random: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """The pattern of a half next to `value`, up with the probability of the part cut off: int16.

    `random` is int32, uniform in [0, 2^16).
    """
    bits = value.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    if KIND == FLOAT16:
        exponent = tl.maximum((size >> 23) - 127, -14)
        # in units of the last place of a half; both steps are exact
        unit = ((137 - exponent) << 23).to(tl.float32, bitcast=True)
        scaled = size.to(tl.float32, bitcast=True) * unit
        whole = scaled.to(tl.int32)
        cut = ((scaled - whole.to(tl.float32)) * 65536.0).to(tl.int32)
        # a carry out of the mantissa raises the exponent, up to infinity
        pattern = ((exponent + 14) << 10) + whole + ((cut + random) >> 16)
        pattern = tl.where(exponent > 15, 0x7C00, pattern)
        pattern = tl.where(size > 0x7F800000, 0x7E00, pattern)
        return (((bits >> 16) & 0x8000) | pattern).to(tl.int16)
    else:
        pattern = tl.where(size < 0x7F800000, bits + random, bits) >> 16
        pattern = tl.where(size > 0x7F800000, pattern | 0x40, pattern)
        return pattern.to(tl.int16)


@triton.jit(
    do_not_specialize=[
        "rows_stride", "steps_stride", "decay_stride", "scale_stride", "first_row", "count",
        "row_offset", "to_step", "first_block", "num_groups", "spacing",
    ],
    do_not_specialize_on_alignment=["rows", "from_steps", "decays", "scales", "key"],
)  # fmt: skip
def settle_kernel(
    weight: tl.tensor,
    rows: tl.tensor,
    from_steps: tl.tensor,
    decays: tl.tensor,
    scales: tl.tensor,
    key: tl.tensor,
    rows_stride: tl.int64,
    steps_stride: tl.int64,
    decay_stride: tl.int64,
    scale_stride: tl.int64,
    first_row: tl.int64,
    count: tl.int64,
    row_offset: tl.int64,
    to_step: tl.int64,
    first_block: tl.int32,
    num_groups: tl.int32,
    spacing: tl.float64,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    skip: tl.tensor,
    num_columns: tl.tensor,
    LISTED: tl.constexpr,
    KIND: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ON_GRID: tl.constexpr,
    ROUNDS: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
) -> None:
    """weight[r] <- decay weight[r] + scale z, in place; see `dist_dp.kernels.request.Update`.

    `rows` is read if `LISTED`. `spacing` is that of the grid. `first_block` holds the shard's
    first column, `skip` columns after its start.
    """
    index, block = _pairs(num_groups, GROUP, LANES)
    live = index < count
    if LISTED:
        local = tl.load(rows + index * rows_stride, mask=live, other=0).to(tl.int64)
    else:
        local = first_row + index
    decay = tl.load(decays + index * decay_stride, mask=live, other=0.0).to(tl.float32)
    given = tl.load(scales + index * scale_stride, mask=live, other=0.0)
    scale = given.to(tl.float32)
    # rounding never weakens noise
    low = scale.to(tl.float64) < given.to(tl.float64)
    scale = (scale.to(tl.int32, bitcast=True) + low.to(tl.int32)).to(tl.float32, bitcast=True)

    column, inside = _columns(block, live, skip, num_columns)
    place = weight + (local * row_stride)[:, None] + column.to(tl.int64) * column_stride
    stored = tl.load(place, mask=inside, other=0)
    kept = _float_of(stored, KIND) * decay[:, None]
    noisy = (scale > 0.0)[:, None]

    row = local + row_offset
    w12 = _word12(row, block + first_block)
    w13 = row.to(tl.uint32)
    w14 = tl.load(from_steps + index * steps_stride, mask=live, other=0).to(tl.uint32)
    w15 = tl.zeros_like(w14) + to_step.to(tl.uint32)
    anything = tl.max(scale) > 0.0
    if ON_GRID:
        noise = tl.zeros((LANES, 16), tl.float64)
        if anything:
            z = words.wide_normals(key, w12, w13, w14, w15, ROUNDS)
            noise = z * (scale.to(tl.float64) / spacing)[:, None]
        noise = tl.where(noisy, noise, 0.0)
        result = _on_grid(stored, decay[:, None], noise, spacing)
        tl.store(place, result, mask=inside)
    else:
        result = kept
        if anything:
            z = words.normals(key, w12, w13, w14, w15, ROUNDS)
            result = tl.where(noisy, kept + z * scale[:, None], kept)
        if KIND == FLOAT32:
            tl.store(place, result, mask=inside)
        else:
            pattern = _nearest(result, KIND)
            if STOCHASTIC:  # noqa: SIM102 - known when compiling; the next one when running
                if anything:
                    x0, x1, x2, x3, x4, x5, x6, x7, _8, _9, _10, _11, _12, _13, _14, _15 = (
                        words.block(key, w12 | _ROUNDING, w13, w14, w15, ROUNDS)
                    )
                    bits = words.eight(x0, x1, x2, x3, x4, x5, x6, x7)
                    random = words.interleave(bits & 0xFFFF, bits >> 16).to(tl.int32, bitcast=True)
                    pattern = tl.where(noisy, _at_random(result, random, KIND), pattern)
            tl.store(place, pattern, mask=inside)
