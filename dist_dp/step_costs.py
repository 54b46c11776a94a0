"""What each step of a run costs: an event for every step number, fixed before the run begins.

The plan makes one, the ledger writes it down when the run is opened, and every charge follows from
it and the numbers of the steps charged.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from dist_dp.accounting import AccountantKind, epsilon_of
from dist_dp.errors import ConfigError
from dist_dp.events import GaussianEvent, PrivacyEvent, event_from_json, event_to_json


@dataclass(frozen=True)
class StepCosts:
    """The event of every step of a run.

    Steps are numbered from 1. Step 0 is what a run does once before them: it has the events of
    ``setup``. Any other step that is not planned (one after the last, or 0 without a setup) costs
    as much as any planned one does: where all are Gaussian with one sample rate, the one with the
    least noise, else one of each together.

    Args:
        segments: (event, number of steps in a row that have it), from the first step on.
        setup: events of step 0, such as a private selection of rows.

    Raises:
        ConfigError: there is no step at all, or a segment has none.
    """

    segments: tuple[tuple[PrivacyEvent, int], ...]
    setup: tuple[PrivacyEvent, ...] = ()

    def __post_init__(self) -> None:
        """Check the segments."""
        if not self.segments and not self.setup:
            raise ConfigError("a run without steps costs nothing: give one segment or more")
        for event, steps in self.segments:
            if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
                raise ConfigError(
                    f"a segment of {event} has {steps!r} steps: give an integer of 1 or more"
                )

    @classmethod
    def constant(cls, event: PrivacyEvent, steps: int) -> StepCosts:
        """Return the costs of a run whose steps all have one event."""
        return cls(((event, steps),))

    @cached_property
    def planned_steps(self) -> int:
        """The number of steps planned, over all segments."""
        return self._ends[-1] if self._ends else 0

    @cached_property
    def unplanned(self) -> Mapping[PrivacyEvent, int]:
        """What a step costs that is not planned: at least as much as any planned one."""
        events = {event for event, _ in self.segments} or set(self.setup)
        gaussian = [event for event in events if isinstance(event, GaussianEvent)]
        if len(gaussian) == len(events) and len({e.sample_rate for e in gaussian}) == 1:
            return {min(gaussian): 1}
        return dict.fromkeys(events, 1)

    @cached_property
    def planned(self) -> Mapping[PrivacyEvent, int]:
        """All that is planned, the setup too, by event."""
        return sum_of(Counter(self.setup), self.between(1, self.planned_steps))

    def at(self, step: int) -> PrivacyEvent:
        """Return the event of a step.

        Raises:
            ValueError: `step` is not planned, and such a step has no single event.
        """
        if not 1 <= step <= self.planned_steps:
            if step >= 0 and len(self.unplanned) == 1 and not (step == 0 and self.setup):
                return next(iter(self.unplanned))
            raise ValueError(
                f"step: {step} given; the first step is 1, the last planned {self.planned_steps}"
            )
        return self.segments[bisect_right(self._ends, step - 1)][0]

    def between(self, first_step: int, steps: int) -> dict[PrivacyEvent, int]:
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
        counts: Counter[PrivacyEvent] = Counter()
        begin = inside = 0
        if self.setup and first_step == 0 and steps:
            counts.update(self.setup)
            inside = 1
        for (event, _), end in zip(self.segments, self._ends, strict=True):
            found = min(after, end + 1) - max(first_step, begin + 1)
            if found > 0:
                counts[event] += found
                inside += found
            begin = end
        if inside < steps:
            for event, count in self.unplanned.items():
                counts[event] += count * (steps - inside)
        return dict(counts)

    def to_json(self) -> dict[str, Any]:
        """Return it as the ledger writes it."""
        return {
            "segments": [
                {**event_to_json(event), "steps": steps} for event, steps in self.segments
            ],
            "setup": [event_to_json(event) for event in self.setup],
        }

    @classmethod
    def from_json(cls, item: Mapping[str, Any]) -> StepCosts:
        """Return what `to_json` gave, or a ledger's entry from before there was a setup.

        Raises:
            ConfigError, KeyError, TypeError: it is something else.
        """
        segments = []
        for segment in item["segments"]:
            values = dict(segment)
            steps = values.pop("steps")
            segments.append((event_from_json(values), steps))
        setup = (event_from_json(event) for event in item.get("setup", ()))
        return cls(tuple(segments), tuple(setup))

    @cached_property
    def _ends(self) -> list[int]:
        """The last step of each segment."""
        return list(accumulate(steps for _, steps in self.segments))


def sum_of(*counts: Mapping[PrivacyEvent, int]) -> dict[PrivacyEvent, int]:
    """Add step counts by event; events whose counts cancel are left out."""
    total: dict[PrivacyEvent, int] = {}
    for some in counts:
        for event, count in some.items():
            total[event] = total.get(event, 0) + count
    return {event: count for event, count in total.items() if count}


def max_steps(
    costs: StepCosts,
    first_step: int,
    at_most: int,
    already: Mapping[PrivacyEvent, int],
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
