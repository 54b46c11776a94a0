"""How ε and δ are written for people: never below what they are."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, Decimal


def round_up(value: float, digits: int = 4) -> str:
    """Write a number of 0 or more with so many significant digits, rounded up.

    Guarantee:
        What is read is an upper bound of ``value``: a bound that was rounded down is none.
    """
    if value == 0:
        return "0"
    if not math.isfinite(value):
        return "\N{INFINITY}" if value > 0 else "not a number"
    exact = Decimal(value)
    quantum = Decimal(1).scaleb(exact.adjusted() - digits + 1)
    rounded = exact.quantize(quantum, rounding=ROUND_CEILING).normalize()
    return f"{rounded:f}" if rounded.adjusted() >= -4 else f"{rounded:e}"
