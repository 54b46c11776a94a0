"""Reference values that others published, and the promises of our own functions."""

from __future__ import annotations

import math
import time

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant, compute_epsilon
from scipy.optimize import brentq

from dist_dp.accounting import (
    AccountantKind,
    GaussianEvent,
    delta_of,
    epsilon_of,
)
from dist_dp.calibration import calibrate_noise_multiplier
from dist_dp.errors import ConfigError

ADD_OR_REMOVE = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE


# tensorflow/privacy@03035d5d, compute_dp_sgd_privacy_test.py: N, batch, σ, epochs, δ → RDP ε;
# the PLD column was computed with dp-accounting 0.6.0 through its own accountant class.
@pytest.mark.parametrize(
    ("n", "batch", "sigma", "epochs", "delta", "rdp", "pld"),
    [
        (60_000, 150, 1.3, 15, 1e-5, 0.7242234026109595, 0.64011),
        (100_000, 100, 1.0, 30, 1e-7, 1.4154988495444842, 1.09820),
    ],
)
def test_tensorflow_privacy_epsilons(
    n: int, batch: int, sigma: float, epochs: int, delta: float, rdp: float, pld: float
) -> None:
    events = {GaussianEvent(sigma, batch / n): math.ceil(epochs * n / batch)}
    assert epsilon_of(events, delta, accountant="rdp") == pytest.approx(rdp, rel=1e-10)
    assert epsilon_of(events, delta) == pytest.approx(pld, abs=5e-6)


def test_tensorflow_privacy_epsilon_without_hope() -> None:
    """Same file, third line: N 1e8, batch 1024, σ 0.1, 10 epochs, δ 1e-7 → order 1.25.

    The published value is for the orders of that file; today's defaults start lower and give less.
    """
    event, steps = GaussianEvent(0.1, 1024 / 1e8), math.ceil(10 * 1e8 / 1024)
    accountant = RdpAccountant([1.25, 1.5, 1.75, 2.0, 2.25, 2.5, *range(3, 64)])
    accountant.compose(event.to_dp_event(steps))
    epsilon, order = accountant.get_epsilon_and_optimal_order(1e-7)
    assert (epsilon, order) == (pytest.approx(5907982.3113984, rel=1e-12), 1.25)
    assert epsilon_of({event: steps}, 1e-7, accountant="rdp") < epsilon
    assert 100 < epsilon_of({event: steps}, 1e-7) < epsilon


# Same file, _compute_dp_sgd_example_privacy: 1.2 epochs, σ 0.7, δ 1e-5. Micro-batches halve σ; no
# sampling rate means 2 plain Gaussian steps, otherwise steps = ceil(1.2 / q).
@pytest.mark.parametrize(
    ("microbatching", "rate", "rdp", "pld"),
    [
        (False, None, 10.8602036, 10.1224946),
        (True, None, 26.2880374, 24.7160779),
        (False, 1e-2, 3.2392676, 2.4612381),
        (True, 1e-2, 22.6248601, 18.6977407),
    ],
)
def test_tensorflow_privacy_example_privacy(
    microbatching: bool, rate: float | None, rdp: float, pld: float
) -> None:
    sigma = 0.35 if microbatching else 0.7
    events = (
        {GaussianEvent(sigma): 2}
        if rate is None
        else {GaussianEvent(sigma, rate): math.ceil(1.2 / rate)}
    )
    assert epsilon_of(events, 1e-5, accountant="rdp") == pytest.approx(rdp, abs=5.1e-8)
    assert epsilon_of(events, 1e-5) == pytest.approx(pld, abs=5.1e-8)


