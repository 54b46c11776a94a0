"""The plot of ``dist-dp bench scaling``: step time against table size, both on log scales."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

_WIDTH, _HEIGHT = 760, 460
_LEFT, _RIGHT, _TOP, _BOTTOM = 78, 150, 46, 58
_COLOURS = {
    "none": "#566173",
    "lazydp": "#1d5fd1",
    "dpsgd": "#0d7a70",
    "dpsgd-torch": "#b04a00",
    "eana": "#8e4ec6",
}
_LABEL_GAP = 16.0


def scaling_svg(result: dict[str, Any]) -> str:
    """Draws the plot.

    Args:
        result: What :func:`dist_dp.cluster.bench.scaling.run_scaling` returned.

    Returns:
        An SVG document that needs nothing else. Bars show the spread over rounds.
    """
    points = result["points"]
    sizes = [p["settings"]["table_bytes"] / 1e9 for p in points]
    rows = [r for p in points for r in p["results"]]
    across = _Axis(min(sizes), max(sizes), _LEFT, _WIDTH - _RIGHT)
    up = _Axis(
        min(r["step_ms_low"] for r in rows),
        max(r["step_ms_high"] for r in rows),
        _HEIGHT - _BOTTOM,
        _TOP,
    )
    names = [r["mechanism"] for r in points[0]["results"]]
    parts = [*_frame(across, up, sizes), *(_curve(n, points, sizes, across, up) for n in names)]
    parts += _labels(names, points, up)
    title = _title(result)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'font-family="system-ui,sans-serif" font-size="13" aria-label="{escape(title)}">'
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>'
        f'<text x="{_LEFT}" y="24" font-size="15" font-weight="600" fill="#17202c">'
        f"{escape(title)}</text>{''.join(parts)}</svg>\n"
    )


class _Axis:
    """Maps values to places, by their logarithm, with a little room at both ends."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        margin = 0.06 * max(math.log(high / low), 0.5)
        self.low, self.high = math.log(low) - margin, math.log(high) + margin
        self._start, self._end = start, end

    def place(self, value: float) -> float:
        share = (math.log(value) - self.low) / (self.high - self.low)
        return self._start + share * (self._end - self._start)

    def ticks(self) -> list[float]:
        """1, 2 and 5 times powers of ten; powers alone where those would be many."""
        first, last = math.floor(self.low / math.log(10)), math.ceil(self.high / math.log(10))
        found = [m * 10.0**e for e in range(first, last + 1) for m in (1, 2, 5)]
        inside = [v for v in found if self.low <= math.log(v) <= self.high]
        tens = [v for v in inside if math.isclose(math.log10(v), round(math.log10(v)))]
        return tens if len(inside) > 9 and len(tens) > 1 else inside


def _title(result: dict[str, Any]) -> str:
    settings = result["points"][0]["settings"]
    return (
        f"Step time against table size: {settings['tables']} tables, dim {settings['dim']}, "
        f"batch {settings['batch']}"
    )


def _frame(across: _Axis, up: _Axis, sizes: Sequence[float]) -> list[str]:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = []
    for value in up.ticks():
        y = up.place(value)
        parts.append(
            f'<path d="M{_LEFT} {y:.1f}H{right}" stroke="#e7ebf1"/><text x="{_LEFT - 8}" '
            f'y="{y + 4:.1f}" text-anchor="end" fill="#566173">{_milliseconds(value)}</text>'
        )
    for size in sizes:
        x = across.place(size)
        parts.append(
            f'<path d="M{x:.1f} {bottom}v5" stroke="#566173"/><text x="{x:.1f}" '
            f'y="{bottom + 21}" text-anchor="middle" fill="#566173">{_size(size)}</text>'
        )
    parts.append(
        f'<path d="M{_LEFT} {_TOP}V{bottom}H{right}" fill="none" stroke="#566173"/>'
        f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 14}" text-anchor="middle" '
        f'fill="#17202c">tables (log scale)</text>'
        f'<text transform="translate(18 {(_TOP + bottom) / 2}) rotate(-90)" '
        f'text-anchor="middle" fill="#17202c">time of a step (log scale)</text>'
    )
    return parts


def _curve(
    name: str, points: Sequence[dict[str, Any]], sizes: Sequence[float], across: _Axis, up: _Axis
) -> str:
    colour = _COLOURS.get(name, "#17202c")
    path, marks = [], []
    for size, point in zip(sizes, points, strict=True):
        row = _row(point, name)
        x, y = across.place(size), up.place(row["step_ms"])
        path.append(f"{x:.1f} {y:.1f}")
        low, high = up.place(row["step_ms_low"]), up.place(row["step_ms_high"])
        marks.append(
            f'<path d="M{x:.1f} {low:.1f}V{high:.1f}" stroke="{colour}"/>'
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"><title>{escape(name)}, '
            f"{_size(size)}: {_milliseconds(row['step_ms'])}</title></circle>"
        )
    return (
        f'<path d="M{"L".join(path)}" fill="none" stroke="{colour}" stroke-width="2"/>'
        f"{''.join(marks)}"
    )


def _labels(names: Sequence[str], points: Sequence[dict[str, Any]], up: _Axis) -> list[str]:
    """Names at the curves' right ends, pushed apart where they would meet."""
    last = points[-1]
    wanted = sorted((up.place(_row(last, n)["step_ms"]), n) for n in names)
    parts, above = [], -math.inf
    for y, name in wanted:
        above = max(y, above + _LABEL_GAP)
        parts.append(
            f'<text x="{_WIDTH - _RIGHT + 10}" y="{above + 4:.1f}" '
            f'fill="{_COLOURS.get(name, "#17202c")}" font-weight="600">{escape(name)} '
            f"{_milliseconds(_row(last, name)['step_ms'])}</text>"
        )
    return parts


def _row(point: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(r for r in point["results"] if r["mechanism"] == name)
    return found


def _milliseconds(value: float) -> str:
    return f"{value / 1e3:.3g} s" if value >= 1e3 else f"{value:.3g} ms"


def _size(gigabytes: float) -> str:
    return f"{gigabytes:.3g} GB" if gigabytes >= 0.1 else f"{1e3 * gigabytes:.3g} MB"
