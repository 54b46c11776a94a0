"""What each step of a run costs: an event for every step number, fixed before the run begins.

The plan makes one, the ledger writes it down when the run is opened, and every charge follows from
it and the numbers of the steps charged.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from dist_dp.accounting import AccountantKind, GaussianEvent, epsilon_of
from dist_dp.errors import ConfigError


@dataclass(frozen=True)
class StepCosts:
    """The event of every step of a run.

    Steps are numbered from 1. A step that is not planned (0, or one after the last) has the
    dearest event of the run.

    Args:
        segments: (event, number of steps in a row that have it), from the first step on. All
            events have one sample rate, so the one with the least noise is the dearest.

    Raises:
        ConfigError: there is no segment, one has no steps, or sample rates differ.
    """

    segments: tuple[tuple[GaussianEvent, int], ...]

    def __post_init__(self) -> None:
        """Check the segments."""
        rates = {event.sample_rate for event, _ in self.segments}
        if len(rates) != 1:
            raise ConfigError(
                f"the events of a run have {len(rates)} sample rates {sorted(rates)}: give one "
                "segment or more, all with the same sample rate"
            )
        for event, steps in self.segments:
            if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
                raise ConfigError(
                    f"a segment of {event} has {steps!r} steps: give an integer of 1 or more"
                )

    @classmethod
    def constant(cls, event: GaussianEvent, steps: int) -> StepCosts:
        """Return the costs of a run whose steps all have one event."""
        return cls(((event, steps),))

    @cached_property
    def planned_steps(self) -> int:
        """The number of steps planned, over all segments."""
        return self._ends[-1]

    @cached_property
    def dearest(self) -> GaussianEvent:
        """The event that costs most: that with the least noise."""
        return min(event for event, _ in self.segments)

    @cached_property
    def planned(self) -> Mapping[GaussianEvent, int]:
        """The planned steps by event."""
        return self.between(1, self.planned_steps)

    def at(self, step: int) -> GaussianEvent:
        """Return the event of a step.

        Raises:
            ValueError: `step` is below 0.
        """
        if step < 0:
            raise ValueError(f"step: {step} given; the first step is 1")
        if not 1 <= step <= self.planned_steps:
            return self.dearest
        return self.segments[bisect_right(self._ends, step - 1)][0]

    def between(self, first_step: int, steps: int) -> dict[GaussianEvent, int]:
        """Return what steps ``first_step .. first_step + steps - 1`` cost, a count by event.

        Guarantee:
            ``between(a, n)`` and ``between(a + n, m)`` add up to ``between(a, n + m)``: however a
            run is cut into leases, each step is charged at its own event, and a step charged
            twice (a replay) at that event twice.

        Raises:
            ValueError: a number is below 0.
        """
        if first_step < 0 or steps < 0:
            raise ValueError(f"steps: {steps} from step {first_step} given; both are at least 0")
        after = first_step + steps
        counts: dict[GaussianEvent, int] = {}
        begin = inside = 0
        for (event, _), end in zip(self.segments, self._ends, strict=True):
            found = min(after, end + 1) - max(first_step, begin + 1)
            if found > 0:
                counts[event] = counts.get(event, 0) + found
                inside += found
            begin = end
        if inside < steps:
            counts[self.dearest] = counts.get(self.dearest, 0) + steps - inside
        return counts

    def to_json(self) -> list[dict[str, Any]]:
        """Return the segments as the ledger writes them."""
        return [{**vars(event), "steps": steps} for event, steps in self.segments]

    @classmethod
    def from_json(cls, segments: list[dict[str, Any]]) -> StepCosts:
        """Return what `to_json` gave.

        Raises:
            ConfigError, KeyError, TypeError: it is something else.
        """
        return cls(
            tuple(
                (GaussianEvent(item["noise_multiplier"], item["sample_rate"]), item["steps"])
                for item in segments
            )
        )

    @cached_property
    def _ends(self) -> list[int]:
        """The last step of each segment."""
        return list(accumulate(steps for _, steps in self.segments))


def sum_of(*counts: Mapping[GaussianEvent, int]) -> dict[GaussianEvent, int]:
    """Add step counts by event; events whose counts cancel are left out."""
    total: dict[GaussianEvent, int] = {}
    for some in counts:
        for event, count in some.items():
            total[event] = total.get(event, 0) + count
    return {event: count for event, count in total.items() if count}


def max_steps(
    costs: StepCosts,
    first_step: int,
    at_most: int,
    already: Mapping[GaussianEvent, int],
    epsilon: float,
    delta: float,
    *,
    accountant: AccountantKind = "pld",
) -> int:
    """Return how many of a run's next steps fit in (ε, δ) after ``already``.

    Args:
        costs: what each step costs.
        first_step: the first of the next steps.
        at_most: how many are wanted, 1 or more.
        already: steps that are charged, by event.
        epsilon: the ε that all together may reach.
        delta: at which δ.
        accountant: see `dist_dp.accounting.epsilon_of`.

    Returns:
        The largest number in 0..``at_most`` (found by bisection; ε grows with the steps).

    Raises:
        ConfigError: an argument is out of its range.
    """
    if isinstance(at_most, bool) or not isinstance(at_most, int) or at_most < 1:
        raise ConfigError(f"steps is {at_most!r}: give an integer of 1 or more")

    def fits(steps: int) -> bool:
        events = sum_of(already, costs.between(first_step, steps))
        return epsilon_of(events, delta, accountant=accountant) <= epsilon

    if fits(at_most):
        return at_most
    low, high = 0, at_most  # `high` does not fit; `low` does, or is 0.
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
