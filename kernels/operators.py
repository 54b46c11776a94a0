"""The kernels as torch operators, for `torch.compile`: `torch.ops.dist_dp.*`.

They take the key as a tensor of 32 bytes, so that it is data of the graph and never a constant
written into compiled code or a guard. Fake kernels tell the compiler the shapes; the operators
that update in place declare it, so functionalisation, aliasing and autograd's version counters
stay right. None of them has a derivative: noise is added outside of the graph of the loss.
"""

from __future__ import annotations

import torch

from dist_dp.kernels import checks, draws, updates


def key_tensor(key: bytes) -> torch.Tensor:
    """A key as uint8 [32] on the CPU, as the operators take it."""
    return torch.frombuffer(bytearray(checks.key(key)), dtype=torch.uint8)


def _key(value: torch.Tensor) -> bytes:
    if value.dtype != torch.uint8 or value.shape != (32,):
        raise ValueError(f"key: uint8 [32] expected, {value.dtype} {tuple(value.shape)} given")
    return bytes(value.cpu().numpy())


@torch.library.custom_op("dist_dp::settle_rows", mutates_args=("weight",))
def settle_rows(
    weight: torch.Tensor,
    rows: torch.Tensor,
    key: torch.Tensor,
    from_steps: torch.Tensor,
    decay: torch.Tensor,
    scale: torch.Tensor,
    to_step: int,
    row_offset: int = 0,
    column_offset: int = 0,
    rounds: int = 20,
    rounding: str = "stochastic",
    grid: float | None = None,
) -> None:
    """`dist_dp.kernels.settle_rows`; from_steps, decay and scale have one entry for each row."""
    updates.settle_rows(
        weight, rows, key=_key(key), row_offset=row_offset, column_offset=column_offset,
        from_steps=from_steps, to_step=to_step, decay=decay, scale=scale, rounds=rounds,
        rounding=rounding, grid=grid,
    )  # fmt: skip


@settle_rows.register_fake
def _settle_rows_fake(*_args: object, **_options: object) -> None:
    """Nothing is returned."""


@torch.library.custom_op("dist_dp::settle_range", mutates_args=("weight",))
def settle_range(
    weight: torch.Tensor,
    key: torch.Tensor,
    from_steps: torch.Tensor,
    decay: torch.Tensor,
    scale: torch.Tensor,
    to_step: int,
    row_offset: int = 0,
    column_offset: int = 0,
    rounds: int = 20,
    rounding: str = "stochastic",
    grid: float | None = None,
) -> None:
    """`dist_dp.kernels.settle_range` over the whole shard, one entry for each row."""
    updates.settle_range(
        weight, key=_key(key), row_offset=row_offset, column_offset=column_offset,
        from_steps=from_steps, to_step=to_step, decay=decay, scale=scale, rounds=rounds,
        rounding=rounding, grid=grid,
    )  # fmt: skip


@settle_range.register_fake
def _settle_range_fake(*_args: object, **_options: object) -> None:
    """Nothing is returned."""


@torch.library.custom_op("dist_dp::normal", mutates_args=())
def normal(
    key: torch.Tensor,
    rows: torch.Tensor,
    from_steps: torch.Tensor,
    to_step: int,
    column_offset: int,
    num_columns: int,
    rounds: int = 20,
) -> torch.Tensor:
    """`dist_dp.kernels.normal`; from_steps has one entry for each row."""
    return draws.normal(
        _key(key), rows, from_steps, to_step, column_offset=column_offset,
        num_columns=num_columns, rounds=rounds,
    )  # fmt: skip


@normal.register_fake
def _normal_fake(
    key: torch.Tensor,
    rows: torch.Tensor,
    from_steps: torch.Tensor,
    to_step: int,
    column_offset: int,
    num_columns: int,
    rounds: int = 20,
) -> torch.Tensor:
    """The shape and type of the result."""
    return rows.new_empty((rows.shape[0], num_columns), dtype=torch.float32)
