"""The compiled kernels, called with plain addresses: no torch headers, no copies.

The library is built by setup.py from `kernels/native`. It holds one path for each set of
instructions, all with the same results; which one runs is decided here by what the processor has.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from dist_dp.kernels.chacha import UInt32Array
from dist_dp.kernels.request import Update

VARIABLE = "DIST_DP_NATIVE_LIBRARY"
"""Environment variable naming another build of the library, one with sanitizers say."""

FILE = Path(os.environ.get(VARIABLE) or Path(__file__).with_name("_native.so"))

ISAS = ("portable", "avx2", "avx512")
"""The paths in the order of the library's numbers; a processor has all up to its best one."""

_INTERFACE = 4

KINDS = {
    torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3,
    torch.int32: 4, torch.int64: 5,
}  # fmt: skip


class _Column(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("kind", ctypes.c_int32),
    ]


class Job(ctypes.Structure):
    """An update of rows; the tensors behind it must outlive it."""

    _fields_ = [
        ("weight", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in
          ("num_rows", "num_columns", "row_stride", "column_stride")),
        *((name, _Column) for name in ("rows", "from_steps", "decay", "scale")),
        *((name, ctypes.c_int64) for name in
          ("first_row", "count", "to_step", "row_offset", "column_offset")),
        ("grid", ctypes.c_double),
        ("key", ctypes.c_char_p),
        *((name, ctypes.c_int32) for name in ("weight_kind", "stochastic", "rounds")),
        ("state", ctypes.c_void_p),
    ]  # fmt: skip


class State(ctypes.Structure):
    """What a shard's rows have beside a float32 weight, and what they owe."""

    _fields_ = [
        ("momentum", ctypes.c_void_p),
        ("momentum_stride", ctypes.c_int64),
        ("low", ctypes.c_void_p),
        ("low_stride", ctypes.c_int64),
        ("second_key", ctypes.c_char_p),
        ("transition", ctypes.c_void_p),
        ("transition_stride", ctypes.c_int64),
        ("noise", ctypes.c_void_p),
        ("noise_stride", ctypes.c_int64),
    ]


class Table(ctypes.Structure):
    """A shard that lookups read; the tensors behind it must outlive it."""

    _fields_ = [
        ("weight", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in
          ("num_rows", "num_columns", "row_stride", "column_stride")),
        ("history", ctypes.c_void_p),
        ("key", ctypes.c_char_p),
        ("row_offset", ctypes.c_int64),
        ("column_offset", ctypes.c_int64),
        ("weight_kind", ctypes.c_int32),
    ]  # fmt: skip


@functools.cache
def library(path: Path = FILE) -> ctypes.CDLL | None:
    """The compiled library, or None where there is none.

    Raises:
        ImportError: the file is there but has another interface, or cannot be loaded.
    """
    if not path.exists():
        return None
    remedy = "rebuild it: `make setup` in a checkout, or reinstall dist-dp"
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise ImportError(f"the compiled kernels cannot be loaded ({error}); {remedy}") from None
    if loaded.dist_dp_interface() != _INTERFACE:
        raise ImportError(f"the compiled kernels in {path} belong to another version; {remedy}")
    job = ctypes.POINTER(Job)
    loaded.dist_dp_check.argtypes = [job, ctypes.POINTER(ctypes.c_int64)]
    loaded.dist_dp_settle.argtypes = [job, ctypes.c_int64, ctypes.c_int32, ctypes.c_int32]
    loaded.dist_dp_settle.restype = None
    pointer, long, short = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    loaded.dist_dp_take_stale.argtypes = [
        pointer, long, pointer, pointer, short, short, short, pointer, pointer, pointer, pointer,
        short,
    ]  # fmt: skip
    loaded.dist_dp_take_stale.restype = long
    loaded.dist_dp_settle_tables.argtypes = [
        pointer, long, pointer, pointer, pointer, long, pointer, pointer, pointer,
        ctypes.c_double, short, short, short, pointer,
    ]  # fmt: skip
    loaded.dist_dp_bag_repeats.argtypes = [
        pointer, short, long, pointer, long, pointer, pointer, short,
    ]  # fmt: skip
    loaded.dist_dp_bag_repeats.restype = long
    loaded.dist_dp_blocks.argtypes = [
        ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p,
        ctypes.c_int32,
    ]  # fmt: skip
    loaded.dist_dp_blocks.restype = None
    loaded.dist_dp_use_team.argtypes = [pointer]
    loaded.dist_dp_use_team.restype = None
    # Of the OpenMP runtime that torch brought along; see native/team.h.
    team = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    if team is not None:
        loaded.dist_dp_use_team(ctypes.cast(team, pointer))
    return loaded


