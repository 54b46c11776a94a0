"""Private choice of the most frequent rows: its law, its noise, its order, what it refuses.

Statistical tests have fixed keys and the level 1e-4; planted faults fall below 1e-6.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from dist_dp import frequent_rows
from dist_dp.distributed import ensure_process_group
from dist_dp.errors import ConfigError
from dist_dp.events import GaussianEvent, LaplaceEvent, PureEvent, TopKEvent
from dist_dp.frequent_rows import (
    noise_scale,
    private_rows,
    top_rows_by_gaussian,
    top_rows_by_gumbel,
)
from dist_dp.row_counts import TableFeatures
from tests.dist_dp.worlds import run_world

SECRET = bytes(range(7, 39))
LEVEL, FAULTY = 1e-4, 1e-6
COUNTS = torch.tensor([4, 3, 3, 1, 0, 0])
RUNS = 4000
K, SCALE = 2, 1.5

Choose = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def _group() -> None:
    ensure_process_group()


def by_peeling(counts: Tensor, k: int, scale: float) -> dict[tuple[int, ...], float]:
    """Probability of every set of k rows, chosen one after another by exponential mechanisms."""
    found: Counter[tuple[int, ...]] = Counter()
    weights = [math.exp(count / scale) for count in counts.tolist()]
    for order in itertools.permutations(range(len(weights)), k):
        probability, left = 1.0, sum(weights)
        for row in order:
            probability *= weights[row] / left
            left -= weights[row]
        found[tuple(sorted(order))] += probability
    return dict(found)


def by_quadrature(counts: Tensor, scale: float) -> dict[tuple[int, ...], float]:
    """Probability of every row to be the largest with normal noise."""
    grid = np.linspace(-15, 25, 20_001)
    values = counts.tolist()
    found = {}
    for row, count in enumerate(values):
        others = [stats.norm.cdf(grid, c, scale) for r, c in enumerate(values) if r != row]
        density = stats.norm.pdf(grid, count, scale) * np.prod(others, axis=0)
        found[(row,)] = float(density.sum() * (grid[1] - grid[0]))
    return found


def p_value(choose: Choose, k: int, expected: Mapping[tuple[int, ...], float]) -> float:
    """Of a χ² test of the sets chosen in many tables."""
    drawn = Counter(
        tuple(choose(COUNTS, k, SCALE, secret=SECRET, table=f"t{n}").tolist()) for n in range(RUNS)
    )
    sets = sorted(expected)
    assert set(drawn) <= set(sets) and sum(expected.values()) == pytest.approx(1, abs=1e-6)
    wanted = np.array([expected[s] for s in sets])
    return float(stats.chisquare([drawn[s] for s in sets], wanted / wanted.sum() * RUNS).pvalue)


def test_gumbel_choice_has_the_law_of_peeling() -> None:
    assert p_value(top_rows_by_gumbel, K, by_peeling(COUNTS, K, SCALE)) > LEVEL


def test_gaussian_choice_has_its_law() -> None:
    assert p_value(top_rows_by_gaussian, 1, by_quadrature(COUNTS, SCALE)) > LEVEL


def only_where_counted(right: Any) -> Any:
    def wrong(counts: Tensor, k: int, noise: Any, table: str, device: Any) -> Tensor:
        held = (counts > 0).numpy()
        return right(counts, k, lambda a, b: noise(a, b) * held[a:b], table, device)

    return wrong


def without_noise(right: Any) -> Any:
    def wrong(counts: Tensor, k: int, noise: Any, table: str, device: Any) -> Tensor:
        return right(counts, k, lambda a, b: noise(a, b) * 0, table, device)

    return wrong


def half_the_noise(right: Any) -> Any:
    def wrong(counts: Tensor, k: int, noise: Any, table: str, device: Any) -> Tensor:
        return right(counts, k, lambda a, b: noise(a, b) / 2, table, device)

    return wrong


@pytest.mark.parametrize("fault", [only_where_counted, without_noise, half_the_noise])
def test_planted_faults_are_seen(fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frequent_rows, "_top_rows", fault(frequent_rows._top_rows))
    assert p_value(top_rows_by_gumbel, K, by_peeling(COUNTS, K, SCALE)) < FAULTY
    assert p_value(top_rows_by_gaussian, 1, by_quadrature(COUNTS, SCALE)) < FAULTY


def noise_of(choose: Choose, rows: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What is added to counts, by row."""
    seen: list[Any] = []
    monkeypatch.setattr(
        frequent_rows, "_top_rows", lambda c, k, noise, t, d: seen.append(noise(3, 3 + rows)) or c
    )
    choose(COUNTS, 1, 2.0, secret=SECRET, table="t")
    return seen[0]