def test_tensorflow_privacy_statement() -> None:
    """Same file, privacy statement: N 10000, batch 64, 5 epochs, σ 2 halved by micro-batching."""
    once, poisson = {GaussianEvent(1.0): 5}, {GaussianEvent(1.0, 64 / 10_000): 782}
    assert epsilon_of(once, 1e-6, accountant="rdp") == pytest.approx(13.376, abs=5.1e-4)
    assert epsilon_of(poisson, 1e-6, accountant="rdp") == pytest.approx(1.616, abs=5.1e-4)
    assert epsilon_of(once, 1e-6) == pytest.approx(12.595, abs=5.1e-4)
    assert epsilon_of(poisson, 1e-6) == pytest.approx(1.199, abs=5.1e-4)


# The same statement for a user with several examples; user-level privacy is of the library only.
@pytest.mark.parametrize(
    ("accountant", "examples", "published"),
    [("rdp", 3, 56.224), ("pld", 2, 30.579), ("rdp", 10, 366.374)],
)
def test_tensorflow_privacy_user_level_without_sampling(
    accountant: AccountantKind, examples: int, published: float
) -> None:
    """All of a user's examples in every step: the sensitivity grows by their number."""
    events = {GaussianEvent(1.0 / examples): 5}
    epsilon = epsilon_of(events, 1e-6, accountant=accountant)
    assert epsilon == pytest.approx(published, abs=5.1e-4)


def test_tensorflow_privacy_user_level_with_sampling() -> None:
    """RDP by group privacy (kε, δ (e^kε - 1) / (e^ε - 1)), PLD by the mixture over draws."""
    events = {GaussianEvent(1.0, 64 / 10_000): 782}

    def excess(log_delta: float, examples: int) -> float:
        one = epsilon_of(events, math.exp(log_delta), accountant="rdp")
        ratio = math.expm1(examples * one) / math.expm1(one)
        return log_delta + math.log(ratio) - math.log(1e-6)

    log_delta = brentq(excess, -25.0, math.log(1e-6), args=(3,))
    user = 3 * epsilon_of(events, math.exp(log_delta), accountant="rdp")
    assert user == pytest.approx(6.425, abs=5.1e-4)
    # At most 10 examples: published as infinite, because no δ of one example is small enough.
    assert min(excess(-x, 10) for x in range(14, 100)) > 0

    q = 64 / 10_000
    draws = dp_accounting.dp_event.MixtureOfGaussiansDpEvent(
        1.0, [0, 1, 2], [(1 - q) ** 2, 2 * q * (1 - q), q**2]
    )
    accountant = PLDAccountant(ADD_OR_REMOVE, 1e-3).compose(draws, 782)
    assert accountant.get_epsilon(1e-6) == pytest.approx(2.532, abs=5.1e-4)


def test_opacus_epsilon() -> None:
    """pytorch/opacus@4d0ebc84, accountants_test.py: σ 1.5, q 0.04, 2250 steps, δ 1e-5.

    RDP differs in the fifth digit (another routine for fractional orders: 7.32911 there, 7.32933
    here); PRV reports the upper end of its error, 6.7774, where PLD has 6.76879.
    """
    events = {GaussianEvent(1.5, 0.04): 2250}
    assert epsilon_of(events, 1e-5, accountant="rdp") == pytest.approx(7.32911117143, rel=4e-5)
    assert epsilon_of(events, 1e-5, accountant="rdp") == pytest.approx(7.32933, abs=5e-6)
    assert epsilon_of(events, 1e-5) == pytest.approx(6.76879, abs=5e-6)
    assert epsilon_of(events, 1e-5) < 6.777395712150674


# Same file: calibration to ε 8, q 0.04, δ 1e-5. Opacus stops within 0.01 of ε, and PRV adds the
# error it allows (another 0.01), so its σ are a little large.
@pytest.mark.parametrize(
    ("accountant", "steps", "published", "slack"),
    [
        ("rdp", 2250, 1.416, 0.01),
        ("rdp", 2000, 1.3562, 0.01),
        ("pld", 2250, 1.34765625, 0.02),
        ("pld", 2000, 1.2915, 0.02),
    ],
)
def test_opacus_calibration(
    accountant: AccountantKind, steps: int, published: float, slack: float
) -> None:
    at_published = epsilon_of({GaussianEvent(published, 0.04): steps}, 1e-5, accountant=accountant)
    assert 8.0 - slack < at_published < 8.0 + 1e-3
    if accountant == "rdp" or steps == 2000:  # the other takes as long again
        sigma = calibrate_noise_multiplier(8.0, 1e-5, 0.04, steps, accountant)
        assert published * (1 - 2e-3) < sigma < published + 1e-4


