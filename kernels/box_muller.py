"""Random words to standard normals: the transform, in NumPy, as every implementation does it.

Two 32-bit words make two normals, r cos t and r sin t (Box and Muller 1958): the first word the
length r = sqrt(-2 log u), the second the angle t. All arithmetic is float32, each operation
rounded as IEEE 754 says, so that AVX-512, AVX2, plain C++, NumPy and a GPU give the same bits.

Length. u = m 2^-32 with m the word made odd: symmetric, never 0 or 1, and 1 - u is as exact as u.
Where the leading 12 bits are zero, 32 bits more from a block of their own extend m to 64 bits, so
u always has at least 20 significant bits and steps between lengths stay below float32's own.
|z| reaches 9.42; the mass beyond is 2^-64 for each pair.

Angle. 30 bits place x in (-1, 1), a quarter of the circle; one bit exchanges sine and cosine and
one is the sign of both. Small angles keep their relative precision.

Accuracy, against the transform in real arithmetic of the same bits: 99.9 % of normals are within
2.3 units in the last place, the worst one found within 4.7, none can be further than 5.3 (over all
words: lengths 2.25, directions 1.34; `tests/kernels/test_accuracy.py`). The polynomials are
minimax fits, made for these intervals and rounded coefficient by coefficient; their relative
errors are 2^-27 (log), 2^-28 (sin) and 2^-31 (cos).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from dist_dp.kernels.portable import Float64Array, fma, log, sin_cos

UInt32Array = NDArray[np.uint32]
Float32Array = NDArray[np.float32]

NORMALS_PER_BLOCK = 16
WIDE_NORMALS_PER_BLOCK = 8

TAIL_BELOW = 1 << 20
"""Length words below this are extended by 32 bits."""

LARGEST_NORMAL = math.sqrt(2.0 * 64.0 * math.log(2.0))
"""No |z| exceeds this (9.42): u is at least 2^-64. Lost mass: 2^-64 a pair."""


def _constants(*values: str) -> list[np.float32]:
    return [np.float32(float.fromhex(value)) for value in values]


# -2 log(1 + f) = -2 f + f^2 + f^3 P(f) for sqrt(1/2) <= 1 + f <= sqrt(2); constant term first
LOG = _constants(
    "-0x1.555554p-1", "0x1.000226p-1", "-0x1.99a01cp-2", "0x1.54728ap-2",
    "-0x1.22d930p-2", "0x1.0d8246p-2", "-0x1.055eaep-2", "0x1.38c974p-3",
)  # fmt: skip
(MINUS_TWO_LN2,) = _constants("-0x1.62e430p+0")
# sin(pi/4 x) = x (high + S(x^2)) and cos(pi/4 x) = 1 + x^2 C(x^2); S starts with the low part of
# pi/4
(SIN_HIGH,) = _constants("0x1.921fb6p-1")
SIN = _constants("-0x1.a32bdep-26", "-0x1.4abbbap-4", "0x1.465eeap-9", "-0x1.2da156p-15")
COS = _constants("-0x1.3bd3ccp-2", "0x1.03c1b0p-6", "-0x1.55b2b4p-12", "0x1.d4f632p-19")

SQRT_HALF_BITS = np.int32(0x3F3504F3)


def _polynomial(coefficients: list[np.float32], x: Float32Array) -> Float32Array:
    total = np.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        total = fma(total, x, coefficient)
    return total


def lengths(words: UInt32Array, extra: UInt32Array) -> Float32Array:
    """sqrt(-2 log u) of one 32-bit word each.

    Args:
        words: uint32, any shape.
        extra: uint32 of the same shape; looked at only where a word is below `TAIL_BELOW`.

    Returns:
        float32 of the same shape, at most `LARGEST_NORMAL`.
    """
    upper = (words >> 31).astype(bool)
    # the distance of u to the nearer end of (0, 1): an odd number of at most 31 bits
    odd = np.where(upper, ~words, words) | np.uint32(1)
    near = odd.view(np.int32).astype(np.float32) * np.float32(2.0**-32)
    long = ((words.astype(np.uint64) << np.uint64(32)) | extra) | np.uint64(1)
    tail = words < TAIL_BELOW
    near[tail] = (long[tail].astype(np.float64) * 2.0**-64).astype(np.float32)
    u = np.where(upper, np.float32(1.0) - near, near)
    exponent = (u.view(np.int32) - SQRT_HALF_BITS) >> 23
    f = (u.view(np.int32) - (exponent << 23)).view(np.float32) - np.float32(1.0)
    f = np.where(exponent == 0, -near, f)  # near 1, u itself has lost bits
    square = f * f
    result = fma(square * f, _polynomial(LOG, f), square)
    result = fma(np.full_like(f, -2.0), f, result)
    result = fma(exponent.astype(np.float32), np.full_like(f, MINUS_TWO_LN2), result)
    return np.sqrt(result)


def directions(words: UInt32Array) -> tuple[Float32Array, Float32Array]:
    """A point of the unit circle for one 32-bit word each: float32, shaped like `words`."""
    quarter = ((words << np.uint32(2)) | np.uint32(2)).view(np.int32)
    x = quarter.astype(np.float32) * np.float32(2.0**-31)
    y = x * x
    sine = fma(x, np.full_like(x, SIN_HIGH), x * _polynomial(SIN, y))
    cosine = fma(y, _polynomial(COS, y), np.float32(1.0))
    exchange = (words & np.uint32(0x40000000)) != 0
    sign = np.where(words >> 31, np.float32(-1.0), np.float32(1.0))
    return sign * np.where(exchange, sine, cosine), sign * np.where(exchange, cosine, sine)


def normals(words: UInt32Array, extra: UInt32Array) -> Float32Array:
    """Turn blocks of random words into standard normals.

    Args:
        words: uint32 [16, n], as `chacha.blocks` returns them: the even words are lengths, the
            odd ones angles.
        extra: uint32 [16, n], the blocks that extend `words`.

    Returns:
        float32 [n, 16]; |z| is at most `LARGEST_NORMAL`.
    """
    length = lengths(words[0::2], extra[0::2])
    first, second = directions(words[1::2])
    result = np.empty((words.shape[1], NORMALS_PER_BLOCK), np.float32)
    result[:, 0::2] = (length * first).T
    result[:, 1::2] = (length * second).T
    return result


def wide_normals(words: UInt32Array) -> Float64Array:
    """Normals in float64, of 128 bits a pair, for weights on a grid.

    Four words make a pair: 64 bits for u = (k + 1/2) 2^-64, and 64 for the angle: 62 for t in
    [-pi/4, pi/4), one that exchanges, one sign for both.

    Args:
        words: uint32 [16, n], as `chacha.blocks` returns them.

    Returns:
        float64 [n, 8]; |z| is at most 9.50.
    """
    uniform = words[1::4].astype(np.float64)
    uniform *= 2.0**32
    uniform += words[0::4].astype(np.float64)
    uniform += 0.5
    uniform *= 2.0**-64
    length = log(uniform)
    length *= -2.0
    np.sqrt(length, out=length)

    upper = words[3::4]
    angle = (upper << 2).view(np.int32).astype(np.float64)
    angle *= 2.0**32
    angle += words[2::4].astype(np.float64) * 4.0 + 2.0
    angle *= math.pi / 2.0 * 2.0**-64
    sine, cosine = sin_cos(angle)
    exchange = (upper & 0x40000000) != 0
    np.copysign(length, upper.view(np.int32), out=length)
    result = np.empty((words.shape[1], WIDE_NORMALS_PER_BLOCK), np.float64)
    result[:, 0::2] = (length * np.where(exchange, sine, cosine)).T
    result[:, 1::2] = (length * np.where(exchange, cosine, sine)).T
    return result
