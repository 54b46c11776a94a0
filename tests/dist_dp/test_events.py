"""What steps of each kind cost, alone and together, against dp_accounting called directly."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import dp_accounting as dp
import pytest
from dp_accounting.pld import PLDAccountant

from dist_dp.accounting import delta_of, epsilon_of
from dist_dp.errors import ConfigError
from dist_dp.events import (
    GaussianEvent,
    LaplaceEvent,
    PrivacyEvent,
    PureEvent,
    event_from_json,
    event_to_json,
    gaussians_together,
)

DELTA = 1e-6
MIXTURES: dict[str, dict[PrivacyEvent, int]] = {
    "several noise levels and rates": {
        GaussianEvent(1.1, 0.01): 300, GaussianEvent(0.8, 0.002): 1000, GaussianEvent(2.0, 0.1): 20,
    },
    "full batches": {GaussianEvent(30.0): 200, GaussianEvent(9.0): 1, GaussianEvent(1.5, 0.02): 90},
    "a selection, then training": {PureEvent(0.4): 1, GaussianEvent(1.0, 0.01): 500},
    "selections and counts": {
        PureEvent(0.05): 12, LaplaceEvent(20.0): 8, LaplaceEvent(3.0, 0.1): 9,
    },
}  # fmt: skip


def directly(events: Mapping[PrivacyEvent, int], epsilon: float) -> float:
    """δ by dp_accounting's own accountant, given its own events, and by hand for pure ones.

    The worst (e, 0) mechanism is randomised response: a loss of e or -e, the former with
    probability 1/(1 + exp(-e)).
    """
    losses = {0.0: 1.0}
    accountant = PLDAccountant(dp.NeighboringRelation.ADD_OR_REMOVE_ONE)
    for event, count in events.items():
        match event:
            case PureEvent(loss):
                heads = 1 / (1 + math.exp(-loss))
                for _ in range(count):
                    more: dict[float, float] = {}
                    for before, p in losses.items():
                        for after, q in ((before + loss, heads), (before - loss, 1 - heads)):
                            more[round(after, 9)] = more.get(round(after, 9), 0.0) + p * q
                    losses = more
                continue
            case GaussianEvent(sigma, rate):
                each: Any = dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(sigma))
            case LaplaceEvent(scale, rate):
                each = dp.LaplaceDpEvent(scale)
                if rate < 1:
                    each = dp.PoissonSampledDpEvent(rate, each)
        accountant.compose(dp.SelfComposedDpEvent(each, count))
    return sum(
        p * (float(accountant.get_delta(epsilon - loss)) if loss < epsilon else 1.0)
        for loss, p in losses.items()
    )


@pytest.mark.parametrize("name", MIXTURES)
def test_composition_is_dp_accountings(name: str) -> None:
    events = MIXTURES[name]
    found = epsilon_of(events, DELTA)
    assert found > 0.5
    assert directly(events, found) == pytest.approx(DELTA, rel=5e-3)
    assert delta_of(events, found) == pytest.approx(DELTA, rel=1e-6)


def test_pure_events_alone_add_up() -> None:
    """Twelve selections of 0.05 are (0.6, 0), so ε at δ is at most that, and little less."""
    found = epsilon_of({PureEvent(0.05): 12}, 1e-12)
    assert 0.59 < found <= 0.6 + 1e-3


def test_gaussians_on_one_sample_are_one_gaussian() -> None:
    """Exact without sampling; with it, two draws of a sample are not one draw."""
    both = gaussians_together([2.0, 3.0])
    assert both.noise_multiplier == pytest.approx(1 / math.sqrt(1 / 4 + 1 / 9))
    apart = epsilon_of({GaussianEvent(2.0): 1, GaussianEvent(3.0): 1}, DELTA)
    assert epsilon_of({both: 1}, DELTA) == pytest.approx(apart, rel=1e-3)
    # One record, q = 0.01: beside a large loss, sampling twice would have to be lucky twice.
    shared = delta_of({gaussians_together([0.5, 0.5], 0.01): 1}, 6.0)
    separate = delta_of({GaussianEvent(0.5, 0.01): 2}, 6.0)
    assert shared > 1.5 * separate
    assert not gaussians_together([2.0, 0.0]).is_private
    with pytest.raises(ConfigError, match="empty"):
        gaussians_together([])


def test_joint_sampling_by_quadrature() -> None:
    """δ of two noisy sums of one sample, from the densities of both in two dimensions."""
    np = pytest.importorskip("numpy")
    sigmas, q, epsilon = (1.0, 1.5), 0.1, 0.5
    grid = np.arange(-14.0, 14.0, 0.02)
    x, y = np.meshgrid(grid, grid, indexing="ij")

    def density(mean: float) -> Any:
        return np.exp(
            -((x - mean) ** 2) / 2 / sigmas[0] ** 2 - (y - mean) ** 2 / 2 / sigmas[1] ** 2
        )

    area = 0.02**2 / (2 * math.pi * sigmas[0] * sigmas[1])
    without, with_it = density(0.0), (1 - q) * density(0.0) + q * density(1.0)
    factor = math.exp(epsilon)
    deltas = [
        float(np.maximum(p - factor * r, 0).sum() * area)
        for p, r in ((with_it, without), (without, with_it))
    ]
    assert delta_of({gaussians_together(sigmas, q): 1}, epsilon) == pytest.approx(
        max(deltas), rel=2e-3
    )


@pytest.mark.parametrize("event", [e for events in MIXTURES.values() for e in events])
def test_round_trip(event: PrivacyEvent) -> None:
    assert event_from_json(event_to_json(event)) == event


def test_what_makes_no_sense_is_named() -> None:
    for wrong in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ConfigError, match="epsilon of an event"):
            PureEvent(wrong)
    with pytest.raises(ConfigError, match="noise_multiplier is -1"):
        LaplaceEvent(-1.0)
    with pytest.raises(ConfigError, match="sample_rate is 2"):
        LaplaceEvent(1.0, 2.0)
    with pytest.raises(ConfigError, match="use the accountant 'pld'"):
        epsilon_of({PureEvent(0.5): 3}, DELTA, accountant="rdp")
    with pytest.raises(ConfigError, match="not \\['epsilon'\\]"):
        event_from_json({"kind": "pure", "sigma": 1.0})
    assert epsilon_of({LaplaceEvent(0.0): 1}, DELTA) == math.inf


@pytest.mark.parametrize("kind", [GaussianEvent, LaplaceEvent])
@pytest.mark.parametrize("noise", [1e-320, 1e-200, 1e-8, 1e-3, 1e200, 1e308])
def test_any_noise_has_a_bound(kind: type[GaussianEvent | LaplaceEvent], noise: float) -> None:
    """An error that is no `DistDpError` here ended other jobs' calls of the accountant too."""
    found = epsilon_of({kind(noise, 1e-3): 100}, DELTA)
    assert found == (math.inf if noise < 1 else 0.0)
    assert delta_of({kind(noise, 1e-3): 100}, 1.0) == pytest.approx(float(noise < 1), abs=1e-12)


