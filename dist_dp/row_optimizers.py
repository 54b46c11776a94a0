"""Optimizers of table rows whose gradients are handed over row by row, already noised.

Only the rows of a step are read and written, of the weight and of the state; a row's state begins
with its first step. So momentum and Adam are those of sparse gradients, as
``torch.optim.SparseAdam`` has them: a row that is in no step does not move.

===================  =============================================================================
``sgd``              w ← w − η g, with g ← g + λ w first, and with momentum m ← μ m + g in g's place
``adagrad``          s ← s + g², w ← w − η g / (√s + ε), by element
``rowwise_adagrad``  s ← s + mean(g²), one number a row
``adam``             m ← β₁ m + (1 − β₁) g by element, v ← β₂ v + (1 − β₂) mean(g²) a row, both
                     corrected by the row's own number of steps; w ← w − η m̂ / (√v̂ + ε)
===================  =============================================================================

With a split by columns, ``mean`` is over the columns of a shard, as in TorchRec's row-wise
optimizers: the result then depends on the split.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dist_dp.row_index import RowIndex
from dist_dp.sharding import TableOptimizer
from dist_dp.table_shard import TableShard
from dist_dp.wide_rows import read_rows, write_rows

BY_ELEMENT: Mapping[str, tuple[str, ...]] = {
    "sgd": (),
    "adagrad": ("sum",),
    "rowwise_adagrad": (),
    "adam": ("first",),
}
"""State of an optimizer with a number for each element of a row."""
BY_ROW: Mapping[str, tuple[str, ...]] = {
    "sgd": (),
    "adagrad": (),
    "rowwise_adagrad": ("row_sum",),
    "adam": ("second", "steps"),
}
"""State with a number a row."""


class RowState:
    """An optimizer's state of those rows of a shard that were ever updated.

    Args:
        columns: Columns of the shard.
        by_element: Names of what has a number for each element, float32.
        by_row: Names of what has a number for each row, float32.
        device: Where the shard is.
    """

    def __init__(
        self,
        columns: int,
        by_element: tuple[str, ...],
        by_row: tuple[str, ...],
        device: torch.device,
    ) -> None:
        self.index = RowIndex(device)
        self.columns = columns
        self._values: dict[str, Tensor] = {
            name: torch.zeros(0, columns, device=device) for name in by_element
        }
        self._values |= {name: torch.zeros(0, device=device) for name in by_row}

    @property
    def names(self) -> list[str]:
        """Names of what is kept."""
        return list(self._values)

    def values(self, name: str) -> Tensor:
        """float32 ``[rows, columns]`` or ``[rows]``, in the order of ``index.rows``; a view."""
        return self._values[name][: len(self.index)]

    def slots(self, rows: Tensor) -> Tensor:
        """Where the state of rows is, int64 ``[n]``; rows without one get zeros.

        Args:
            rows: int64 ``[n]``, distinct local rows.
        """
        slots = self.index.insert(rows)
        count = len(self.index)
        for name, old in self._values.items():
            if old.shape[0] < count:
                larger = old.new_zeros(max(count, 2 * old.shape[0]), *old.shape[1:])
                larger[: old.shape[0]] = old
                self._values[name] = larger
        return slots

    def take(self, name: str, slots: Tensor) -> Tensor:
        """A copy of some rows' values."""
        return self._values[name].index_select(0, slots)

    def put(self, name: str, slots: Tensor, values: Tensor) -> None:
        """Writes some rows' values."""
        self._values[name].index_copy_(0, slots, values)

    @property
    def num_bytes(self) -> int:
        """Memory it takes."""
        return self.index.num_bytes + sum(v.numel() * 4 for v in self._values.values())


class RowOptimizer:
    """Takes an optimizer's step on some rows of a shard.

    Args:
        settings: Kind and constants.
    """

    def __init__(self, settings: TableOptimizer) -> None:
        self.settings = settings

    @property
    def _kept(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of what is kept by element, and by row."""
        kind = self.settings.kind
        if kind == "sgd" and self.settings.momentum:
            return ("momentum",), ()
        return BY_ELEMENT[kind], BY_ROW[kind]

    @property
    def state_names(self) -> set[str]:
        """Names of what it keeps; none for plain SGD."""
        by_element, by_row = self._kept
        return {*by_element, *by_row}

    def state_of(self, shard: TableShard) -> RowState | None:
        """A shard's state, made if it has none yet; None for plain SGD, which keeps none."""
        if not self.state_names:
            return None
        if shard.row_state is None:
            shard.row_state = RowState(shard.weight.shape[1], *self._kept, shard.weight.device)
        return shard.row_state

    @torch.no_grad()
    def update(
        self,
        shard: TableShard,
        rows: Tensor,
        gradient: Tensor,
        *,
        learning_rate: float,
        weight_decay: float = 0.0,
    ) -> None:
        """Takes a step.

        Args:
            shard: The shard.
            rows: int64 ``[n]``, distinct local rows.
            gradient: float32 ``[n, local columns]``; overwritten.
            learning_rate: η.
            weight_decay: λ, coupled, of these rows alone; for ``sgd``.
        """
        if not rows.numel():
            return
        if weight_decay:
            gradient.add_(read_rows(shard, rows), alpha=weight_decay)
        state = self.state_of(shard)
        step = gradient if state is None else self._step(state, state.slots(rows), gradient)
        if shard.low is None and shard.weight.dtype == torch.float32:
            shard.weight.index_add_(0, rows, step, alpha=-learning_rate)
        else:
            write_rows(shard, rows, read_rows(shard, rows).sub_(step, alpha=learning_rate))

    def _step(self, state: RowState, slots: Tensor, gradient: Tensor) -> Tensor:
        """What η is multiplied with, in the gradient's memory or new."""
        kind, eps = self.settings.kind, self.settings.eps
        if kind == "sgd":
            momentum = state.take("momentum", slots).mul_(self.settings.momentum).add_(gradient)
            state.put("momentum", slots, momentum)
            return momentum
        if kind == "adagrad":
            total = state.take("sum", slots).addcmul_(gradient, gradient)
            state.put("sum", slots, total)
            return gradient.div_(total.sqrt_().add_(eps))
        squares = gradient.square().mean(1)
        if kind == "rowwise_adagrad":
            total = state.take("row_sum", slots).add_(squares)
            state.put("row_sum", slots, total)
            return gradient.div_(total.sqrt_().add_(eps).unsqueeze(1))
        return self._adam(state, slots, gradient, squares)

    def _adam(self, state: RowState, slots: Tensor, gradient: Tensor, squares: Tensor) -> Tensor:
        decay1, decay2 = self.settings.betas
        steps = state.take("steps", slots).add_(1.0)
        first = state.take("first", slots).mul_(decay1).add_(gradient, alpha=1.0 - decay1)
        second = state.take("second", slots).mul_(decay2).add_(squares, alpha=1.0 - decay2)
        for name, value in (("steps", steps), ("first", first), ("second", second)):
            state.put(name, slots, value)
        exact = steps.to(torch.float64)
        one = -torch.expm1(exact * torch.log(exact.new_tensor(decay1)))
        two = -torch.expm1(exact * torch.log(exact.new_tensor(decay2)))
        root = (second / two).sqrt_().add_(self.settings.eps)
        return first.mul_((1.0 / (one * root)).to(torch.float32).unsqueeze(1))
