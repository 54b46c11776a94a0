"""Settling rows whose state is more than a float32 weight: a momentum, or half precision.

A row with momentum owes, for the steps it missed, one transition of (weight, momentum) and one
draw of two normals a coordinate (:mod:`dist_dp.momentum_schedule`); a half-precision row is settled
in its float32 value (:mod:`dist_dp.wide_rows`). Arithmetic is float64; what is stored is rounded to
float32 once.

The compiled kernels do that for all tables of a lookup together (:mod:`dist_dp.kernels.states`).
Tables on a GPU, and machines without the compiled kernels, take the PyTorch code here: the same
moves, in several passes over copies of the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dist_dp import kernels
from dist_dp.kernels import state_reference
from dist_dp.mechanisms.base import Schedule
from dist_dp.momentum_schedule import MomentumSchedule
from dist_dp.table_shard import TableShard, settled
from dist_dp.wide_rows import HALF_DTYPES, read_rows, widen, write_rows

Owed = tuple[Tensor, Tensor]
"""What rows owe: transition and factor of the noise (with momentum), or decay and deviation."""

_RANGE_ROWS = 1 << 14
"""Rows of a range settled at a time: what they owe takes 56 bytes each."""


def give_state(shard: TableShard, *, momentum: bool) -> None:
    """Allocates what a shard's rows have beside a float32 weight: a momentum of 0, the rest."""
    if momentum:
        shard.momentum = torch.zeros(
            shard.weight.shape, dtype=torch.float32, device=shard.weight.device
        )
    if shard.weight.dtype in HALF_DTYPES:
        widen(shard)


def has_own_state(shard: TableShard) -> bool:
    """Whether a shard's rows are more than a float32 weight."""
    return shard.momentum is not None or shard.low is not None


class TableSets:
    """The shards that are looked up together, described once for the kernels."""

    def __init__(self) -> None:
        self._sets: dict[tuple[Any, ...], kernels.ShardSet] = {}

    def of(self, shards: Sequence[TableShard]) -> kernels.ShardSet:
        """A set of shards: a ``TableSet``, or a ``StateTableSet`` if some have a state."""
        places = tuple(
            (s.noise_key, s.weight.shape, *(t.data_ptr() for t in s.state_tensors().values()))
            for s in shards
        )
        if places not in self._sets:
            plain = (
                [s.weight for s in shards],
                [s.last_step for s in shards],
                [s.noise_key for s in shards],
                [s.row_offset for s in shards],
                [s.column_offset for s in shards],
            )
            if any(has_own_state(s) for s in shards):
                momenta, lows = [s.momentum for s in shards], [s.low for s in shards]
                self._sets[places] = kernels.StateTableSet(*plain, momenta, lows)
            else:
                self._sets[places] = kernels.TableSet(*plain)
        return self._sets[places]


def owed(schedule: Schedule, from_steps: Tensor) -> Owed:
    """What rows last settled at `from_steps` owe up to the last step recorded, float64."""
    if isinstance(schedule, MomentumSchedule):
        return schedule.propagate(from_steps, schedule.step)
    return schedule.decay_and_scale(from_steps, schedule.step)


def settle_stale(
    tables: kernels.StateTableSet,
    shards: Sequence[TableShard],
    stale: kernels.Stale,
    schedules: Sequence[Schedule],
    rounds: int,
) -> None:
    """Brings the stale rows of a lookup, marked already, up to the last step recorded.

    Args:
        tables: The shards, described.
        shards: The shards.
        stale: What :meth:`~dist_dp.kernels.StateTableSet.take_stale` found.
        schedules: By optimizer group.
        rounds: ChaCha rounds.
    """
    counts = stale.counts.tolist()
    if len(schedules) == 1:
        both = owed(schedules[0], stale.from_steps)
        debts = list(zip(*(part.split(counts) for part in both), strict=True))
    else:
        from_steps = stale.from_steps.split(counts)
        debts = [owed(schedules[s.group], f) for s, f in zip(shards, from_steps, strict=True)]
    step = schedules[0].step
    if tables.compiled:
        tables.settle(stale, to_step=step, owed=debts, rounds=rounds)
        return
    parts = (stale.rows.split(counts), stale.from_steps.split(counts))
    for shard, rows, from_steps, debt in zip(shards, *parts, debts, strict=True):
        if has_own_state(shard):
            move_rows(shard, rows, from_steps, step, debt, rounds)
        else:
            kernels.settle_rows(
                shard.weight,
                rows,
                key=shard.noise_key,
                row_offset=shard.row_offset,
                column_offset=shard.column_offset,
                from_steps=from_steps,
                to_step=step,
                decay=debt[0],
                scale=debt[1],
                rounds=rounds,
            )


