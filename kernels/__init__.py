"""Keyed Gaussian noise and in-place row updates: the face of the kernels.

Every random number is a function of a key and its own coordinates alone: (global row, column,
from-step, to-step). It does not depend on where a table is placed, in which order rows are
visited, on chunks, threads or devices, nor on the processor: the same bits come out everywhere.
So a run on one worker and a run on eight add the same noise, and a replayed step is the same
release.

Guarantee:
    To anyone without the key, the numbers are indistinguishable from independent draws as long
    as ChaCha with the chosen rounds is a pseudorandom function. That holds for one use of each
    (key, row, column, from-step, to-step): derive one key for each run, stream and table with
    `derive_key`, and never settle one interval of a row onto two different values that both
    leave the system. Normals come from 64-bit uniforms: |z| reaches 9.49, the mass lost beyond is
    2^-65 for each pair. They are rounded to float32, and so are weights: this module does not
    defend against attacks on the low-order bits of floating-point noise.

Arithmetic. Normals are made in float64 and rounded once to float32. Updates are float32:
`decay` is rounded to nearest and `scale` up to float32 (noise is never weakened), then
w <- fl(fl(decay * w) + fl(scale * z)), each operation rounded by itself. A row whose scale is 0
draws nothing.

Limits: steps below 2^31, rows below 2^48, 524288 columns, float32 tables.

Errors: TypeError for a wrong type or dtype, ValueError for a wrong shape, device or value,
IndexError for a row that does not exist. Every check is made before the first write, so a refused
call leaves the weight as it was.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from dist_dp.kernels import checks, reference

__all__ = [
    "add_normal",
    "derive_key",
    "implementation",
    "normal",
    "normal_like",
    "settle_range",
    "settle_rows",
    "uniform_rows",
    "uniforms",
]

FLAT_ROW = 1024
"""Dense tensors are numbered as rows of this many elements."""

_DENSE_CHUNK_ROWS = 256


def implementation() -> str:
    """Name what makes the noise in this process, for the user and the run's summary."""
    return reference.NAME


