"""The privacy loss of selecting many items, one after another, each by an exponential mechanism.

A mechanism has an ε₀-bounded range if, for any two neighbouring data sets, the log of the ratio of
its probabilities varies over outcomes by ε₀ at most: it lies in [t - ε₀, t] for some t in [0, ε₀],
which may be another for every pair (Durfee and Rogers 2019; Dong, Durfee and Rogers 2020, "Optimal
differential privacy composition for exponential mechanisms"). An exponential mechanism with
probabilities in proportion to exp(ε₀ · count) is such a one where one unit more changes all counts
in one direction, each by 1 at most. That says more than (ε₀, 0), which allows a range of 2 ε₀: the
variance of the loss is at most ε₀²/4, and not ε₀².
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float64Array = NDArray[np.float64]

_CELLS = 16  # of the grid in ε₀: the variance of the loss grows by less than 1 %
_WIDEST_CELL = 0.05
_LONGEST_BLOCK = 64
_MOST_CELLS = 1024  # of a block's largest loss, so that few selections have a finer grid
_LARGEST_EPSILON = 20.0


def worst_profile(epsilon: Any, epsilon0: float) -> Float64Array:
    """The largest δ(ε) of any mechanism with an ε₀-bounded range, in closed form.

    For one t the worst is the two-point mechanism with losses t and t - ε₀; the supremum over t is
    (1 - exp((ε - ε₀)/2))² / (1 - exp(-ε₀)) for ε between -ε₀ and ε₀, reached at t = (ε + ε₀)/2.
    """
    epsilon = np.asarray(epsilon, dtype=np.float64)
    inside = np.expm1((np.clip(epsilon, -epsilon0, epsilon0) - epsilon0) / 2) ** 2
    found = inside / -math.expm1(-epsilon0)
    certain = -np.expm1(np.minimum(epsilon, 0.0))
    result: Float64Array = np.where(epsilon < -epsilon0, certain, found)
    return result


def profiles(epsilon0: float, most: int, cells: int) -> list[Float64Array]:
    """Bounds of δ(ε) after 0, 1, … ``most`` selections, each chosen in the light of those before.

    Guarantee:
        Entry j is no less than the δ of any adaptive composition of j mechanisms with an
        ε₀-bounded range, at ε = -``most`` ε₀ … ``most`` ε₀ in steps of ε₀ / ``cells``; and so is,
        between these points, the chord over e^ε. For j selections,

            δⱼ(ε) = sup over t of  p δⱼ₋₁(ε - t) + (1 - p) δⱼ₋₁(ε - t + ε₀),

        p being the probability of the loss t: given what came first, the rest is one of j - 1
        selections, and x δⱼ₋₁(ε - log x) is convex in x, so the extreme losses are the worst. A
        chord lies above a convex function, and its supremum over t within a cell is in closed form.
        The set of pairs is closed under exchange, so the bound holds for a unit more as for one
        less. Rounding of float64 aside.
    """
    h = epsilon0 / cells
    end = most * cells
    index = np.arange(-end, end + 1)
    least = np.maximum(0.0, -np.expm1(index * h))
    found = [least]
    for _ in range(most):
        # Beyond the grid: certain, or impossible.
        below = -np.expm1(np.arange(-end - cells - 1, -end) * h)
        wide = np.concatenate([below, found[-1], np.zeros(cells + 1)])
        found.append(np.maximum(least, _one_more(wide, epsilon0, cells)))
    return found


def _one_more(wide: Float64Array, epsilon0: float, cells: int) -> Float64Array:
    """The supremum over t at every point, of what is given with ``cells + 1`` points more around.

    In the cell where t = (c+1) h - s, s in [0, h], the function is A e^s + B e^-s + constant.
    """
    h = epsilon0 / cells
    size = len(wide) - 2 * cells - 2
    width = -math.expm1(-epsilon0)
    best = np.zeros(size)
    ends = np.array([0.0, h])

    def at(shift: int) -> Float64Array:
        return wide[cells + 1 + shift : cells + 1 + shift + size]

    for c in range(cells):
        far, near = at(-c - 1), at(-c - 1 + cells)
        far_slope = (at(-c) - far) / math.expm1(h)
        near_slope = (at(-c + cells) - near) / math.expm1(h)
        rising = far_slope - near_slope * math.exp(-epsilon0)
        falling = math.exp((c + 1) * h - epsilon0) * (far_slope - far + near - near_slope)
        with np.errstate(divide="ignore", invalid="ignore"):
            turning = np.log(falling / rising) / 2
        for s in (*ends, np.where(np.isfinite(turning), turning, 0.0).clip(0.0, h)):
            probability = -np.expm1((c + 1) * h - s - epsilon0) / width
            rise = np.expm1(s)
            value = probability * (far + far_slope * rise)
            value += (1 - probability) * (near + near_slope * rise)
            np.maximum(best, value, out=best)
    return np.minimum(best, 1.0)


def selections_pld(epsilon0: float, selections: int, interval: float) -> Any:
    """A privacy loss distribution that dominates ``selections`` selections, on a grid.

    Guarantee:
        Its δ(ε) bounds that of any adaptive composition of so many mechanisms with an ε₀-bounded
        range, alone and composed with others. Up to 64 of them go by `profiles`, which allows for
        the worst; such blocks are composed by ``dp_accounting`` on a grid that is fine against ε₀,
        and only the result is put on the grid of ``interval`` (connecting the dots): a grid that
        is coarse against ε₀ would cost a multiple.
    """
    from dp_accounting.pld import common, pld_pmf, privacy_loss_distribution

    if epsilon0 > _LARGEST_EPSILON:
        # Hopeless as a guarantee; (kε₀, 0) bounds it.
        return privacy_loss_distribution.from_privacy_parameters(
            common.DifferentialPrivacyParameters(epsilon0 * selections, 0.0),
            value_discretization_interval=interval,
        )
    cells = max(_CELLS, math.ceil(epsilon0 / _WIDEST_CELL))
    block = min(selections, _LONGEST_BLOCK, max(1, _MOST_CELLS // cells))
    cells = max(cells, _MOST_CELLS // block)
    bounds = profiles(epsilon0, block, cells)
    h = epsilon0 / cells

    def pmf(count: int) -> Any:
        end = block * cells
        found = pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap(h, -end, end, bounds[count])
        return found.to_dense_pmf()

    fine = pmf(block).self_compose(selections // block)
    if selections % block:
        fine = fine.compose(pmf(selections % block), 1e-15)
    return privacy_loss_distribution.PrivacyLossDistribution(_on_grid(fine, interval))


def _on_grid(fine: Any, interval: float) -> Any:
    """A distribution of losses on another grid, no less pessimistic."""
    from dp_accounting.pld import pld_pmf

    step, probabilities = fine._discretization, np.asarray(fine._probs)
    losses = (fine._lower_loss + np.arange(len(probabilities))) * step
    first, last = math.floor(losses[0] / interval), math.ceil(losses[-1] / interval)
    points = np.arange(first, last + 1) * interval
    # δ(ε) sums p (1 - e^(ε - loss)) over the losses above ε; no power here exceeds 1.
    above = _tail_sums(probabilities, 1.0)
    weighted = _tail_sums(probabilities, math.exp(-step))
    begin = np.searchsorted(losses, points, side="right")
    factor = np.exp(np.minimum(points - losses[np.minimum(begin, len(losses) - 1)], 0.0))
    deltas = above[begin] - factor * weighted[begin] + fine._infinity_mass
    deltas = np.maximum.accumulate(deltas[::-1].clip(fine._infinity_mass, 1.0))[::-1]
    return pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap(interval, first, last, deltas)


def _tail_sums(values: Float64Array, ratio: float) -> Float64Array:
    """From each place to the end, the sum of values times powers of a ratio; 0 for the end."""
    from scipy.signal import lfilter

    sums: Float64Array = lfilter([1.0], [1.0, -ratio], values[::-1])[::-1]
    return np.append(sums, 0.0)