def test_google_rdp_values() -> None:
    """google/differential-privacy@b5b0286e, rdp_privacy_accountant_test.py."""
    orders = [1.5, 2.5, 5, 50, 100]
    accountant = RdpAccountant(orders)
    accountant.compose(GaussianEvent(2.5, 0.01).to_dp_event(50))
    published = [6.70579741e-04, 1.08548710e-03, 2.18075656e-03, 2.38460375e-02, 1.67416308e02]
    assert list(accountant._rdp) == pytest.approx(published, rel=1e-8)

    accountant = RdpAccountant([1 + x / 1000 for x in range(1, 99_000)])
    accountant.compose(GaussianEvent(4.530877117).to_dp_event(1))
    assert accountant.get_epsilon(1e-6) == pytest.approx(1.0, abs=1e-5)

    epsilon, order = compute_epsilon(list(range(2, 33)), [1.1] * 31, 1e-5)
    assert (epsilon, order) == (pytest.approx(1.32783806176, rel=1e-11), 32)


@pytest.mark.parametrize(("sigma", "bound"), [(1.13, 19.74), (8.83, 2.04)])
def test_google_tree_aggregation(sigma: float, bound: float) -> None:
    """Same file: DP-FTRL, 1600 steps, δ 1e-6 (of the library only: we offer no such event)."""
    accountant = RdpAccountant(
        neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_SPECIAL
    )
    accountant.compose(dp_accounting.SingleEpochTreeAggregationDpEvent(sigma, 1600))
    assert accountant.get_epsilon(1e-6) < bound


def test_google_pld_values() -> None:
    """google/differential-privacy@b5b0286e, pld_privacy_accountant_test.py."""
    three = {GaussianEvent(math.sqrt(3)): 3}
    assert delta_of(three, 1.0) == pytest.approx(0.126936, abs=1.1e-6)
    assert delta_of({GaussianEvent(0.5, 0.2): 3}, 1.0) == pytest.approx(0.15594, abs=1.1e-5)
    # TPR 0.38914 at FPR 0.1 and μ = 1 say that the three steps are one Gaussian of σ 1.
    assert delta_of(three, 1.0) == pytest.approx(delta_of({GaussianEvent(1.0): 1}, 1.0), rel=1e-9)


def test_mixed_events_compose_as_in_the_library() -> None:
    events = {GaussianEvent(1.5, 0.01): 300, GaussianEvent(1.2, 0.02): 100, GaussianEvent(5.0): 2}
    for kind, accountant in (
        ("pld", PLDAccountant(ADD_OR_REMOVE)),
        ("rdp", RdpAccountant(neighboring_relation=ADD_OR_REMOVE)),
    ):
        for event, count in events.items():
            accountant.compose(event.to_dp_event(count))
        ours = epsilon_of(events, 1e-6, accountant=kind)  # type: ignore[arg-type]
        assert ours == pytest.approx(accountant.get_epsilon(1e-6), rel=1e-8)
        ours = delta_of(events, 2.0, accountant=kind)  # type: ignore[arg-type]
        assert ours == pytest.approx(accountant.get_delta(2.0), rel=1e-6)


def test_epsilon_at_the_edges() -> None:
    assert epsilon_of({}, 1e-5) == 0.0
    assert epsilon_of({GaussianEvent(1.0, 0.1): 0}, 1e-5) == 0.0
    assert delta_of({}, 1.0) == 0.0
    assert math.isinf(epsilon_of({GaussianEvent(0.0, 0.1): 1}, 1e-5))
    assert math.isinf(epsilon_of({GaussianEvent(0.0, 0.1): 1}, 1e-5, accountant="rdp"))
    assert delta_of({GaussianEvent(0.0, 0.1): 1}, 1.0) == 1.0


