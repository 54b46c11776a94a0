"""A noise multiplier that changes with the step, in few levels, so that ε can be exact.

Every noise multiplier has a privacy loss distribution of its own, which takes up to a second to
make, and a cosine has as many as it has steps. So a schedule with more than `MAX_LEVELS` values is
rounded up to that many, and the rounded multiplier is the one that is drawn: nothing is
approximated in the accounting.
"""

from __future__ import annotations

from bisect import bisect_left
from functools import lru_cache
from itertools import groupby

from dist_dp.events import GaussianEvent, PrivacyEvent
from dist_dp.schedules import ScheduleConfig, learning_rate_at
from dist_dp.step_costs import StepCosts

MAX_LEVELS = 16
"""Most distinct noise multipliers of a run.

A schedule that falls to a tenth then draws at most 10^(1/15), 17%, more noise than it says.
"""


@lru_cache(maxsize=64)
def factor_levels(schedule: ScheduleConfig | None, steps: int) -> tuple[tuple[float, int], ...]:
    """Return a schedule's factors over a run, in at most `MAX_LEVELS` distinct values.

    A schedule with no more values than that keeps them. Otherwise the levels are spaced
    geometrically from its least to its greatest value, both included, and every factor is rounded
    up to the next.

    Args:
        schedule: factors by step, all above 0; None for 1 at every step.
        steps: the steps of the run; it costs about 1 µs for each, once.

    Returns:
        (factor, number of steps in a row that have it), from step 1 on.

    Guarantee:
        No factor is below the schedule's.
    """
    if schedule is None:
        return ((1.0, steps),)
    factors = [learning_rate_at(schedule, step) for step in range(1, steps + 1)]
    levels = sorted(set(factors))
    if len(levels) > MAX_LEVELS:
        least, greatest = levels[0], levels[-1]
        last = MAX_LEVELS - 1
        between = [least * (greatest / least) ** (level / last) for level in range(1, last)]
        # The ends exactly, whatever a power's last bit.
        levels = [least, *(min(level, greatest) for level in between), greatest]
    rounded = (levels[bisect_left(levels, factor)] for factor in factors)
    return tuple((level, len(list(run))) for level, run in groupby(rounded))


@lru_cache(maxsize=64)
def planned_costs(
    noise_multiplier: float,
    sample_rate: float,
    schedule: ScheduleConfig | None,
    steps: int,
    setup: tuple[PrivacyEvent, ...] = (),
) -> StepCosts:
    """Return what each step of a run costs.

    Args:
        noise_multiplier: that of a step with factor 1.
        sample_rate: of every step.
        schedule: factors of the noise multiplier; None for 1 at every step.
        steps: the steps of the run.
        setup: what is done once before them.
    """
    return StepCosts(
        tuple(
            (GaussianEvent(noise_multiplier * factor, sample_rate), count)
            for factor, count in factor_levels(schedule, steps)
        ),
        setup,
    )
