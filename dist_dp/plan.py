"""The privacy plan: one object that couples sampling, clipping, noise and accounting.

Whatever bears on the guarantee is in it and nothing else: knobs of speed (micro-batches, sharding,
threads) may not change the guarantee, so they live elsewhere.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from dist_dp.accounting import epsilon_of
from dist_dp.calibration import calibrate_noise_multiplier
from dist_dp.choice_budget import choice_event
from dist_dp.errors import ConfigError
from dist_dp.events import GaussianEvent, PrivacyEvent, event_from_json, event_to_json
from dist_dp.noise_grid import (
    check_spacing,
    dense_spacing,
    read_spacing,
    table_spacing,
)
from dist_dp.noise_levels import factor_levels, planned_costs
from dist_dp.plain_model import PlainModel
from dist_dp.plan_checks import check_agreement, check_delta_of
from dist_dp.schedules import ScheduleConfig, learning_rate_at
from dist_dp.sparse_settings import ADAPTIVE, SparseSettings
from dist_dp.statement import not_covered, statement_of
from dist_dp.step_costs import StepCosts, sum_of

Mechanism = Literal["none", "dpsgd", "lazydp", "fest", "adafest", "adafest+"]


class PrivacyPlan(PlainModel):
    """What a run does to private data, in simple types that go to JSON or YAML and back.

    Args:
        mechanism: `none` (no privacy), `dpsgd` (noise on every row each step), `lazydp` (the
            same distribution, drawn when a row is read), or `fest`, `adafest`, `adafest+` (noise
            on few rows).
        noise_multiplier: noise standard deviation over sensitivity of a step, the largest of any;
            left out until `calibrate` finds it. Where a step also selects rows it is that of
            selection and gradients together; `gradient_multiplier_at` is the gradients' own.
        max_grad_norm: bound C on the Euclidean norm of one unit's gradient, over all layers and
            tables together: a record's, or the sum over a user's records in a step.
        clip_schedule: factor of `max_grad_norm` by step, a schedule with base 1; the same at every
            step by default. Noise follows the bound, so a step costs the same privacy at any.
        noise_multiplier_schedule: factor of `noise_multiplier` by step, a schedule with base 1,
            rounded up to 16 levels (see `dist_dp.noise_levels`); the same at every step by
            default. A step with less noise costs more privacy.
        num_records: records in the training data, where the unit is a record; treated as public.
        num_users: users in the training data, where the unit is a user; treated as public, and
            then the number of records is not in the plan.
        max_records_per_user: most records of a user in a step, where the unit is a user; those of
            a user with more take turns at random.
        expected_batch_size: mean number of units a step draws (may be fractional). The sum of
            clipped gradients is divided by this, never by the size drawn.
        steps: number of steps the run is to take.
        delta: δ of the guarantee; must be below 1 / `num_units`.
        target_epsilon: ε the noise was calibrated to, kept for the record.
        unit: what the guarantee protects: one `record`, or one `user` with all its records.
        neighbouring_relation: data sets that differ by adding or removing one such unit.
        sampling: each unit is drawn independently in each step.
        accountant: `pld` (tight) or `rdp` (for comparison).
        allow_large_delta: accept δ ≥ 1 / `num_units` all the same.
        noise_grid: spacing of the grid that noised table rows are put on, a power of two; None
            for none. See `dist_dp.noise_grid`.
        noise_rounds: ChaCha rounds of the noise: 20 or 12.
        sparse: what `fest`, `adafest` and `adafest+` select rows by.

    Raises:
        ConfigError: a key is unknown, of the wrong type, or contradicts another; the message
            names the key and the remedy.

    Guarantee:
        The noise multipliers, the sample rate and the steps that the accountant sees are those
        that training uses, because both read them from here: `step_costs` is what the ledger
        charges, and `noise_multiplier_at`, which training draws, is read off it.
    """

    called: ClassVar[str] = "privacy plan"

    mechanism: Mechanism = "lazydp"
    noise_multiplier: float | None = Field(default=None, ge=0)
    max_grad_norm: float = Field(gt=0)
    num_records: int | None = Field(default=None, ge=1)
    num_users: int | None = Field(default=None, ge=1)
    max_records_per_user: int | None = Field(default=None, ge=1)
    expected_batch_size: float = Field(gt=0)
    steps: int = Field(ge=1)
    delta: float | None = Field(default=None, gt=0, lt=1)
    target_epsilon: float | None = Field(default=None, gt=0)
    unit: Literal["record", "user"] = "record"
    neighbouring_relation: Literal["add_or_remove_one"] = "add_or_remove_one"
    sampling: Literal["poisson"] = "poisson"
    accountant: Literal["pld", "rdp"] = "pld"
    allow_large_delta: bool = False
    noise_grid: float | None = None
    noise_rounds: Literal[20, 12] = 20
    clip_schedule: ScheduleConfig | None = None
    noise_multiplier_schedule: ScheduleConfig | None = None
    sparse: SparseSettings | None = None

    @field_validator(
        "noise_multiplier", "max_grad_norm", "num_records", "num_users", "max_records_per_user",
        "expected_batch_size", "steps", "delta", "target_epsilon", mode="before",
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
        check_agreement(self)
        return self

    @property
    def sample_rate(self) -> float:
        """Probability that a given unit takes part in a given step."""
        return self.expected_batch_size / self.num_units

    @property
    def num_units(self) -> int:
        """Units of privacy in the training data: records, or users."""
        count = self.num_users if self.unit == "user" else self.num_records
        assert count is not None  # check_agreement saw to it
        return count

    @property
    def is_private(self) -> bool:
        """Whether the plan adds any noise at all."""
        return self.mechanism != "none" and self.noise_multiplier != 0

    @property
    def noise_on_sum(self) -> float:
        """Standard deviation σC of the noise on a step's sum of gradients; 0 without noise.

        With a schedule of either, no step has more; see `noise_on_sum_at`.
        """
        return self._of_gradients(self.noise_multiplier or 0.0) * self.max_grad_norm

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

    def noise_multiplier_at(self, step: int) -> float:
        """The noise multiplier σ of a step; the first step is 1. 0 with mechanism `none`.

        Guarantee:
            It is that of the event that the step is charged as, bit for bit. A function of the
            plan and the step alone, fixed before the run and never of the data, so that events of
            different noise compose as they are: nothing is chosen in the light of a result.

        Raises:
            ConfigError: the noise multiplier is not known yet.
            ValueError: `step` is below 1.
        """
        if step < 1:
            raise ValueError(f"step: {step} given; the first step is 1")
        return 0.0 if self.mechanism == "none" else self.event_at(step).noise_multiplier

    def noise_multiplier_range(self) -> tuple[float, float]:
        """The least and the greatest noise multiplier of any step; zeros with mechanism `none`.

        Raises:
            ConfigError: the noise multiplier is not known yet.
        """
        if self.mechanism == "none":
            return 0.0, 0.0
        multipliers = [
            event.noise_multiplier
            for event, _ in self.step_costs().segments
            if isinstance(event, GaussianEvent)
        ]
        return min(multipliers), max(multipliers)

    def gradient_multiplier_at(self, step: int) -> float:
        """The noise multiplier of a step's gradients: σ, or σ₂ where a selection has its share.

        Guarantee:
            With the selection's own σ₁ it makes σ: 1/σ² = 1/σ₁² + 1/σ₂²; see
            `dist_dp.sparse_settings`.
        """
        return self._of_gradients(self.noise_multiplier_at(step))

    def _of_gradients(self, noise_multiplier: float) -> float:
        if self.mechanism not in ADAPTIVE or self.sparse is None:
            return noise_multiplier
        return self.sparse.gradient_multiplier(noise_multiplier)

    def noise_on_sum_at(self, step: int) -> float:
        """Standard deviation of the noise on a step's sum of gradients: σC, or σ₂C."""
        return self.gradient_multiplier_at(step) * self.max_grad_norm_at(step)

    @property
    def dense_noise_grid(self) -> float | None:
        """Spacing of the grid that dense parameters' noised sums are put on, if tables have one."""
        if self.noise_grid is None:
            return None
        self.step_costs()  # complains where the noise is not known yet
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
        return not_covered(self)

    def calibrate(self, epsilon: float, delta: float) -> PrivacyPlan:
        """Return this plan with the smallest noise multiplier that meets (ε, δ) over its steps.

        With a noise multiplier schedule it is the one that the factors multiply, and the
        composition is that of all levels.

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
            check_delta_of(self, delta)
        factors: Counter[float] = Counter()
        for factor, steps in factor_levels(self.noise_multiplier_schedule, self.steps):
            factors[factor] += steps
        sigma = calibrate_noise_multiplier(
            epsilon,
            delta,
            self.sample_rate,
            self.steps,
            self.accountant,
            factors,
            also=dict.fromkeys(self._setup(), 1),
        )
        changes = {"noise_multiplier": sigma, "delta": delta, "target_epsilon": epsilon}
        return PrivacyPlan(**{**self.model_dump(), **changes})

    def step_costs(self) -> StepCosts:
        """Return what each step costs: the events that training causes and the ledger charges.

        Raises:
            ConfigError: the noise multiplier is not known yet, or the mechanism is `none`, whose
                steps have no event.
        """
        if self.mechanism == "none":
            raise ConfigError(
                "mechanism 'none' adds no noise, so its steps have no privacy cost to account for: "
                "choose mechanism 'lazydp' or 'dpsgd'"
            )
        if self.noise_multiplier is None:
            raise ConfigError(
                "noise_multiplier is not set: give it, or call calibrate(epsilon, delta)"
            )
        return planned_costs(
            self.noise_multiplier,
            self.sample_rate,
            self.noise_multiplier_schedule,
            self.steps,
            self._setup(),
        )

    def _setup(self) -> tuple[PrivacyEvent, ...]:
        """What is done once before the first step: the private choice of rows, if there is one."""
        if self.sparse is None or not self.sparse.chooses_privately:
            return ()
        if self.sparse.choice is None:
            raise ConfigError(
                "what the private choice of rows costs is not known yet: call with_choice(rows of "
                "each table)"
            )
        return (event_from_json(self.sparse.choice),)

    def with_choice(self, num_rows: Mapping[str, int]) -> PrivacyPlan:
        """Return this plan with the cost of its private choice of rows, if it makes one.

        Args:
            num_rows: rows of each table of the model, by name.

        Guarantee:
            The choice alone costs at most `sparse.choice_epsilon` at the plan's δ; its event is the
            run's step 0, in `step_costs`, so calibration, ledger and statement count it.

        Raises:
            ConfigError: a table has fewer rows than it is to keep, or δ is not set.
        """
        settings = self.sparse
        if settings is None or settings.rows is None:
            return self
        rows = settings.rows_to_choose(num_rows)
        if not settings.chooses_privately:
            return self
        if self.delta is None:
            raise ConfigError(f"delta is not set: give delta (below 1/num_{self.unit}s)")
        if not rows:
            raise ConfigError("sparse.rows keeps every row of every table: choose 'adafest'")
        assert settings.choice_epsilon is not None  # check_for saw to it
        event = choice_event(
            settings.choice_epsilon,
            self.delta,
            selections=sum(rows.values()),
            noise=settings.choice_noise or "gaussian",
            accountant=self.accountant,
        )
        changed = {**settings.model_dump(), "choice": event_to_json(event)}
        return PrivacyPlan(**{**self.model_dump(), "sparse": changed})

    def event_at(self, step: int) -> GaussianEvent:
        """Return what a step costs; see `step_costs` for errors."""
        event = self.step_costs().at(step)
        assert isinstance(event, GaussianEvent)
        return event

    def events(self, steps: int | None = None) -> dict[PrivacyEvent, int]:
        """Return what the first ``steps`` steps (all by default) cost, and what precedes them."""
        costs = self.step_costs()
        taken = costs.between(1, self.steps if steps is None else steps)
        return sum_of(taken, Counter(costs.setup))

    def epsilon(self, charged: Mapping[PrivacyEvent, int] | None = None) -> float:
        """Return ε at the plan's δ.

        Args:
            charged: the steps to compose, by event: those of `events`, or what the ledger charged;
                all planned steps by default.

        Returns:
            ε ≥ 0, an upper bound; ``inf`` for mechanism `none` or without noise.

        Raises:
            ConfigError: δ or the noise multiplier is not set.
        """
        if self.mechanism == "none":
            return math.inf
        events = self.events() if charged is None else charged
        if self.delta is None:
            raise ConfigError(f"delta is not set: give delta (below 1/num_{self.unit}s)")
        return epsilon_of(events, self.delta, accountant=self.accountant)

    def statement(self, charged: Mapping[PrivacyEvent, int] | None = None) -> str:
        """Return the guarantee in plain English, for cards and reports; see `epsilon`."""
        return statement_of(self, charged)
