"""The rows that FEST trains at all, chosen before the first step: publicly, or privately."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from dist_dp.contributions import KeptRows
from dist_dp.distributed import all_together, rank
from dist_dp.errors import BudgetError
from dist_dp.frequent_rows import private_rows
from dist_dp.public_counts import public_rows
from dist_dp.row_counts import TableFeatures, row_counts
from dist_dp.setup_charge import charge_setup

if TYPE_CHECKING:
    from dist_dp.batch_features import FeaturesOf
    from dist_dp.loader import BatchSource
    from dist_dp.plan import PrivacyPlan
    from dist_dp.user_records import UserRecords


def choose_rows(
    plan: PrivacyPlan,
    tables: Sequence[TableFeatures],
    source: BatchSource,
    *,
    users: UserRecords | None,
    features_of: FeaturesOf | None,
    secret: bytes,
    run_id: str,
    accountant: Any,
    device: torch.device,
) -> KeptRows:
    """Chooses the rows of every table that does not keep all of them; a collective.

    Guarantee:
        A private choice costs the plan's setup event and is charged, as the run's step 0, before
        anything is counted; once for a secret, since made again from the same records it comes out
        the same. A run that goes on from a checkpoint does not choose again.

    Args:
        plan: With its choice resolved (`PrivacyPlan.with_choice`).
        tables: The model's tables.
        source: The training records.
        users: Whose they are, where the unit is a user.
        features_of: From a batch to the ids of its collections.
        secret: The run's 32 secret bytes.
        run_id: The run's account.
        accountant: Rank 0's.
        device: Where collectives run.

    Returns:
        By unique name of the table: global rows, int64, sorted.

    Raises:
        BudgetError: What is left of the budget does not cover the choice.
        ConfigError: A table has fewer rows than it is to keep.
        DataError: The public counts, or the records, cannot be read.
    """
    settings = plan.sparse
    assert settings is not None
    num_rows = {t.table: t.num_rows for t in tables}
    rows = settings.rows_to_choose(num_rows)
    if settings.frequencies is not None:
        return public_rows(settings.frequencies, num_rows, rows)
    (event,) = plan.step_costs().setup

    def charge() -> None:
        if rank() == 0:
            charge_setup(accountant, run_id, secret)

    all_together(charge, BudgetError, "charge the choice of rows")
    most = settings.rows_of_a_unit
    chosen = [t for t in tables if t.table in rows]
    return private_rows(
        row_counts(source, chosen, most, users=users, features_of=features_of, device=device),
        rows,
        event,
        secret=secret,
        num_tables=len(chosen),
        max_rows_per_unit=most,
        device=device,
    )
