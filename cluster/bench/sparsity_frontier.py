"""From training runs to figures: reductions, losses paired by seed, and the frontier."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from dist_dp.cluster.bench.sparsity_settings import REFERENCE, Point
from dist_dp.cluster.bench.sparsity_training import Rates, Trained

LOSS_ALLOWED = 0.005
"""AUC that a gradient size may cost to count as comparable."""


def result_of(
    point: Point,
    epsilon: float | None,
    rates: Rates,
    by_seed: Mapping[int, Trained],
    reference: Mapping[int, Trained],
) -> dict[str, Any]:
    """A point's entry of the JSON file.

    Args:
        point: Mechanism and settings.
        epsilon: None for ``none``.
        rates: Its learning rates.
        by_seed: Its runs.
        reference: Those of lazydp at the same ε; a loss is a difference at one seed, where weights
            and batches are the same.
    """
    runs = list(by_seed.values())
    aucs = [r.auc for r in runs]
    losses = [reference[s].auc - r.auc for s, r in by_seed.items() if s in reference]
    noised = fmean(r.noised_coordinates for r in runs)
    return {
        "mechanism": point.mechanism,
        "epsilon": epsilon,
        "auc": fmean(aucs),
        "auc_low": min(aucs),
        "auc_high": max(aucs),
        "auc_by_seed": {str(s): r.auc for s, r in by_seed.items()},
        "public_auc": fmean(r.public_auc for r in runs),
        "auc_loss": fmean(losses) if losses else None,
        "auc_loss_low": min(losses, default=None),
        "auc_loss_high": max(losses, default=None),
        "noised_coordinates_per_step": noised,
        "noised_rows_per_step": fmean(r.noised_rows for r in runs),
        "noised_dense_coordinates_per_step": 0 if epsilon is None else runs[0].dense_coordinates,
        "reduction_vs_dpsgd": reduction(runs[0].table_coordinates, noised),
        "settings": point.described(),
        "rates": asdict(rates),
        "seeds": sorted(by_seed),
        "seconds": fmean(r.seconds for r in runs),
    }


def reduction(table_coordinates: int, noised: float) -> float | None:
    """How many times fewer coordinates were noised than all; None if none was."""
    return table_coordinates / noised if noised else None


def frontier(results: Sequence[Mapping[str, Any]], quality: str = "auc") -> list[int]:
    """Which results no other beats: the Pareto set of gradient size against quality.

    Args:
        results: At one ε. One that noised no coordinate at all trained no table, and takes no part.
        quality: The figure that should be high.

    Returns:
        Their places, by falling gradient size. Of equal ones the first.
    """
    some = [n for n, row in enumerate(results) if row["reduction_vs_dpsgd"] is not None]

    def key(place: int) -> tuple[float, float]:
        row = results[place]
        return -row["reduction_vs_dpsgd"], -row[quality]

    found: list[int] = []
    best = -math.inf
    for place in sorted(some, key=key):
        if results[place][quality] > best:
            best = results[place][quality]
            found.append(place)
    return found[::-1]


def frontiers(results: Sequence[dict[str, Any]], seeds: int) -> list[dict[str, Any]]:
    """The frontier at each ε, for the JSON file.

    Args:
        results: All entries.
        seeds: How many seeds a point must have been run with: one lucky run is no frontier.
    """
    found = []
    for epsilon in sorted({r["epsilon"] for r in results if r["epsilon"] is not None}):
        here = [r for r in results if r["epsilon"] == epsilon and len(r["seeds"]) >= seeds]
        points = [here[place] for place in frontier(here)]
        comparable = [p for p in points if p["auc_loss"] < LOSS_ALLOWED]
        if not points:
            continue
        found.append(
            {
                "epsilon": epsilon,
                "points": [_brief(p) for p in points],
                "largest_reduction": max(p["reduction_vs_dpsgd"] for p in points),
                "largest_comparable_reduction": max(
                    (p["reduction_vs_dpsgd"] for p in comparable), default=None
                ),
            }
        )
    return found


def _brief(row: dict[str, Any]) -> dict[str, Any]:
    names = ("mechanism", "settings", "reduction_vs_dpsgd", "noised_rows_per_step")
    return {n: row[n] for n in (*names, "auc", "auc_loss", "auc_loss_low", "auc_loss_high")}


def worth_repeating(results: Sequence[dict[str, Any]]) -> list[int]:
    """Which results to run with further seeds: the frontier by *public* records, and references.

    The test records do not choose which points are measured again, so that a point is not there
    because its first test was lucky.
    """
    found = [n for n, r in enumerate(results) if r["mechanism"] in ("none", REFERENCE)]
    for epsilon in {r["epsilon"] for r in results if r["epsilon"] is not None}:
        mine = [n for n, r in enumerate(results) if r["epsilon"] == epsilon]
        found += [mine[place] for place in frontier([results[n] for n in mine], "public_auc")]
    return sorted(set(found))
