"""LazyDP: DP-SGD's distribution at the cost of the rows a batch reads (arXiv 2404.08847).

A row that no example touches in steps s+1..t is linear in the Gaussians of those steps, so they
merge into one draw: w_t = D(s,t) w_s + N(0, v(s,t)), with D and v from the schedule's prefix
sums. The draw waits until the row is next read. Unlike the paper's code, v holds the learning
rate, clip norm and noise of *each* waiting step, the draw comes before the read instead of from
a look-ahead queue, and a release always settles every row.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from dist_dp import kernels
from dist_dp.mechanisms.base import Mechanism
from dist_dp.mechanisms.dpsgd import settle_all
from dist_dp.table_shard import TableShard


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

    def before_lookup(self, shard: TableShard, rows: Tensor, *, training: bool = True) -> None:
        """Settles the rows about to be read, up to the last finished step."""
        step = self.schedule.step
        stale = rows[shard.last_step[rows] < step]
        if stale.numel() == 0:
            return
        from_steps = shard.last_step[stale]
        decay, scale = self.schedule.decay_and_scale(from_steps, step)
        kernels.settle_rows(
            shard.weight,
            stale,
            key=shard.noise_key,
            row_offset=shard.row_offset,
            column_offset=shard.column_offset,
            from_steps=from_steps,
            to_step=step,
            decay=decay,
            scale=scale,
            rounds=self.rounds,
            grid=None if training else self.grid,
        )
        shard.last_step[stale] = step

    def after_update(self, shards: Iterable[TableShard]) -> None:
        """Nothing: the step's noise waits for the next read."""

    def settle(self, shard: TableShard) -> None:
        """Settles every row, for a release."""
        settle_all(self, shard)
