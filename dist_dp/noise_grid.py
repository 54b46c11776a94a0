"""The fixed grid for noised numbers: what it defends against, how fine it is, what it costs.

Against what. Floating-point numbers are dense near 0 and sparse far from it, so which values
`weight + noise` can take depends on the weight itself, and one released number can tell two data
sets apart however much noise was added (Mironov, CCS 2012; for Gaussian noise Jin et al., IEEE S&P
2022; Haney et al., arXiv 2207.13793). On a grid every number leaves as a multiple of one spacing
that was fixed without looking at the records, with noise that was drawn in float64 and rounded
once, after it was added.

How fine. A spacing may be at most an eighth of the noise of any one step. `auto` takes the finest
whose 2^24 multiples (float32 is exact up to there) reach eight times the noise a weight collects
over the run, and at least 8. Weights are held inside that range.

Where. Noised sums of dense gradients at every step; table rows at a release, with the noise of at
least the last step, and under `dpsgd` at every step. All rows alike are rounded and held in the
range, whatever the records: post-processing. Under `lazydp` a training lookup does not round to
the grid, since which rows it reads is private.

What it costs. float64 noise takes about four times as long to draw; a rounding adds a twelfth of
a squared spacing to the variance (at most 0.13 % of a step's).
"""

from __future__ import annotations

import math
from typing import Any

from dist_dp.errors import ConfigError

MULTIPLES = 2.0**24
"""Multiples of the spacing on either side of 0 that float32 holds exactly."""

COARSEST = 1.0 / 8.0
"""The largest spacing, over the standard deviation of one step's noise."""

SMALLEST_SPACING, LARGEST_SPACING = 2.0**-100, 2.0**100

_LEAST_RANGE = 8.0
_DEVIATIONS_IN_RANGE = 8.0
_DENSE = 1.0 / 64.0


def read_spacing(value: Any) -> float:
    """A spacing from a configuration: a number, or a text such as ``2^-20`` or ``1e-6``.

    Returns:
        A power of two.

    Raises:
        ValueError: It is none; the message names the nearest ones.
    """
    number = _number(value)
    if not (math.isfinite(number) and SMALLEST_SPACING <= number <= LARGEST_SPACING):
        raise ValueError(f"must be a power of two between 2^-100 and 2^100, not {value}")
    below = _power_of_two_below(number)
    if below != number:
        raise ValueError(
            f"must be a power of two, not {value}; the nearest are {spacing_text(below)} = "
            f"{below:g} and {spacing_text(2 * below)} = {2 * below:g}"
        )
    return number


def _number(value: Any) -> float:
    expected = f"must be a power of two such as 2^-20, not {value!r}"
    if isinstance(value, str):
        base, power, exponent = value.replace("**", "^").partition("^")
        try:
            return math.ldexp(1.0, int(exponent)) if power and int(base) == 2 else float(value)
        except (ValueError, OverflowError):
            raise ValueError(expected) from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(expected)
    return float(value)


def spacing_text(spacing: float) -> str:
    """``2^-20``: a power of two for a person."""
    return f"2^{math.frexp(spacing)[1] - 1}"


def table_spacing(smallest: float, largest: float, steps: int) -> float:
    """The spacing that ``auto`` stands for; see the top of this module.

    Args:
        smallest: Least standard deviation of one step's noise on a weight, among steps with any.
        largest: The greatest.
        steps: Steps of the run.

    Raises:
        ConfigError: No spacing is both fine enough for the noise and wide enough in range.
    """
    reach = max(_LEAST_RANGE, _DEVIATIONS_IN_RANGE * largest * math.sqrt(steps))
    below = _power_of_two_below(reach / MULTIPLES)
    spacing = below if below * MULTIPLES >= reach else 2 * below
    if spacing > smallest * COARSEST:
        raise ConfigError(
            f"noise.grid: none fits: weights may reach ±{reach:.3g}, which takes a spacing of "
            f"{spacing_text(spacing)} at least, and the smallest noise of a step ({smallest:.3g} "
            f"on a weight) one of {spacing_text(_power_of_two_below(smallest * COARSEST))} at "
            "most. Let the tables' learning rate stay further from 0 (final_fraction of a cosine, "
            "fewer warmup_steps), or leave noise.grid out"
        )
    return spacing


def check_spacing(spacing: float, deviation: float, when: str) -> None:
    """Refuses a grid that is too coarse for the noise of a step.

    Args:
        spacing: Of the tables' grid.
        deviation: Standard deviation of the step's noise on a weight.
        when: Which step, for the message.

    Raises:
        ConfigError: It is more than an eighth of the noise.
    """
    if spacing > deviation * COARSEST:
        raise ConfigError(
            f"noise.grid: {spacing_text(spacing)} is more than an eighth of the noise on a weight "
            f"{when} ({deviation:.3g}); give "
            f"{spacing_text(_power_of_two_below(deviation * COARSEST))} or a finer one, or auto"
        )


def dense_spacing(deviation: float) -> float:
    """The grid of a dense parameter's noised sum of gradients.

    Args:
        deviation: sigma C, the standard deviation of the noise on the sum; above 0.

    Returns:
        The largest power of two up to a 64th of it. The range is then 2^17 deviations or more: a
        number would reach its end only if the gradients of over 100,000 sigma records of one step
        lay wholly along one parameter. It would be held there, which is post-processing.
    """
    return _power_of_two_below(deviation * _DENSE)


def _power_of_two_below(value: float) -> float:
    """The largest power of two up to a value above 0."""
    return math.ldexp(1.0, math.frexp(value)[1] - 1)
