"""DP-SGD as written: noise on every row of every table at every step (Abadi et al., CCS 2016)."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from dist_dp import kernels
from dist_dp.mechanisms.base import Mechanism
from dist_dp.table_shard import TableShard


class DPSGD(Mechanism):
    """The slow reference: one pass over all tables a step.

    Guarantee:
        Every iterate w_t = (1 − η_t λ) w_{t−1} − (η_t/B)(G_t + σ_t C_t Z_t) has Z_t independent
        standard normal on every coordinate, so with Poisson-sampled batches and joint clipping
        to C_t the released model is (ε, δ)-DP for adding or removing one record, at the ε the
        accountant composes. It assumes the noise key stays secret.

        With a grid, w_t is also rounded to it at every step, whatever the batch: post-processing.
        Each rounding gives what real arithmetic and a real Gaussian would, but for a probability
        below 2^-49 (1 + 10 deviation / spacing) a number, which ε and δ leave out.
    """

    name = "dpsgd"
    private = True
    table_optimizers = frozenset({"sgd"})

    def before_lookup(self, shard: TableShard, rows: Tensor, *, training: bool = True) -> None:
        """Nothing waits."""

    def after_update(self, shards: Iterable[TableShard]) -> None:
        """Adds the step's decay and noise to all rows."""
        for shard in shards:
            settle_all(self, shard)

    def settle(self, shard: TableShard) -> None:
        """Nothing waits, but rows loaded from elsewhere are checked to be up to date."""
        settle_all(self, shard)


def settle_all(mechanism: Mechanism, shard: TableShard) -> None:
    """Settles every row of a shard up to the schedule's step, and puts it on the grid."""
    schedule = mechanism.schedule
    if mechanism.grid is None and bool((shard.last_step == schedule.step).all()):
        return
    decay, scale = schedule.decay_and_scale(shard.last_step, schedule.step)
    kernels.settle_range(
        shard.weight,
        key=shard.noise_key,
        row_offset=shard.row_offset,
        column_offset=shard.column_offset,
        from_steps=shard.last_step,
        to_step=schedule.step,
        decay=decay,
        scale=scale,
        rounds=mechanism.rounds,
        grid=mechanism.grid,
    )
    shard.last_step.fill_(schedule.step)
