"""The rows that DP-FEST trains: the most frequent ones, chosen privately from counts with noise.

Where public counts are given there is nothing to protect: see `dist_dp.public_counts`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_dp.distributed import all_gather_cat, rank, world_size
from dist_dp.errors import ConfigError
from dist_dp.events import GaussianEvent, PrivacyEvent, TopKEvent
from dist_dp.kernels import derive_key, normal, uniforms
from dist_dp.kernels.portable import log, log_complements
from dist_dp.row_counts import TableFeatures
from dist_dp.top_rows import check_rows_fit, largest

Float64Array = NDArray[np.float64]
Noise = Callable[[int, int], Float64Array]
"""The noise of the rows from one number to another."""

_ROWS_AT_ONCE = 1 << 20
_NORMALS_IN_A_BLOCK = 1024


def private_rows(
    counts: Iterable[tuple[TableFeatures, Tensor]],
    rows: Mapping[str, int],
    event: PrivacyEvent,
    *,
    secret: bytes,
    num_tables: int,
    max_rows_per_unit: int,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """Chooses rows of all tables by noisy counts; a collective, the same on every rank.

    Guarantee:
        Costs ``event``, for one unit added or removed; charge it before (see
        `dist_dp.setup_charge`). The noise follows from the event: see `top_rows_by_gumbel` and
        `top_rows_by_gaussian`. Every row's count has noise, those of rows that nobody holds too.
        Noise is keyed by the secret, the table and the row, so the choice is the same wherever
        and however often it is made from the same records, and nothing new is seen when it is made
        again. Nothing but the chosen rows may leave: not the counts, noisy or not.

    Args:
        counts: Tables and their counts, as `dist_dp.row_counts` gives them with
            ``max_rows_per_unit``.
        rows: How many rows to take, by unique name of the table.
        event: What the choice is charged as: a `TopKEvent` of as many selections, or a
            `GaussianEvent` on all units; see `choice_event`.
        secret: The run's 32 secret bytes.
        num_tables: Tables from which rows are chosen.
        max_rows_per_unit: Bound on the rows of a table that a unit counts for.
        device: Where collectives run.

    Returns:
        By unique name of the table, int64, sorted.

    Raises:
        ConfigError: A table has fewer rows than asked for, or the event covers less than this.
    """
    if len(rows) > num_tables:
        raise ConfigError(
            f"rows of {len(rows)} tables are to be chosen, noise is for {num_tables}: give the "
            "number of tables"
        )
    scale = noise_scale(event, num_tables, max_rows_per_unit)
    if isinstance(event, TopKEvent) and event.selections < sum(rows.values()):
        raise ConfigError(
            f"{sum(rows.values())} rows are to be chosen, but {event.selections} selections are "
            "charged: make the event for all tables together"
        )
    found = {}
    for table, values in counts:
        if table.table not in rows:
            continue
        choose = top_rows_by_gumbel if isinstance(event, TopKEvent) else top_rows_by_gaussian
        found[table.table] = choose(
            values, rows[table.table], scale, secret=secret, table=table.table, device=device
        )
    missing = sorted(set(rows) - set(found))
    if missing:
        raise ConfigError(f"rows: there are no counts of table '{missing[0]}'; count it too")
    return found


def noise_scale(event: PrivacyEvent, num_tables: int, max_rows_per_unit: int) -> float:
    """The scale of the noise on every count that makes a choice cost ``event``.

    Guarantee:
        Gumbel: 1/ε₀, whatever a unit's bound is, since each of the ε₀-mechanisms sees every count
        change by 1 at most. Gaussian: the standard deviation is the noise multiplier times
        √(``max_rows_per_unit`` · ``num_tables``), the l2 sensitivity of all counts together.

    Raises:
        ConfigError: The event is of another kind, has no noise, or is for a sample of the units.
    """
    if isinstance(event, TopKEvent):
        return 1 / event.epsilon0
    if not isinstance(event, GaussianEvent) or not event.is_private or event.sample_rate != 1.0:
        raise ConfigError(
            f"rows cannot be chosen at the cost of {event}: give a TopKEvent, or a GaussianEvent "
            "with noise and sample rate 1 (every unit is counted)"
        )
    return event.noise_multiplier * math.sqrt(max_rows_per_unit * num_tables)


def top_rows_by_gumbel(
    counts: Tensor,
    k: int,
    scale: float,
    *,
    secret: bytes,
    table: str,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The ``k`` rows with the largest counts plus Gumbel noise; a collective.

    Guarantee:
        For one unit added or removed: if it changes each count by 1 at most, all in one direction
        (the counts are monotone with sensitivity 1), this costs `TopKEvent` (1/``scale``, ``k``).
        The k largest of counts with independent Gumbel noise, in order, have the law of k
        exponential mechanisms one after another, each choosing among the rows left with
        probability in proportion to exp(count / ``scale``) (Durfee and Rogers 2019); each is
        (1/``scale``, 0)-private with a range of the loss of 1/``scale`` (Dong, Durfee and Rogers
        2020). Here the set alone is kept, which tells less. Several tables are so many selections
        together. The noise comes from 64 random bits a row: a Gumbel value is exact up to a
        relative 2^-64/p in its probability p of being exceeded. Assumes that ChaCha20 is a
        pseudorandom function and the secret unknown.

    Args:
        counts: By row, ``[rows]``, the same on every rank.
        k: How many rows to take.
        scale: Of the noise, above 0.
        secret: The run's 32 secret bytes.
        table: The table's unique name.
        device: Where collectives run.

    Returns:
        int64 ``[k]``, sorted.

    Raises:
        ConfigError: The table has fewer rows.
    """
    key = derive_key(secret, "fest", table)

    def noise(first: int, last: int) -> Float64Array:
        # Small uniforms have the most digits; they become the large values, which matter.
        exponentials = -log_complements(uniforms(key, 0, last - first, first=first))
        return log(exponentials) * -scale

    return _top_rows(counts, k, noise, table, device)


