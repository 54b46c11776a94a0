"""What a step costs that selects rows one after another and noises their gradients, on one sample.

Both see the same Poisson sample, so neither can be amplified alone: the two are one mechanism, and
that one is sampled. ``dp_accounting`` samples single noise mechanisms only; here any privacy loss
distribution is, by the formula for a dominating pair.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_dp.bounded_range import selections_pld
from dist_dp.errors import ConfigError
from dist_dp.events import check_sample_rate

Float64Array = NDArray[np.float64]

_INTERVAL = 1e-4
_FINE_INTERVAL = 2e-3
_TOLERANCE = 1e-4
_LARGEST_SIGMA = 2.0**12


@dataclass(frozen=True)
class SampledSelection:
    """A step of DP-SGD with exponential selection (Zhang, Mironov and Hejazinia 2021).

    Args:
        noise_multiplier: σ, of selection and gradients together; see `epsilon0`.
        selection_share: the part r of each step's privacy that the selection takes.
        selections: m, rows selected in a step.
        sample_rate: probability with which a unit takes part in a step.

    Raises:
        ConfigError: a value is out of its range.

    Guarantee:
        `epsilon` is an upper bound for adding or removing one unit, for T such steps, each chosen
        in the light of those before: m exponential mechanisms with an ε₀-bounded range
        (:mod:`dist_dp.bounded_range`) and a Gaussian one with noise multiplier σ₂, on one Poisson
        sample. With (P, Q) a pair that dominates both together in either direction, a sample has
        (P, (1 - q) P + q Q) in one and its exchange in the other (Zhu, Dong and Wang 2022, theorem
        11). Rounding of float64 aside.
    """

    noise_multiplier: float
    selection_share: float
    selections: int
    sample_rate: float

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_sample_rate(self.sample_rate)
        if not self.noise_multiplier > 0:
            raise ConfigError(f"noise_multiplier is {self.noise_multiplier}: give one above 0")
        if not 0 < self.selection_share < 1:
            raise ConfigError(
                f"selection_share is {self.selection_share}: give a number between 0 and 1"
            )
        if self.selections < 1:
            raise ConfigError(f"selections is {self.selections}: give 1 or more")

    @property
    def epsilon0(self) -> float:
        """ε₀ of one selection: m ε₀²/8 = r/(2σ²), equal in zero-concentrated terms."""
        return 2 * math.sqrt(self.selection_share / self.selections) / self.noise_multiplier

    @property
    def gradient_multiplier(self) -> float:
        """σ₂, the noise multiplier of the gradients."""
        return self.noise_multiplier / math.sqrt(1 - self.selection_share)

    def epsilon(self, steps: int, delta: float) -> float:
        """ε of so many steps at ``delta``."""
        return float(self._pld().self_compose(steps).get_epsilon_for_delta(delta))

    def _pld(self) -> Any:
        """The privacy loss distribution of one step."""
        from dp_accounting.pld import privacy_loss_distribution as distributions

        together = distributions.from_gaussian_mechanism(
            self.gradient_multiplier, value_discretization_interval=_FINE_INTERVAL
        ).compose(selections_pld(self.epsilon0, self.selections, _FINE_INTERVAL))
        pmf = together._pmf_remove.to_dense_pmf()
        losses = (pmf._lower_loss + np.arange(len(pmf._probs))) * pmf._discretization
        return sampled(losses, np.asarray(pmf._probs), self.sample_rate)


def sampled(losses: Float64Array, probabilities: Float64Array, sample_rate: float) -> Any:
    """The privacy loss distribution of a mechanism on a Poisson sample.

    Args:
        losses: log P/Q of a pair that dominates the mechanism, for a unit more as for one less, and
            is itself the same after an exchange; ascending.
        probabilities: Their probabilities under P. Only those of losses from 0 on are used: below,
            they follow from the exchange (P at -x is e^-x P at x), and the given ones have few
            digits. What is missing to 1 is taken for an infinite loss.
        sample_rate: q.
    """
    from dp_accounting.pld import pld_pmf, privacy_loss_distribution

    q = sample_rate
    up, mass = losses[losses >= 0], probabilities[losses >= 0]
    down = up > 0
    at = np.concatenate([-up[down][::-1], up])
    under_p = np.concatenate([(mass * np.exp(-up))[down][::-1], mass])
    under_q = under_p[::-1]
    infinite = max(0.0, 1.0 - float(under_p.sum()))
    # (P, (1 - q) P + q Q), and its exchange, whose loss is the same with the other sign.
    kept = -np.log1p(q * np.expm1(-at))
    if q < 1:
        one = (np.append(kept, -math.log1p(-q)), np.append(under_p, infinite), 0.0)
    else:
        one = (kept, under_p, infinite)
    two = (-kept[::-1], ((1 - q) * under_p + q * under_q)[::-1], q * infinite)
    pmfs = []
    for places, weights, beyond in (one, two):
        first, last = (
            math.floor(places.min() / _INTERVAL),
            math.ceil(places.max() / _INTERVAL),
        )
        points = np.arange(first, last + 1) * _INTERVAL
        deltas = _profile(places, weights, beyond, points)
        pmfs.append(
            pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap(_INTERVAL, first, last, deltas)
        )
    return privacy_loss_distribution.PrivacyLossDistribution(*pmfs)


def _profile(
    losses: Float64Array, mass: Float64Array, infinite: float, points: Float64Array
) -> Float64Array:
    """δ(ε) at ascending points: the mass above ε, times 1 - e^(ε - loss)."""
    order = np.argsort(losses)
    losses, mass = losses[order], mass[order]
    above = np.append(np.cumsum(mass[::-1])[::-1], 0.0)
    # Sums of mass e^-loss, from the largest loss on, each relative to the point it is used at.
    weighted = np.append(np.cumsum((mass * np.exp(-losses))[::-1])[::-1], 0.0)
    begin = np.searchsorted(losses, points, side="right")
    deltas = above[begin] - np.exp(points) * weighted[begin] + infinite
    result: Float64Array = np.maximum.accumulate(deltas[::-1].clip(infinite, 1.0))[::-1]
    return result


def calibrated(
    epsilon: float, delta: float, sample_rate: float, steps: int, *, share: float, selections: int
) -> SampledSelection:
    """The step with the least noise whose ``steps`` repetitions stay within (ε, δ).

    Raises:
        ConfigError: No noise multiplier below 4096 suffices.
    """
    from scipy.optimize import brentq

    def step(log_sigma: float) -> SampledSelection:
        return SampledSelection(math.exp(log_sigma), share, selections, sample_rate)

    def excess(log_sigma: float) -> float:
        return math.log(max(step(log_sigma).epsilon(steps, delta), 1e-12) / epsilon)

    high = 0.0
    while excess(high) > 0:
        high += math.log(2)
        if high > math.log(_LARGEST_SIGMA):
            raise ConfigError(f"epsilon {epsilon} at delta {delta} cannot be reached: raise it")
    low = high - math.log(2)
    while excess(low) <= 0 and low > -2:
        low, high = low - math.log(2), low
    root = float(brentq(excess, low, high, xtol=_TOLERANCE)) if excess(low) > 0 else high
    while excess(root) > 0:
        root += _TOLERANCE
    return step(root)