def derive_key(secret: bytes, stream: str, name: str) -> bytes:
    """Derive the key of one stream (noise, sampling, initialisation, …) of one table.

    Keyed BLAKE2b over the length-prefixed names: distinct pairs give independent keys, and none
    of them gives away another or the secret.

    Args:
        secret: 32 bytes from the operating system; one for each run.
        stream: what the numbers are for.
        name: which table, parameter or set of records.

    Returns:
        32 bytes.
    """
    checks.key(secret, "secret")
    digest = hashlib.blake2b(digest_size=32, key=secret, person=b"dist_dp.kernels")
    for part in (stream.encode(), name.encode()):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def normal(
    key: bytes,
    rows: torch.Tensor,
    from_steps: torch.Tensor | int,
    to_step: int,
    *,
    column_offset: int = 0,
    num_columns: int,
    rounds: int = 20,
) -> torch.Tensor:
    """Standard normals of the given rows and columns.

    Args:
        key: 32 bytes, from `derive_key`.
        rows: *global* row numbers, int64 or int32 [n]; repeats give the same numbers again.
        from_steps: [n] or one for all; each before `to_step`.
        to_step: the last step the noise stands for.
        column_offset: global number of the first column; any number, not only multiples of 8.
        num_columns: columns to return.
        rounds: ChaCha rounds: 20, 12 or 8.

    Returns:
        float32 [n, num_columns] on the device of `rows`.
    """
    checks.key(key)
    checks.rounds(rounds)
    offset, number = checks.columns(column_offset, num_columns)
    end = checks.integer(to_step, "to_step", 0, checks.MAX_STEP)
    numbers = checks.rows(rows, "rows", checks.MAX_ROWS)
    steps = checks.steps(from_steps, numbers.numel(), end)
    checks.noisy_steps(steps, end)
    drawn = reference.normals(
        key, numbers.cpu().numpy(), steps.cpu().numpy(), end, offset, number, rounds
    )
    return torch.from_numpy(drawn).to(rows.device)


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
) -> None:
    """In place: weight[r] <- decay * weight[r] + scale * z for each listed row r.

    Args:
        weight: float32 [R, D], a shard of a table; rows and columns may be strided.
        rows: *local* row numbers, int64 or int32 [n], each once.
        key: the table's key.
        row_offset: global number of the shard's first row.
        column_offset: global number of the shard's first column.
        from_steps: the step each row was last settled to: [n], or one for all.
        to_step: the step to settle to. Where it equals from_steps, scale must be 0.
        decay: float32 or float64 [n], or one for all.
        scale: standard deviation to add: float32 or float64 [n], or one for all; at least 0.
        rounds: ChaCha rounds: 20, 12 or 8.
    """
    shard = checks.table(weight)
    checks.key(key)
    checks.rounds(rounds)
    local = checks.rows(rows, "rows", shard.shape[0])
    if local.device != shard.device:
        raise ValueError(f"rows: is on {local.device}, the weight is on {shard.device}")
    checks.unique(local, "rows")
    first_row, first_column = _placement(shard, row_offset, column_offset)
    end = checks.integer(to_step, "to_step", 0, checks.MAX_STEP)
    count = local.numel()
    steps = checks.steps(from_steps, count, end)
    factors = checks.factor(decay, "decay", count, shard.device, round_up=False)
    scales = checks.factor(scale, "scale", count, shard.device, round_up=True)
    checks.noisy_steps(steps, end, scales)
    if count:
        reference.settle_rows(
            shard, local, key, first_row, first_column, steps, end, factors, scales, rounds
        )


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
) -> None:
    """Settle the local rows first_row .. last_row - 1 in place, without storing their noise.

    The same numbers as `settle_rows` on those rows. Beyond its arguments it needs a few MiB and,
    while it checks them, up to 30 bytes for each row of the range; go through a huge table in
    ranges of a million rows.

    Args:
        weight: float32 [R, D], a shard of a table.
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
    """
    shard = checks.table(weight)
    checks.key(key)
    checks.rounds(rounds)
    num_rows = shard.shape[0]
    last = num_rows if last_row is None else checks.integer(last_row, "last_row", 0, num_rows)
    first = checks.integer(first_row, "first_row", 0, last)
    global_row, first_column = _placement(shard, row_offset, column_offset)
    end = checks.integer(to_step, "to_step", 0, checks.MAX_STEP)
    count = last - first

    def of_range(value: torch.Tensor | float) -> torch.Tensor | float:
        if isinstance(value, torch.Tensor) and value.shape == (num_rows,):
            return value[first:last]
        return value

    steps = checks.steps(of_range(from_steps), count, end)  # type: ignore[arg-type]
    factors = checks.factor(of_range(decay), "decay", count, shard.device, round_up=False)
    scales = checks.factor(of_range(scale), "scale", count, shard.device, round_up=True)
    checks.noisy_steps(steps, end, scales)
    if count:
        reference.settle_range(
            shard, first, key, global_row, first_column, steps, end, factors, scales, rounds
        )


