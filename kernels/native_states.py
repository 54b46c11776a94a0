"""The compiled kernels for rows with a momentum or of half precision; see `dist_dp.kernels.states`.

As in `dist_dp.kernels.native`, whose structures these are: plain addresses of checked tensors,
which the caller keeps alive.
"""

from __future__ import annotations

import ctypes

import torch

from dist_dp.kernels import native

Owed = tuple[torch.Tensor, torch.Tensor]
"""Of each row, float64: its transition and its noise's factor; neighbouring numbers in a row."""


def state(
    momentum: torch.Tensor | None, low: torch.Tensor | None, second_key: bytes | None
) -> native.State:
    """Describe what a shard's rows have beside a float32 weight."""
    made = native.State(second_key=second_key)
    if momentum is not None:
        made.momentum, made.momentum_stride = momentum.data_ptr(), momentum.stride(0)
    if low is not None:
        made.low, made.low_stride = low.data_ptr(), low.stride(0)
    return made


def settle_tables(
    tables: ctypes.Array[native.Table],
    states: ctypes.Array[native.State],
    rows: torch.Tensor,
    from_steps: torch.Tensor,
    taken: torch.Tensor,
    to_step: int,
    owed: list[Owed],
    rounds: int,
    grid: float,
    *,
    isa: str,
) -> None:
    """Settle what `native.take_stale` found in tables some of which have a state.

    Raises:
        ValueError: a step or a factor is out of range; nothing is settled then.
    """
    for described, (transition, noise) in zip(states, owed, strict=True):
        _owe(described, transition, noise)
    where = ctypes.c_int64()
    fault = native.loaded().dist_dp_settle_tables(
        tables, len(tables), rows.data_ptr(), from_steps.data_ptr(), taken.data_ptr(), to_step,
        None, None, states, grid, rounds, native.thread_number(None), native.isa_number(isa),
        ctypes.byref(where),
    )  # fmt: skip
    if fault:
        raise _refusal(where.value, fault)


def settle_range(
    weight: torch.Tensor,
    described: native.State,
    key: bytes,
    row_offset: int,
    column_offset: int,
    first_row: int,
    from_steps: torch.Tensor,
    to_step: int,
    owed: Owed,
    rounds: int,
    *,
    isa: str,
) -> None:
    """Settle the rows first_row, first_row + 1, …: as many as `from_steps` has.

    Raises:
        ValueError: as for `settle_tables`.
    """
    _owe(described, *owed)
    job = native.Job(
        weight=weight.data_ptr(), num_rows=weight.shape[0], num_columns=weight.shape[1],
        row_stride=weight.stride(0), column_stride=1, from_steps=native.column_of(from_steps),
        first_row=first_row, count=from_steps.numel(), to_step=to_step, row_offset=row_offset,
        column_offset=column_offset, key=key, weight_kind=native.KINDS[weight.dtype],
        rounds=rounds, state=ctypes.addressof(described),
    )  # fmt: skip
    library = native.loaded()
    fault = library.dist_dp_check(ctypes.byref(job), ctypes.byref(ctypes.c_int64()))
    if fault:
        raise _refusal(0, fault)
    threads = native.thread_number(None)
    library.dist_dp_settle(ctypes.byref(job), 1, threads, native.isa_number(isa))


def _owe(described: native.State, transition: torch.Tensor, noise: torch.Tensor) -> None:
    described.transition, described.transition_stride = transition.data_ptr(), transition.stride(0)
    described.noise, described.noise_stride = noise.data_ptr(), noise.stride(0)


def _refusal(table: int, fault: int) -> ValueError:
    return ValueError(
        f"table {table}: a from-step, or what a row owes, is out of range (fault {fault}); "
        "transitions and factors must be finite in float32, decays and deviations at least 0"
    )
