"""Optimizers that update given rows of a table and nothing else.

For mechanisms whose update is not FBGEMM's: those that leave the noised gradient on few rows. The
formulae are PyTorch's. A row that gets no gradient in a step is, in that step, like a parameter
whose gradient is ``None``: its weight, momentum, moments and number of updates stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dist_dp.errors import ConfigError
from dist_dp.row_index import check_distinct
from dist_dp.row_state import RowState, StateField
from dist_dp.sharding import TableOptimizer
from dist_dp.table_shard import TableShard
from dist_dp.wide_rows import read_rows, write_rows

_BLOCK_NUMBERS = 1 << 18
"""Numbers of a table updated at a time: they and what is made of them stay in the cache."""

_EACH, _ROW = StateField(columns=True), StateField(columns=False)
_FIELDS: dict[str, dict[str, StateField]] = {
    "sgd": {"momentum": _EACH},
    "adagrad": {"sum": _EACH},
    "rowwise_adagrad": {"sum": _ROW},
    "adam": {
        "exp_avg": _EACH,
        "exp_avg_sq": _ROW,
        "step": StateField(columns=False, dtype=torch.int32),
    },
}

ROW_OPTIMIZERS = frozenset(_FIELDS)
"""Kinds of :class:`~dist_dp.sharding.TableOptimizer` that can update single rows."""

_Rule = Callable[[Tensor, Tensor, dict[str, Tensor], float], None]
"""Changes a block's values and states in place: values, gradient, states, learning rate."""


