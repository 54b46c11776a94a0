"""What turns a million measured steps into a line of a few hundred points, and axes around it."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

MAX_POINTS = 400


def finite_points(x: Array, y: Array) -> tuple[Array, Array]:
    """Keep the points whose both coordinates are finite."""
    keep = np.isfinite(x) & np.isfinite(y)
    return x[keep], y[keep]


def downsample(x: Array, y: Array, limit: int = MAX_POINTS) -> tuple[Array, Array]:
    """Thin a line out to at most ``limit`` points, never losing its first, last, lowest, highest.

    The inner points are cut into equal stretches, and of each its lowest and highest point stay,
    in their order: a spike of one step in a million is still to be seen.

    Args:
        x: Increasing abscissae, [points], finite.
        y: Ordinates, [points], finite.
        limit: Largest number of points returned, at least 4.

    Returns:
        The kept ``(x, y)``, in order.
    """
    n = len(x)
    if n <= limit:
        return x, y
    edges = np.linspace(1, n - 1, (limit - 2) // 2 + 1).astype(np.int64)
    kept = {0, n - 1}
    for start, end in pairwise(edges):
        if end > start:
            kept.add(int(start + np.argmin(y[start:end])))
            kept.add(int(start + np.argmax(y[start:end])))
    index = np.array(sorted(kept))
    return x[index], y[index]


def smooth(y: Array, window: int) -> Array:
    """Centred moving mean over ``window`` points (odd); at the ends, over those that are there."""
    half = window // 2
    if half == 0 or len(y) == 0:
        return y
    sums = np.concatenate([[0.0], np.cumsum(y)])
    start = np.maximum(np.arange(len(y)) - half, 0)
    end = np.minimum(np.arange(len(y)) + half + 1, len(y))
    means: Array = (sums[end] - sums[start]) / (end - start)
    return means


def smoothing_window(n: int) -> int:
    """Odd window of about a thirtieth of ``n`` points; 1, so no smoothing, below 30."""
    return 2 * (n // 60) + 1 if n >= 30 else 1


def linear_ticks(low: float, high: float, target: int = 5) -> list[float]:
    """Round values (1, 2 or 5 times a power of ten apart) inside ``[low, high]``."""
    if not high > low:
        return [low]
    raw = (high - low) / target
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * min((m for m in (1, 2, 5, 10) if m * power >= raw * 0.999), default=10)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten inside ``[low, high]``; with 2 and 5 times them where there are few."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        ticks = [f * 10.0**d for d in decades for f in factors if low <= f * 10.0**d <= high]
        if len(ticks) >= 3:
            break
    while len(ticks) > 7:
        ticks = ticks[::2]
    return ticks
