"""The raw random words behind a table's noise, for statistical test suites.

`python -m dist_dp.kernels.stream | dieharder -g 200 -a`
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Annotated

import numpy as np
import torch
import typer

from dist_dp.kernels import checks, dispatch, draws, native, reference
from dist_dp.kernels.chacha import ROUNDS, UInt32Array

COLUMNS = 128
_BLOCKS_PER_ROW = COLUMNS // reference.COLUMNS_PER_BLOCK
_ROWS = 4096  # rows made at a time: 2 MiB of words
_SECRET = bytes(range(32))  # known to all: these numbers are for tests


def words(key: bytes, rounds: int = 20) -> Iterator[UInt32Array]:
    """Yield the words that make the noise of step 1 of a table with 128 columns, row after row.

    Args:
        key: 32 bytes.
        rounds: ChaCha rounds: 20, 12 or 8.

    Yields:
        uint32 [32768, 16]: the 8 blocks of each of 4096 rows; the rows go up to 2^48.
    """
    isa = dispatch.chosen_isa()
    dispatch.warn_if_slow()
    steps = np.zeros(_ROWS, np.int64)
    for first in range(0, checks.MAX_ROWS, _ROWS):
        rows = np.arange(first, first + _ROWS, dtype=np.int64)
        counters = reference.inputs(rows, 0, _BLOCKS_PER_ROW, steps, 1)
        if isa is None:
            made = reference.blocks(key, counters, rounds)
        else:
            made = native.blocks(key, counters, rounds, isa=isa)
        yield np.ascontiguousarray(made.T)


def normal_words(key: bytes, rounds: int = 20) -> Iterator[UInt32Array]:
    """Yield the normals of the same rows and step, turned back to uniform bits.

    Each normal gives the first 16 bits of its distribution function, two of them a word. More
    bits would show float32's rounding of the normals.

    Args:
        key: 32 bytes.
        rounds: ChaCha rounds: 20, 12 or 8.

    Yields:
        uint32 [4096, 64].
    """
    for first in range(0, checks.MAX_ROWS, _ROWS):
        rows = torch.arange(first, first + _ROWS)
        drawn = draws.normal(key, rows, 0, 1, num_columns=COLUMNS, rounds=rounds)
        bits = torch.special.ndtr(drawn.to(torch.float64)).mul_(65536.0)
        halves = bits.clamp_(0.0, 65535.0).numpy().astype("<u2")
        yield halves.view("<u4")


def main(
    rounds: Annotated[int, typer.Option(help="ChaCha rounds: 20, 12 or 8.")] = 12,
    size: Annotated[
        int | None, typer.Option("--bytes", min=0, help="Stop after so many; by default, never.")
    ] = None,
    table: Annotated[str, typer.Option(help="Another name gives another key.")] = "stream",
    normals: Annotated[
        bool, typer.Option("--normals", help="The normals turned back to uniform bits instead.")
    ] = False,
) -> None:
    """Write the random words behind a table's noise to standard output, little-endian."""
    if rounds not in ROUNDS:
        raise typer.BadParameter(f"one of {ROUNDS} expected", param_hint="--rounds")
    key = draws.derive_key(_SECRET, "noise", table)
    left = size
    try:
        for part in (normal_words if normals else words)(key, rounds):
            data = part.astype("<u4", copy=False).data.cast("B")
            if left is not None:
                data = data[:left]
                left -= len(data)
            sys.stdout.buffer.write(data)
            if left == 0:
                break
        sys.stdout.buffer.flush()
    except BrokenPipeError:  # the reader has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit


if __name__ == "__main__":
    typer.run(main)
