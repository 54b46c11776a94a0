"""The k largest of many values, with ties in a fixed order."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from dist_dp.errors import ConfigError


def largest(values: NDArray[np.float64], k: int) -> NDArray[np.int64]:
    """The places of the ``k`` largest values, ascending; all, if there are no more.

    Of equal values those at smaller places come first, so the result is one and the same however
    it is computed.
    """
    if k >= len(values):
        return np.arange(len(values), dtype=np.int64)
    if k < 1:
        return np.empty(0, dtype=np.int64)
    threshold = np.partition(values, len(values) - k)[len(values) - k]
    chosen = values > threshold
    ties = np.flatnonzero(values == threshold)
    chosen[ties[: k - int(chosen.sum())]] = True
    return np.flatnonzero(chosen)


def check_rows_fit(rows: Mapping[str, int], num_rows: Mapping[str, int]) -> None:
    """Refuses numbers of rows that tables do not have.

    Args:
        rows: How many rows to take, by unique name of the table.
        num_rows: Rows of every table.

    Raises:
        ConfigError: With both numbers, or the names that there are.
    """
    for table, wanted in rows.items():
        if table not in num_rows:
            raise ConfigError(
                f"rows: no table is called '{table}'; there are {', '.join(sorted(num_rows))}"
            )
        if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 1:
            raise ConfigError(f"rows of table '{table}' is {wanted!r}: give an integer from 1 on")
        if wanted > num_rows[table]:
            raise ConfigError(
                f"rows: {wanted} of table '{table}' are to be kept, but it has only "
                f"{num_rows[table]} rows; give at most so many, or leave the table out to keep "
                "all of it"
            )
