"""Settling rows whose state is more than a float32 weight: a momentum, or half precision.

A row with momentum owes, for the steps it missed, one transition of (weight, momentum) and one
draw of two normals a coordinate (:mod:`dist_dp.momentum_schedule`); a half-precision row is settled
in its float32 value (:mod:`dist_dp.wide_rows`). Arithmetic is float64; what is stored is rounded to
float32 once. Memory is O(rows settled), and a range is settled a chunk at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from dist_dp import kernels
from dist_dp.mechanisms.base import Schedule
from dist_dp.momentum_schedule import MomentumSchedule
from dist_dp.table_shard import TableShard
from dist_dp.wide_rows import HALF_DTYPES, read_rows, widen, write_rows

_NUMBERS = 1 << 14
"""Numbers worked on at a time."""
_RANGE_ROWS = 1 << 14
"""Rows of a range whose history is looked at at a time."""


def give_state(shard: TableShard, *, momentum: bool) -> None:
    """Allocates what a shard's rows have beside a float32 weight: a momentum of 0, the rest."""
    if momentum:
        shard.momentum = torch.zeros(
            shard.weight.shape, dtype=torch.float32, device=shard.weight.device
        )
    if shard.weight.dtype in HALF_DTYPES:
        widen(shard)


def has_own_state(shard: TableShard) -> bool:
    """Whether a shard is settled here rather than by the kernels."""
    return shard.momentum is not None or shard.low is not None


def settle_reads(
    reads: Iterable[tuple[TableShard, Tensor]], schedules: Sequence[Schedule], rounds: int
) -> None:
    """Brings the rows of lookups up to the last step recorded, once each.

    Args:
        reads: Shards with a state of their own and local rows, in any order, repeats allowed.
        schedules: By optimizer group.
        rounds: ChaCha rounds.
    """
    for shard, rows in reads:
        distinct = torch.unique(rows).to(torch.int64)
        _settle_stale(shard, distinct, schedules[shard.group], rounds)


def settle_range(
    shard: TableShard,
    schedule: Schedule,
    rounds: int,
    first_row: int = 0,
    last_row: int | None = None,
) -> None:
    """Brings a range of rows up to the last step recorded."""
    last = shard.weight.shape[0] if last_row is None else last_row
    for start in range(first_row, last, _RANGE_ROWS):
        rows = torch.arange(start, min(last, start + _RANGE_ROWS), device=shard.weight.device)
        _settle_stale(shard, rows, schedule, rounds)


def settle_one_step(shard: TableShard, schedule: Schedule, rounds: int) -> None:
    """Applies the last step's transition and noise to every row, for mechanisms without history."""
    count = shard.weight.shape[0]
    shard.settling = True
    for start in range(0, count, _RANGE_ROWS):
        rows = torch.arange(start, min(count, start + _RANGE_ROWS), device=shard.weight.device)
        settle_rows(shard, rows, torch.full_like(rows, schedule.step - 1), schedule, rounds)
    shard.settling = False


def _settle_stale(shard: TableShard, rows: Tensor, schedule: Schedule, rounds: int) -> None:
    from_steps = shard.last_step[rows]
    stale = from_steps < schedule.step
    rows, from_steps = rows[stale], from_steps[stale]
    shard.settling = True
    shard.last_step[rows] = schedule.step
    settle_rows(shard, rows, from_steps, schedule, rounds)
    shard.settling = False


@torch.no_grad()
def settle_rows(
    shard: TableShard, rows: Tensor, from_steps: Tensor, schedule: Schedule, rounds: int
) -> None:
    """Applies transition and noise of the steps after `from_steps`; the history stays as it is.

    Args:
        shard: With a state of its own.
        rows: int64 ``[n]``, distinct local rows.
        from_steps: int ``[n]``, each before the schedule's step.
        schedule: Of the shard's group.
        rounds: ChaCha rounds.

    Guarantee:
        The float32 state (weight and momentum) of a row has the law of eager DP-SGD up to one
        rounding to float32 a settle, for draws that are independent standard normals: z_1 and z_2
        of a row have keys of their own, derived from the table's, and each (row, column, from-step,
        to-step) is drawn once.
    """
    if not rows.numel():
        return
    weight = read_rows(shard, rows)
    if isinstance(schedule, MomentumSchedule):
        assert shard.momentum is not None
        phi, factor = schedule.propagate(from_steps, schedule.step)
        momentum = shard.momentum.index_select(0, rows)
        draws = [
            _normals(shard, k, rows, from_steps, schedule.step, rounds) if needed else None
            for k, needed in zip(
                momentum_keys(shard), (factor[:, :2].any(), factor[:, 2].any()), strict=True
            )
        ]
        for some in _pieces(weight):
            _move(weight[some], momentum[some], phi[some], factor[some], draws, some)
        shard.momentum.index_copy_(0, rows, momentum)
    else:
        decay, scale = schedule.decay_and_scale(from_steps, schedule.step)
        noise = None
        if scale.any():
            noise = _normals(shard, shard.noise_key, rows, from_steps, schedule.step, rounds)
        for some in _pieces(weight):
            value = weight[some].double().mul_(decay[some].unsqueeze(1))
            if noise is not None:
                value.addcmul_(scale[some].unsqueeze(1), noise[some].double())
            weight[some] = value
    write_rows(shard, rows, weight)


def _move(
    weight: Tensor,
    momentum: Tensor,
    phi: Tensor,
    factor: Tensor,
    draws: Sequence[Tensor | None],
    some: slice,
) -> None:
    """m <- mw w + mm m + a z_1 and w <- ww w + wm m + b z_1 + c z_2, in place."""
    ww, wm, mw, mm = phi.unsqueeze(2).unbind(1)
    a, b, c = factor.unsqueeze(2).unbind(1)
    shared, own = draws
    old, speed = weight.double(), momentum.double()
    new = mw * old
    new.addcmul_(mm, speed)
    old.mul_(ww).addcmul_(wm, speed)
    if shared is not None:
        z = shared[some].double()
        new.addcmul_(a, z)
        old.addcmul_(b, z)
    if own is not None:
        old.addcmul_(c, own[some].double())
    weight.copy_(old)
    momentum.copy_(new)


def _pieces(values: Tensor) -> Iterator[slice]:
    """Rows of a buffer that stay in cache together (and below what torch would split up)."""
    step = max(1, _NUMBERS // max(1, values.shape[1]))
    for start in range(0, values.shape[0], step):
        yield slice(start, start + step)


def _normals(
    shard: TableShard, key: bytes, rows: Tensor, from_steps: Tensor, to_step: int, rounds: int
) -> Tensor:
    """The standard normals of rows' gaps, float32 ``[n, local columns]``."""
    return kernels.normal(
        key,
        rows + shard.row_offset,
        from_steps,
        to_step,
        column_offset=shard.column_offset,
        num_columns=shard.weight.shape[1],
        rounds=rounds,
    )


def momentum_keys(shard: TableShard) -> tuple[bytes, bytes]:
    """The keys of z_1, which momentum and weight share, and of z_2, the weight's own."""
    first, second = (kernels.derive_key(shard.noise_key, "momentum", name) for name in ("1", "2"))
    return first, second
