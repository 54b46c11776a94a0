"""No noise: the baseline that the private mechanisms are compared with. Not private."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from dist_dp.mechanisms.base import Mechanism
from dist_dp.table_shard import TableShard


class NoMechanism(Mechanism):
    """Trains without privacy; weight decay alone is applied late, as in ``lazydp``."""

    name = "none"
    private = False
    table_optimizers = frozenset({"sgd", "adagrad", "rowwise_adagrad"})

    def before_lookup(self, shard: TableShard, rows: Tensor, *, training: bool = True) -> None:
        """Applies the decay that waits."""
        since_start, _ = self.schedule.decay_and_scale(
            torch.zeros(1, dtype=torch.int32), self.schedule.step
        )
        if float(since_start) == 1.0:
            return
        decay, _ = self.schedule.decay_and_scale(shard.last_step[rows], self.schedule.step)
        shard.weight[rows] *= decay.to(shard.weight.dtype).unsqueeze(1)
        shard.last_step[rows] = self.schedule.step

    def after_update(self, shards: Iterable[TableShard]) -> None:
        """Nothing to do."""

    def settle(self, shard: TableShard) -> None:
        """Applies the decay that waits, to every row."""
        self.before_lookup(shard, torch.arange(shard.weight.shape[0], device=shard.weight.device))
