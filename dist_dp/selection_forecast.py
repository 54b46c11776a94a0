"""What a selection of rows will come to, from public settings alone: before any data is read."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dist_dp.sparse_settings import ADAPTIVE, by_table

if TYPE_CHECKING:
    from dist_dp.plan import PrivacyPlan

MANY = 0.1
"""Share of a table's rows from which false positives are worth a warning."""


class DenseSelectionWarning(UserWarning):
    """A threshold is so low that a large part of the tables would be noised at every step."""


@dataclass(frozen=True)
class SelectionForecast:
    """A step's noised rows and coordinates.

    Attributes:
        thresholds: τ by table, in the step with the most noise; empty where rows are chosen once.
        eligible_rows: Rows that may be noised at all, over all tables.
        all_rows: Rows of all tables.
        false_positives: Rows that survive in the mean although no unit touches them; where rows are
            chosen once and not again, all chosen ones.
        false_positive_coordinates: Coordinates of those.
        most_rows: Rows noised if every row that is looked up survives.
        most_coordinates: Coordinates of those.
        all_coordinates: Coordinates of all tables: what DP-SGD noises.
        warning: What is wrong with it, and the remedy; None if nothing is.
    """

    thresholds: dict[str, float]
    eligible_rows: int
    all_rows: int
    false_positives: float
    false_positive_coordinates: float
    most_rows: float
    most_coordinates: float
    all_coordinates: int
    warning: str | None = None


def forecast_selection(
    plan: PrivacyPlan,
    tables: Mapping[str, tuple[int, int]],
    ids_a_step: Mapping[str, float],
) -> SelectionForecast | None:
    """What a step's selection will come to; None for mechanisms that select no rows.

    Args:
        plan: With its noise multiplier known.
        tables: Rows and columns by unique table name.
        ids_a_step: Ids that a step looks up in each table, in the mean.

    Raises:
        ConfigError: A setting names a table that is not there, or fits none.
    """
    settings = plan.sparse
    if settings is None:
        return None
    rows = {table: size for table, (size, _) in tables.items()}
    eligible = dict(rows)
    if settings.rows is not None:
        kept = by_table(settings.rows, rows, "sparse.rows", default=max(rows.values()))
        eligible = {table: min(rows[table], kept[table]) for table in rows}
    if plan.mechanism in ADAPTIVE:
        # The step with the most noise has the most false positives.
        found = settings.thresholds(plan.noise_multiplier_range()[1], eligible)
        thresholds = {table: tau for table, (tau, _) in found.items()}
        untouched = {table: p * eligible[table] for table, (_, p) in found.items()}
    else:
        thresholds = {}
        untouched = {table: float(count) for table, count in eligible.items()}
    most = {t: min(eligible[t], untouched[t] + ids_a_step.get(t, 0.0)) for t in rows}
    dims = {table: dim for table, (_, dim) in tables.items()}
    false_coordinates = {t: n * dims[t] for t, n in untouched.items()}
    dense = [t for t in thresholds if eligible[t] and untouched[t] >= MANY * eligible[t]]
    return SelectionForecast(
        thresholds=thresholds,
        eligible_rows=sum(eligible.values()),
        all_rows=sum(rows.values()),
        false_positives=sum(untouched.values()),
        false_positive_coordinates=sum(false_coordinates.values()),
        most_rows=sum(most.values()),
        most_coordinates=sum(n * dims[t] for t, n in most.items()),
        all_coordinates=sum(rows[t] * dims[t] for t in rows),
        warning=_warning(
            dense,
            sum(untouched[t] for t in dense),
            sum(eligible[t] for t in dense),
            4 * sum(false_coordinates[t] for t in dense),
            by_threshold=settings.threshold is not None,
        )
        if dense
        else None,
    )


def _warning(
    tables: list[str], survivors: float, rows: int, size: float, *, by_threshold: bool
) -> str:
    named = f"table '{tables[0]}'" if len(tables) == 1 else f"{len(tables)} tables"
    remedy = (
        "raise sparse.threshold, or give sparse.false_positives in its place, the rows a step may "
        "noise in vain"
        if by_threshold
        else "lower sparse.false_positives"
    )
    return (
        f"the selection is no selection in {named}: {survivors:,.0f} of {rows:,} rows are expected "
        "to survive a step although no unit touches them; their noise takes "
        f"{size / 1e6:,.1f} MB a step. To mend it, {remedy}."
    )


def warn_if_dense(forecast: SelectionForecast | None) -> None:
    """Warns where untouched rows alone are a large part of a table.

    Warns:
        DenseSelectionWarning: With the rows expected, their memory and the remedy.
    """
    if forecast is not None and forecast.warning is not None:
        warnings.warn(forecast.warning, DenseSelectionWarning, stacklevel=2)
