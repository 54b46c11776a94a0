"""The guarantee of a plan in plain English: what it covers, and what it does not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from dist_dp.events import PrivacyEvent
from dist_dp.figures import round_up
from dist_dp.noise_grid import spacing_text
from dist_dp.sparse_settings import ADAPTIVE, SPARSE_MECHANISMS

if TYPE_CHECKING:
    from dist_dp.plan import PrivacyPlan

WATCHERS = (
    "anyone who watches the memory of the training machines, or which table rows are touched "
    "when: in memory, rows between two reads lack the noise that still waits for them"
)
SPARSE_WATCHERS = (
    "anyone who watches the memory of the training machines within a step, or which table rows "
    "it reads (which rows it writes is private, and between two steps the tables are)"
)
NOT_COVERED: tuple[str, ...] = (
    "everything in the run folder beside release/: training metrics, reports and checkpoints "
    "are computed from the records without noise (metrics on held-out records likewise)",
    "the choice of hyper-parameters by looking at several runs on the same records, beyond what "
    "the ledger charges for those runs",
)
"""What no plan's guarantee covers; `not_covered` adds what depends on the plan."""


def not_covered(plan: PrivacyPlan) -> tuple[str, ...]:
    """What a plan's guarantee says nothing about, one phrase each, for cards and reports."""
    person = (
        "a person who stands behind several user keys: the unit is one user, all records with one "
        "key"
        if plan.unit == "user"
        else "a person who stands behind several records: the unit is one record"
    )
    watchers = SPARSE_WATCHERS if plan.mechanism in SPARSE_MECHANISMS else WATCHERS
    number = f"the number of {plan.unit}s, treated as public"
    bits = "attacks on the low-order bits of floating-point noise"
    if plan.noise_grid is not None:
        bits = (
            "the float32 rounding of gradients before the noise (what is noised lies on fixed "
            f"grids, table weights on that of {spacing_text(plan.noise_grid)}), and attacks on "
            "timing"
        )
    counts = (
        ()
        if plan.sparse is None or plan.sparse.frequencies is None
        else (
            "the file of row counts that rows were chosen by: it is taken for public, and would "
            "void the guarantee if the training records had been counted",
        )
    )
    return (watchers, *NOT_COVERED, person, number, bits, *counts)


def statement_of(plan: PrivacyPlan, charged: Mapping[PrivacyEvent, int] | None = None) -> str:
    """Write the guarantee for cards and reports.

    Args:
        plan: the plan.
        charged: the steps charged, by event; all planned ones by default.

    Raises:
        ConfigError: δ or the noise multiplier is not set.
    """
    epsilon = plan.epsilon(charged)
    if math.isinf(epsilon):
        reason = "mechanism 'none'" if plan.mechanism == "none" else "no noise was added"
        return (
            f"This model is not private: it was trained on {plan.num_units:,} {plan.unit}s "
            f"with no privacy guarantee ({reason}). It may reveal any of them."
        )
    costs = plan.events() if charged is None else charged
    steps = sum(costs.values()) - sum(costs.get(e, 0) for e in plan.step_costs().setup)
    falling = "" if plan.clip_schedule is None else " at most, by a schedule fixed in advance,"
    user = plan.unit == "user"
    return (
        f"This model is (ε, δ)-differentially private with ε = {round_up(epsilon)} and "
        f"δ = {plan.delta:g}. The unit of privacy is one {plan.unit} of the training data"
        f"{', with all records that have its key' if user else ''}, "
        "and the guarantee compares data sets that differ by adding or removing one such "
        f"{plan.unit}. It comes from {steps:,} steps, each on a Poisson sample that draws "
        f"every {plan.unit} independently with probability {plan.sample_rate:.4g} "
        f"({plan.expected_batch_size:g} of {plan.num_units:,} {plan.unit}s "
        f"expected){_records(plan)}, "
        f"with gradients{' of users' if user else ''} "
        f"clipped to norm {plan.max_grad_norm:g}{falling} and a noise multiplier of "
        f"{_noise(plan)}{_selection(plan)}{_choice(plan)}, accounted by "
        f"{plan.accountant.upper()}. "
        "It covers the released model and anything computed from it, as long as the run's "
        f"noise key stays secret and ChaCha{plan.noise_rounds} is a pseudorandom function. It "
        "does not cover someone who watches the memory of the training machines or which table "
        f"rows are {'read' if plan.mechanism in SPARSE_MECHANISMS else 'touched'}; "
        f"{not_covered(plan)[-1]}; training metrics "
        "computed without noise; the choice of hyper-parameters by comparing several runs on "
        f"the same data; or a person who stands behind several "
        f"{'user keys' if user else 'records'} beyond what a guarantee "
        f"for each {plan.unit} implies. The number of {plan.unit}s is treated as public."
    )


def _selection(plan: PrivacyPlan) -> str:
    """What else a step's noise multiplier stands for, where rows are selected."""
    if plan.mechanism not in ADAPTIVE or plan.sparse is None:
        return ""
    return (
        " for each step's selection of rows (by counts of the units that touch them, bounded to "
        f"norm {plan.sparse.contribution_norm:g}) and gradients together, of which the selection "
        f"has {plan.sparse.share:.3g}"
    )


def _choice(plan: PrivacyPlan) -> str:
    """How the rows that are trained at all were chosen."""
    if plan.sparse is None or plan.sparse.rows is None:
        return ""
    if not plan.sparse.chooses_privately:
        return ", on rows that were chosen by public frequencies"
    return (
        ", on rows that were chosen once before by noisy counts, at a cost of ε at most "
        f"{plan.sparse.choice_epsilon:g} that is part of the above"
    )


def _records(plan: PrivacyPlan) -> str:
    if plan.unit == "record":
        return ""
    return f" with at most {plan.max_records_per_user:,} of its records"


def _noise(plan: PrivacyPlan) -> str:
    least, greatest = plan.noise_multiplier_range()
    if plan.noise_multiplier_schedule is None:
        return f"{greatest:.5g}"
    return f"{least:.5g} to {greatest:.5g}, by a schedule fixed in advance"
