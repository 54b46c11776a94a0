"""The plot of ``dist-dp bench sparsity``: AUC loss against gradient size, a panel for each ε."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from dist_dp.cluster.bench.sparsity_frontier import LOSS_ALLOWED, frontier
from dist_dp.cluster.bench.sparsity_settings import REFERENCE
from dist_dp.errors import ConfigError

_PANEL, _HEIGHT = 300, 400
_LEFT, _TOP, _BOTTOM, _GAP, _RIGHT = 66, 76, 58, 22, 20
_COLOURS = {
    "fest": "#b04a00",
    "adafest": "#0d7a70",
    "adafest+": "#8e4ec6",
    "exponential": "#c2185b",
}
_ROOM = 0.08


def sparsity_svg(result: dict[str, Any]) -> str:
    """Draws the plot.

    Args:
        result: What :func:`dist_dp.cluster.bench.sparsity.run_sparsity` returned.

    Returns:
        An SVG document that needs nothing else. To the right fewer coordinates are noised, up more
        AUC is lost; lazydp is the line at 0. A full circle was run with all seeds (its bar is their
        spread), an empty one with one seed; the line goes along the mechanism's own frontier.

    Raises:
        ConfigError: There is nothing to draw.
    """
    rows = [
        r
        for r in result["results"]
        if r["reduction_vs_dpsgd"] and r["auc_loss"] is not None and r["mechanism"] != REFERENCE
    ]
    if not rows:
        raise ConfigError("--plot: no point of fest, adafest or adafest+ noised a row of a table")
    epsilons = sorted({r["epsilon"] for r in rows})
    width = _LEFT + len(epsilons) * (_PANEL + _GAP) - _GAP + _RIGHT
    across = _Axis([math.log10(r["reduction_vs_dpsgd"]) for r in rows])
    up = _Axis([0.0, LOSS_ALLOWED, *(r["auc_loss"] for r in rows)])
    seeds = max(len(r["seeds"]) for r in rows)
    parts = []
    for number, epsilon in enumerate(epsilons):
        panel = _Panel(_LEFT + number * (_PANEL + _GAP), across, up, first=number == 0)
        parts += panel.frame(f"ε = {epsilon:g}")
        here = [r for r in rows if r["epsilon"] == epsilon]
        for name in dict.fromkeys(r["mechanism"] for r in here):
            parts.append(panel.curve(name, [r for r in here if r["mechanism"] == name], seeds))
    title = f"AUC lost against gradient size: {result['data']['source']} records"
    names = list(dict.fromkeys(r["mechanism"] for r in rows))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {_HEIGHT}" role="img" '
        f'font-family="system-ui,sans-serif" font-size="13" aria-label="{escape(title)}">'
        f'<rect width="{width}" height="{_HEIGHT}" fill="#fff"/>'
        f'<text x="{_LEFT}" y="24" font-size="15" font-weight="600" fill="#17202c">'
        f"{escape(title)}</text>{_legend(names)}"
        f'<text x="{(_LEFT + width - _RIGHT) / 2:.0f}" y="{_HEIGHT - 14}" text-anchor="middle" '
        f'fill="#17202c">times fewer noised coordinates than DP-SGD (log scale)</text>'
        f'<text transform="translate(16 {(_TOP + _HEIGHT - _BOTTOM) / 2}) rotate(-90)" '
        f'text-anchor="middle" fill="#17202c">AUC lost against lazydp</text>'
        f"{''.join(parts)}</svg>\n"
    )


class _Axis:
    """Maps values to a share of the axis, with a little room at both ends."""

    def __init__(self, values: Sequence[float]) -> None:
        low, high = min(values), max(values)
        margin = _ROOM * max(high - low, 1e-3)
        self.low, self.high = low - margin, high + margin

    def share(self, value: float) -> float:
        return (value - self.low) / (self.high - self.low)


class _Panel:
    """One ε."""

    def __init__(self, left: float, across: _Axis, up: _Axis, *, first: bool) -> None:
        self._left, self._across, self._up, self._first = left, across, up, first

    def x(self, reduction: float) -> float:
        return self._left + self._across.share(math.log10(reduction)) * _PANEL

    def y(self, loss: float) -> float:
        bottom = _HEIGHT - _BOTTOM
        return bottom - self._up.share(loss) * (bottom - _TOP)

    def frame(self, name: str) -> list[str]:
        """Axes, ticks, the panel's name and the line of the loss that is allowed."""
        bottom, right = _HEIGHT - _BOTTOM, self._left + _PANEL
        parts = [
            f'<text x="{self._left + _PANEL / 2:.0f}" y="{_TOP - 10}" text-anchor="middle" '
            f'font-weight="600" fill="#17202c">{escape(name)}</text>'
        ]
        for value in _ticks(self._up.low, self._up.high):
            y = self.y(value)
            parts.append(f'<path d="M{self._left} {y:.1f}H{right}" stroke="#e7ebf1"/>')
            if self._first:
                parts.append(
                    f'<text x="{self._left - 8}" y="{y + 4:.1f}" text-anchor="end" '
                    f'fill="#566173">{value:g}</text>'
                )
        for power in range(math.ceil(self._across.low), math.floor(self._across.high) + 1):
            x = self.x(10.0**power)
            parts.append(
                f'<path d="M{x:.1f} {bottom}v5" stroke="#566173"/><text x="{x:.1f}" '
                f'y="{bottom + 21}" text-anchor="middle" fill="#566173">10'
                f'<tspan dy="-5" font-size="9">{power}</tspan></text>'
            )
        for power in range(math.floor(self._across.low), math.ceil(self._across.high)):
            inside = [m * 10.0**power for m in range(2, 10)]
            inside = [v for v in inside if self._across.low <= math.log10(v) <= self._across.high]
            parts += [f'<path d="M{self.x(v):.1f} {bottom}v3" stroke="#566173"/>' for v in inside]
        allowed, none = self.y(LOSS_ALLOWED), self.y(0.0)
        parts.append(
            f'<path d="M{self._left} {allowed:.1f}H{right}" stroke="#566173" '
            f'stroke-dasharray="4 3"/>'
            f'<path d="M{self._left} {none:.1f}H{right}" stroke="#1d5fd1"/>'
            f'<path d="M{self._left} {_TOP}V{bottom}H{right}" fill="none" stroke="#566173"/>'
        )
        return parts

    def curve(self, name: str, rows: Sequence[dict[str, Any]], seeds: int) -> str:
        """A mechanism's points, and a line along those that none of its own beats."""
        colour = _COLOURS.get(name, "#17202c")
        best = [rows[place] for place in frontier(rows)]
        path = "L".join(
            f"{self.x(r['reduction_vs_dpsgd']):.1f} {self.y(r['auc_loss']):.1f}" for r in best
        )
        return (
            f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.5" '
            f'stroke-opacity="0.7"/>{"".join(self._mark(name, r, colour, seeds) for r in rows)}'
        )

    def _mark(self, name: str, row: dict[str, Any], colour: str, seeds: int) -> str:
        x, y = self.x(row["reduction_vs_dpsgd"]), self.y(row["auc_loss"])
        all_seeds = len(row["seeds"]) == seeds
        low, high = self.y(row["auc_loss_low"]), self.y(row["auc_loss_high"])
        bar = f'<path d="M{x:.1f} {low:.1f}V{high:.1f}" stroke="{colour}"/>' if all_seeds else ""
        said = f"{name} {_words(row['settings'])}: {row['reduction_vs_dpsgd']:.3g} ×"
        return (
            f'{bar}<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" stroke="{colour}" '
            f'fill="{colour if all_seeds else "#fff"}"><title>{escape(said)}, AUC loss '
            f"{row['auc_loss']:.4f}</title></circle>"
        )


def _legend(names: Sequence[str]) -> str:
    parts, x = [], float(_LEFT)
    for name in [REFERENCE, *names]:
        colour = _COLOURS.get(name, "#1d5fd1")
        parts.append(
            f'<circle cx="{x + 4:.0f}" cy="43" r="3.5" fill="{colour}" class="legend"/>'
            f'<text x="{x + 13:.0f}" y="47" fill="{colour}" font-weight="600">{escape(name)}</text>'
        )
        x += 34 + 8 * len(name)
    return "".join(parts)


def _words(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in settings.items())


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers, five or so."""
    raw = (high - low) / 5
    size = 10 ** math.floor(math.log10(raw))
    step = next(m * size for m in (1, 2, 5, 10) if m * size >= raw)
    first = math.ceil(low / step)
    return [round(n * step, 10) for n in range(first, math.floor(high / step) + 1)]
