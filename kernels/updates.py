"""Updates in place: rows of a table, and dense tensors."""

from __future__ import annotations

import torch
from torch.autograd.graph import increment_version

from dist_dp.kernels import checks, dispatch, native, reference
from dist_dp.kernels.graphs import outside_graphs
from dist_dp.kernels.request import Update

FLAT_ROW = 1024
"""Dense tensors are numbered as rows of this many elements."""


@outside_graphs
@torch.no_grad()
def settle_rows(
    weight: torch.Tensor,
    rows: torch.Tensor,
    *,
    key: bytes,
    row_offset: int = 0,
    column_offset: int = 0,
    from_steps: torch.Tensor | int,
    to_step: int,
    decay: torch.Tensor | float,
    scale: torch.Tensor | float,
    rounds: int = 20,
    rounding: str = "stochastic",
    grid: float | None = None,
) -> None:
    """In place: weight[r] <- decay * weight[r] + scale * z for each listed row r.

    `torch.compile` leaves the graph for this call; to stay in it, call
    `torch.ops.dist_dp.settle_rows`.

    Args:
        weight: float32, bfloat16 or float16 [R, D], a shard of a table; rows and columns may be
            strided.
        rows: *local* row numbers, int64 or int32 [n], each once.
        key: the table's key.
        row_offset: global number of the shard's first row.
        column_offset: global number of the shard's first column.
        from_steps: the step each row was last settled to: [n], or one for all.
        to_step: the step to settle to. Where it equals from_steps, scale must be 0.
        decay: float32 or float64 [n], or one for all.
        scale: standard deviation to add: float32 or float64 [n], or one for all; at least 0.
        rounds: ChaCha rounds: 20, 12 or 8.
        rounding: of half precision, `stochastic` or `nearest`.
        grid: put the weights on multiples of this power of two (float32 tables): w <- the
            multiple nearest to decay * w + scale * z, with z in float64, within 2^24 spacings
            of 0.

    Guarantee:
        With `grid`, the value stored is the one that real arithmetic, a real Gaussian and one
        rounding would give, except with probability below 2^-49 (1 + 10 scale / grid) for each
        number; a run's ε and δ leave that probability out (docs/kernels.md says what it comes
        to). Without a grid the same holds up to float32's rounding only, which attacks on
        low-order bits can use.
    """
    shard = checks.table(weight)
    if rows.device != shard.device:
        raise ValueError(f"rows: is on {rows.device}, the weight is on {shard.device}")
    local = checks.integers(rows, "rows")
    _carry_out([
        _prepare(
            shard, local, 0, local.numel(), key, row_offset, column_offset, from_steps, to_step,
            decay, scale, rounds, rounding, grid,
        )
    ])  # fmt: skip
    increment_version(weight)


@outside_graphs
@torch.no_grad()
def settle_range(
    weight: torch.Tensor,
    *,
    key: bytes,
    row_offset: int = 0,
    column_offset: int = 0,
    from_steps: torch.Tensor | int,
    to_step: int,
    decay: torch.Tensor | float,
    scale: torch.Tensor | float,
    first_row: int = 0,
    last_row: int | None = None,
    rounds: int = 20,
    rounding: str = "stochastic",
    grid: float | None = None,
) -> None:
    """Settle the local rows first_row .. last_row - 1 in place, without storing their noise.

    The same numbers as `settle_rows` on those rows.

    Args:
        weight: float32, bfloat16 or float16 [R, D], a shard of a table.
        key: the table's key.
        row_offset: global number of the shard's first row.
        column_offset: global number of the shard's first column.
        from_steps: one for each row of the shard [R], or of the range [last_row - first_row], or
            one for all.
        to_step: the step to settle to. Where it equals from_steps, scale must be 0.
        decay: float32 or float64, shaped like `from_steps` may be.
        scale: standard deviation to add, shaped likewise; at least 0.
        first_row: first local row.
        last_row: one past the last local row; by default the shard's end.
        rounds: ChaCha rounds: 20, 12 or 8.
        rounding: of half precision, `stochastic` or `nearest`.
        grid: as for `settle_rows`, with the same guarantee.
    """
    shard = checks.table(weight)
    num_rows = shard.shape[0]
    last = num_rows if last_row is None else checks.integer(last_row, "last_row", 0, num_rows)
    first = checks.integer(first_row, "first_row", 0, last)

    def of_range(value: torch.Tensor | float) -> torch.Tensor | float:
        if isinstance(value, torch.Tensor) and value.shape == (num_rows,):
            return value[first:last]
        return value

    _carry_out([
        _prepare(
            shard, None, first, last - first, key, row_offset, column_offset,
            of_range(from_steps), to_step, of_range(decay), of_range(scale), rounds, rounding,
            grid,
        )
    ])  # fmt: skip
    increment_version(weight)