def normal_like(
    key: bytes,
    shape: Sequence[int],
    from_step: int,
    to_step: int,
    *,
    device: torch.device | str = "cpu",
    rounds: int = 20,
) -> torch.Tensor:
    """Standard normals for a dense parameter: the same on every replica.

    Element i in row-major order is row i // 1024, column i % 1024 of `normal`.

    Returns:
        float32 of the given shape.
    """
    count = math.prod(checks.integer(n, "shape", 0, checks.MAX_ROWS) for n in shape)
    rows = torch.arange(-(-count // FLAT_ROW))
    drawn = normal(key, rows, from_step, to_step, num_columns=FLAT_ROW, rounds=rounds)
    return drawn.view(-1)[:count].view(tuple(shape)).to(device)


@torch.no_grad()
def add_normal(
    tensor: torch.Tensor,
    *,
    key: bytes,
    from_step: int,
    to_step: int,
    scale: float,
    rounds: int = 20,
) -> None:
    """In place: tensor <- tensor + scale * normal_like(key, tensor.shape, from_step, to_step).

    Args:
        tensor: float32, any shape and strides.
        key: the parameter's key.
        from_step: before `to_step`.
        to_step: the last step the noise stands for.
        scale: standard deviation to add; at least 0 (then nothing is drawn).
        rounds: ChaCha rounds: 20, 12 or 8.
    """
    target = checks.dense(tensor, "tensor")
    checks.key(key)
    checks.rounds(rounds)
    end = checks.integer(to_step, "to_step", 0, checks.MAX_STEP)
    steps = checks.steps(from_step, 1, end)
    factor = checks.factor(scale, "scale", 1, target.device, round_up=True)
    checks.noisy_steps(steps, end, factor)
    if not target.numel() or not bool(factor):
        return
    flat = target.view(-1) if target.is_contiguous() else target.reshape(-1)
    size = _DENSE_CHUNK_ROWS * FLAT_ROW
    for first in range(0, flat.numel(), size):
        part = flat[first : first + size]
        start = first // FLAT_ROW
        rows = torch.arange(start, start - (-part.numel() // FLAT_ROW))
        drawn = normal(key, rows, from_step, end, num_columns=FLAT_ROW, rounds=rounds)
        part.add_(drawn.view(-1)[: part.numel()].to(part.device).mul_(factor))
    if not target.is_contiguous():
        target.copy_(flat.view(target.shape))


def uniforms(
    key: bytes, step: int, count: int, *, first: int = 0, rounds: int = 20
) -> NDArray[np.float64]:
    """Uniform numbers in (0, 1) for decisions that every process must take alike.

    64 random bits (k + 1/2) 2^-64 rounded to float64, at most 1 - 2^-53: a relative precision of
    2^-53 down to 2^-12, an absolute one of 2^-64 below.

    Args:
        key: 32 bytes, from `derive_key`.
        step: numbers of different steps are independent.
        count: how many.
        first: number of the first one: (first=0, count=9) ends with (first=8, count=1).
        rounds: ChaCha rounds: 20, 12 or 8.

    Returns:
        float64 [count].
    """
    checks.key(key)
    checks.rounds(rounds)
    start = checks.integer(first, "first", 0, checks.MAX_ROWS)
    number = checks.integer(count, "count", 0, checks.MAX_ROWS - start)
    return reference.uniforms(
        key, checks.integer(step, "step", 0, checks.MAX_STEP), number, start, rounds
    )


def uniform_rows(
    key: bytes,
    rows: torch.Tensor,
    *,
    num_columns: int,
    column_offset: int = 0,
    low: float,
    high: float,
    rounds: int = 20,
) -> torch.Tensor:
    """Uniform initial values of table rows, independent of where the table is placed.

    Args:
        key: 32 bytes, from `derive_key`.
        rows: *global* row numbers, int64 or int32 [n].
        num_columns: columns to return.
        column_offset: global number of the first column.
        low: lower end.
        high: upper end, at least `low`.
        rounds: ChaCha rounds: 20, 12 or 8.

    Returns:
        float32 [n, num_columns] in [low, high], 32 random bits each, on the device of `rows`.
    """
    checks.key(key)
    checks.rounds(rounds)
    offset, number = checks.columns(column_offset, num_columns)
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise ValueError(f"low, high: finite numbers in order expected, {low} and {high} given")
    numbers = checks.rows(rows, "rows", checks.MAX_ROWS)
    drawn = reference.uniform_rows(
        key, numbers.cpu().numpy(), offset, number, float(low), float(high), rounds
    )
    return torch.from_numpy(drawn).to(rows.device)


def _placement(shard: torch.Tensor, row_offset: int, column_offset: int) -> tuple[int, int]:
    """Check that the shard lies within the rows and columns that can be numbered."""
    first_row = checks.integer(row_offset, "row_offset", 0, checks.MAX_ROWS - shard.shape[0])
    first_column, _ = checks.columns(column_offset, shard.shape[1])
    return first_row, first_column