@pytest.mark.parametrize("rate", [1e-320, 1e-17, 1 - 2**-53])
def test_any_sample_rate_has_a_bound(rate: float) -> None:
    low = epsilon_of({GaussianEvent(5.0, rate): 100}, DELTA)
    assert 0 <= low <= epsilon_of({GaussianEvent(5.0, 1.0): 100}, DELTA) * (1 + 1e-6)
    assert (low > 1) == (rate > 0.5)


def test_a_pure_event_of_any_size_has_a_bound() -> None:
    assert epsilon_of({PureEvent(800.0): 10}, DELTA) == math.inf
    assert epsilon_of({PureEvent(1e300): 10}, DELTA) == math.inf


def test_several_gaussians_of_any_noise_are_one() -> None:
    assert gaussians_together([3e200, 4e200], 0.1).noise_multiplier == pytest.approx(2.4e200)
    assert gaussians_together([1e-320, 1.0], 0.1).noise_multiplier == 1e-320
    with pytest.raises(ConfigError, match="nan"):
        gaussians_together([1.0, math.nan], 0.1)


@pytest.mark.slow
def test_a_million_steps_take_under_two_seconds() -> None:
    dp.pld  # noqa: B018  # imported before the clock starts
    begin = time.perf_counter()
    found = epsilon_of({GaussianEvent(0.8, 1e-4): 10**6}, 1e-7)
    assert time.perf_counter() - begin < 2.0
    assert 0.5 < found < 1.5
