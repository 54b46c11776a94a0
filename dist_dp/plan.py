"""The privacy plan: one object that couples sampling, clipping, noise and accounting.

Whatever bears on the guarantee is in it and nothing else: knobs of speed (micro-batches, sharding,
threads) may not change the guarantee, so they live elsewhere.
"""

from __future__ import annotations

import json
import math
from decimal import ROUND_CEILING, Decimal
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dist_dp.accounting import GaussianEvent, calibrate_noise_multiplier, epsilon_of
from dist_dp.errors import ConfigError
from dist_dp.noise_grid import (
    check_spacing,
    dense_spacing,
    read_spacing,
    spacing_text,
    table_spacing,
)
from dist_dp.schedules import ScheduleConfig, learning_rate_at

Mechanism = Literal["none", "dpsgd", "lazydp"]

NOT_COVERED: tuple[str, ...] = (
    "anyone who watches the memory of the training machines, or which table rows are touched "
    "when: in memory, rows between two reads lack the noise that still waits for them",
    "everything in the run folder beside release/: training metrics, reports and checkpoints "
    "are computed from the records without noise (metrics on held-out records likewise)",
    "the choice of hyper-parameters by looking at several runs on the same records, beyond what "
    "the ledger charges for those runs",
    "a person who stands behind several records: the unit is one record",
    "the number of records, treated as public",
)
"""What no plan's guarantee covers; `PrivacyPlan.not_covered` adds what depends on the plan."""


