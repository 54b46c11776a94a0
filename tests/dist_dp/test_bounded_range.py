"""The loss of many selections: above every mechanism's, below the closed forms, near the limit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from dist_dp.accounting import delta_of, epsilon_of
from dist_dp.bounded_range import profiles, selections_pld, worst_profile
from dist_dp.errors import ConfigError
from dist_dp.events import GaussianEvent, PureEvent, TopKEvent, event_from_json, event_to_json


def two_points(t: float, epsilon0: float) -> list[tuple[float, float]]:
    """(loss, its probability) of the mechanism with losses t and t - ε₀ only."""
    p = math.expm1(t - epsilon0) / math.expm1(-epsilon0)
    return [(t, p), (t - epsilon0, 1 - p)]


def delta_by_hand(losses: Sequence[tuple[float, float]], epsilon: float) -> float:
    return math.fsum(p * max(0.0, -math.expm1(epsilon - loss)) for loss, p in losses)


def test_the_worst_of_one_selection() -> None:
    """The closed form is the supremum over all two-point mechanisms, and the recursion finds it."""
    for epsilon0 in (0.01, 0.7, 3.0):
        cells = 16
        grid = np.arange(-cells, cells + 1) * epsilon0 / cells
        closed = worst_profile(grid, epsilon0)
        tried = [
            max(delta_by_hand(two_points(t, epsilon0), e) for t in np.linspace(0, epsilon0, 4001))
            for e in grid
        ]
        assert np.allclose(closed, tried, rtol=1e-5, atol=1e-12)
        once = profiles(epsilon0, 1, cells)[1]
        # Starting from no selection at all the chords have a corner at 0 and are exact.
        assert np.all(once >= closed - 1e-15) and np.allclose(once, closed, rtol=1e-9)
    assert worst_profile(-5.0, 1.0) == pytest.approx(-math.expm1(-5.0))


def test_no_sequence_of_selections_exceeds_the_bound() -> None:
    """Every choice of t, also one that heeds the losses so far; the worst comes near the bound."""
    epsilon0, most, cells = 0.5, 3, 16
    bound = profiles(epsilon0, most, cells)[most]
    grid = np.arange(-most * cells, most * cells + 1) * epsilon0 / cells
    options = np.linspace(0, epsilon0, 9)
    highest = np.zeros(len(grid))
    # t of the first, of the second given the first's outcome, of the third given both.
    for first, up, down in itertools.product(options, repeat=3):
        for last in itertools.product(options[::4], repeat=4):
            losses = []
            for i, (a, p) in enumerate(two_points(first, epsilon0)):
                for j, (b, q) in enumerate(two_points((up, down)[i], epsilon0)):
                    for c, r in two_points(last[2 * i + j], epsilon0):
                        losses.append((a + b + c, p * q * r))
            loss, probability = np.array(losses).T
            excess = np.maximum(0.0, -np.expm1(grid[:, None] - loss)) @ probability
            np.maximum(highest, excess, out=highest)
    assert np.all(highest <= bound + 1e-12)
    # These few values of t come near it, which is 0.2 at ε = 0.
    assert np.all(highest >= bound - 0.012)


def peeling(counts: Sequence[float], k: int, epsilon0: float) -> dict[tuple[int, ...], float]:
    """Probability of every ordered top k of exponential mechanisms, one after another."""
    found = {}
    for chosen in itertools.permutations(range(len(counts)), k):
        probability, left = 1.0, set(range(len(counts)))
        for row in chosen:
            weights = {r: math.exp(epsilon0 * counts[r]) for r in left}
            probability *= weights[row] / sum(weights.values())
            left.remove(row)
        found[chosen] = probability
    return found


def test_real_selections_stay_below() -> None:
    """All sets of counts that one unit more can raise, with both signs, against the PLD."""
    epsilon0, k = 0.8, 3
    pld = selections_pld(epsilon0, k, 1e-4)
    points = np.linspace(-1.0, 2.5, 15)
    bound = np.array([pld.get_delta_for_epsilon(float(e)) for e in points])
    highest = np.zeros(len(points))
    for counts in ((0, 0, 0, 0, 0), (3, 2, 2, 1, 0), (9, 9, 4, 0, 0)):
        before = peeling(counts, k, epsilon0)
        for raised in itertools.product((0, 1), repeat=5):
            after = peeling([c + r for c, r in zip(counts, raised, strict=True)], k, epsilon0)
            for one, other in ((before, after), (after, before)):
                losses = [(math.log(one[o] / other[o]), one[o]) for o in one]
                found = [delta_by_hand(losses, float(e)) for e in points]
                np.maximum(highest, found, out=highest)
    assert np.all(highest <= bound + 1e-9)
    assert highest[points > 0].max() > 0.5 * bound[points > 0].max()


def gaussian_limit(epsilon0: float, selections: int, delta: float) -> float:
    """ε of the Gaussian mechanism that many selections with losses ±ε₀/2 come to."""
    mu = epsilon0 * math.sqrt(selections) / 2

    def excess(epsilon: float) -> float:
        first = norm.cdf(mu / 2 - epsilon / mu)
        return float(first - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)) - delta

    return float(brentq(excess, 0, 500))


@pytest.mark.parametrize(
    ("epsilon0", "selections"),
    [(1e-4, 100_000), (1e-4, 10**7), (1e-3, 10**6), (0.02, 2048), (0.01, 12_345), (0.2, 300)],
)
@pytest.mark.parametrize("delta", [1e-5, 1e-9])
def test_epsilon_of_many(epsilon0: float, selections: int, delta: float) -> None:
    """Above the limit by 3 % at most, below the closed forms of zCDP and plain addition."""
    event = TopKEvent(epsilon0, selections)
    found = epsilon_of({event: 1}, delta)
    limit = gaussian_limit(epsilon0, selections, delta)
    rho = selections * epsilon0**2 / 8
    assert 0.999 * limit <= found <= 1.03 * limit + 1e-4
    assert found < min(rho + 2 * math.sqrt(rho * math.log(1 / delta)), selections * epsilon0)
    assert found < epsilon_of({event: 1}, delta, accountant="rdp")
    assert delta_of({event: 1}, found) == pytest.approx(delta, rel=1e-6)


def test_epsilon_of_few() -> None:
    """No more than (k ε₀, 0) says, up to a cell of the grid; less than by randomised response."""
    for epsilon0, selections in ((0.5, 1), (0.3, 7), (2.0, 3), (1e-5, 10), (30.0, 2)):
        event = TopKEvent(epsilon0, selections)
        for delta in (1e-3, 1e-6, 1e-12):
            found = epsilon_of({event: 1}, delta)
            assert found <= epsilon0 * selections + 1e-4
            if epsilon0 >= 1e-3:
                assert found <= epsilon_of({PureEvent(epsilon0): selections}, delta) + 1e-4
    assert epsilon_of({TopKEvent(0.5, 1): 1}, 1e-3) == pytest.approx(
        brentq(lambda e: float(worst_profile(e, 0.5)) - 1e-3, 0, 0.5), abs=1e-4
    )


def test_a_hopeless_choice_is_infinite_work_neither_nor_free() -> None:
    assert 1400 < epsilon_of({TopKEvent(0.01, 10**8): 1}, 1e-6) < 1520


def test_repeats_and_mixtures_compose() -> None:
    """Twice the choice is one of twice the selections; with training it costs more than either."""
    choice, training = TopKEvent(0.02, 500), {GaussianEvent(1.0, 0.01): 500}
    assert epsilon_of({choice: 2}, 1e-6) == epsilon_of({TopKEvent(0.02, 1000): 1}, 1e-6)
    apart = [epsilon_of({choice: 1}, 1e-6), epsilon_of(training, 1e-6)]
    together = epsilon_of({choice: 1, **training}, 1e-6)
    assert max(apart) < together < sum(apart)
    # What 500 selections come to nearly is the Gaussian mechanism with μ = ε₀ √k / 2.
    limit = GaussianEvent(2 / (0.02 * math.sqrt(500)))
    assert together == pytest.approx(epsilon_of({limit: 1, **training}, 1e-6), rel=0.01)


def test_the_event() -> None:
    event = TopKEvent(0.02, 500)
    assert event_from_json(event_to_json(event)) == event and event.is_private
    for wrong in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ConfigError, match="epsilon0 of a selection"):
            TopKEvent(wrong, 5)
    for number in (0, -3):
        with pytest.raises(ConfigError, match="give 1 or more"):
            TopKEvent(0.1, number)
    with pytest.raises(ConfigError, match="give an integer"):
        TopKEvent(0.1, True)