class RowOptimizer:
    """Updates rows of a shard with one of the table optimizers.

    ===================  ==========================================================================
    ``sgd``              coupled weight decay; with momentum a buffer for each updated row
                         (``torch.optim.SGD``)
    ``adagrad``          sum of squares of each number (``torch.optim.Adagrad``)
    ``rowwise_adagrad``  sum of each row's mean square (FBGEMM's ``EXACT_ROWWISE_ADAGRAD``)
    ``adam``             first moment of each number, second moment of each row's mean square;
                         both are corrected by the number of updates of the row, not of the run
    ===================  ==========================================================================

    With column-wise splits the row-wise states are of the columns of each shard, as TorchRec's:
    the result then depends on how the table is split.

    Guarantee:
        Nothing is added to the privacy loss: weights and states are functions of the gradients
        handed over, which the mechanism has noised, and of which rows these are, which it has
        chosen privately. No other row of weight or state is read or written.

    Args:
        settings: Kind, eps, momentum and betas.

    Raises:
        ConfigError: The kind is unknown.
    """

    def __init__(self, settings: TableOptimizer) -> None:
        if settings.kind not in _FIELDS:
            raise ConfigError(
                f"table optimizer '{settings.kind}' cannot update single rows; choose one of "
                f"{', '.join(sorted(ROW_OPTIMIZERS))} (train.table_optimizer)"
            )
        self.settings = settings
        self._rule: _Rule = {
            "sgd": self._sgd,
            "adagrad": self._adagrad,
            "rowwise_adagrad": self._rowwise_adagrad,
            "adam": self._adam,
        }[settings.kind]

    @property
    def fields(self) -> Mapping[str, StateField]:
        """What it keeps for a row that was ever updated, by name; nothing for plain SGD."""
        stateless = self.settings.kind == "sgd" and not self.settings.momentum
        return {} if stateless else _FIELDS[self.settings.kind]

    def prepare(self, shard: TableShard) -> None:
        """Gives a shard an empty state, if it needs one and has none.

        Before a checkpoint is loaded: a state is restored only where one is expected.

        Raises:
            ConfigError: The shard has the state of another optimizer.
        """
        state = shard.row_state
        if state is None and self.fields:
            rows, columns = shard.weight.shape
            device = shard.weight.device
            shard.row_state = RowState(self.settings.kind, self.fields, (rows, columns), device)
        elif state is not None and (state.kind != self.settings.kind or not self.fields):
            raise ConfigError(
                f"table '{shard.table}': its rows have the state of '{state.kind}', not of "
                f"'{self.settings.kind}'; use one table optimizer for the whole run"
            )

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
        """Takes a step on some rows.

        Memory is O(rows ever updated), and a block beside it.

        Args:
            shard: The shard; a half-precision one is updated in its float32 values.
            rows: int64 ``[n]``, distinct local rows; sorted ones are faster.
            gradient: float32 ``[n, local columns]``, noised and divided by the batch; unchanged.
            learning_rate: Of this step.
            weight_decay: Coupled (added to the gradient), on these rows only.

        Raises:
            ValueError: Rows or gradient do not fit the shard; nothing was changed.
        """
        _check(shard, rows, gradient)
        self.prepare(shard)
        state = shard.row_state
        slots = None if state is None else state.insert(rows)
        values = {} if state is None else state.values
        block = max(1, _BLOCK_NUMBERS // max(1, gradient.shape[1]))
        for start in range(0, rows.numel(), block):
            part = slice(start, start + block)
            weights, direction = read_rows(shard, rows[part]), gradient[part]
            if weight_decay:
                direction = direction.add(weights, alpha=weight_decay)
            held = {}
            if slots is not None:
                held = {name: t.index_select(0, slots[part]) for name, t in values.items()}
            self._rule(weights, direction, held, learning_rate)
            for name, tensor in held.items():
                assert slots is not None
                values[name].index_copy_(0, slots[part], tensor)
            write_rows(shard, rows[part], weights)

    def _sgd(
        self, weights: Tensor, gradient: Tensor, held: dict[str, Tensor], learning_rate: float
    ) -> None:
        if held:
            gradient = held["momentum"].mul_(self.settings.momentum).add_(gradient)
        weights.add_(gradient, alpha=-learning_rate)

    def _adagrad(
        self, weights: Tensor, gradient: Tensor, held: dict[str, Tensor], learning_rate: float
    ) -> None:
        squares = held["sum"].addcmul_(gradient, gradient)
        weights.addcdiv_(gradient, squares.sqrt().add_(self.settings.eps), value=-learning_rate)

    def _rowwise_adagrad(
        self, weights: Tensor, gradient: Tensor, held: dict[str, Tensor], learning_rate: float
    ) -> None:
        squares = held["sum"].add_(gradient.square().mean(1))
        factor = squares.sqrt().add_(self.settings.eps).reciprocal_()
        weights.addcmul_(gradient, factor.unsqueeze(1), value=-learning_rate)

    def _adam(
        self, weights: Tensor, gradient: Tensor, held: dict[str, Tensor], learning_rate: float
    ) -> None:
        first, second = self.settings.betas
        mean = held["exp_avg"].lerp_(gradient, 1 - first)
        square = held["exp_avg_sq"].mul_(second).add_(gradient.square().mean(1), alpha=1 - second)
        steps = held["step"].add_(1).double()
        root = (square.double() / (1 - second**steps)).sqrt_().add_(self.settings.eps)
        factor = 1 / ((1 - first**steps) * root)
        weights.addcmul_(mean, factor.to(mean.dtype).unsqueeze(1), value=-learning_rate)


def _check(shard: TableShard, rows: Tensor, gradient: Tensor) -> None:
    count, columns = shard.weight.shape
    wanted = (rows.numel(), columns)
    if rows.dim() != 1 or rows.dtype != torch.int64:
        raise ValueError(
            f"table '{shard.table}': rows are {rows.dtype} {tuple(rows.shape)}; pass int64 [n]"
        )
    if tuple(gradient.shape) != wanted or gradient.dtype != torch.float32:
        raise ValueError(
            f"table '{shard.table}': the gradient is {gradient.dtype} {tuple(gradient.shape)}; "
            f"pass float32 {list(wanted)}: a row for each of rows, the columns of the shard"
        )
    if rows.numel():
        low, high = (int(n) for n in torch.stack(rows.aminmax()).tolist())
        if low < 0 or high >= count:
            raise ValueError(
                f"table '{shard.table}': row {low if low < 0 else high} is not among the {count} "
                "local rows; subtract the shard's row_offset from global rows"
            )
        check_distinct(rows)
