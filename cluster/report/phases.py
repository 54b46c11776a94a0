"""Where a step's time goes: one stacked bar, split into ordinary training and privacy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dist_dp.cluster.report.series import Array
from dist_dp.cluster.report.text import escape, finite, milliseconds, share

# Phase -> (what it is, whether only a private step has it).
_PHASES: dict[str, tuple[str, bool]] = {
    "data": ("read and batch", False),
    "forward": ("lookups and layers", False),
    "backward": ("gradients", False),
    "update": ("parameter update", False),
    "communication": ("between workers", False),
    "settle": ("settle rows before the lookup", True),
    "clip": ("norms and clipping", True),
    "select": ("choose the rows", True),
    "noise": ("noise drawn each step", True),
    "ledger": ("charge the ledger", True),
}


def median_phases(metrics: Mapping[str, Array], summary: Mapping[str, Any]) -> dict[str, float]:
    """Return phase -> median milliseconds, disjoint; the phases' order is the bar's.

    ``phases_ms`` of the summary is used where there is one, the metrics otherwise. Settling is
    measured inside the forward pass and taken out of it here. What a step took beyond its phases
    becomes the phase ``other``.
    """
    given = summary.get("phases_ms")
    found: dict[str, float] = {}
    if isinstance(given, Mapping) and given:
        found = {
            str(name).removesuffix("_ms"): value
            for name, raw in given.items()
            if (value := finite(raw)) is not None
        }
    else:
        for name in _PHASES:
            known = metrics[f"{name}_ms"][np.isfinite(metrics[f"{name}_ms"])]
            if len(known):
                found[name] = float(np.median(known))
    if "forward" in found and "settle" in found:
        found["forward"] = max(0.0, found["forward"] - found["settle"])
    ordered = {name: found.pop(name) for name in _PHASES if found.get(name, 0.0) > 0}
    ordered.update({name: value for name, value in found.items() if value > 0})
    step = finite(summary.get("step_ms"))
    if ordered and step is not None and step - sum(ordered.values()) > 0.005 * step:
        ordered["other"] = step - sum(ordered.values())
    return ordered


def breakdown(phases: Mapping[str, float], mechanism: str) -> str:
    """Return the stacked bar with a labelled row for each phase and a total for each group."""
    total = sum(phases.values())
    parts, x = [], 0.0
    for name, value in phases.items():
        width = 1000 * value / total
        parts.append(
            f'<rect class="phase {_style(name)}" x="{x:.2f}" y="0" '
            f'width="{max(width - 1.5, 0.5):.2f}" height="40">'
            f"<title>{escape(name)}: {milliseconds(value)}</title></rect>"
        )
        x += width
    label = f"A step of {mechanism}: " + ", ".join(
        f"{name} {milliseconds(value)}" for name, value in phases.items()
    )
    bar = (
        '<svg class="bar" viewBox="0 0 1000 40" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )
    groups = []
    for title, private in (("Any training step", False), ("Added by privacy", True)):
        mine = {n: v for n, v in phases.items() if _is_private(n) is private}
        if not mine:
            continue
        rows = "".join(
            f'<tr><th scope="row"><i class="key phase {_style(n)}"></i>{escape(n)}'
            f" <small>{_PHASES[n][0] if n in _PHASES else ''}</small></th>"
            f"<td>{milliseconds(v)}</td><td>{share(v / total)}</td></tr>"
            for n, v in mine.items()
        )
        groups.append(
            f'<table class="phases"><thead><tr><th scope="col">{title}</th>'
            f"<td>{milliseconds(sum(mine.values()))}</td>"
            f"<td>{share(sum(mine.values()) / total)}</td></tr></thead>"
            f"<tbody>{rows}</tbody></table>"
        )
    return (
        f'<p class="barhead"><b>{escape(mechanism)}</b> <span>{milliseconds(total)} a step'
        f"</span></p>{bar}"
        f'<div class="groups">{"".join(groups)}</div>'
    )


def _is_private(name: str) -> bool:
    return _PHASES.get(name, ("", False))[1]


def _style(name: str) -> str:
    return f"p-{name}" if name in _PHASES else "p-other"
