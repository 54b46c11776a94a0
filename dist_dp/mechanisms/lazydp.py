"""LazyDP: DP-SGD's distribution at the cost of the rows a batch reads (arXiv 2404.08847).

A row that no example touches in steps s+1..t is linear in the Gaussians of those steps, so they
merge into one draw: w_t = D(s,t) w_s + N(0, v(s,t)), with D and v from the schedule's prefix
sums. The draw waits until the row is next read. Unlike the paper's code, v holds the learning
rate, clip norm and noise of *each* waiting step, the draw comes before the read instead of from
a look-ahead queue, and a release always settles every row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from dist_dp import kernels
from dist_dp.mechanisms.base import Mechanism, Read
from dist_dp.table_shard import TableShard

CHUNK_ROWS = 1 << 16
"""Rows settled at a time by a release."""


class LazyDP(Mechanism):
    """Noise deferred to the next read and merged; exact for SGD with weight decay.

    Guarantee:
        Values read (by a lookup after ``before_lookup``, or after ``settle``) have the joint
        distribution they have under :class:`~dist_dp.mechanisms.dpsgd.DPSGD`, up to the rounding
        of float32, for any learning-rate, clip and noise schedule, so the same (ε, δ) holds for
        the released model, for adding or removing one record. It covers settled values only: the
        tables in memory between reads, and which rows a step touched, are outside the guarantee.

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

    def prepare(self, shard: TableShard) -> None:
        """The history table: 4 bytes a row."""
        shard.last_step  # noqa: B018 (allocates)

    def is_settled(self, shard: TableShard) -> bool:
        """Whether every row is settled to the last finished step."""
        return bool((shard.last_step == self.schedule.step).all())

    def before_lookup(self, reads: Sequence[Read], *, training: bool = True) -> None:
        """Settles the rows about to be read, up to the last finished step, once each.

        The history table tells which rows are stale, and repeats of a row from its first
        occurrence, so nothing is sorted. All tables of a lookup go to the kernels together.
        """
        step = self.schedule.step
        if step == 0:
            return
        for shard, _ in reads:
            shard.settling = True
        stale = [kernels.take_stale(shard.last_step, rows, step) for shard, rows in reads]
        kernels.settle_tables(
            self._updates([shard for shard, _ in reads], stale, None if training else self.grid)
        )
        for shard, _ in reads:
            shard.settling = False

    def _updates(
        self,
        shards: list[TableShard],
        stale: list[tuple[Tensor, Tensor]],
        grid: float | None,
    ) -> list[kernels.RowUpdate]:
        """What the kernels must do: decay and noise of all tables, found in one go."""
        step = self.schedule.step
        factors: list[tuple[Tensor, Tensor]] = [(Tensor(), Tensor())] * len(shards)
        for group, schedule in enumerate(self.schedules):
            members = [i for i, shard in enumerate(shards) if shard.group == group]
            if not members:
                continue
            steps = [stale[i][1] for i in members]
            decay, scale = schedule.decay_and_scale(torch.cat(steps), step)
            sizes = [s.numel() for s in steps]
            parts = zip(decay.split(sizes), scale.split(sizes), strict=True)
            for i, part in zip(members, parts, strict=True):
                factors[i] = part
        return [
            kernels.RowUpdate(
                weight=shard.weight,
                rows=rows,
                key=shard.noise_key,
                row_offset=shard.row_offset,
                column_offset=shard.column_offset,
                from_steps=from_steps,
                to_step=step,
                decay=decay,
                scale=scale,
                rounds=self.rounds,
                grid=grid,
            )
            for shard, (rows, from_steps), (decay, scale) in zip(
                shards, stale, factors, strict=True
            )
            if rows.numel()
        ]

    def after_update(self, shards: Iterable[TableShard]) -> None:
        """Nothing: the step's noise waits for the next read."""

    def settle(self, shard: TableShard, first_row: int = 0, last_row: int | None = None) -> None:
        """Settles a range of rows, for a release, a chunk at a time: no memory for a copy."""
        schedule = self.schedule_of(shard)
        step = schedule.step
        last = shard.weight.shape[0] if last_row is None else last_row
        for start in range(first_row, last, CHUNK_ROWS):
            end = min(last, start + CHUNK_ROWS)
            from_steps = shard.last_step[start:end]
            if self.grid is None and bool((from_steps == step).all()):
                continue
            decay, scale = schedule.decay_and_scale(from_steps, step)
            shard.settling = True
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
            shard.settling = False
