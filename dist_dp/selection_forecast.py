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
"""Share of all rows from which false positives are worth a warning."""


class DenseSelectionWarning(UserWarning):
    """A threshold is so low that a large part of the tables would be noised at every step."""


@dataclass(frozen=True)
class SelectionForecast:
    """A step's noised rows and coordinates.

    Attributes:
        thresholds: τ by table; empty where rows are chosen once.
        eligible_rows: Rows that may be noised at all, over all tables.
        all_rows: Rows of all tables.
        false_positives: Rows that survive in the mean although no unit touches them; where rows are
            chosen once and not again, all chosen ones.
        false_positive_coordinates: Coordinates of those.
        most_rows: Rows noised if every row that is looked up survives.
        most_coordinates: Coordinates of those.
        all_coordinates: Coordinates of all tables: what DP-SGD noises.
    """

    thresholds: dict[str, float]
    eligible_rows: int
    all_rows: int
    false_positives: float
    false_positive_coordinates: float
    most_rows: float
    most_coordinates: float
    all_coordinates: int

    @property
    def bytes_a_step(self) -> float:
        """Memory of the noise of the false positives, float32."""
        return 4.0 * self.false_positive_coordinates


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
        found = settings.thresholds(plan.noise_multiplier_at(1), eligible)
        thresholds = {table: tau for table, (tau, _) in found.items()}
        untouched = {table: p * eligible[table] for table, (_, p) in found.items()}
    else:
        thresholds = {}
        untouched = {table: float(count) for table, count in eligible.items()}
    most = {t: min(eligible[t], untouched[t] + ids_a_step.get(t, 0.0)) for t in rows}
    dims = {table: dim for table, (_, dim) in tables.items()}
    return SelectionForecast(
        thresholds=thresholds,
        eligible_rows=sum(eligible.values()),
        all_rows=sum(rows.values()),
        false_positives=sum(untouched.values()),
        false_positive_coordinates=sum(n * dims[t] for t, n in untouched.items()),
        most_rows=sum(most.values()),
        most_coordinates=sum(n * dims[t] for t, n in most.items()),
        all_coordinates=sum(rows[t] * dims[t] for t in rows),
    )


def warn_if_dense(forecast: SelectionForecast | None) -> None:
    """Warns where untouched rows alone are a large part of the tables.

    Warns:
        DenseSelectionWarning: With the rows expected, their memory and the remedy.
    """
    if forecast is None or not forecast.thresholds:
        return
    if forecast.false_positives < MANY * forecast.eligible_rows:
        return
    lowest = min(forecast.thresholds.values())
    warnings.warn(
        f"the selection's threshold (sparse.threshold, {lowest:g} at the lowest) is so low that "
        f"{forecast.false_positives:,.0f} of {forecast.eligible_rows:,} rows are expected to "
        "survive each step although no unit touches them; their noise takes "
        f"{forecast.bytes_a_step / 1e6:,.1f} MB a step. Raise it, or give "
        "sparse.false_positives, the rows a step may noise in vain.",
        DenseSelectionWarning,
        stacklevel=2,
    )