def available() -> bool:
    """Whether the compiled kernels can be used."""
    return library() is not None


def isas() -> tuple[str, ...]:
    """The paths this processor can run, the best one last."""
    return ISAS[: loaded().dist_dp_best_isa() + 1]


def is_valid(update: Update) -> bool:
    """Check the values of an update's columns in one pass; writes nothing.

    Rows in range and each once, steps in [0, to_step], factors finite in float32 and at least 0,
    no noise over an empty interval.
    """
    return bool(
        loaded().dist_dp_check(ctypes.byref(_job(update)), ctypes.byref(ctypes.c_int64())) == 0
    )


def settle(update: Update, *, isa: str | None = None, threads: int | None = None) -> None:
    """Carry out a checked update in place; see `settle_all`."""
    settle_all([update], isa=isa, threads=threads)


def settle_all(
    updates: Sequence[Update], *, isa: str | None = None, threads: int | None = None
) -> None:
    """Carry out checked updates in place, with one set of threads for all.

    Args:
        updates: what to do, on different rows; the tensors are on the CPU.
        isa: one of `isas()`; by default the best. The result does not depend on it.
        threads: at most so many; by default torch's number. Nor on this.
    """
    jobs = (Job * len(updates))(*(_job(update) for update in updates))
    loaded().dist_dp_settle(jobs, len(updates), thread_number(threads), isa_number(isa))


def normals(
    key: bytes,
    rows: torch.Tensor,
    from_steps: torch.Tensor,
    to_step: int,
    column_offset: int,
    num_columns: int,
    rounds: int,
    *,
    isa: str | None = None,
    threads: int | None = None,
) -> torch.Tensor:
    """Standard normals float32 [n, num_columns]; see `dist_dp.kernels.normal`."""
    output = torch.empty(rows.numel(), num_columns)
    fill(output, key, rows, from_steps, to_step, column_offset, rounds, isa=isa, threads=threads)
    return output


def fill(
    output: torch.Tensor,
    key: bytes,
    rows: torch.Tensor,
    from_steps: torch.Tensor,
    to_step: int,
    column_offset: int,
    rounds: int,
    *,
    isa: str | None = None,
    threads: int | None = None,
) -> None:
    """Write standard normals into float32 [n, num_columns]."""
    job = Job(
        weight=output.data_ptr(), num_rows=output.shape[0], num_columns=output.shape[1],
        row_stride=output.stride(0), column_stride=output.stride(1),
        rows=column_of(rows), from_steps=column_of(from_steps), count=output.shape[0],
        to_step=to_step, column_offset=column_offset, key=key, rounds=rounds,
    )  # fmt: skip
    if output.numel():
        loaded().dist_dp_settle(ctypes.byref(job), 1, thread_number(threads), isa_number(isa))


def table(
    weight: torch.Tensor, history: torch.Tensor, key: bytes, row_offset: int, column_offset: int
) -> Table:
    """Describe a shard; its arguments are checked."""
    return Table(
        weight=weight.data_ptr(), num_rows=weight.shape[0], num_columns=weight.shape[1],
        row_stride=weight.stride(0), column_stride=weight.stride(1), history=history.data_ptr(),
        key=key, row_offset=row_offset, column_offset=column_offset,
        weight_kind=KINDS[weight.dtype],
    )  # fmt: skip