class PrivacyPlan(BaseModel):
    """What a run does to private data, in simple types that go to JSON or YAML and back.

    Args:
        mechanism: `none` (no privacy), `dpsgd` (noise on every row each step) or `lazydp` (the
            same distribution, drawn when a row is read).
        noise_multiplier: noise standard deviation over `max_grad_norm`; left out until
            `calibrate` finds it.
        max_grad_norm: bound C on the Euclidean norm of one record's gradient, over all layers and
            tables together.
        clip_schedule: factor of `max_grad_norm` by step, a schedule with base 1; the same at every
            step by default. Noise follows the bound, so a step costs the same privacy at any.
        num_records: records in the training data; treated as public.
        expected_batch_size: mean number of records a step draws (may be fractional). The sum of
            clipped gradients is divided by this, never by the size drawn.
        steps: number of steps the run is to take.
        delta: δ of the guarantee; must be below 1 / `num_records`.
        target_epsilon: ε the noise was calibrated to, kept for the record.
        unit: what the guarantee protects; one record.
        neighbouring_relation: data sets that differ by adding or removing one such unit.
        sampling: each record is drawn independently in each step.
        accountant: `pld` (tight) or `rdp` (for comparison).
        allow_large_delta: accept δ ≥ 1 / `num_records` all the same.
        noise_grid: spacing of the grid that noised table rows are put on, a power of two; None
            for none. See `dist_dp.noise_grid`.
        noise_rounds: ChaCha rounds of the noise: 20 or 12.

    Raises:
        ConfigError: a key is unknown, of the wrong type, or contradicts another; the message
            names the key and the remedy.

    Guarantee:
        The noise multiplier, the sample rate and the number of steps that the accountant sees
        are those that training uses, because both read them from here.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    mechanism: Mechanism = "lazydp"
    noise_multiplier: float | None = Field(default=None, ge=0)
    max_grad_norm: float = Field(gt=0)
    num_records: int = Field(ge=1)
    expected_batch_size: float = Field(gt=0)
    steps: int = Field(ge=1)
    delta: float | None = Field(default=None, gt=0, lt=1)
    target_epsilon: float | None = Field(default=None, gt=0)
    unit: Literal["record"] = "record"
    neighbouring_relation: Literal["add_or_remove_one"] = "add_or_remove_one"
    sampling: Literal["poisson"] = "poisson"
    accountant: Literal["pld", "rdp"] = "pld"
    allow_large_delta: bool = False
    noise_grid: float | None = None
    noise_rounds: Literal[20, 12] = 20
    clip_schedule: ScheduleConfig | None = None

    def __init__(self, **values: Any) -> None:
        """Validate ``values``; every complaint becomes one readable `ConfigError`."""
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _readable(error) from None

    @classmethod
    def model_validate(cls, obj: Any, **kwargs: Any) -> Self:
        """Read a plan from a mapping of keys and values.

        Raises:
            ConfigError: it is not a mapping, or not a valid plan.
        """
        try:
            return super().model_validate(obj, **kwargs)
        except ValidationError as error:
            raise _readable(error) from None

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **kwargs: Any) -> Self:
        """Read a plan back from JSON.

        Raises:
            ConfigError: the text is not JSON, or not a valid plan.
        """
        try:
            values = json.loads(json_data)
        except ValueError as error:
            raise ConfigError(f"the privacy plan is not valid JSON: {error}") from None
        if not isinstance(values, dict):
            raise ConfigError("the privacy plan must be a JSON object of keys and values")
        return cls(**values)

    @field_validator(
        "noise_multiplier", "max_grad_norm", "num_records", "expected_batch_size", "steps",
        "delta", "target_epsilon", mode="before",
    )  # fmt: skip
    @classmethod
    def _no_truth_values(cls, value: object) -> object:
        # YAML reads `yes` as true, and true would pass for the number 1.
        if isinstance(value, bool):
            raise ValueError("should be a number, not true or false")
        return value

    @field_validator("noise_grid", mode="before")
    @classmethod
    def _power_of_two(cls, value: object) -> object:
        return None if value is None else read_spacing(value)

    @model_validator(mode="after")
    def _must_agree(self) -> Self:
        if self.expected_batch_size > self.num_records:
            raise ConfigError(
                f"expected_batch_size {self.expected_batch_size:g} is larger than num_records "
                f"{self.num_records}: lower expected_batch_size"
            )
        if self.noise_grid is not None and not self.is_private:
            raise ConfigError(
                f"noise_grid {spacing_text(self.noise_grid)} is set, but no noise is added: leave "
                "out noise_grid, or choose mechanism 'lazydp' or 'dpsgd' with a noise multiplier"
            )
        if self.mechanism == "none":
            for key in ("noise_multiplier", "target_epsilon"):
                if getattr(self, key):
                    raise ConfigError(
                        f"{key} {getattr(self, key)} is set, but mechanism 'none' gives no "
                        f"privacy: leave out {key}, or choose mechanism 'lazydp' or 'dpsgd'"
                    )
        elif self.delta is not None:
            self._check_delta(self.delta)
        if self.clip_schedule is not None:
            self._check_clip_schedule(self.clip_schedule)
        return self

    def _check_clip_schedule(self, schedule: ScheduleConfig) -> None:
        if schedule.base != 1:
            raise ConfigError(
                f"clip_schedule has base {schedule.base:g}: it multiplies max_grad_norm, so give "
                "base 1 and the largest norm as max_grad_norm"
            )
        if learning_rate_at(schedule, self.steps) <= 0:
            raise ConfigError(
                f"clip_schedule makes the clip norm 0 by step {self.steps}, where a gradient could "
                "not be bounded but by nothing: give the cosine a final_fraction"
            )
        if self.noise_grid is not None:
            raise ConfigError(
                "clip_schedule does not go with noise_grid, whose spacing was chosen for one noise "
                "on the sum: leave out one of them"
            )

    def _check_delta(self, delta: float) -> None:
        if delta * self.num_records >= 1 and not self.allow_large_delta:
            raise ConfigError(
                f"delta {delta:g} is not below 1/num_records = {1 / self.num_records:.3g}: a "
                "mechanism that publishes one whole record would pass; lower delta, or set "
                "allow_large_delta (--force-delta) if you mean it"
            )

    @property
    def sample_rate(self) -> float:
        """Probability that a given record takes part in a given step."""
        return self.expected_batch_size / self.num_records

    @property
    def is_private(self) -> bool:
        """Whether the plan adds any noise at all."""
        return self.mechanism != "none" and self.noise_multiplier != 0

    @property
    def noise_on_sum(self) -> float:
        """Standard deviation σC of the noise on a step's sum of gradients; 0 without noise.

        With a clip schedule it is the largest of any step; see `noise_on_sum_at`.
        """
        return (self.noise_multiplier or 0.0) * self.max_grad_norm

    def max_grad_norm_at(self, step: int) -> float:
        """The clip norm C of a step; the first step is 1.

        Guarantee:
            A function of the plan and the step alone, never of the data. A step clips to C and
            adds noise of deviation σC to the sum, so its noise over its sensitivity is σ whatever
            C is, and what `epsilon` composes holds for every schedule.

        Raises:
            ValueError: `step` is below 1.
        """
        if self.clip_schedule is None:
            return self.max_grad_norm
        return self.max_grad_norm * learning_rate_at(self.clip_schedule, step)

    def noise_on_sum_at(self, step: int) -> float:
        """Standard deviation σC of the noise on a step's sum of gradients."""
        return (self.noise_multiplier or 0.0) * self.max_grad_norm_at(step)

    @property
    def dense_noise_grid(self) -> float | None:
        """Spacing of the grid that dense parameters' noised sums are put on, if tables have one."""
        if self.noise_grid is None:
            return None
        self.event()  # complains where the noise is not known yet
        return dense_spacing(self.noise_on_sum)

    def with_noise_grid(
        self, grid: float | str | None, smallest: float, largest: float
    ) -> PrivacyPlan:
        """Return this plan with a noise grid.

        Args:
            grid: a power of two, `auto`, or None for no grid.
            smallest: least standard deviation of one step's noise on a table's weight, among
                steps with any.
            largest: the greatest.

        Raises:
            ConfigError: `grid` is no power of two, is too coarse for the noise, nothing fits
                `auto`, or the plan adds no noise.
        """
        if grid is not None and not self.is_private:
            raise ConfigError(
                f"noise.grid {grid} is set, but mechanism '{self.mechanism}' with noise multiplier "
                f"{self.noise_multiplier} adds no noise: leave it out"
            )
        if grid == "auto":
            grid = table_spacing(smallest, largest, self.steps)
        plan = PrivacyPlan(**{**self.model_dump(), "noise_grid": grid})
        if plan.noise_grid is not None:
            check_spacing(plan.noise_grid, smallest, "in the step with the least")
        return plan

    def not_covered(self) -> tuple[str, ...]:
        """What the guarantee says nothing about, one phrase each, for cards and reports."""
        bits = "attacks on the low-order bits of floating-point noise"
        if self.noise_grid is not None:
            bits = (
                "the float32 rounding of gradients before the noise (what is noised lies on fixed "
                f"grids, table weights on that of {spacing_text(self.noise_grid)}), and attacks on "
                "timing"
            )
        return (*NOT_COVERED, bits)

    def calibrate(self, epsilon: float, delta: float) -> PrivacyPlan:
        """Return this plan with the smallest noise multiplier that meets (ε, δ) over its steps.

        Guarantee:
            ``result.epsilon() <= epsilon``, checked before it is returned.

        Raises:
            ConfigError: ε or δ is out of range or cannot be reached, or the mechanism is `none`.
        """
        if self.mechanism == "none":
            raise ConfigError(
                "mechanism 'none' cannot be calibrated: choose mechanism 'lazydp' or 'dpsgd', "
                "or leave out epsilon"
            )
        if 0 < delta < 1:
            self._check_delta(delta)
        sigma = calibrate_noise_multiplier(
            epsilon, delta, self.sample_rate, self.steps, self.accountant
        )
        changes = {"noise_multiplier": sigma, "delta": delta, "target_epsilon": epsilon}
        return PrivacyPlan(**{**self.model_dump(), **changes})

    def event(self) -> GaussianEvent | None:
        """Return what one step costs; nothing to account for with mechanism `none`.

        Raises:
            ConfigError: the noise multiplier is not known yet.
        """
        if self.mechanism == "none":
            return None
        if self.noise_multiplier is None:
            raise ConfigError(
                "noise_multiplier is not set: give it, or call calibrate(epsilon, delta)"
            )
        return GaussianEvent(self.noise_multiplier, self.sample_rate)

    def epsilon(self, steps: int | None = None) -> float:
        """Return ε at the plan's δ after ``steps`` steps (all of them by default).

        Returns:
            ε ≥ 0, an upper bound; ``inf`` for mechanism `none` or without noise.

        Raises:
            ConfigError: δ or the noise multiplier is not set, or ``steps`` is negative.
        """
        event = self.event()
        if event is None:
            return math.inf
        if self.delta is None:
            raise ConfigError("delta is not set: give delta (below 1/num_records)")
        count = self.steps if steps is None else steps
        return epsilon_of({event: count}, self.delta, accountant=self.accountant)

    def statement(self, steps: int | None = None) -> str:
        """Return the guarantee after ``steps`` steps in plain English, for cards and reports."""
        count = self.steps if steps is None else steps
        epsilon = self.epsilon(steps)
        if math.isinf(epsilon):
            reason = "mechanism 'none'" if self.mechanism == "none" else "no noise was added"
            return (
                f"This model is not private: it was trained on {self.num_records:,} records with "
                f"no privacy guarantee ({reason}). It may reveal any of them."
            )
        falling = "" if self.clip_schedule is None else " at most, by a schedule fixed in advance,"
        return (
            f"This model is (ε, δ)-differentially private with ε = {_round_up(epsilon)} and "
            f"δ = {self.delta:g}. The unit of privacy is one {self.unit} of the training data, "
            "and the guarantee compares data sets that differ by adding or removing one such "
            f"{self.unit}. It comes from {count:,} steps, each on a Poisson sample that draws "
            f"every record independently with probability {self.sample_rate:.4g} "
            f"({self.expected_batch_size:g} of {self.num_records:,} records expected), with "
            f"gradients clipped to norm {self.max_grad_norm:g}{falling} and a noise multiplier of "
            f"{self.noise_multiplier:.5g}, accounted by {self.accountant.upper()}. "
            "It covers the released model and anything computed from it, as long as the run's "
            f"noise key stays secret and ChaCha{self.noise_rounds} is a pseudorandom function. It "
            "does not cover someone who watches the memory of the training machines or which table "
            f"rows are touched; {self.not_covered()[-1]}; training metrics "
            "computed without noise; the choice of hyper-parameters by comparing several runs on "
            "the same data; or a person who stands behind several records beyond what a guarantee "
            "for each record implies. The number of records is treated as public."
        )


def _round_up(value: float, digits: int = 4) -> str:
    """Write ``value`` with so many significant digits, never below it."""
    if value == 0:
        return "0"
    exact = Decimal(value)
    quantum = Decimal(1).scaleb(exact.adjusted() - digits + 1)
    return f"{exact.quantize(quantum, rounding=ROUND_CEILING).normalize():f}"


def _readable(error: ValidationError) -> ConfigError:
    parts = []
    for item in error.errors(include_url=False):
        key = ".".join(str(part) for part in item["loc"]) or "privacy plan"
        if item["type"] == "extra_forbidden":
            known = ", ".join(PrivacyPlan.model_fields)
            parts.append(f"{key} is not a key of the privacy plan; known keys: {known}")
        elif item["type"] == "missing":
            parts.append(f"{key} is missing: give a value")
        else:
            parts.append(
                f"{key} is {item['input']!r}: {item['msg'].removeprefix('Value error, ').lower()}"
            )
    return ConfigError("; ".join(parts))
