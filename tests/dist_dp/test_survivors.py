"""Which rows survive a selection: probabilities against closed forms, and nothing of the placement.

Statistical tests use fixed keys; each is at level 1e-6 over everything it looks at.
"""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import binom, chi2, norm

from dist_dp import kernels
from dist_dp.survivors import SelectionNoise

LEVEL = 1e-6
NOISE = SelectionNoise.of_table(kernels.derive_key(bytes(range(32)), "tables", "t"))
STEPS = 3000


def tail(threshold: float, deviation: float) -> float:
    return float(norm.sf(threshold / deviation))


def untouched(step: int, probability: float, rows: int, **part: int) -> list[int]:
    bounds = {"first": 0, "last": rows} | part
    found = NOISE.of_untouched(step=step, probability=probability, num_rows=rows, **bounds)
    return found.tolist()


def test_touched_rows_survive_as_their_counts_say() -> None:
    """Rows of counts 0 … 5, τ = 2.5, deviation 1.3: binomial counts over the steps."""
    rows = torch.arange(60)
    counts = (rows % 6).to(torch.float64)
    alive = torch.zeros(60)
    for step in range(1, STEPS + 1):
        alive += NOISE.of_touched(rows, counts, step=step, threshold=2.5, deviation=1.3)
    for count in range(6):
        mine = int(alive[counts == count].sum())
        wanted = tail(2.5 - count, 1.3)
        low, high = binom.interval(1 - LEVEL / 6, 10 * STEPS, wanted)
        assert low <= mine <= high, (count, mine / (10 * STEPS), wanted)


@pytest.mark.parametrize("probability", [0.3, 0.02, 1e-4])
def test_untouched_rows_survive_with_the_tails_probability(probability: float) -> None:
    """Number of survivors, and each of 50 stretches of rows, over the steps."""
    rows, steps = 20_000, 400
    by_stretch = torch.zeros(50)
    total = 0
    for step in range(1, steps + 1):
        found = untouched(step, probability, rows)
        assert found == sorted(set(found))
        total += len(found)
        by_stretch += torch.bincount(torch.tensor(found, dtype=torch.int64) // 400, minlength=50)
    low, high = binom.interval(1 - LEVEL, rows * steps, probability)
    assert low <= total <= high
    expected = rows * steps * probability / 50
    statistic = float(((by_stretch - expected) ** 2).sum() / (expected * (1 - probability)))
    assert chi2.ppf(LEVEL, 50) <= statistic <= chi2.isf(LEVEL, 50)


def test_rows_survive_independently_of_each_other() -> None:
    """Pairs of neighbours, and the same row at two steps: as often together as chance has it."""
    probability, rows, steps = 0.2, 4000, 250
    neighbours = again = 0
    before = torch.zeros(rows, dtype=torch.bool)
    for step in range(1, steps + 1):
        now = torch.zeros(rows, dtype=torch.bool)
        now[untouched(step, probability, rows)] = True
        neighbours += int((now[::2] & now[1::2]).sum())
        again += int((now & before).sum())
        before = now
    low, high = binom.interval(1 - LEVEL / 2, rows // 2 * steps, probability**2)
    assert low <= neighbours <= high
    low, high = binom.interval(1 - LEVEL / 2, rows * (steps - 1), probability**2)
    assert low <= again <= high


@pytest.mark.parametrize("probability", [0.7, 0.05, 1e-3])
def test_a_range_has_the_rows_that_the_whole_has_there(probability: float) -> None:
    rows = 50_000
    whole = untouched(3, probability, rows)
    for first, last in [(0, 1), (0, 17), (999, 1001), (12_345, 39_001), (49_999, 50_000)]:
        part = untouched(3, probability, rows, first=first, last=last)
        assert part == [row for row in whole if first <= row < last]


def test_a_huge_table_costs_its_survivors() -> None:
    """10^9 rows and a hundred survivors: a few calls for random numbers, no pass over rows."""
    drawn = []
    uniforms = kernels.uniforms

    def counted(key: bytes, step: int, count: int, **options: int) -> object:
        drawn.append(count)
        return uniforms(key, step, count, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "uniforms", counted)
        found = untouched(1, 1e-7, 10**9)
    assert 50 < len(found) < 160
    assert sum(drawn) < 500


def test_no_noise_means_no_survivor_but_by_count() -> None:
    assert untouched(1, 0.0, 100) == []
    assert untouched(1, 1.0, 5) == [0, 1, 2, 3, 4]
    counts = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    alive = NOISE.of_touched(torch.arange(3), counts, step=1, threshold=1.0, deviation=0.0)
    assert alive.tolist() == [False, True, True]


def test_other_steps_and_tables_draw_other_rows() -> None:
    other = SelectionNoise.of_table(kernels.derive_key(bytes(range(32)), "tables", "u"))
    mine = untouched(1, 0.1, 1000)
    theirs = other.of_untouched(step=1, probability=0.1, num_rows=1000, first=0, last=1000)
    assert mine != untouched(2, 0.1, 1000)
    assert mine != theirs.tolist()
    assert math.isclose(len(mine), 100, abs_tol=60)
