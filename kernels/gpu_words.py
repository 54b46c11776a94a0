"""ChaCha and the normals in Triton: functions for kernels, over tensors with one block a lane.

The same operations in the same order as `chacha`, `box_muller` and `portable`, which explain
them; constants are taken from there. A fused multiply-add is written `tl.fma`, and kernels are
compiled with `enable_fp_fusion=False`, so that the compiler makes no others.
"""

# Triton reads annotations as strings; the `tl.tensor` ones are for people.
from __future__ import annotations

import math

import triton
import triton.language as tl

from dist_dp.kernels import box_muller, chacha, portable, reference

_CONSTANTS = tl.constexpr(tuple(int(word) for word in chacha.CONSTANTS))

TAIL = tl.constexpr(reference.TAIL << 13)
WIDE_LOW = tl.constexpr(reference.WIDE_LOW << 13)
WIDE_HIGH = tl.constexpr(reference.WIDE_HIGH << 13)
ROUNDING = tl.constexpr(reference.ROUNDING << 13)

_TAIL_BELOW = tl.constexpr(box_muller.TAIL_BELOW)
_SQRT_HALF_BITS = tl.constexpr(int(box_muller.SQRT_HALF_BITS))
_MINUS_TWO_LN2 = tl.constexpr(float(box_muller.MINUS_TWO_LN2))
_SIN_HIGH = tl.constexpr(float(box_muller.SIN_HIGH))
_LOG = tl.constexpr(tuple(float(c) for c in reversed(box_muller.LOG)))
_SIN = tl.constexpr(tuple(float(c) for c in reversed(box_muller.SIN)))
_COS = tl.constexpr(tuple(float(c) for c in reversed(box_muller.COS)))

_WIDE_SQRT_HALF_BITS = tl.constexpr(portable.SQRT_HALF_BITS)
_LN2_HIGH = tl.constexpr(portable.LN2_HIGH)
_LN2_LOW = tl.constexpr(portable.LN2_LOW)
_WIDE_ATANH = tl.constexpr(tuple(portable.ATANH))
_WIDE_SIN = tl.constexpr(tuple(portable.SIN))
_WIDE_COS = tl.constexpr(tuple(portable.COS))
_WIDE_ANGLE = tl.constexpr(math.pi / 2.0 * 2.0**-64)

_TWO_M31 = tl.constexpr(2.0**-31)
_TWO_M32 = tl.constexpr(2.0**-32)
_TWO_M64 = tl.constexpr(2.0**-64)
_TWO_32 = tl.constexpr(2.0**32)


