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
from functools import lru_cache
from typing import Any, Literal

from dist_dp.errors import ConfigError
from dist_dp.events import GaussianEvent, PrivacyEvent, check_sample_rate, event_order

__all__ = [
    "AccountantKind", "GaussianEvent", "check_delta", "check_sample_rate", "delta_of", "epsilon_of",
]  # fmt: skip

AccountantKind = Literal["pld", "rdp"]

_INTERVAL = 1e-4
# Above this privacy loss the grid is widened, so that a hopeless setting (a tiny noise multiplier)
# costs seconds and not gigabytes. Pessimistic rounding keeps the result an upper bound.
_FINE_GRID_LOSS = 100.0
# Beyond it nobody is protected from anything: ε is called infinite, at once.
_HOPELESS_LOSS = 1e5
# Two runs with 16 noise levels each; one takes up to 3 MB, its power up to 6.
_PLDS_KEPT = 32


def epsilon_of(
    events: Mapping[PrivacyEvent, int], delta: float, *, accountant: AccountantKind = "pld"
) -> float:
    """Return ε of the composition of ``events`` (a step count for each) at ``delta``.

    Guarantee:
        Whoever sees the results of all these steps, each a mechanism on a Poisson sample of its own
        (see `dist_dp.events`), has (ε, δ)-differential privacy against the presence of one unit
        (add-or-remove-one). The events must not have been chosen in the light of each other's
        results. Results are cached.

    Returns:
        ε ≥ 0; ``inf`` where an event has no noise, or so little that ε is beyond all use (some
        10⁵), or δ is beyond numerical reach.

    Raises:
        ConfigError: δ not in (0, 1), a negative count, or an unknown accountant.
    """
    check_delta(delta)
    return _epsilon(_key(events), float(delta), _check_accountant(accountant))


def delta_of(
    events: Mapping[PrivacyEvent, int], epsilon: float, *, accountant: AccountantKind = "pld"
) -> float:
    """Return δ of the composition of ``events`` at ``epsilon``; see `epsilon_of`.

    Raises:
        ConfigError: ε negative or not finite, a negative count, or an unknown accountant.
    """
    if not (math.isfinite(epsilon) and epsilon >= 0):
        raise ConfigError(f"epsilon is {epsilon}: give a finite number of 0 or more")
    key = _key(events)
    if not all(event.is_private for event, _ in key):
        return 1.0
    if not key:
        return 0.0
    if _check_accountant(accountant) == "rdp":
        with _quiet_absl():
            return float(_rdp(key).get_delta(float(epsilon)))
    loss = _rough_loss(key)
    if not loss <= _HOPELESS_LOSS:
        return 1.0
    try:
        return float(_composed_pld(key, _interval(loss)).get_delta_for_epsilon(float(epsilon)))
    except OverflowError:
        return 1.0


_Key = tuple[tuple[PrivacyEvent, int], ...]


@lru_cache(maxsize=8192)
def _epsilon(key: _Key, delta: float, accountant: AccountantKind) -> float:
    if not all(event.is_private for event, _ in key):
        return math.inf
    if not key:
        return 0.0
    if accountant == "rdp":
        with _quiet_absl():
            return float(_rdp(key).get_epsilon(delta))
    loss = _rough_loss(key)
    if not loss <= _HOPELESS_LOSS:
        return math.inf
    try:
        return max(0.0, float(_composed_pld(key, _interval(loss)).get_epsilon_for_delta(delta)))
    except OverflowError:  # e to the loss is no float any more
        return math.inf


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


@lru_cache(maxsize=_PLDS_KEPT)
def _power_pld(event: PrivacyEvent, count: int, interval: float) -> Any:
    one = event.times(count)
    if one is not None:
        return _step_pld(one, interval)
    return _step_pld(event, interval).self_compose(count)


@lru_cache(maxsize=_PLDS_KEPT)
def _step_pld(event: PrivacyEvent, interval: float) -> Any:
    return event.pld(interval)


def _rough_loss(key: _Key) -> float:
    """About the largest privacy loss that matters.

    It decides the grid, and whether to calculate at all, never the result's validity.
    """
    mean, widest = 0.0, 0.0
    for event, count in key:
        per_step, largest = event.rough_loss()
        mean += count * per_step
        widest = max(widest, largest)
    return mean + 10 * math.sqrt(2 * mean) + widest


def _interval(loss: float) -> float:
    """Choose the grid: 1e-4, wider (by powers of two) where the loss spans millions of cells."""
    if loss <= _FINE_GRID_LOSS:
        return _INTERVAL
    return float(_INTERVAL * 2 ** math.ceil(math.log2(loss / _FINE_GRID_LOSS)))


def _key(events: Mapping[PrivacyEvent, int]) -> _Key:
    for event, count in events.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ConfigError(f"step count of {event} is {count!r}: give an integer of 0 or more")
    return tuple(
        sorted(
            ((event, count) for event, count in events.items() if count),
            key=lambda item: event_order(item[0]),
        )
    )


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


def check_delta(delta: float) -> None:
    """Refuse a δ that is no probability strictly between 0 and 1.

    Raises:
        ConfigError: with what to give.
    """
    if not 0 < delta < 1:
        raise ConfigError(
            f"delta is {delta}: give a number between 0 and 1 (below 1 / number of records)"
        )
