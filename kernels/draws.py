"""Random numbers as functions of a key and their coordinates: normals, uniforms, keys."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from dist_dp.kernels import checks, dispatch, native, reference
from dist_dp.kernels.chacha import UInt32Array
from dist_dp.kernels.updates import FLAT_ROW

_BLOCK_CHUNK = 1 << 15  # blocks made into uniform numbers at a time


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
        column_offset: global number of the first column; any number, not only multiples of 16.
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
    checks.step_values(steps, end)
    checks.noisy_steps(steps, end)
    device = numbers.device
    isa = dispatch.chosen_isa() if device.type == "cpu" else None
    if isa is not None:
        return native.normals(key, numbers, steps.cpu(), end, offset, number, rounds, isa=isa)
    gpu = dispatch.gpu_or_none(device)
    if gpu is not None:
        on_device: torch.Tensor = gpu.normals(
            key, numbers, steps.to(device), end, offset, number, rounds
        )
        return on_device
    dispatch.warn_if_slow(device)
    drawn = reference.normals(
        key, numbers.cpu().numpy(), steps.cpu().numpy(), end, offset, number, rounds
    )
    return torch.from_numpy(drawn).to(device)


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
    rows = torch.arange(-(-count // FLAT_ROW), device=device)
    drawn = normal(key, rows, from_step, to_step, num_columns=FLAT_ROW, rounds=rounds)
    return drawn.view(-1)[:count].view(tuple(shape))


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
    checks.integer(step, "step", 0, checks.MAX_STEP)
    width = reference.UNIFORMS_PER_BLOCK
    result = np.empty(number, np.float64)
    for done in range(0, number, _BLOCK_CHUNK * width):
        begin, end = start + done, min(start + number, start + done + _BLOCK_CHUNK * width)
        first_block = begin // width
        counters = reference.uniform_counters(step, first_block, -(-end // width) - first_block)
        values = reference.uniforms(_words(key, counters, rounds))
        skip = begin - first_block * width
        result[done : done + end - begin] = values[skip : skip + end - begin]
    return result


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
    width = reference.COLUMNS_PER_BLOCK
    first_block = offset // width
    num_blocks = -(-(offset + number) // width) - first_block
    skip = offset - first_block * width
    lists = numbers.cpu().numpy()
    drawn = np.empty((len(lists), number), np.float32)
    step = max(1, _BLOCK_CHUNK // max(1, num_blocks))
    for begin in range(0, len(lists) if number else 0, step):
        counters = reference.initial_counters(lists[begin : begin + step], first_block, num_blocks)
        values = _words(key, counters, rounds).T.astype(np.float64)
        values += 0.5
        values *= (high - low) * 2.0**-32
        values += low
        wide = values.reshape(-1, num_blocks * width)
        drawn[begin : begin + step] = wide[:, skip : skip + number]
    np.clip(drawn, np.float32(low), np.float32(high), out=drawn)
    return torch.from_numpy(drawn).to(rows.device)


def _words(key: bytes, counters: UInt32Array, rounds: int) -> UInt32Array:
    """The blocks uint32 [16, n] of counters [4, n], by whatever is fast here."""
    isa = dispatch.chosen_isa()
    if isa is None:
        dispatch.warn_if_slow(stacklevel=3)
        return reference.blocks(key, counters, rounds)
    return native.blocks(key, counters, rounds, isa=isa)
