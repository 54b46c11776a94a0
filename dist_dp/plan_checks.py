"""What a privacy plan's settings may be together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dist_dp.errors import ConfigError
from dist_dp.noise_grid import spacing_text
from dist_dp.schedules import ScheduleConfig, check_factors
from dist_dp.sparse_settings import SPARSE_MECHANISMS

if TYPE_CHECKING:
    from dist_dp.plan import PrivacyPlan


def check_agreement(plan: PrivacyPlan) -> None:
    """Check settings against each other, once each is valid by itself.

    Raises:
        ConfigError: two contradict each other; the message names both and the remedy.
    """
    _check_unit(plan)
    if plan.expected_batch_size > plan.num_units:
        raise ConfigError(
            f"expected_batch_size {plan.expected_batch_size:g} is larger than num_{plan.unit}s "
            f"{plan.num_units}: lower expected_batch_size"
        )
    if plan.noise_grid is not None and not plan.is_private:
        raise ConfigError(
            f"noise_grid {spacing_text(plan.noise_grid)} is set, but no noise is added: leave "
            "out noise_grid, or choose mechanism 'lazydp' or 'dpsgd' with a noise multiplier"
        )
    if plan.mechanism == "none":
        for key in ("noise_multiplier", "target_epsilon"):
            if getattr(plan, key):
                raise ConfigError(
                    f"{key} {getattr(plan, key)} is set, but mechanism 'none' gives no "
                    f"privacy: leave out {key}, or choose mechanism 'lazydp' or 'dpsgd'"
                )
    elif plan.delta is not None:
        check_delta_of(plan, plan.delta)
    _check_sparse(plan)
    if plan.clip_schedule is not None:
        _check_clip_schedule(plan, plan.clip_schedule)
    if plan.noise_multiplier_schedule is not None:
        _check_noise_multiplier_schedule(plan, plan.noise_multiplier_schedule)


def _check_unit(plan: PrivacyPlan) -> None:
    """One unit has the settings of that unit, and none of the other's.

    The number of records is no part of a plan for users: a plan is published, and one user may
    change that number by any amount.
    """
    needed: tuple[str, ...] = ("num_records",)
    odd: tuple[str, ...] = ("num_users", "max_records_per_user")
    if plan.unit == "user":
        needed, odd = odd, needed
    for key in needed:
        if getattr(plan, key) is None:
            raise ConfigError(f"{key} is missing: the unit of privacy is one {plan.unit}; give it")
    for key in odd:
        if getattr(plan, key) is not None:
            raise ConfigError(
                f"{key} {getattr(plan, key)} is set, but the unit of privacy is one {plan.unit}: "
                f"leave out {key}, or change the unit"
            )


def _check_sparse(plan: PrivacyPlan) -> None:
    if plan.mechanism not in SPARSE_MECHANISMS:
        if plan.sparse is not None:
            raise ConfigError(
                f"sparse is set, but mechanism '{plan.mechanism}' selects no rows: leave it out, "
                f"or choose {', '.join(SPARSE_MECHANISMS)}"
            )
        return
    if plan.sparse is None:
        raise ConfigError(
            f"sparse is missing: mechanism '{plan.mechanism}' needs to know by what rows are "
            "selected (a threshold or expected false positives, the rows to keep)"
        )
    plan.sparse.check_for(plan.mechanism)
    if plan.noise_grid is not None:
        raise ConfigError(
            f"noise_grid does not go with mechanism '{plan.mechanism}': leave it out, or choose "
            "'lazydp'"
        )


def _check_clip_schedule(plan: PrivacyPlan, schedule: ScheduleConfig) -> None:
    check_factors(
        schedule,
        plan.steps,
        name="clip_schedule",
        multiplies="max_grad_norm",
        at_zero="makes the clip norm 0, where a gradient could not be bounded but by nothing: "
        "give the cosine a final_fraction",
    )
    if plan.noise_grid is not None:
        raise ConfigError(
            "clip_schedule does not go with noise_grid, whose spacing was chosen for one noise "
            "on the sum: leave out one of them"
        )


def _check_noise_multiplier_schedule(plan: PrivacyPlan, schedule: ScheduleConfig) -> None:
    if plan.mechanism == "none":
        raise ConfigError(
            "noise_multiplier_schedule is set, but mechanism 'none' adds no noise: leave it "
            "out, or choose mechanism 'lazydp' or 'dpsgd'"
        )
    check_factors(
        schedule,
        plan.steps,
        name="noise_multiplier_schedule",
        multiplies="noise_multiplier",
        at_zero="makes a step without noise, hence a run without a guarantee: give the cosine "
        "a final_fraction",
    )
    if plan.noise_multiplier is not None and plan.noise_multiplier_range()[0] == 0:
        raise ConfigError(
            f"noise_multiplier_schedule times noise_multiplier {plan.noise_multiplier:g} is 0 "
            "at a step, which would have no noise: raise noise_multiplier, or leave out the "
            "schedule"
        )
    if plan.noise_grid is not None:
        raise ConfigError(
            "noise_multiplier_schedule does not go with noise_grid, whose spacing was chosen "
            "for one noise on the sum: leave out one of them"
        )


def check_delta_of(plan: PrivacyPlan, delta: float) -> None:
    """Refuse a δ at which publishing one whole unit would pass.

    Raises:
        ConfigError: with the δ that would do.
    """
    if delta * plan.num_units >= 1 and not plan.allow_large_delta:
        what = "all records of one user" if plan.unit == "user" else "one whole record"
        raise ConfigError(
            f"delta {delta:g} is not below 1/num_{plan.unit}s = {1 / plan.num_units:.3g}: a "
            f"mechanism that publishes {what} would pass; lower delta, or set "
            "allow_large_delta (--force-delta) if you mean it"
        )
