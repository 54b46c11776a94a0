"""Logarithm, sine and cosine from additions, products and quotients alone; and the fused product.

IEEE 754 fixes the result of these operations and of the square root, but not of `log` or `sin`,
whose last bit differs between processors and libraries. Noise and sampling must come out the same
on every machine of a cluster, so they use the functions here. Each step is one NumPy call, which
leaves a compiler nothing to contract into a fused multiply-add.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Float32Array = NDArray[np.float32]
Float64Array = NDArray[np.float64]

LN2_HIGH = float.fromhex("0x1.62e42fefa3800p-1")  # 11 low bits zero: exact times any exponent
LN2_LOW = float.fromhex("0x1.ef35793c76730p-45")
SQRT_HALF_BITS = 0x3FE6A09E00000000
# atanh(s) = s + s^3/3 + s^5/5 + ...; |s| <= 0.1716 leaves less than 2^-62 behind the last term
ATANH = [1.0 / (2 * k + 1) for k in range(11, 0, -1)]
# Taylor coefficients in t^2; |t| <= pi/4 leaves less than 2^-60 behind the last term
SIN = [(-1.0) ** k / math.factorial(2 * k + 1) for k in range(8, 0, -1)]
COS = [(-1.0) ** k / math.factorial(2 * k) for k in range(9, 0, -1)]


def _polynomial(x: Float64Array, coefficients: list[float]) -> Float64Array:
    """Horner's rule without a constant term: c[-1] x + c[-2] x^2 + and so on."""
    total = x * coefficients[0]
    for coefficient in coefficients[1:]:
        total += coefficient
        total *= x
    return total


def log(x: Float64Array) -> Float64Array:
    """Natural logarithm of positive normal float64 numbers.

    Error at most 2 units in the last place (tested against 40 digits).
    """
    bits = x.view(np.int64)
    exponent = bits - SQRT_HALF_BITS
    exponent >>= 52
    mantissa = (bits - (exponent << 52)).view(np.float64)  # in [sqrt(1/2), sqrt(2))
    numerator = mantissa - 1.0
    s = numerator / (mantissa + 1.0)
    # log m = 2 atanh(s) = f - s f + 2 s p with f = m - 1, p = atanh(s)/s - 1, since 2 s = f - s f;
    # f is exact, so only the small terms round
    correction = _polynomial(s * s, ATANH)
    correction *= 2.0
    correction -= numerator
    correction *= s
    power = exponent.astype(np.float64)
    correction += power * LN2_LOW
    numerator += correction
    power *= LN2_HIGH
    power += numerator
    return power


def log_complement(probability: float) -> float:
    """log(1 - p) for 0 < p < 1, also where 1 - p would round to 1."""
    return float(log_complements(np.array([probability]))[0])


def log_complements(probabilities: Float64Array) -> Float64Array:
    """log(1 - p) of many, each 0 < p < 1; see `log_complement`."""
    s = probabilities / (2.0 - probabilities)  # log(1 - p) = -2 atanh(p / (2 - p))
    tail = _polynomial(s * s, ATANH)
    tail += 1.0
    tail *= -2.0 * s
    large = probabilities >= 0.25
    tail[large] = log(1.0 - probabilities[large])
    return tail


def sin_cos(t: Float64Array) -> tuple[Float64Array, Float64Array]:
    """Sine and cosine for |t| <= pi/4, in radians; error at most 2 units in the last place."""
    square = t * t
    sine = _polynomial(square, SIN)
    sine *= t
    sine += t
    cosine = _polynomial(square, COS)
    cosine += 1.0
    return sine, cosine


def fma(a: Float32Array, b: Float32Array, c: Float32Array | np.float32) -> Float32Array:
    """a * b + c in float32 with one rounding, as processors' fused multiply-add.

    The product is exact in float64. The sum is rounded there and again to float32; that differs
    from one rounding only where the first one ends exactly half-way between two float32 numbers,
    which is put right. Arguments whose results leave float32's normal range are not foreseen.
    """
    product = a.astype(np.float64)
    product *= b
    total = product + c
    half_way = (total.view(np.int64) & 0x1FFFFFFF) == 0x10000000
    if half_way.any():
        at = np.nonzero(half_way)
        left = product[at]
        right = np.broadcast_to(np.float64(c), total.shape)[at]
        rounded = total[at]
        back = rounded - left  # what rounding lost (Knuth's two-sum)
        lost = (left - (rounded - back)) + (right - back)
        toward = np.where(lost > 0, np.inf, -np.inf)
        total[at] = np.where(lost == 0, rounded, np.nextafter(rounded, toward))
    return total.astype(np.float32)
