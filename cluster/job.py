"""What the driver hands to the workers: simple types only, no secrets, no open files."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dist_dp.cluster.config import RunConfig, parse_config
from dist_dp.datasets.schema import DataSchema
from dist_dp.datasets.store import ArrowStore
from dist_dp.errors import ConfigError
from dist_dp.noise_schedule import SMALLEST_DEVIATION, is_representable, step_deviation
from dist_dp.plan import PrivacyPlan
from dist_dp.schedules import learning_rate_at

VERIFY_BELOW_BYTES = 2 << 30
"""Stores below this size are compared with their checksums at every start."""


@dataclass(frozen=True)
class Job:
    """One training run.

    Attributes:
        run_name: Name of the run; also its account in the ledger.
        run_folder: Its folder, on storage that driver and workers share.
        store: Folder of the converted data, likewise.
        dataset: Name of the data set in the ledger.
        ledger: Name of the ledger: its path on the driver's node, or its URL without the way to
            connect.
        config: The resolved configuration.
        columns: The data schema with the table sizes of this run.
        plan: The privacy plan.
        owner: Tells it from another run of its name; random.
        resume: Go on from the run's checkpoint.
        verbose: Let libraries log.
    """

    run_name: str
    run_folder: str
    store: str
    dataset: str
    ledger: str
    config: dict[str, Any]
    columns: dict[str, Any]
    plan: dict[str, Any]
    owner: str
    resume: bool = False
    verbose: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Simple types, for Ray Train."""
        return asdict(self)

    @property
    def run_config(self) -> RunConfig:
        """The validated configuration."""
        return parse_config(self.config)

    @property
    def schema(self) -> DataSchema:
        """The data schema."""
        return DataSchema.model_validate(self.columns)

    @property
    def privacy_plan(self) -> PrivacyPlan:
        """The privacy plan."""
        return PrivacyPlan(**self.plan)

    def open_store(self) -> ArrowStore:
        """Opens the data, verified if it is small enough to read whole."""
        store = ArrowStore.open(Path(self.store), schema=self.schema)
        if store.num_bytes < VERIFY_BELOW_BYTES:
            store = ArrowStore.open(Path(self.store), verify=True, schema=self.schema)
        return store


def make_plan(
    config: RunConfig, num_units: int, table_rows: Mapping[str, int] | None = None
) -> PrivacyPlan:
    """The privacy plan of a configuration, calibrated.

    Args:
        config: The configuration.
        num_units: Records of the training split, or its users where they are the unit of privacy.
        table_rows: Rows of each table, for plans that choose among them.

    Raises:
        ConfigError: It does not fit the number of units, or the noise of a step would be too
            small or too large to be represented.
    """
    privacy, train = config.privacy, config.train
    steps = train.steps
    if steps is None:
        assert train.epochs is not None
        steps = max(1, math.ceil(train.epochs * num_units / train.expected_batch_size))
    delta = privacy.delta if privacy.delta is not None else 0.1 / max(1, num_units)
    plan = PrivacyPlan(
        mechanism=privacy.mechanism,
        noise_multiplier=privacy.noise_multiplier,
        max_grad_norm=privacy.max_grad_norm,
        clip_schedule=privacy.clip_schedule,
        noise_multiplier_schedule=privacy.noise_multiplier_schedule,
        unit=privacy.unit,
        num_records=num_units if privacy.unit == "record" else None,
        num_users=num_units if privacy.unit == "user" else None,
        max_records_per_user=privacy.max_records_per_user,
        expected_batch_size=train.expected_batch_size,
        steps=steps,
        delta=None if privacy.mechanism == "none" else delta,
        accountant=privacy.accountant,
        allow_large_delta=privacy.allow_large_delta,
        noise_rounds=config.noise.rounds,
        sparse=privacy.sparse,
    )
    if table_rows is not None:
        plan = plan.with_choice(table_rows)
    if privacy.epsilon is not None:
        plan = plan.calibrate(privacy.epsilon, delta)
    smallest, largest = _noise_of_steps(config, plan)
    plan = plan.with_noise_grid(config.noise.grid, smallest, largest)
    if plan.noise_grid is not None and learning_rate_at(train.learning_rate, plan.steps) == 0:
        raise ConfigError(
            "noise.grid: the tables' learning rate is 0 at the last step, so a release would add "
            "no noise on the grid; give the cosine a final_fraction"
        )
    return plan


def _noise_of_steps(config: RunConfig, plan: PrivacyPlan) -> tuple[float, float]:
    """The least and the greatest noise of a step on a table's weight, steps without any aside.

    Raises:
        ConfigError: At some step's learning rate the noise could not be recorded.
    """
    schedule = config.train.learning_rate

    def deviation(step: int) -> float:
        return step_deviation(
            learning_rate_at(schedule, step),
            plan.gradient_multiplier_at(step),
            plan.max_grad_norm_at(step),
            plan.expected_batch_size,
        )

    # Rates, clip norms and noise multipliers rise up to the peak and never after it, so the first
    # too small is found by halving.
    factors = (plan.clip_schedule, plan.noise_multiplier_schedule)
    rising = max(factor.warmup_steps if factor else 0 for factor in factors)
    peak = min(plan.steps, max(1, schedule.warmup_steps, rising))
    falling = range(peak, plan.steps + 1)
    small = bisect_left(falling, True, key=lambda step: deviation(step) < SMALLEST_DEVIATION)
    for step in (1, peak, *falling[small : small + 1]):
        if not is_representable(deviation(step)):
            raise ConfigError(
                f"train.learning_rate: it is {learning_rate_at(schedule, step):.3g} at step "
                f"{step}, where noise of standard deviation {deviation(step):.3g} cannot be "
                "represented; choose a schedule that stays further from "
                f"{'0' if deviation(step) < 1 else 'infinity'}"
            )
    # What is not representable and was not refused is a rate of exactly 0, from there to the end.
    last = falling[small - 1] if small else peak
    return min(deviation(1), deviation(last)), deviation(peak)
