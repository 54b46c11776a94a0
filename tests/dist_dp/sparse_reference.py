"""FEST and AdaFEST on an unsharded model, one example at a time: what placements must equal.

The model and data of :mod:`tests.dist_dp.unsharded`. What a unit contributes is written out over
Python sets; whether a row survives is asked of :class:`SelectionNoise` for whole tables, whose own
probabilities are tested elsewhere.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dist_dp import kernels
from dist_dp.optimizer import ROUNDING_MARGIN
from dist_dp.sampling import PoissonSampler
from dist_dp.sparse_settings import ADAPTIVE, SparseSettings
from dist_dp.survivors import SelectionNoise
from tests.dist_dp import unsharded
from tests.dist_dp.gradients import SECRET
from tests.dist_dp.unsharded import CLIP, DECAY, LR, TABLES, parameter_of

COLLECTIONS = ("pooled", "weighted", "sequence")
KEPT = {
    "pooled.a": [0, 1, 4, 5, 6, 9, 12],
    "pooled.d": [2, 3, 4, 8],
    "weighted.w": [1, 2, 5],
    "sequence.s": [0, 3, 4],
}
"""Chosen rows of some tables; the others keep all."""


def kept_rows() -> dict[str, Tensor]:
    return {table: torch.tensor(rows) for table, rows in KEPT.items()}


@dataclass
class SparseRun:
    """Where a run ended, and which rows of each table survived each step."""

    state: dict[str, Tensor]
    norms: list[Tensor] = field(default_factory=list)
    survivors: list[dict[str, list[int]]] = field(default_factory=list)


def contributions(
    unit: list[int], kept: Mapping[str, list[int]], max_norm: float
) -> dict[tuple[str, int], float]:
    """What one unit sends for each (table, row) that may survive."""
    data = unsharded.records()
    places: dict[tuple[str, int], list[Any]] = defaultdict(list)
    for number, collection in enumerate(COLLECTIONS):
        readers: dict[str, list[str]] = defaultdict(list)
        for table, (_, features) in TABLES.items():
            if table.startswith(collection):
                for feature in features:
                    readers[feature].append(table)
        for key in list(data.sparse[number].keys()):
            for record in unit:
                bag = data.select([record]).sparse[number][key].values().tolist()
                for place, row in enumerate(bag):
                    for table in readers[key]:
                        if row in kept.get(table, [row]):
                            places[table, row].append((number, key, record, place))
    sent = {min(where) for where in places.values()}
    times = {pair: sum(w in sent for w in where) for pair, where in places.items()}
    size = math.sqrt(sum(m * m for m in times.values()))
    weight = min(1.0, max_norm / size) if size else 0.0
    weight = math.floor(weight * 2**20) / 2**20
    return {pair: m * weight for pair, m in times.items()}


def reference(
    steps: int,
    mechanism: str,
    settings: SparseSettings,
    *,
    sigma: float,
    zero: bool = False,
    by_user: bool = False,
    gamma: float = 0.8,
) -> SparseRun:
    """The run, with SGD and weight decay on the survivors."""
    kept = KEPT if mechanism != "adafest" else {}
    state = {n: p.detach().clone() for n, p in unsharded.model().named_parameters()}
    names = {parameter_of(t): t for t in TABLES}
    sampler = PoissonSampler(SECRET, unsharded.RECORDS, unsharded.RATE)
    expected = unsharded.USERS_EXPECTED if by_user else unsharded.EXPECTED
    exact = unsharded.model().double()
    run = SparseRun(state)
    sigma2 = settings.gradient_multiplier(sigma) if mechanism in ADAPTIVE else sigma
    for step in range(1, steps + 1):
        drawn = (
            unsharded.drawn_users(step) if by_user else [[r] for r in sampler.sample(step).tolist()]
        )
        sums, norms = _clipped(exact, state, [] if zero else drawn, kept)
        run.norms.append(norms)
        alive = _survivors(drawn, kept, mechanism, settings, sigma, step)
        run.survivors.append(alive)
        noised = unsharded._with_noise(
            {n: v for n, v in sums.items() if n not in names}, step, sigma2 * CLIP
        )
        lr = LR * gamma ** (step - 1)
        for name, value in state.items():
            if name not in names:
                value -= lr * (noised[name] / expected + DECAY * value)
                continue
            table = names[name]
            rows = torch.tensor(alive[table], dtype=torch.int64)
            if not rows.numel():
                continue
            gradient = (sums[name][rows] / expected).float()
            if sigma2:
                noise = kernels.normal(
                    kernels.derive_key(SECRET, "tables", table),
                    rows,
                    step - 1,
                    step,
                    num_columns=value.shape[1],
                )
                gradient += noise * (sigma2 * CLIP / expected)
            value[rows] -= lr * (gradient + DECAY * value[rows])
    return run


def _survivors(
    units: list[list[int]],
    kept: Mapping[str, list[int]],
    mechanism: str,
    settings: SparseSettings,
    sigma: float,
    step: int,
) -> dict[str, list[int]]:
    counts = {table: [0.0] * rows for table, (rows, _) in TABLES.items()}
    touched: set[tuple[str, int]] = set()
    for unit in units:
        for (table, row), weight in contributions(unit, kept, settings.contribution_norm).items():
            counts[table][row] += weight
            touched.add((table, row))
    candidates = {t: kept.get(t, list(range(rows))) for t, (rows, _) in TABLES.items()}
    if mechanism not in ADAPTIVE:
        return candidates
    thresholds = settings.thresholds(sigma, {t: len(rows) for t, rows in candidates.items()})
    deviation = settings.selection_multiplier(sigma) * settings.contribution_norm
    found = {}
    for table, rows in candidates.items():
        tau, probability = thresholds[table]
        noise = SelectionNoise.of_table(kernels.derive_key(SECRET, "tables", table))
        above = noise.of_touched(
            torch.tensor(rows),
            torch.tensor([counts[table][r] for r in rows], dtype=torch.float64),
            step=step,
            threshold=tau,
            deviation=deviation,
        )
        drawn = noise.of_untouched(
            step=step, probability=probability, num_rows=len(rows), first=0, last=len(rows)
        )
        untouched = {rows[n] for n in drawn.tolist()}
        found[table] = [
            row
            for row, is_above in zip(rows, above.tolist(), strict=True)
            if (is_above if (table, row) in touched else row in untouched)
        ]
    return found


def _clipped(
    exact: Any, state: Mapping[str, Tensor], units: list[list[int]], kept: Mapping[str, list[int]]
) -> tuple[dict[str, Tensor], Tensor]:
    """As :func:`unsharded.clipped`, with the gradients of frozen rows left out."""
    data = unsharded.records()
    exact.load_state_dict({n: p.double() for n, p in state.items()})
    sums = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in state.items()}
    masks = {}
    for table, rows in kept.items():
        mask = torch.zeros(TABLES[table][0], 1, dtype=torch.float64)
        mask[rows] = 1.0
        masks[parameter_of(table)] = mask
    norms = []
    for unit in units:
        grads: dict[str, Tensor] = {}
        for record in unit:
            for n, g in unsharded._gradient(exact, data.select([record])).items():
                g = g * masks[n] if n in masks else g
                grads[n] = grads[n] + g if n in grads else g
        norms.append(float(sum(g.square().sum() for g in grads.values()) ** 0.5))
        for n, g in grads.items():
            sums[n] += g * min(1.0, CLIP * ROUNDING_MARGIN / norms[-1])
    return sums, torch.tensor(norms, dtype=torch.float64)
