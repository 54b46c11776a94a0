"""The transform of random words to normals in float64, to measure the float32 one by."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from dist_dp.kernels import box_muller

Float64Array = NDArray[np.float64]

WORST_NORMAL = 5.24
"""No normal is off by more units in its last place (test_accuracy.py says why)."""


def exact_lengths(words: NDArray[np.uint32], extra: NDArray[np.uint32]) -> Float64Array:
    """sqrt(-2 log u) in float64; its errors are below 10^-7 units of float32's last place."""
    upper = words >= 2**31
    tail = words < box_muller.TAIL_BELOW
    near = (np.where(upper, ~words, words) | np.uint32(1)).astype(np.float64) * 2.0**-32
    long = ((words.astype(np.uint64) << np.uint64(32)) | extra) | np.uint64(1)
    near[tail] = long[tail].astype(np.float64) * 2.0**-64
    result: Float64Array = np.sqrt(-2.0 * np.where(upper, np.log1p(-near), np.log(near)))
    return result


def exact_directions(words: NDArray[np.uint32]) -> tuple[Float64Array, Float64Array]:
    """The point of the unit circle in float64."""
    angle = ((words << np.uint32(2)) | np.uint32(2)).view(np.int32) * (math.pi / 4 * 2.0**-31)
    sign = np.where(words >= 2**31, -1.0, 1.0)
    sine, cosine = sign * np.sin(angle), sign * np.cos(angle)
    exchange = (words & np.uint32(0x40000000)) != 0
    return np.where(exchange, sine, cosine), np.where(exchange, cosine, sine)


def exact_normals(words: NDArray[np.uint32], extra: NDArray[np.uint32]) -> Float64Array:
    """Like `box_muller.normals` in float64: [n, 16] of blocks [16, n]."""
    length = exact_lengths(words[0::2], extra[0::2])
    first, second = exact_directions(words[1::2])
    return np.stack([length * first, length * second], 1).reshape(16, -1).T


def ulps(values: NDArray[np.float32], exact: Float64Array) -> Float64Array:
    """Errors in units of the exact value's last place in float32."""
    unit = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
    return np.abs(values.astype(np.float64) - exact) / unit
