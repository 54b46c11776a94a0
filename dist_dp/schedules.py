"""Schedules of rates and other settings: functions of the step alone, never of the data.

A rate that reacts to the loss would carry private information outside the accounting.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dist_dp.errors import ConfigError

Finite = Annotated[float, Field(allow_inf_nan=False)]


class ScheduleConfig(BaseModel):
    """A learning-rate schedule.

    Attributes:
        kind: `constant`, `cosine` (from `base` to `final_fraction * base` at `total_steps`) or
            `step` (times `gamma` after every `step_size` steps).
        base: the highest learning rate.
        warmup_steps: steps over which the rate first rises linearly from 0, reaching `base`.
        total_steps: the step at which the cosine ends; the rate stays there afterwards.
        final_fraction: the cosine's last rate over `base`.
        step_size: steps between two reductions, counted from the end of the warm-up.
        gamma: the factor of a reduction.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["constant", "cosine", "step"] = "constant"
    base: Annotated[Finite, Field(gt=0)]
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    total_steps: Annotated[int, Field(ge=1)] | None = None
    final_fraction: Annotated[Finite, Field(ge=0, le=1)] | None = None
    step_size: Annotated[int, Field(ge=1)] | None = None
    gamma: Annotated[Finite, Field(gt=0, le=1)] | None = None

    @model_validator(mode="after")
    def _complete(self) -> ScheduleConfig:
        wanted = {
            "constant": (),
            "cosine": ("total_steps",),
            "step": ("step_size", "gamma"),
        }[self.kind]
        allowed = {*wanted, "total_steps", *(("final_fraction",) if self.kind == "cosine" else ())}
        for name in ("total_steps", "final_fraction", "step_size", "gamma"):
            given = getattr(self, name) is not None
            if name in wanted and not given:
                raise ValueError(f"{name}: needed by the schedule kind '{self.kind}'; set it")
            if given and name not in allowed:
                raise ValueError(
                    f"{name}: has no meaning for the schedule kind '{self.kind}'; remove it or "
                    "choose another kind"
                )
        if self.total_steps is not None and self.warmup_steps >= self.total_steps:
            raise ValueError(
                f"warmup_steps: {self.warmup_steps} must be below total_steps = {self.total_steps}"
            )
        return self


def learning_rate_at(schedule: ScheduleConfig, step: int) -> float:
    """The learning rate of a step; the first step is 1.

    Raises:
        ValueError: `step` is below 1.
    """
    if step < 1:
        raise ValueError(f"step: {step} given; the first step is 1")
    if step <= schedule.warmup_steps:
        return schedule.base * step / schedule.warmup_steps
    after = step - schedule.warmup_steps
    if schedule.kind == "cosine":
        assert schedule.total_steps is not None
        progress = min(1.0, after / (schedule.total_steps - schedule.warmup_steps))
        final = schedule.final_fraction or 0.0
        if progress == 1.0:
            # Exactly: cos(pi/2) rounds to 6e-17, whose square is no learning rate anybody meant.
            return schedule.base * final
        # 1 + cos(x) = 2 cos^2(x/2): no cancellation where the rate is small
        return schedule.base * (final + (1.0 - final) * math.cos(math.pi * progress / 2.0) ** 2)
    if schedule.kind == "step":
        assert schedule.step_size is not None and schedule.gamma is not None
        return schedule.base * float(schedule.gamma ** ((after - 1) // schedule.step_size))
    return schedule.base


def check_factors(
    schedule: ScheduleConfig, steps: int, *, name: str, multiplies: str, at_zero: str
) -> None:
    """Check a schedule that multiplies another setting: its greatest factor 1, none of them 0.

    Args:
        schedule: the schedule.
        steps: the steps of the run.
        name: its key, for the messages.
        multiplies: the key of what it multiplies.
        at_zero: what a factor of 0 would make, and why that cannot be.

    Raises:
        ConfigError: it has another base, or is 0 at a step of the run.
    """
    if schedule.base != 1:
        raise ConfigError(
            f"{name} has base {schedule.base:g}: it multiplies {multiplies}, so give base 1 and "
            f"the greatest value as {multiplies}"
        )
    # After the warm-up, which begins above 0, no schedule rises: the last step has the least.
    if learning_rate_at(schedule, steps) <= 0:
        raise ConfigError(f"{name} is 0 by step {steps}, which {at_zero}")
