"""What a run is charged: steps by event, and the same rounded up so that few sums occur."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from dist_dp.events import PrivacyEvent
from dist_dp.step_costs import StepCosts, sum_of

# From (steps charged, steps planned) to a number of steps no smaller, the same for many leases.
Rounding = Callable[[int, int], int]


def part_of_plan(charged: int, planned: int) -> int:
    """Round up to 1/16, 4/16, 9/16 or 16/16 of the plan: about equal parts of ε, as ε ~ √steps."""
    part = math.ceil(4 * math.sqrt(charged / planned))
    return math.ceil(planned * part**2 / 16)


@functools.lru_cache(maxsize=64)
def multiple_of(block: int) -> Rounding:
    """Return a rounding up to the next multiple of ``block`` steps, or to the whole plan.

    The same function for the same block, as long as few are in use.
    """

    def rounding(charged: int, planned: int) -> int:
        multiple = -(-charged // block) * block
        return min(multiple, planned) if charged <= planned else multiple

    return rounding


@dataclass
class RunState:
    """A run: what its steps cost, and which are charged to it.

    Attributes:
        dataset: the data set it is charged to.
        costs: the event of each step; None for a run without noise, which has none.
        charged: how many steps are charged, those charged again counted again.
        by_event: the same by event; empty for a run without noise.
        released_step: the last step that a recorded release holds.
        spans: first and last step of each lease, in order, without those given back.
        status: `open`, or how it ended.
        owner: who opened it, as was said then: one of the same name elsewhere is another run.
    """

    dataset: str
    costs: StepCosts | None
    charged: int = 0
    by_event: dict[PrivacyEvent, int] = field(default_factory=dict)
    released_step: int = 0
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)
    status: str = "open"
    owner: str = ""

    def cost_of(self, first_step: int, steps: int) -> dict[PrivacyEvent, int]:
        """Return what steps from ``first_step`` on cost, by event; nothing without noise."""
        return {} if self.costs is None else self.costs.between(first_step, steps)

    def charge(self, first_step: int, steps: int) -> None:
        """Charge ``steps`` steps from ``first_step`` on."""
        self.charged += self._counted(first_step, steps)
        self.by_event = sum_of(self.by_event, self.cost_of(first_step, steps))

    def give_back(self, first_step: int, steps: int) -> None:
        """Take back a charge of ``steps`` steps from ``first_step`` on."""
        self.charged -= self._counted(first_step, steps)
        returned = {event: -count for event, count in self.cost_of(first_step, steps).items()}
        self.by_event = sum_of(self.by_event, returned)

    def _counted(self, first_step: int, steps: int) -> int:
        """How many of these are steps of the run; its setup (step 0) is none."""
        setup = self.costs is not None and bool(self.costs.setup) and first_step == 0
        return steps - 1 if setup and steps else steps

    @property
    def charged_to(self) -> int:
        """The last step of the latest lease that was not given back whole; 0 if there is none."""
        ends = (last for first, last in reversed(self.spans.values()) if last >= first)
        return next(ends, 0)

    def charge_with(
        self, extra: Mapping[PrivacyEvent, int], rounding: Rounding | None
    ) -> dict[PrivacyEvent, int]:
        """Return the charge by event with ``extra`` more, rounded up while the run goes on.

        Guarantee:
            No event counts fewer steps than are charged, whatever ``rounding`` says.
        """
        exact = sum_of(self.by_event, extra)
        if rounding is None or self.costs is None or self.status != "open":
            return exact
        planned = self.costs.planned
        return {
            event: max(count, rounding(count, planned[event])) for event, count in exact.items()
        }
