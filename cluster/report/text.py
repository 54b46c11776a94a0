"""Numbers and strings as a reader wants them; everything that is not ours is escaped here."""

from __future__ import annotations

import html
import math
from typing import Any

from dist_dp.figures import round_up

DASH = "\N{EN DASH}"
INFINITY = "\N{INFINITY}"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def escape(value: Any) -> str:
    """Escape any value for HTML text and for quoted attributes; None is an en dash."""
    return DASH if value is None or value == "" else html.escape(str(value), quote=True)


def number(value: Any) -> float | None:
    """Return a float (also of the strings 'inf' and 'nan'), or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def finite(value: Any) -> float | None:
    """Return a finite float, or None."""
    found = number(value)
    return found if found is not None and math.isfinite(found) else None


def show(value: Any, digits: int = 4) -> str:
    """Format a number with significant digits; thousands separated, small ones as powers of 10."""
    x = number(value)
    if x is None:
        return DASH
    if math.isnan(x):
        return "not a number"
    if math.isinf(x):
        return INFINITY if x > 0 else f"\N{MINUS SIGN}{INFINITY}"
    if x == 0:
        return "0"
    exponent = math.floor(math.log10(abs(x)))
    if exponent < -3 or exponent >= 12:
        mantissa, power = f"{x:.{digits - 1}e}".split("e")
        if "." in mantissa:
            mantissa = mantissa.rstrip("0").rstrip(".")
        return f"{mantissa} × 10{str(int(power)).translate(_SUPERSCRIPT)}"
    decimals = max(0, digits - 1 - exponent)
    text = f"{x:,.{decimals}f}"
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return text.replace("-", "\N{MINUS SIGN}")


def bound(value: Any, digits: int = 4) -> str:
    """Format an upper bound such as ε as :func:`show` does, but rounded up."""
    x = finite(value)
    return show(value if x is None or x < 0 else float(round_up(x, digits)), digits)


def fixed(value: Any, decimals: int) -> str:
    """Format a quality figure with a fixed number of decimals."""
    x = finite(value)
    return show(value) if x is None else f"{x:.{decimals}f}"


def count(value: Any) -> str:
    """Format a whole number with separated thousands."""
    x = finite(value)
    return show(value) if x is None else f"{round(x):,}"


def size(value: Any) -> str:
    """Format bytes with a binary unit."""
    x = finite(value)
    if x is None:
        return show(value)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(x) < 1024:
            return f"{x:.0f} {unit}" if unit == "B" else f"{x:.3g} {unit}"
        x /= 1024
    return f"{x:,.4g} TiB"


def milliseconds(value: Any) -> str:
    """Format a duration in milliseconds, three digits where they mean something."""
    x = finite(value)
    if x is None:
        return show(value)
    return f"{x:,.{0 if x >= 99.95 else 1 if x >= 9.995 else 2}f} ms"


def share(value: float) -> str:
    """Format a fraction as a percentage."""
    return f"{100 * value:.1f}\N{THIN SPACE}%"
