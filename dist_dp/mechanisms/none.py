"""No noise: the baseline that the private mechanisms are compared with. Not private."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from dist_dp import kernels
from dist_dp.mechanisms.base import Mechanism, Read
from dist_dp.mechanisms.row_states import TableSets, has_own_state, settle_range, settle_stale
from dist_dp.table_shard import TableShard


class NoMechanism(Mechanism):
    """Trains without privacy; weight decay and momentum are applied late, as in ``lazydp``."""

    name = "none"
    private = False
    table_optimizers = frozenset({"sgd", "adagrad", "rowwise_adagrad"})

    why_these_optimizers = "FBGEMM updates the tables, by an optimizer that it fuses"
    other_ways = ""

    @cached_property
    def _sets(self) -> TableSets:
        return TableSets()

    def before_lookup(self, reads: Sequence[Read], *, training: bool = True) -> None:
        """Applies the decay that waits."""
        own = [read for read in reads if has_own_state(read[0])]
        if own:
            shards = [shard for shard, _ in own]
            tables = self._sets.of(shards)
            assert isinstance(tables, kernels.StateTableSet)
            stale = tables.take_stale([rows for _, rows in own], self.schedule.step)
            settle_stale(tables, shards, stale, self.schedules, self.rounds)
        for shard, rows in reads:
            if not has_own_state(shard) and self._decays(shard):
                self._apply(shard, torch.unique(rows).to(torch.int64))

    def after_update(self, shards: Iterable[TableShard]) -> None:
        """Nothing to do."""

    def settle(self, shard: TableShard, first_row: int = 0, last_row: int | None = None) -> None:
        """Applies the decay that waits, to every row of the range."""
        if has_own_state(shard):
            settle_range(shard, self.schedules[shard.group], self.rounds, first_row, last_row)
        elif self._decays(shard):
            last = shard.weight.shape[0] if last_row is None else last_row
            self._apply(shard, torch.arange(first_row, last, device=shard.weight.device))

    def _decays(self, shard: TableShard) -> bool:
        """Whether any step so far had weight decay: without, no history is kept."""
        return not self.schedule_of(shard).without_decay

    def _apply(self, shard: TableShard, rows: Tensor) -> None:
        schedule = self.schedule_of(shard)
        decay, _ = schedule.decay_and_scale(shard.last_step[rows], schedule.step)
        shard.weight[rows] *= decay.to(shard.weight.dtype).unsqueeze(1)
        shard.last_step[rows] = schedule.step