@triton.jit
def _rotate(x: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    return (x << BITS) | (x >> (32 - BITS))


@triton.jit
def _quarter_round(a: tl.tensor, b: tl.tensor, c: tl.tensor, d: tl.tensor) -> tl.tuple:
    a = a + b
    d = _rotate(d ^ a, 16)
    c = c + d
    b = _rotate(b ^ c, 12)
    a = a + b
    d = _rotate(d ^ a, 8)
    c = c + d
    b = _rotate(b ^ c, 7)
    return a, b, c, d


@triton.jit
def block(
    key: tl.tensor,
    w12: tl.tensor,
    w13: tl.tensor,
    w14: tl.tensor,
    w15: tl.tensor,
    ROUNDS: tl.constexpr,
) -> tl.tuple:
    """The 16 words of one ChaCha block a lane.

    Args:
        key: pointer to the key's 8 words, int32.
        w12: input words 12, uint32 [LANES].
        w13: input words 13, likewise.
        w14: input words 14, likewise.
        w15: input words 15, likewise.
        ROUNDS: 20, 12 or 8.

    Returns:
        Sixteen tensors uint32 [LANES].
    """
    zero = tl.zeros_like(w12)
    c0 = zero + _CONSTANTS[0]
    c1 = zero + _CONSTANTS[1]
    c2 = zero + _CONSTANTS[2]
    c3 = zero + _CONSTANTS[3]
    k0 = zero + tl.load(key).to(tl.uint32, bitcast=True)
    k1 = zero + tl.load(key + 1).to(tl.uint32, bitcast=True)
    k2 = zero + tl.load(key + 2).to(tl.uint32, bitcast=True)
    k3 = zero + tl.load(key + 3).to(tl.uint32, bitcast=True)
    k4 = zero + tl.load(key + 4).to(tl.uint32, bitcast=True)
    k5 = zero + tl.load(key + 5).to(tl.uint32, bitcast=True)
    k6 = zero + tl.load(key + 6).to(tl.uint32, bitcast=True)
    k7 = zero + tl.load(key + 7).to(tl.uint32, bitcast=True)
    x0, x1, x2, x3 = c0, c1, c2, c3
    x4, x5, x6, x7 = k0, k1, k2, k3
    x8, x9, x10, x11 = k4, k5, k6, k7
    x12, x13, x14, x15 = w12, w13, w14, w15
    for _ in range(ROUNDS // 2):
        x0, x4, x8, x12 = _quarter_round(x0, x4, x8, x12)
        x1, x5, x9, x13 = _quarter_round(x1, x5, x9, x13)
        x2, x6, x10, x14 = _quarter_round(x2, x6, x10, x14)
        x3, x7, x11, x15 = _quarter_round(x3, x7, x11, x15)
        x0, x5, x10, x15 = _quarter_round(x0, x5, x10, x15)
        x1, x6, x11, x12 = _quarter_round(x1, x6, x11, x12)
        x2, x7, x8, x13 = _quarter_round(x2, x7, x8, x13)
        x3, x4, x9, x14 = _quarter_round(x3, x4, x9, x14)
    return (
        x0 + c0, x1 + c1, x2 + c2, x3 + c3, x4 + k0, x5 + k1, x6 + k2, x7 + k3,
        x8 + k4, x9 + k5, x10 + k6, x11 + k7, x12 + w12, x13 + w13, x14 + w14, x15 + w15,
    )  # fmt: skip


@triton.jit
def eight(
    x0: tl.tensor,
    x1: tl.tensor,
    x2: tl.tensor,
    x3: tl.tensor,
    x4: tl.tensor,
    x5: tl.tensor,
    x6: tl.tensor,
    x7: tl.tensor,
) -> tl.tensor:
    """Eight tensors [LANES] as the columns of one [LANES, 8]; no number moves to another lane."""
    even = tl.join(tl.join(x0, x4), tl.join(x2, x6))
    odd = tl.join(tl.join(x1, x5), tl.join(x3, x7))
    return tl.reshape(tl.join(even, odd), (x0.shape[0], 8))


@triton.jit
def interleave(even: tl.tensor, odd: tl.tensor) -> tl.tensor:
    """Two tensors [LANES, 8] as the even and odd columns of one [LANES, 16]."""
    return tl.reshape(tl.join(even, odd), (even.shape[0], 16))


@triton.jit
def _lengths(upper: tl.tensor, near: tl.tensor) -> tl.tensor:
    """sqrt(-2 log u), where u is `near` away from 1 (`upper`) or from 0."""
    u = tl.where(upper, 1.0 - near, near)
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - _SQRT_HALF_BITS) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    f = tl.where(exponent == 0, 0.0 - near, f)
    square = f * f
    total = tl.fma(f, _LOG[0], _LOG[1])
    for i in tl.static_range(2, 8):
        total = tl.fma(total, f, _LOG[i])
    result = tl.fma(square * f, total, square)
    result = tl.fma(f, -2.0, result)
    result = tl.fma(exponent.to(tl.float32), _MINUS_TWO_LN2, result)
    return tl.sqrt_rn(result)


@triton.jit
def _directions(words: tl.tensor) -> tl.tuple:
    """A point of the unit circle, without the sign that both coordinates share."""
    x = ((words << 2) | 2).to(tl.int32, bitcast=True).to(tl.float32) * _TWO_M31
    y = x * x
    sine = tl.fma(y, _SIN[0], _SIN[1])
    cosine = tl.fma(y, _COS[0], _COS[1])
    for i in tl.static_range(2, 4):
        sine = tl.fma(sine, y, _SIN[i])
        cosine = tl.fma(cosine, y, _COS[i])
    sine = tl.fma(x, _SIN_HIGH, x * sine)
    cosine = tl.fma(cosine, y, 1.0)
    exchange = (words & 0x40000000) != 0
    return tl.where(exchange, sine, cosine), tl.where(exchange, cosine, sine)


@triton.jit
def normals(
    key: tl.tensor,
    w12: tl.tensor,
    w13: tl.tensor,
    w14: tl.tensor,
    w15: tl.tensor,
    ROUNDS: tl.constexpr,
) -> tl.tensor:
    """Standard normals float32 [LANES, 16]; arguments as for `block`, with domain 0."""
    x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15 = block(
        key, w12, w13, w14, w15, ROUNDS
    )
    radius = eight(x0, x2, x4, x6, x8, x10, x12, x14)
    angle = eight(x1, x3, x5, x7, x9, x11, x13, x15)
    signed = radius.to(tl.int32, bitcast=True)
    near = ((signed ^ (signed >> 31)) | 1).to(tl.float32) * _TWO_M32
    # rare: a second block for all lanes where one word of them needs it
    if tl.min(radius) < _TAIL_BELOW:
        y0, _1, y2, _3, y4, _5, y6, _7, y8, _9, y10, _11, y12, _13, y14, _15 = block(
            key, w12 | TAIL, w13, w14, w15, ROUNDS
        )
        extra = eight(y0, y2, y4, y6, y8, y10, y12, y14)
        long = (radius.to(tl.int64) << 32) | extra.to(tl.int64) | 1
        refined = (long.to(tl.float64) * _TWO_M64).to(tl.float32)
        near = tl.where(radius < _TAIL_BELOW, refined, near)
    length = _lengths(signed < 0, near)
    length = tl.where(angle >= 0x80000000, 0.0 - length, length)
    first, second = _directions(angle)
    return interleave(length * first, length * second)


@triton.jit
def _wide_log(x: tl.tensor) -> tl.tensor:
    """`portable.log`."""
    bits = x.to(tl.int64, bitcast=True)
    exponent = (bits - _WIDE_SQRT_HALF_BITS) >> 52
    mantissa = (bits - (exponent << 52)).to(tl.float64, bitcast=True)
    f = mantissa - 1.0
    s = f / (mantissa + 1.0)
    y = s * s
    total = y * _WIDE_ATANH[0]
    for i in tl.static_range(1, 11):
        total = (total + _WIDE_ATANH[i]) * y
    power = exponent.to(tl.float64)
    correction = (total * 2.0 - f) * s + power * _LN2_LOW
    return power * _LN2_HIGH + (f + correction)


@triton.jit
def wide_normals(
    key: tl.tensor,
    w12: tl.tensor,
    w13: tl.tensor,
    w14: tl.tensor,
    w15: tl.tensor,
    ROUNDS: tl.constexpr,
) -> tl.tensor:
    """Standard normals float64 [LANES, 16], from two blocks; arguments as for `normals`."""
    a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15 = block(
        key, w12 | WIDE_LOW, w13, w14, w15, ROUNDS
    )
    b0, b1, b2, b3, b4, b5, b6, b7, b8, b9, b10, b11, b12, b13, b14, b15 = block(
        key, w12 | WIDE_HIGH, w13, w14, w15, ROUNDS
    )
    low = eight(a0, a4, a8, a12, b0, b4, b8, b12)
    high = eight(a1, a5, a9, a13, b1, b5, b9, b13)
    angle = eight(a2, a6, a10, a14, b2, b6, b10, b14)
    upper = eight(a3, a7, a11, a15, b3, b7, b11, b15)

    u = (high.to(tl.float64) * _TWO_32 + low.to(tl.float64) + 0.5) * _TWO_M64
    length = tl.sqrt(_wide_log(u) * -2.0)
    length = tl.where(upper >= 0x80000000, 0.0 - length, length)
    t = (upper << 2).to(tl.int32, bitcast=True).to(tl.float64) * _TWO_32
    t = (t + (angle.to(tl.float64) * 4.0 + 2.0)) * _WIDE_ANGLE
    y = t * t
    sine = y * _WIDE_SIN[0]
    for i in tl.static_range(1, 8):
        sine = (sine + _WIDE_SIN[i]) * y
    sine = sine * t + t
    cosine = y * _WIDE_COS[0]
    for i in tl.static_range(1, 9):
        cosine = (cosine + _WIDE_COS[i]) * y
    cosine = cosine + 1.0
    exchange = (upper & 0x40000000) != 0
    first = length * tl.where(exchange, sine, cosine)
    second = length * tl.where(exchange, cosine, sine)
    return interleave(first, second)