@pytest.mark.parametrize(
    ("choose", "law"),
    [
        (top_rows_by_gumbel, stats.gumbel_r(scale=2.0)),
        (top_rows_by_gaussian, stats.norm(scale=2.0)),
    ],
)
def test_noise_of_many_rows(choose: Choose, law: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The law, independent neighbours, and the far end, which decides what is chosen."""
    noise = noise_of(choose, 1 << 18, monkeypatch)
    assert stats.kstest(noise, law.cdf).pvalue > LEVEL
    assert abs(np.corrcoef(noise[1:], noise[:-1])[0, 1]) < 4 / math.sqrt(len(noise))
    high = law.isf(100 / len(noise))
    assert stats.poisson(100).sf((noise > high).sum() - 1) > LEVEL
    assert stats.poisson(100).cdf((noise > high).sum()) > LEVEL


def choices(rows: int = 5000, k: int = 40) -> dict[str, list[int]]:
    counts = torch.from_numpy(np.random.default_rng(2).geometric(0.3, rows) - 1)
    found = {}
    for choose in (top_rows_by_gumbel, top_rows_by_gaussian):
        for table in ("a", "b"):
            chosen = choose(counts, k, 2.0, secret=SECRET, table=table)
            found[f"{choose.__name__} {table}"] = chosen.tolist()
    return found


def many_and_few() -> list[dict[str, list[int]]]:
    """Of many rows, and of so few that no rank has as many as are chosen."""
    return [choices(), choices(rows=41)]


def test_the_choice_is_the_same_wherever_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = choices()
    for chosen in alone.values():
        assert chosen == sorted(set(chosen)) and len(chosen) == 40
    assert len({tuple(chosen) for chosen in alone.values()}) == 4
    assert run_world(many_and_few, 3) == [[alone, choices(rows=41)]] * 3
    monkeypatch.setattr(frequent_rows, "_ROWS_AT_ONCE", 777)
    assert choices() == alone


def test_all_tables_at_the_cost_of_one_event() -> None:
    tables = [TableFeatures(name, 6, (name,)) for name in ("a", "b", "c")]
    counted = [(table, COUNTS) for table in tables]
    rows = {"a": 2, "c": 3}
    common: dict[str, Any] = {"secret": SECRET, "num_tables": 2, "max_rows_per_unit": 4}
    found = private_rows(counted, rows, TopKEvent(0.5, 5), **common)
    expected = top_rows_by_gumbel(COUNTS, 3, 2.0, secret=SECRET, table="c")
    assert list(found) == ["a", "c"] and found["c"].equal(expected)
    found = private_rows(counted, rows, GaussianEvent(0.5), **common)
    scale = 0.5 * math.sqrt(8)
    assert found["c"].equal(top_rows_by_gaussian(COUNTS, 3, scale, secret=SECRET, table="c"))
    assert found["c"].dtype == torch.int64
    with pytest.raises(ConfigError, match="5 rows are to be chosen, but 4 selections"):
        private_rows(counted, rows, TopKEvent(0.5, 4), **common)
    with pytest.raises(ConfigError, match="rows of 2 tables are to be chosen, noise is for 1"):
        private_rows(counted, rows, GaussianEvent(0.5), **{**common, "num_tables": 1})
    with pytest.raises(ConfigError, match="no counts of table 'c'"):
        private_rows(counted[:2], rows, TopKEvent(0.5, 5), **common)
    with pytest.raises(ConfigError, match="7 of table 'a' are to be kept, but it has only 6 rows"):
        private_rows(counted, {"a": 7}, TopKEvent(0.5, 7), **common)
    for wrong in (PureEvent(1.0), LaplaceEvent(1.0), GaussianEvent(1.0, 0.5), GaussianEvent(0.0)):
        with pytest.raises(ConfigError, match="cannot be chosen at the cost"):
            noise_scale(wrong, 2, 4)


def test_without_much_noise_the_most_frequent_are_chosen() -> None:
    chosen = top_rows_by_gumbel(COUNTS, 3, 1e-9, secret=SECRET, table="t")
    assert chosen.tolist() == [0, 1, 2]
    everything = top_rows_by_gaussian(COUNTS, 6, 5.0, secret=SECRET, table="t")
    assert everything.tolist() == [0, 1, 2, 3, 4, 5]
