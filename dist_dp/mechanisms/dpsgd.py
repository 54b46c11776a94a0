"""DP-SGD as written: noise on every row of every table at every step (Abadi et al., CCS 2016)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dist_dp import kernels
from dist_dp.mechanisms.base import Mechanism, Read
from dist_dp.mechanisms.row_states import has_own_state, settle_one_step
from dist_dp.table_shard import TableShard, settled


class DPSGD(Mechanism):
    """The slow reference: one pass over all tables a step.

    Guarantee:
        Every iterate w_t = (1 − η_t λ) w_{t−1} − (η_t/B)(G_t + σ_t C_t Z_t), or its like with
        momentum, has Z_t independent standard normal on every coordinate, so with Poisson-sampled
        batches and joint clipping to C_t the released model is (ε, δ)-DP for adding or removing
        one unit (record or user), at the ε the accountant composes. It assumes the noise key stays
        secret.

        With a grid, w_t is also rounded to it at every step, whatever the batch: post-processing.
        Each rounding gives what real arithmetic and a real Gaussian would, but for a probability
        below 2^-49 (1 + 10 deviation / spacing) a number, which ε and δ leave out.
    """

    name = "dpsgd"
    private = True
    table_optimizers = frozenset({"sgd"})

    def before_lookup(self, reads: Sequence[Read], *, training: bool = True) -> None:
        """Nothing waits."""

    def after_update(self, shards: Iterable[TableShard]) -> None:
        """Adds the step's decay and noise to all rows; no history is needed for that."""
        step = self.schedule.step
        for shard in shards:
            if has_own_state(shard):
                settle_one_step(shard, self.schedules[shard.group], self.rounds)
                continue
            decay, scale = self.schedule_of(shard).one_step(step)
            with settled([shard]):
                kernels.settle_range(
                    shard.weight,
                    key=shard.noise_key,
                    row_offset=shard.row_offset,
                    column_offset=shard.column_offset,
                    from_steps=step - 1,
                    to_step=step,
                    decay=decay,
                    scale=scale,
                    rounds=self.rounds,
                    grid=self.grid,
                )

    def settle(self, shard: TableShard, first_row: int = 0, last_row: int | None = None) -> None:
        """Nothing waits, but a table that no step has rounded yet is put on the grid."""
        if self.grid is None:
            return
        step = self.schedule.step
        kernels.settle_range(
            shard.weight,
            key=shard.noise_key,
            row_offset=shard.row_offset,
            column_offset=shard.column_offset,
            from_steps=step,
            to_step=step,
            decay=1.0,
            scale=0.0,
            first_row=first_row,
            last_row=last_row,
            rounds=self.rounds,
            grid=self.grid,
        )
