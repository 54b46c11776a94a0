"""Replicated (data_parallel) tables: the clipped gradient summed over ranks, no averaging."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dist_dp.distributed import all_reduce_sum
from dist_dp.table_shard import TableShard


def sequence_lookup(
    kernel: Any, shards: list[TableShard], feature_counts: list[int]
) -> Callable[[Any], Tensor]:
    """A forward for replicated sequence tables on CPU.

    FBGEMM's dense CPU kernel pools bags even when asked for single rows (fbgemm-gpu 1.8), so the
    lookup is done by PyTorch's embedding on views of the kernel's parameter.

    Args:
        kernel: TorchRec's dense embedding kernel.
        shards: Its tables, in order.
        feature_counts: Features that read each of them.

    Returns:
        A replacement for ``kernel.forward``: features to float ``[ids, dim]``.
    """
    (parameter,) = tuple(kernel.emb_module.parameters())

    def forward(features: Any) -> Tensor:
        bounds = features.offset_per_key()
        found: list[Tensor] = []
        start, key = 0, 0
        for shard, count in zip(shards, feature_counts, strict=True):
            size = shard.weight.numel()
            table = parameter[start : start + size].view(shard.weight.shape)
            ids = features.values()[bounds[key] : bounds[key + count]].to(torch.int64)
            found.append(torch.nn.functional.embedding(ids, table))
            start, key = start + size, key + count
        return torch.cat(found)

    return forward


class ReplicatedTables:
    """SGD on the replicated tables of one kernel, in place of DistributedDataParallel.

    DDP would average over ranks (the guarantee would be wrong by the world size) and would send
    every row. Here the rows that some rank looked up, and only those, are summed over ranks, so
    all replicas take the same step.

    Args:
        kernel: TorchRec's dense embedding kernel; its parameter holds the tables back to back.
        shards: The tables, in the kernel's order.
    """

    def __init__(self, kernel: Any, shards: list[TableShard]) -> None:
        self.shards = shards
        (self._parameter,) = tuple(kernel.emb_module.parameters())
        self._rows: list[Tensor | None] = [None] * len(shards)

    def note(self, index: int, rows: Tensor) -> None:
        """Remembers the rows of a lookup (the union over ranks) for the update."""
        known = self._rows[index]
        self._rows[index] = rows if known is None else torch.unique(torch.cat([known, rows]))

    def noted(self, index: int) -> Tensor | None:
        """The rows of table ``index`` that some rank looked up: sorted, the same on every rank."""
        return self._rows[index]

    def clear(self) -> None:
        """Forgets the noted rows and the gradient."""
        self._rows = [None] * len(self.shards)
        self._parameter.grad = None

    def apply(self) -> None:
        """Sums the gradients, already times the learning rate, over ranks and takes the step.

        A collective: every rank calls it.
        """
        grad = self._parameter.grad
        start = 0
        for shard, rows in zip(self.shards, self._rows, strict=True):
            size = shard.weight.numel()
            if rows is not None and rows.numel() > 0:
                if grad is None:
                    touched = torch.zeros_like(shard.weight[rows])
                else:
                    touched = grad[start : start + size].view(shard.weight.shape)[rows]
                all_reduce_sum(touched)
                shard.weight.index_add_(0, rows, touched, alpha=-1.0)
            start += size
        self.clear()