def take_stale(
    tables: ctypes.Array[Table], ids: Sequence[torch.Tensor], older_than: int, to_step: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Find and mark stale rows; see `dist_dp.kernels.tables`.

    Args:
        tables: the shards.
        ids: for each of them, contiguous, all int64 or all int32.
        older_than: rows settled to this step or a later one are left out; at most `to_step`.
        to_step: the step the rows are to be settled to.

    Returns:
        Rows int64 [k] and the steps they were settled to int32 [k], table after table, and how many
        each table has, int64 [tables].

    Raises:
        IndexError: an id is no row; nothing is marked then.
    """
    number = len(ids)
    pointers = (ctypes.c_void_p * number)(*(i.data_ptr() for i in ids))
    counts = (ctypes.c_int64 * number)(*(i.numel() for i in ids))
    total = sum(counts)
    rows = torch.empty(total, dtype=torch.int64)
    from_steps = torch.empty(total, dtype=torch.int32)
    taken = torch.empty(number, dtype=torch.int64)
    where = ctypes.c_int64()
    wrong = loaded().dist_dp_take_stale(
        tables, number, pointers, counts, KINDS[ids[0].dtype], older_than, to_step,
        rows.data_ptr(), from_steps.data_ptr(), taken.data_ptr(), ctypes.byref(where),
        thread_number(None),
    )  # fmt: skip
    if wrong:
        last = tables[wrong - 1].num_rows
        raise IndexError(f"ids of table {wrong - 1}: row {where.value} is outside [0, {last})")
    found = int(taken.sum())
    return rows[:found], from_steps[:found], taken


def settle_tables(
    tables: ctypes.Array[Table],
    rows: torch.Tensor,
    from_steps: torch.Tensor,
    taken: torch.Tensor,
    to_step: int,
    decay: torch.Tensor,
    scale: torch.Tensor,
    rounds: int,
    grid: float,
    *,
    isa: str | None = None,
) -> None:
    """Settle what `take_stale` found; decay and scale are float64 [k], contiguous.

    Raises:
        ValueError: a step or a factor is out of range; nothing is settled then.
    """
    where = ctypes.c_int64()
    fault = loaded().dist_dp_settle_tables(
        tables, len(tables), rows.data_ptr(), from_steps.data_ptr(), taken.data_ptr(), to_step,
        decay.data_ptr(), scale.data_ptr(), None, grid, rounds, thread_number(None),
        isa_number(isa), ctypes.byref(where),
    )  # fmt: skip
    if fault:
        raise ValueError(
            f"table {where.value}: a from-step, decay or scale is out of range (fault {fault}); "
            "decay and scale must be finite in float32 and at least 0"
        )


def bag_repeats(
    ids: torch.Tensor, lengths: torch.Tensor, weights: torch.Tensor | None
) -> torch.Tensor:
    """See `dist_dp.kernels.bag_repeats`; contiguous tensors, weights float32.

    Raises:
        ValueError: the lengths do not add up to the ids.
    """
    squares = torch.empty(lengths.numel())
    wrong = loaded().dist_dp_bag_repeats(
        ids.data_ptr(), KINDS[ids.dtype], ids.numel(), lengths.data_ptr(), lengths.numel(),
        None if weights is None else weights.data_ptr(), squares.data_ptr(), thread_number(None),
    )  # fmt: skip
    if wrong:
        raise ValueError(f"lengths: they do not fit the {ids.numel()} ids")
    return squares


def blocks(
    key: bytes, counters: UInt32Array, rounds: int, *, isa: str | None = None
) -> UInt32Array:
    """Raw words uint32 [16, n] of the blocks whose words 12..15 are counters [4, n]."""
    given = np.ascontiguousarray(counters.T)
    made = np.empty((counters.shape[1], 16), np.uint32)
    loaded().dist_dp_blocks(
        key, given.ctypes.data, counters.shape[1], rounds, made.ctypes.data, isa_number(isa)
    )
    return made.T


def loaded() -> ctypes.CDLL:
    """The compiled library.

    Raises:
        ImportError: there is none.
    """
    found = library()
    if found is None:
        raise ImportError(f"there are no compiled kernels: {FILE} does not exist")
    return found


def isa_number(isa: str | None) -> int:
    """A path's number in the library; by default the best one's."""
    usable = isas()
    if isa is None:
        return len(usable) - 1
    if isa not in usable:
        raise ValueError(f"isa: one of {usable} expected, {isa!r} given")
    return usable.index(isa)


def thread_number(threads: int | None) -> int:
    """By default torch's number."""
    return torch.get_num_threads() if threads is None else threads


def column_of(value: torch.Tensor) -> _Column:
    """Numbers of rows, where one may stand for all."""
    stride = value.stride(0) if value.numel() > 1 else 0
    return _Column(value.data_ptr(), stride, KINDS[value.dtype])


def _job(update: Update) -> Job:
    weight = update.weight
    return Job(
        weight=weight.data_ptr(), num_rows=weight.shape[0], num_columns=weight.shape[1],
        row_stride=weight.stride(0), column_stride=weight.stride(1),
        rows=_Column() if update.rows is None else column_of(update.rows),
        from_steps=column_of(update.from_steps), decay=column_of(update.decay),
        scale=column_of(update.scale), first_row=update.first_row, count=update.count,
        to_step=update.to_step, row_offset=update.row_offset,
        column_offset=update.column_offset, grid=update.grid, key=update.key,
        weight_kind=KINDS[weight.dtype], stochastic=int(update.stochastic),
        rounds=update.rounds,
    )  # fmt: skip
