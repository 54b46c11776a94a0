"""LazyDP: DP-SGD's distribution at the cost of the rows a batch reads (arXiv 2404.08847).

A row that no example touches in steps s+1..t is linear in the Gaussians of those steps, so they
merge into one draw: w_t = D(s,t) w_s + N(0, v(s,t)), with D and v from the schedule's prefix
sums. The draw waits until the row is next read. Unlike the paper's code, v holds the learning
rate, clip norm and noise of *each* waiting step, the draw comes before the read instead of from
a look-ahead queue, and a release always settles every row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from dist_dp import kernels
from dist_dp.mechanisms.base import Mechanism, Read
from dist_dp.mechanisms.row_states import TableSets, has_own_state, settle_range, settle_stale
from dist_dp.table_shard import TableShard, settled

CHUNK_ROWS = 1 << 16
"""Rows settled at a time by a release."""


class LazyDP(Mechanism):
    """Noise deferred to the next read and merged; exact for SGD with momentum and weight decay.

    Guarantee:
        Values read (by a lookup after ``before_lookup``, or after ``settle``) have the joint
        distribution they have under :class:`~dist_dp.mechanisms.dpsgd.DPSGD`, up to the rounding
        of float32, for any learning-rate, clip and noise schedule, so the same (ε, δ) holds for
        the released model, for adding or removing one unit (record or user). It covers settled
        values only: the tables in memory between reads, and which rows a step touched, are outside
        the guarantee.

        With a grid, a release puts every row on it, with noise in float64 for all steps since the
        row was last read by training, the last step's at least: post-processing of all rows
        alike, with the same bound a number as for ``dpsgd``. Rows that a training batch reads are
        *not* rounded to the grid, since which rows those are is private; their float32 rounding
        stays hidden under the noise of at least one step, but is not counted in ε and δ. Lookups
        outside training are on the grid, so they must not depend on the training records.
    """

    name = "lazydp"
    private = True
    table_optimizers = frozenset({"sgd"})

    @cached_property
    def _sets(self) -> TableSets:
        return TableSets()

    def prepare(self, shard: TableShard) -> None:
        """The history table: 4 bytes a row."""
        shard.last_step  # noqa: B018 (allocates)

    def is_settled(
        self, shard: TableShard, first_row: int = 0, last_row: int | None = None
    ) -> bool:
        """Whether every row of a range is settled to the last finished step."""
        return bool((shard.last_step[first_row:last_row] == self.schedule.step).all())

    def before_lookup(self, reads: Sequence[Read], *, training: bool = True) -> None:
        """Settles the rows about to be read, up to the last finished step, once each.

        The history table tells which rows are stale, and repeats of a row from its first
        occurrence, so nothing is sorted. All tables of a lookup go to the kernels together.
        """
        self._settle_rows(reads, None if training else self.grid)

    def settle_ahead(self, reads: Sequence[Read]) -> None:
        """Settles rows of the *next* batch to the step in flight, which the schedule already has.

        Rows read at the step in flight, which its gradient is about to reach, are settled to the
        step before and left alone: they are settled at their next read, as ever. A row settled
        here is not read before the step is over, so its noise only comes earlier: the value read is
        the same.
        """
        self._settle_rows(reads, None, older_than=self.schedule.step - 1)

    def _settle_rows(
        self, reads: Sequence[Read], grid: float | None, older_than: int | None = None
    ) -> None:
        step = self.schedule.step
        if step == 0 or not reads:
            return
        shards = [shard for shard, _ in reads]
        tables = self._sets.of(shards)
        with settled(shards):
            stale = tables.take_stale([rows for _, rows in reads], step, older_than=older_than)
            if isinstance(tables, kernels.StateTableSet):
                settle_stale(tables, shards, stale, self.schedules, self.rounds)
                return
            assert isinstance(tables, kernels.TableSet)
            decay, scale = self._owed(shards, stale)
            tables.settle(
                stale,
                to_step=step,
                decay=decay,
                scale=scale,
                rounds=self.rounds,
                grid=grid,
            )

    def _owed(self, shards: list[TableShard], stale: kernels.Stale) -> tuple[Tensor, Tensor]:
        """Decay and standard deviation of all stale rows, float64 ``[rows]`` each."""
        step = self.schedule.step
        if len(self.schedules) == 1:
            return self.schedule_of(shards[0]).decay_and_scale(stale.from_steps, step)
        parts = [
            self.schedule_of(shard).decay_and_scale(from_steps, step)
            for shard, from_steps in zip(
                shards, stale.from_steps.split(stale.counts.tolist()), strict=True
            )
        ]
        return torch.cat([d for d, _ in parts]), torch.cat([s for _, s in parts])

    def after_update(self, shards: Iterable[TableShard]) -> None:
        """Nothing: the step's noise waits for the next read."""

    def settle(self, shard: TableShard, first_row: int = 0, last_row: int | None = None) -> None:
        """Settles a range of rows, for a release, a chunk at a time: no memory for a copy."""
        if has_own_state(shard):
            settle_range(shard, self.schedules[shard.group], self.rounds, first_row, last_row)
            return
        schedule = self.schedule_of(shard)
        step = schedule.step
        last = shard.weight.shape[0] if last_row is None else last_row
        for start in range(first_row, last, CHUNK_ROWS):
            end = min(last, start + CHUNK_ROWS)
            from_steps = shard.last_step[start:end]
            if self.grid is None and bool((from_steps == step).all()):
                continue
            decay, scale = schedule.decay_and_scale(from_steps, step)
            with settled([shard]):
                kernels.settle_range(
                    shard.weight,
                    key=shard.noise_key,
                    row_offset=shard.row_offset,
                    column_offset=shard.column_offset,
                    from_steps=from_steps,
                    to_step=step,
                    decay=decay,
                    scale=scale,
                    first_row=start,
                    last_row=end,
                    rounds=self.rounds,
                    grid=self.grid,
                )
                from_steps.fill_(step)