def test_a_million_steps_are_quick() -> None:
    start = time.perf_counter()
    epsilon = epsilon_of({GaussianEvent(1.0, 1e-4): 10**6}, 1e-5)
    assert time.perf_counter() - start < 5
    assert epsilon == pytest.approx(0.48417, abs=5e-6)


def test_wide_grid_stays_an_upper_bound() -> None:
    """Beyond a loss of 100 the grid widens: one Gaussian has a closed form to compare with."""
    sigma, delta = 0.05, 1e-5
    epsilon = epsilon_of({GaussianEvent(sigma): 1}, delta)

    def exact_delta(eps: float) -> float:  # Balle and Wang 2018, theorem 8
        phi = lambda x: math.erfc(-x / math.sqrt(2)) / 2  # noqa: E731
        half, shift = 1 / (2 * sigma), eps * sigma
        # The second term is e^ε times a tail too small for floats; Mills' ratio gives its size.
        tail = half + shift
        second = math.exp(-((half - shift) ** 2) / 2) / (tail * math.sqrt(2 * math.pi))
        return phi(half - shift) - second

    assert exact_delta(epsilon) == pytest.approx(delta, rel=2e-2)
    assert exact_delta(epsilon) <= delta * 1.001


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
@pytest.mark.parametrize(
    ("epsilon", "delta", "rate", "steps"), [(0.3, 1e-6, 1e-3, 2_000), (1.0, 1e-5, 1.0, 10)]
)
def test_calibration_is_tight_and_safe(
    accountant: AccountantKind, epsilon: float, delta: float, rate: float, steps: int
) -> None:
    sigma = calibrate_noise_multiplier(epsilon, delta, rate, steps, accountant)
    at = {GaussianEvent(sigma, rate): steps}
    less = {GaussianEvent(sigma * (1 - 3e-5), rate): steps}
    assert epsilon_of(at, delta, accountant=accountant) <= epsilon
    assert epsilon_of(less, delta, accountant=accountant) > epsilon


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ((0.0, 1e-5, 0.1, 10), "epsilon"),
        ((-1.0, 1e-5, 0.1, 10), "epsilon"),
        ((math.inf, 1e-5, 0.1, 10), "epsilon"),
        ((math.nan, 1e-5, 0.1, 10), "epsilon"),
        ((1.0, 0.0, 0.1, 10), "delta"),
        ((1.0, 1.0, 0.1, 10), "delta"),
        ((1.0, 1e-5, 0.0, 10), "sample_rate"),
        ((1.0, 1e-5, 1.5, 10), "sample_rate"),
        ((1.0, 1e-5, 0.1, 0), "steps"),
        ((1.0, 1e-30, 0.1, 10), "cannot be reached"),
    ],
)
def test_calibration_refuses(values: tuple[float, float, float, int], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        calibrate_noise_multiplier(*values)


@pytest.mark.parametrize(("sigma", "rate"), [(-1.0, 0.1), (math.nan, 0.1), (1.0, 0.0), (1.0, 2.0)])
def test_event_refuses(sigma: float, rate: float) -> None:
    with pytest.raises(ConfigError):
        GaussianEvent(sigma, rate)


def test_event_does_not_tell_integers_from_floats() -> None:
    assert GaussianEvent(1, 1) == GaussianEvent(1.0) and hash(GaussianEvent(1)) is not None
    with pytest.raises(ConfigError, match="step count"):
        epsilon_of({GaussianEvent(1.0): -1}, 1e-5)
    with pytest.raises(ConfigError, match="'pld' or 'rdp'"):
        epsilon_of({GaussianEvent(1.0): 1}, 1e-5, accountant="gdp")  # type: ignore[arg-type]