@outside_graphs
@torch.no_grad()
def add_normal(
    tensor: torch.Tensor,
    *,
    key: bytes,
    from_step: int,
    to_step: int,
    scale: float,
    rounds: int = 20,
    grid: float | None = None,
) -> None:
    """In place: tensor <- tensor + scale * normal_like(key, tensor.shape, from_step, to_step).

    Args:
        tensor: float32, any shape and strides.
        key: the parameter's key.
        from_step: before `to_step`.
        to_step: the last step the noise stands for.
        scale: standard deviation to add; at least 0 (then nothing is drawn).
        rounds: ChaCha rounds: 20, 12 or 8.
        grid: as for `settle_rows`, with the same guarantee (and the same noise as there, not
            `normal_like`'s).
    """
    target = checks.dense(tensor, "tensor")
    checks.single(from_step, "from_step")
    checks.single(scale, "scale")
    flat = target.view(-1) if target.is_contiguous() else target.reshape(-1)
    whole = flat.numel() // FLAT_ROW
    parts = [(flat[: whole * FLAT_ROW].view(whole, FLAT_ROW), 0)]
    if flat.numel() > whole * FLAT_ROW:
        parts.append((flat[whole * FLAT_ROW :].view(1, -1), whole))
    _carry_out([
        _prepare(
            part, None, 0, part.shape[0], key, first_row, 0, from_step, to_step, 1.0, scale,
            rounds, "nearest", grid,
        )
        for part, first_row in parts
    ])  # fmt: skip
    if not target.is_contiguous():
        target.copy_(flat.view(target.shape))
    increment_version(tensor)


def _prepare(
    shard: torch.Tensor,
    rows: torch.Tensor | None,
    first_row: int,
    count: int,
    key: bytes,
    row_offset: int,
    column_offset: int,
    from_steps: torch.Tensor | float,
    to_step: int,
    decay: torch.Tensor | float,
    scale: torch.Tensor | float,
    rounds: int,
    rounding: str,
    grid: float | None,
) -> Update:
    """An update with every argument checked but the values in its columns."""
    device = shard.device
    end = checks.integer(to_step, "to_step", 0, checks.MAX_STEP)
    steps = checks.steps(from_steps, count, end)  # type: ignore[arg-type]
    return Update(
        weight=shard,
        rows=rows,
        first_row=first_row,
        count=count,
        key=checks.key(key),
        row_offset=checks.integer(row_offset, "row_offset", 0, checks.MAX_ROWS - shard.shape[0]),
        column_offset=checks.columns(column_offset, shard.shape[1])[0],
        from_steps=steps.to(device),
        to_step=end,
        decay=checks.factor(decay, "decay", count, device),
        scale=checks.factor(scale, "scale", count, device),
        rounds=checks.rounds(rounds),
        stochastic=checks.rounding(rounding) and shard.dtype != torch.float32,
        grid=checks.spacing(grid, shard.dtype),
    )


def _carry_out(updates: list[Update]) -> None:
    """Check the values of all updates, then write; on one device."""
    updates = [u for u in updates if u.count]
    if not updates:
        return
    device = updates[0].weight.device
    isa = dispatch.chosen_isa() if device.type == "cpu" else None
    for update in updates:
        if isa is None or not native.is_valid(update):
            checks.values(update)
            if isa is not None:
                raise AssertionError(f"the compiled checks refuse what the others accept: {update}")
    if isa is not None:
        native.settle_all(updates, isa=isa)
        return
    gpu = dispatch.gpu_or_none(device)
    if gpu is None:
        dispatch.warn_if_slow(device, stacklevel=3)
    for update in updates:
        (gpu or reference).settle(update)
