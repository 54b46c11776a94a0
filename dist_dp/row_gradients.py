"""The clipped gradient of each row, handed over instead of applied by FBGEMM.

FBGEMM's fused update writes ``weight -= rate * gradient``. Where a row's state is more than its
weight (a momentum, the rest of a half-precision weight) the update is ours: the kernel's lookup is
wrapped so that its backward keeps the gradient of the output, and the sums by row come out here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dist_dp.distributed import all_reduce_sum
from dist_dp.id_checks import is_among
from dist_dp.replicas import ReplicatedTables
from dist_dp.table_shard import TableShard
from dist_dp.wide_rows import read_rows, write_rows

Apply = Callable[[TableShard, Tensor, Tensor], None]
"""Called with a shard, distinct local rows (int64 ``[n]``), their gradient (float32 ``[n, cols]``).

The gradient is summed over the batch and carries whatever factor it was sent with."""


def apply_to_state(shard: TableShard, rows: Tensor, gradient: Tensor) -> None:
    """Takes an SGD step on rows, with a gradient that carries the step's factor.

    Into the momentum if there is one (the weight follows when the row is settled, see
    :meth:`~dist_dp.momentum_schedule.MomentumSchedule.gradient_learning_rate`), else into the
    float32 value.
    """
    if shard.momentum is not None:
        shard.momentum.index_add_(0, rows, gradient)
    elif shard.low is not None:
        write_rows(shard, rows, read_rows(shard, rows) - gradient)
    else:
        shard.weight.index_add_(0, rows, gradient, alpha=-1.0)


class RowGradients:
    """Stands between one embedding kernel and its autograd.

    Lookups go through the kernel as before, without FBGEMM's backward. Gradients of all lookups of
    a step are kept, as they are (O(batch) numbers), until :meth:`apply`.

    Args:
        kernel: TorchRec's embedding kernel; its ``forward`` is replaced.
        shards: Its tables, in order.
        feature_counts: Features that read each of them.
        pooled: Whether it pools bags.
        apply: What to do with the gradient of each shard's rows.
        always: Call it once a step for every shard, without rows too.
        only: The local rows (int64, sorted) whose gradient is wanted: others are not summed.
        replicas: If the tables are replicated: what notes the rows that some rank looked up;
            gradients are then summed over ranks.
    """

    def __init__(
        self,
        kernel: Any,
        shards: Sequence[TableShard],
        feature_counts: Sequence[int],
        *,
        pooled: bool,
        apply: Apply,
        always: bool = False,
        only: Callable[[TableShard], Tensor] | None = None,
        replicas: ReplicatedTables | None = None,
    ) -> None:
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode

        self._shards = list(shards)
        self._counts = list(feature_counts)
        self._pooled = pooled
        self._mean = pooled and kernel._pooling == PoolingMode.MEAN
        self._apply = apply
        self._always = always
        self._only = only
        self._replicas = replicas
        self._kept: list[tuple[Any, Tensor]] = []
        self._anchor = torch.zeros((), requires_grad=True)
        self._lookup: Callable[[Any], Tensor] = kernel.forward
        weight = self._shards[0].weight
        if weight.dtype == torch.bfloat16 and weight.device.type == "cpu":
            self._lookup = self._look_up_here
        kernel.forward = self._forward

    def _forward(self, features: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return self._lookup(features).float()
        found: Tensor = _Keep.apply(self._anchor, self, features)  # type: ignore[no-untyped-call]
        return found

    def _look_up_here(self, features: Any) -> Tensor:
        """The kernel's lookup in PyTorch: FBGEMM's CPU code has none for bfloat16."""
        found = []
        for index, shard in enumerate(self._shards):
            for rows, bags, weights, _ in self._uses(features, index):
                values = shard.weight[rows].float()
                if self._pooled:
                    if weights is not None:
                        values *= weights.unsqueeze(1)
                    size = (features.stride(), values.shape[1])
                    values = values.new_zeros(size).index_add_(0, bags, values)
                found.append(values)
        return torch.cat(found, dim=1 if self._pooled else 0)

    def keep(self, features: Any, gradient: Tensor) -> None:
        """Remembers the gradient of a lookup's output."""
        self._kept.append((features, gradient))

    def clear(self) -> None:
        """Forgets what was kept."""
        self._kept.clear()
        if self._replicas is not None:
            self._replicas.clear()

    def apply(self) -> None:
        """Sums what was kept by row and hands it over, shard by shard.

        A collective where tables are replicated: every rank calls it, once a step.
        """
        for index, shard in enumerate(self._shards):
            rows, gradient = self._summed(index)
            if self._replicas is not None:
                # Replicas want the same rows.
                everywhere = self._replicas.noted(index)
                if self._only is not None:
                    everywhere = self._only(shard)
                if everywhere is not None and everywhere.numel():
                    total = gradient.new_zeros(everywhere.numel(), gradient.shape[1])
                    total[torch.searchsorted(everywhere, rows)] = gradient
                    rows, gradient = everywhere, all_reduce_sum(total)
            if rows.numel() or self._always:
                self._apply(shard, rows, gradient)
        self.clear()

    def _uses(
        self, features: Any, index: int, gradient: Tensor | None = None
    ) -> list[tuple[Tensor, Tensor, Tensor | None, Tensor | None]]:
        """Rows, places in the output, weights and output gradient of each feature of a shard.

        A place is a bag's number (pooled), or an id's among the feature's ids.
        """
        first = sum(self._counts[:index])
        bounds = features.offset_per_key()
        width = self._shards[index].weight.shape[1]
        column = sum(
            n * s.weight.shape[1]
            for n, s in zip(self._counts[:index], self._shards[:index], strict=True)
        )
        lengths = features.lengths().to(torch.int64).view(-1, features.stride())
        all_weights = features.weights_or_none() if self._pooled else None
        uses: list[tuple[Tensor, Tensor, Tensor | None, Tensor | None]] = []
        for feature in range(first, first + self._counts[index]):
            ids = slice(bounds[feature], bounds[feature + 1])
            rows = features.values()[ids].to(torch.int64)
            if not self._pooled:
                places = torch.arange(rows.numel(), device=rows.device)
                uses.append((rows, places, None, None if gradient is None else gradient[ids]))
                continue
            bag_lengths = lengths[feature]
            bags = torch.arange(bag_lengths.numel(), device=rows.device)
            places = torch.repeat_interleave(bags, bag_lengths, output_size=rows.numel())
            weights = None
            if all_weights is not None and all_weights.is_floating_point():
                weights = all_weights[ids].float()
            if self._mean:
                each = (1.0 / bag_lengths.clamp_min(1))[places]
                weights = each if weights is None else weights * each
            start = column + (feature - first) * width
            part = None if gradient is None else gradient[:, start : start + width]
            uses.append((rows, places, weights, part))
        return uses

    def _summed(self, index: int) -> tuple[Tensor, Tensor]:
        """Distinct rows of a shard, sorted, and their gradient over all lookups kept."""
        shard = self._shards[index]
        only = None if self._only is None else self._only(shard)
        rows, places, weights, parts = [], [], [], []
        start = 0
        for features, gradient in self._kept:
            for use_rows, use_places, use_weights, part in self._uses(features, index, gradient):
                assert part is not None
                if only is not None:
                    wanted = torch.nonzero(is_among(use_rows, only)).squeeze(1)
                    use_rows, use_places = use_rows[wanted], use_places[wanted]
                    use_weights = None if use_weights is None else use_weights[wanted]
                rows.append(use_rows)
                places.append(use_places + start)
                weights.append(
                    torch.ones(use_rows.shape, device=use_rows.device)
                    if use_weights is None
                    else use_weights
                )
                parts.append(part.float())
                start += part.shape[0]
        if not start or not sum(r.numel() for r in rows):
            empty = torch.empty(0, dtype=torch.int64, device=shard.weight.device)
            return empty, torch.zeros(0, shard.weight.shape[1], device=shard.weight.device)
        ordered, order = torch.sort(torch.cat(rows), stable=True)
        distinct, counts = torch.unique_consecutive(ordered, return_counts=True)
        # The sum over a row's entries is a pooled lookup in the output's gradient.
        summed = torch.nn.functional.embedding_bag(
            torch.cat(places)[order],
            torch.cat(parts),
            counts.cumsum(0) - counts,
            mode="sum",
            per_sample_weights=torch.cat(weights)[order],
        )
        return distinct, summed


class _Keep(torch.autograd.Function):
    """A lookup whose backward keeps the output's gradient; the anchor makes it be called."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, owner: RowGradients, features: Any) -> Tensor:
        ctx.owner, ctx.features = owner, features
        return owner._lookup(features).float()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        ctx.owner.keep(ctx.features, gradient)
        return None, None, None