def settle_range(
    shard: TableShard,
    schedule: Schedule,
    rounds: int,
    first_row: int = 0,
    last_row: int | None = None,
) -> None:
    """Brings a range of a shard's rows up to the last step recorded, and marks them."""
    last = shard.weight.shape[0] if last_row is None else last_row
    for start in range(first_row, last, _RANGE_ROWS):
        end = min(last, start + _RANGE_ROWS)
        from_steps = shard.last_step[start:end]
        if bool((from_steps == schedule.step).all()):
            continue
        with settled([shard]):
            _move_range(shard, start, end, from_steps, schedule, owed(schedule, from_steps), rounds)
            from_steps.fill_(schedule.step)


def settle_one_step(shard: TableShard, schedule: Schedule, rounds: int) -> None:
    """Applies the last step's transition and noise to every row, for mechanisms without history."""
    count = shard.weight.shape[0]
    before = torch.full((1,), schedule.step - 1, dtype=torch.int32, device=shard.weight.device)
    transition, noise = owed(schedule, before)
    with settled([shard]):
        for start in range(0, count, _RANGE_ROWS):
            end = min(count, start + _RANGE_ROWS)
            debt = (
                transition.expand(end - start, *transition.shape[1:]),
                noise.expand(end - start, *noise.shape[1:]),
            )
            _move_range(shard, start, end, before.expand(end - start), schedule, debt, rounds)


def _move_range(
    shard: TableShard,
    first_row: int,
    last_row: int,
    from_steps: Tensor,
    schedule: Schedule,
    debt: Owed,
    rounds: int,
) -> None:
    """The moves of the rows of a range that are not settled yet; the history stays as it is."""
    if kernels.compiled_for(shard.weight.device):
        kernels.settle_state_range(
            shard.weight,
            shard.momentum,
            shard.low,
            key=shard.noise_key,
            row_offset=shard.row_offset,
            column_offset=shard.column_offset,
            from_steps=from_steps,
            to_step=schedule.step,
            owed=debt,
            first_row=first_row,
            last_row=last_row,
            rounds=rounds,
        )
        return
    stale = (from_steps < schedule.step).nonzero().squeeze(1)
    mine = (debt[0][stale], debt[1][stale])
    move_rows(shard, first_row + stale, from_steps[stale], schedule.step, mine, rounds)


@torch.no_grad()
def move_rows(
    shard: TableShard, rows: Tensor, from_steps: Tensor, to_step: int, debt: Owed, rounds: int
) -> None:
    """The moves of rows in PyTorch, on any device; the history stays as it is.

    Memory is O(rows).

    Args:
        shard: With a state of its own.
        rows: int64 ``[n]``, distinct local rows.
        from_steps: int ``[n]``, each before `to_step`.
        to_step: The step to settle to.
        debt: What the rows owe.
        rounds: ChaCha rounds.

    Guarantee:
        The float32 state (weight and momentum) of a row has the law of eager DP-SGD up to one
        rounding to float32 a settle, for draws that are independent standard normals: z_1 and z_2
        of a row have keys of their own, derived from the table's, and each (row, column, from-step,
        to-step) is drawn once.
    """
    if not rows.numel():
        return
    transition, noise = debt

    def normals(key: bytes, needed: Tensor) -> Tensor | None:
        if not bool(needed.any()):
            return None
        return kernels.normal(
            key,
            rows + shard.row_offset,
            from_steps,
            to_step,
            column_offset=shard.column_offset,
            num_columns=shard.weight.shape[1],
            rounds=rounds,
        )

    values = read_rows(shard, rows)
    if shard.momentum is None:
        first = normals(shard.noise_key, noise)
        state_reference.move(values, None, transition, noise, first, None)
    else:
        keys = kernels.momentum_keys(shard.noise_key)
        first, second = normals(keys[0], noise), normals(keys[1], noise[:, 2])
        momentum = shard.momentum.index_select(0, rows)
        state_reference.move(values, momentum, transition, noise, first, second)
        shard.momentum.index_copy_(0, rows, momentum)
    write_rows(shard, rows, values)
