"""Line charts as inline SVG.

Drawn for a width of 360 units, which is a narrow telephone's or a third of a wide window's, so
that the letters stay between 9 and 13 pixels wherever the chart is shown. Colours come from the
page's style sheet, for light and for dark.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field

import numpy as np

from dist_dp.cluster.report.series import (
    Array,
    downsample,
    finite_points,
    linear_ticks,
    log_ticks,
)
from dist_dp.cluster.report.text import escape, show

WIDTH, HEIGHT = 360, 214
LEFT, RIGHT, TOP, BOTTOM = 44, 350, 12, 182


@dataclass
class Line:
    """One line: ``style`` is a class of the style sheet (main, faint, second, third)."""

    name: str
    x: Array
    y: Array
    style: str = "main"
    points: bool = False
    hover: bool = True


@dataclass
class Band:
    """A filled area between two lines over the same steps; ``edges`` names upper and lower."""

    name: str
    edges: tuple[str, str]
    x: Array
    low: Array
    high: Array


@dataclass
class Reference:
    """A dashed horizontal line with its label."""

    label: str
    y: float
    style: str = "limit"


@dataclass
class Chart:
    """A chart by step: what to draw, and how to read it.

    ``low``, ``high`` force an end of the vertical axis; ``percent`` shows fractions as per cent.
    """

    title: str
    latest: str
    note: str
    lines: list[Line]
    bands: list[Band] = field(default_factory=list)
    references: list[Reference] = field(default_factory=list)
    log: bool = False
    percent: bool = False
    low: float | None = None
    high: float | None = None
    warning: str = ""

    def drawable(self) -> bool:
        """Tell whether any line has a finite point (and a positive one, on a log axis)."""
        return any(len(self._points(line.x, line.y)[0]) for line in self.lines)

    def _points(self, x: Array, y: Array) -> tuple[Array, Array]:
        x, y = finite_points(x, y)
        return (x[y > 0], y[y > 0]) if self.log else (x, y)


@dataclass
class _Axes:
    x0: float
    x1: float
    y0: float
    y1: float
    log: bool

    def px(self, x: float) -> float:
        return LEFT + (RIGHT - LEFT) * (x - self.x0) / (self.x1 - self.x0)

    def py(self, y: float) -> float:
        low, high, value = self.y0, self.y1, min(max(y, self.y0), self.y1)
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return BOTTOM - (BOTTOM - TOP) * (value - low) / (high - low)


def figure(chart: Chart) -> str:
    """Return the HTML of a chart: title, latest value, legend, SVG, how to read it."""
    legend = _legend(chart)
    warning = f'<p class="warn">{escape(chart.warning)}</p>' if chart.warning else ""
    return (
        '<figure class="card chart"><figcaption>'
        f'<h3>{escape(chart.title)}</h3><span class="latest">{escape(chart.latest)}</span>'
        f"</figcaption>{legend}{svg(chart)}"
        f'<p class="note">{escape(chart.note)}</p>{warning}</figure>'
    )


def svg(chart: Chart) -> str:
    """Return the SVG element of a chart that has something to draw."""
    axes = _axes(chart)
    hover: list[dict[str, object]] = []
    body = [_grid(chart, axes)]
    for band in chart.bands:
        body.append(_band(chart, axes, band))
        for name, y in zip(band.edges, (band.high, band.low), strict=True):
            points = downsample(*chart._points(band.x, y))
            if len(points[0]):
                hover.append({"n": name, "s": "faint", "p": _pairs(*points)})
    for line in chart.lines:
        x, y = downsample(*chart._points(line.x, line.y))
        if len(x) == 0:
            continue
        body.append(_path(axes, x, y, line))
        if line.hover:
            hover.append({"n": line.name, "s": line.style, "p": _pairs(x, y)})
    drawn = [_pixels(chart, axes, line.x, line.y) for line in chart.lines]
    body += [_reference(axes, reference, drawn) for reference in chart.references]
    data = {
        "x": [axes.x0, axes.x1, LEFT, RIGHT],
        "y": [axes.y0, axes.y1, BOTTOM, TOP],
        "log": chart.log,
        "pct": chart.percent,
        "series": hover,
    }
    label = f"{chart.title} by step. Latest: {chart.latest}. {chart.note}"
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(label)}" data-plot="{escape(json.dumps(data))}">'
        f"{''.join(body)}</svg>"
    )


def tick_label(value: float, percent: bool = False) -> str:
    """Format a number for an axis: short, with k and M for thousands and millions."""
    if percent:
        return f"{100 * value:.4g}%"
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= factor and not (factor == 1e3 and abs(value) < 1e4 and value % 100):
            return f"{value / factor:.4g}{unit}"
    if 0 < abs(value) < 1e-3:
        return show(value, 2).replace(" × ", "·").removeprefix("1·")
    return f"{value:.4g}"


def _axes(chart: Chart) -> _Axes:
    xs, ys = [], []
    for line in chart.lines:
        x, y = chart._points(line.x, line.y)
        xs.append(x)
        ys.append(y)
    for band in chart.bands:
        ys += [chart._points(band.x, band.low)[1], chart._points(band.x, band.high)[1]]
    ys.append(np.array([r.y for r in chart.references if math.isfinite(r.y)], dtype=np.float64))
    x_all, y_all = np.concatenate(xs), np.concatenate(ys)
    if chart.log:
        y_all = y_all[y_all > 0]
    x0, x1 = float(x_all.min()), float(x_all.max())
    if x0 == x1:
        x0, x1 = x0 - 1, x1 + 1
    y0 = float(y_all.min()) if chart.low is None else chart.low
    y1 = float(y_all.max()) if chart.high is None else chart.high
    if chart.log:
        y0, y1 = y0 / 1.25, y1 * 1.25
        return _Axes(x0, x1, y0, y1, True)
    if y1 <= y0:
        y0, y1 = (y0 - abs(y0) * 0.1 - 1e-12, y0 + abs(y0) * 0.1 + 1e-12)
    margin = 0.06 * (y1 - y0)
    y0 = y0 - margin if chart.low is None else y0
    y1 = y1 + margin if chart.high is None else y1
    return _Axes(x0, x1, y0, y1, False)


def _grid(chart: Chart, axes: _Axes) -> str:
    parts = []
    ticks = log_ticks(axes.y0, axes.y1) if axes.log else linear_ticks(axes.y0, axes.y1)
    for tick in ticks:
        y = axes.py(tick)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick" x="{LEFT - 6}" y="{y + 3.7:.1f}" text-anchor="end">'
            f"{tick_label(tick, chart.percent)}</text>"
        )
    for tick in linear_ticks(axes.x0, axes.x1):
        if tick != int(tick):
            continue
        x = axes.px(tick)
        anchor = "end" if x > RIGHT - 12 else "middle"
        parts.append(
            f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{BOTTOM}" y2="{BOTTOM + 4}"/>'
            f'<text class="tick" x="{x:.1f}" y="{BOTTOM + 16}" text-anchor="{anchor}">'
            f"{tick_label(tick)}</text>"
        )
    parts.append(
        f'<line class="axis" x1="{LEFT}" x2="{RIGHT}" y1="{BOTTOM}" y2="{BOTTOM}"/>'
        f'<text class="tick" x="{(LEFT + RIGHT) / 2}" y="{HEIGHT - 3}" '
        'text-anchor="middle">step</text>'
    )
    return "".join(parts)


def _path(axes: _Axes, x: Array, y: Array, line: Line) -> str:
    points = " ".join(f"{axes.px(a):.1f},{axes.py(b):.1f}" for a, b in zip(x, y, strict=True))
    drawn = f'<polyline class="line {escape(line.style)}" points="{points}"/>'
    if line.points or len(x) == 1:
        drawn += "".join(
            f'<circle class="dot {escape(line.style)}" cx="{axes.px(a):.1f}" '
            f'cy="{axes.py(b):.1f}" r="2.6"/>'
            for a, b in zip(x, y, strict=True)
        )
    return drawn


def _band(chart: Chart, axes: _Axes, band: Band) -> str:
    high = downsample(*chart._points(band.x, band.high))
    low = downsample(*chart._points(band.x, band.low))
    outline = list(zip(*high, strict=True)) + list(zip(*low, strict=True))[::-1]
    points = " ".join(f"{axes.px(a):.1f},{axes.py(b):.1f}" for a, b in outline)
    return f'<polygon class="band" points="{points}"/>'


def _pixels(chart: Chart, axes: _Axes, x: Array, y: Array) -> list[tuple[float, float]]:
    x, y = downsample(*chart._points(x, y))
    return [(axes.px(a), axes.py(b)) for a, b in zip(x, y, strict=True)]


def _reference(axes: _Axes, reference: Reference, drawn: list[list[tuple[float, float]]]) -> str:
    """Draw a dashed line and put its label where the fewest points of the lines are."""
    if not math.isfinite(reference.y) or (axes.log and reference.y <= 0):
        return ""
    y = axes.py(reference.y)
    style = escape(reference.style)
    width = 6.0 * len(reference.label)
    places = [(x, y + dy) for dy in (-5, 13) for x in (RIGHT - 2 - width, LEFT + 6)]
    free = [place for place in places if TOP + 4 < place[1] < BOTTOM]

    def covered(place: tuple[float, float]) -> int:
        left, base = place
        return sum(
            left - 4 < px < left + width + 4 and base - 13 < py < base + 5
            for line in drawn
            for px, py in line
        )

    left, base = min(free, key=covered)
    anchor, at = ("start", left) if left == LEFT + 6 else ("end", RIGHT - 2)
    return (
        f'<line class="reference {style}" x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="label {style}" x="{at}" y="{base:.1f}" text-anchor="{anchor}">'
        f"{escape(reference.label)}</text>"
    )


def _legend(chart: Chart) -> str:
    entries = [(band.name, "band") for band in chart.bands]
    entries += [(line.name, line.style) for line in chart.lines]
    if len(entries) < 2:
        return ""
    items = "".join(
        f'<span><i class="key {escape(style)}"></i>{escape(name)}</span>' for name, style in entries
    )
    return f'<div class="legend">{items}</div>'


def _pairs(x: Array, y: Array) -> list[list[float]]:
    return [[float(f"{a:.7g}"), float(f"{b:.5g}")] for a, b in zip(x, y, strict=True)]