def top_rows_by_gaussian(
    counts: Tensor,
    k: int,
    scale: float,
    *,
    secret: bytes,
    table: str,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The ``k`` rows with the largest counts plus normal noise; see `top_rows_by_gumbel`.

    Guarantee:
        The noisy counts of all tables together are one Gaussian mechanism; ``scale`` over the l2
        norm of what one unit added or removed changes is its noise multiplier (`noise_scale`).
        Which are the largest is computed from them alone.
    """
    key = derive_key(secret, "fest", table)
    width = _NORMALS_IN_A_BLOCK

    def noise(first: int, last: int) -> Float64Array:
        blocks = torch.arange(first // width, -(-last // width))
        drawn = normal(key, blocks, 0, 1, num_columns=width).view(-1)
        skip = first - first // width * width
        return drawn[skip : skip + last - first].numpy().astype(np.float64) * scale

    return _top_rows(counts, k, noise, table, device)


def _top_rows(
    counts: Tensor, k: int, noise: Noise, table: str, device: torch.device | str
) -> Tensor:
    """Each rank looks for the largest in a part of the rows; then all in what they found."""
    total = counts.numel()
    check_rows_fit({table: k}, {table: total})
    first, last = (total * r // world_size() for r in (rank(), rank() + 1))
    values, rows = np.empty(0, dtype=np.float64), np.empty(0, dtype=np.int64)
    for begin in range(first, last, _ROWS_AT_ONCE):
        end = min(last, begin + _ROWS_AT_ONCE)
        noisy = counts[begin:end].cpu().numpy() + noise(begin, end)
        values = np.concatenate([values, noisy])
        rows = np.concatenate([rows, np.arange(begin, end)])
        kept = largest(values, k)
        values, rows = values[kept], rows[kept]
    # In order of ranks, so of rows.
    all_values = all_gather_cat(torch.from_numpy(values).to(device)).cpu().numpy()
    all_rows = all_gather_cat(torch.from_numpy(rows).to(device)).cpu()
    return all_rows[torch.from_numpy(largest(all_values, k))]
