"""How often rows survive, in the mechanism as it runs, against the closed form.

A batch of eight records is selected from at many steps. A row with count c survives with
probability Φ((c − τ) / (σ₁C₁)), touched or not. Level 1e-6 over all rows, fixed keys; each planted
fault is seen.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from scipy.stats import binom, norm

from tests.dist_dp import sparse_reference, sparse_runs, unsharded
from tests.dist_dp.sparse_runs import FAULTS, SETTINGS
from tests.dist_dp.worlds import run_world

SIGMA, STEPS, LEVEL = 0.5, 600, 1e-6


@cache
def counts(mechanism: str) -> dict[str, list[float]]:
    """Σ of contributions by table and row, by Python sets."""
    kept = sparse_reference.KEPT if mechanism == "adafest+" else {}
    found = {t: [0.0] * rows for t, (rows, _) in unsharded.TABLES.items()}
    for record in sparse_runs.RECORDS:
        norm_bound = SETTINGS[mechanism].contribution_norm
        sent = sparse_reference.contributions([record], kept, norm_bound)
        for (table, row), weight in sent.items():
            found[table][row] += weight
    return found


def unlikely(mechanism: str, times: dict[str, Any]) -> list[Any]:
    """Rows whose number of survivals is outside its interval."""
    settings = SETTINGS[mechanism]
    deviation = settings.selection_multiplier(SIGMA) * settings.contribution_norm
    kept = sparse_reference.KEPT if mechanism == "adafest+" else {}
    tau = settings.threshold
    assert isinstance(tau, float)
    cells = sum(rows for rows, _ in unsharded.TABLES.values())
    found = []
    for table, by_row in counts(mechanism).items():
        for row, count in enumerate(by_row):
            wanted = float(norm.sf((tau - count) / deviation))
            if row not in kept.get(table, [row]):
                wanted = 0.0
            low, high = binom.interval(1 - LEVEL / cells, STEPS, wanted)
            if not low <= int(times[table][row]) <= high:
                found.append((table, row, count, int(times[table][row]) / STEPS, wanted))
    return found


def survivals(mechanism: str, fault: str | None = None) -> dict[str, Any]:
    (times,) = run_world(sparse_runs.survivals, 1, mechanism, SIGMA, STEPS, fault)
    return times  # type: ignore[no-any-return]


@pytest.mark.parametrize("mechanism", ["adafest", "adafest+"])
def test_rows_survive_with_the_probability_of_their_counts(mechanism: str) -> None:
    by_row = [c for row in counts(mechanism).values() for c in row]
    assert min(by_row) == 0.0 and len({*by_row}) > 5, "touched and untouched rows are needed"
    assert not unlikely(mechanism, survivals(mechanism))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault: str) -> None:
    assert unlikely("adafest", survivals("adafest", fault))


def test_a_row_that_was_not_chosen_never_survives() -> None:
    times = survivals("adafest+")
    for table, rows in sparse_reference.KEPT.items():
        others = torch.ones(len(times[table]), dtype=torch.bool)
        others[rows] = False
        assert int(times[table][others].sum()) == 0
