"""Privacy accounting: a thin, cached face on ``dp_accounting``; no bound is computed by hand here.

All figures are for Poisson sampling and the add-or-remove-one neighbouring relation. ``pld``
composes privacy loss distributions (Koskela et al. 2020; Doroshenko et al. 2022, "Connect the
dots"), ``rdp`` Rényi divergences (Mironov 2017; Mironov, Talwar, Zhang 2019). Both give upper
bounds; ``rdp`` is the looser one and is kept for comparison with published values.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, cast

from dist_dp.errors import ConfigError

if TYPE_CHECKING:
    import dp_accounting

AccountantKind = Literal["pld", "rdp"]

_INTERVAL = 1e-4
# Above this privacy loss the grid is widened, so that a hopeless setting (a tiny noise multiplier)
# costs seconds and not gigabytes. Pessimistic rounding keeps the result an upper bound.
_FINE_GRID_LOSS = 100.0
_SMALLEST_SIGMA = 2.0**-4
_LARGEST_SIGMA = 2.0**17
_SIGMA_TOLERANCE = 1e-5
# A calibrated run must fit its budget on another machine too, whatever its last bits.
_EPSILON_MARGIN = 1e-9


@dataclass(frozen=True, order=True)
class GaussianEvent:
    """One step of the Gaussian mechanism on a Poisson sample of the records.

    Args:
        noise_multiplier: standard deviation of the noise over the sensitivity of the sum; 0 means
            no noise, hence no guarantee.
        sample_rate: probability with which each record takes part, independently; 1 means that
            all records take part (no amplification by sampling).

    Raises:
        ConfigError: a value is out of its range.
    """

    noise_multiplier: float
    sample_rate: float = 1.0

    def __post_init__(self) -> None:
        """Normalise both values to ``float`` and check their ranges."""
        object.__setattr__(self, "noise_multiplier", float(self.noise_multiplier))
        object.__setattr__(self, "sample_rate", float(self.sample_rate))
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier >= 0):
            raise ConfigError(
                f"noise_multiplier is {self.noise_multiplier}: give a finite number of 0 or more"
            )
        _check_sample_rate(self.sample_rate)

    def to_dp_event(self, count: int = 1) -> dp_accounting.DpEvent:
        """Return ``count`` such steps in the vocabulary of ``dp_accounting``."""
        import dp_accounting as dp

        event: Any = dp.GaussianDpEvent(self.noise_multiplier)
        if self.sample_rate < 1.0:
            event = dp.PoissonSampledDpEvent(self.sample_rate, event)
        return cast("dp_accounting.DpEvent", dp.SelfComposedDpEvent(event, count))


def epsilon_of(
    events: Mapping[GaussianEvent, int], delta: float, *, accountant: AccountantKind = "pld"
) -> float:
    """Return ε of the composition of ``events`` (a step count for each) at ``delta``.

    Guarantee:
        Whoever sees the results of all these steps, each a Gaussian mechanism on a fresh Poisson
        sample, has (ε, δ)-differential privacy against the presence of one record
        (add-or-remove-one). The events must not have been chosen in the light of each other's
        results. Results are cached.

    Returns:
        ε ≥ 0; ``inf`` where an event has no noise or δ is beyond numerical reach.

    Raises:
        ConfigError: δ not in (0, 1), a negative count, or an unknown accountant.
    """
    _check_delta(delta)
    return _epsilon(_key(events), float(delta), _check_accountant(accountant))


def delta_of(
    events: Mapping[GaussianEvent, int], epsilon: float, *, accountant: AccountantKind = "pld"
) -> float:
    """Return δ of the composition of ``events`` at ``epsilon``; see `epsilon_of`.

    Raises:
        ConfigError: ε negative or not finite, a negative count, or an unknown accountant.
    """
    if not (math.isfinite(epsilon) and epsilon >= 0):
        raise ConfigError(f"epsilon is {epsilon}: give a finite number of 0 or more")
    key = _key(events)
    if any(event.noise_multiplier == 0 for event, _ in key):
        return 1.0
    if not key:
        return 0.0
    if _check_accountant(accountant) == "rdp":
        with _quiet_absl():
            return float(_rdp(key).get_delta(float(epsilon)))
    return float(_composed_pld(key, _interval(key)).get_delta_for_epsilon(float(epsilon)))


def calibrate_noise_multiplier(
    target_epsilon: float,
    target_delta: float,
    sample_rate: float,
    steps: int,
    accountant: AccountantKind = "pld",
) -> float:
    """Return the smallest noise multiplier whose ``steps`` steps stay within the target.

    Guarantee:
        ``epsilon_of({GaussianEvent(result, sample_rate): steps}, target_delta)`` is at most
        ``target_epsilon``: this is checked on the value returned, which is within 1e-5 (relative)
        of the smallest one possible, and never below 1/16.

    Raises:
        ConfigError: an argument is out of its range, or no noise multiplier below 131072 suffices.
    """
    from scipy.optimize import brentq

    _check_target(target_epsilon, target_delta)
    _check_sample_rate(sample_rate)
    _check_steps(steps)
    goal = target_epsilon * (1 - _EPSILON_MARGIN)

    def excess(log_sigma: float) -> float:
        events = {GaussianEvent(math.exp(log_sigma), sample_rate): steps}
        epsilon = epsilon_of(events, target_delta, accountant=accountant)
        # Nearly linear in these coordinates, so few steps; brentq needs finite values.
        return math.log(min(max(epsilon, 1e-12), 1e12) / goal)

    low, high = math.log(0.5), math.log(1.0)
    while excess(high) > 0:
        low, high = high, high + math.log(2)
        if high > math.log(_LARGEST_SIGMA):
            raise ConfigError(
                f"epsilon {target_epsilon} at delta {target_delta} cannot be reached in {steps} "
                f"steps at sample rate {sample_rate}: raise epsilon or delta, or take fewer steps"
            )
    while excess(low) <= 0:
        low, high = low - math.log(2), low
        if high < math.log(_SMALLEST_SIGMA) + 1e-9:
            return math.exp(high)
    root = float(brentq(excess, low, high, xtol=_SIGMA_TOLERANCE / 2))
    while excess(root) > 0:
        root += _SIGMA_TOLERANCE / 2
    return math.exp(root)


def max_steps(
    event: GaussianEvent,
    already: Mapping[GaussianEvent, int],
    epsilon: float,
    delta: float,
    at_most: int,
    *,
    accountant: AccountantKind = "pld",
) -> int:
    """Return how many more steps of ``event`` fit in (ε, δ) after ``already``.

    Returns:
        The largest number in 0..``at_most`` (found by bisection; ε grows with the steps).

    Raises:
        ConfigError: an argument is out of its range.
    """
    _check_target(epsilon, delta)
    _check_steps(at_most)

    def fits(steps: int) -> bool:
        events = dict(already)
        events[event] = events.get(event, 0) + steps
        return epsilon_of(events, delta, accountant=accountant) <= epsilon

    if fits(at_most):
        return at_most
    low, high = 0, at_most  # `high` does not fit; `low` does, or is 0.
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


_Key = tuple[tuple[GaussianEvent, int], ...]


@lru_cache(maxsize=8192)
def _epsilon(key: _Key, delta: float, accountant: AccountantKind) -> float:
    if any(event.noise_multiplier == 0 for event, _ in key):
        return math.inf
    if not key:
        return 0.0
    if accountant == "rdp":
        with _quiet_absl():
            return float(_rdp(key).get_epsilon(delta))
    return max(0.0, float(_composed_pld(key, _interval(key)).get_epsilon_for_delta(delta)))


def _rdp(key: _Key) -> Any:
    from dp_accounting import NeighboringRelation
    from dp_accounting.rdp import RdpAccountant

    result = RdpAccountant(neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE)
    for event, count in key:
        result.compose(event.to_dp_event(count))
    return result


def _composed_pld(key: _Key, interval: float) -> Any:
    # The same calls as PLDAccountant makes, so that single steps and powers can be remembered:
    # a ledger asks for many step counts of few events.
    result = _power_pld(*key[0], interval)
    for event, count in key[1:]:
        result = result.compose(_power_pld(event, count, interval))
    return result


@lru_cache(maxsize=16)
def _power_pld(event: GaussianEvent, count: int, interval: float) -> Any:
    if event.sample_rate == 1.0:
        # Gaussian steps compose exactly into one with less noise.
        sigma = event.noise_multiplier / math.sqrt(count)
        return _step_pld(GaussianEvent(sigma, 1.0), interval)
    return _step_pld(event, interval).self_compose(count)


@lru_cache(maxsize=16)
def _step_pld(event: GaussianEvent, interval: float) -> Any:
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        standard_deviation=event.noise_multiplier,
        sampling_prob=event.sample_rate,
        value_discretization_interval=interval,
        neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
    )


def _interval(key: _Key) -> float:
    """Choose the grid: 1e-4, wider (by powers of two) where the loss would span millions of cells.

    The rough size of the loss used here decides the grid only, never the result's validity.
    """
    mean, widest = 0.0, 0.0
    for event, count in key:
        inverse = 1 / event.noise_multiplier**2
        per_step = event.sample_rate * inverse / 2
        if inverse < 100:
            per_step = min(per_step, event.sample_rate**2 * math.expm1(inverse))
        mean += count * per_step
        widest = max(widest, inverse / 2 + 9 * math.sqrt(inverse))
    loss = mean + 10 * math.sqrt(2 * mean) + widest
    if loss <= _FINE_GRID_LOSS:
        return _INTERVAL
    return float(_INTERVAL * 2 ** math.ceil(math.log2(loss / _FINE_GRID_LOSS)))


def _key(events: Mapping[GaussianEvent, int]) -> _Key:
    for event, count in events.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ConfigError(f"step count of {event} is {count!r}: give an integer of 0 or more")
    return tuple(sorted((event, count) for event, count in events.items() if count))


@contextlib.contextmanager
def _quiet_absl() -> Iterator[None]:
    # The RDP accountant warns of every order it leaves out; the bound stays valid without them.
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _check_accountant(accountant: AccountantKind) -> AccountantKind:
    if accountant not in ("pld", "rdp"):
        raise ConfigError(f"accountant is {accountant!r}: choose 'pld' or 'rdp'")
    return accountant


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ConfigError(
            f"delta is {delta}: give a number between 0 and 1 (below 1 / number of records)"
        )


def _check_target(epsilon: float, delta: float) -> None:
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise ConfigError(f"epsilon is {epsilon}: give a finite number above 0")
    _check_delta(delta)


def _check_sample_rate(sample_rate: float) -> None:
    if not 0 < sample_rate <= 1:
        raise ConfigError(
            f"sample_rate is {sample_rate}: it must lie in (0, 1]; it is the expected batch size "
            "over the number of records"
        )


def _check_steps(steps: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ConfigError(f"steps is {steps!r}: give an integer of 1 or more")
