"""Rows of the benchmark for tables with a momentum or of half precision.

Each case settles an ascending list of rows; the plain float32 table is among
them. Speed counts a weight as the 8 bytes that a plain table reads and writes, whatever the rows
hold, so that the rows can be compared.
"""

from __future__ import annotations

import torch

from dist_dp.kernels import draws, states
from dist_dp.kernels.bench_cases import Case, Sizes, Suite
from dist_dp.kernels.tables import Stale

_KEY = draws.derive_key(bytes(32), "noise", "bench states")
_COLUMNS = 128
_TO_STEP = 100
_PARTS = 8  # row lists of one table: no list follows itself, so none is still in a cache
_KINDS = (
    ("float32", torch.float32, False),
    ("bfloat16", torch.bfloat16, False),
    ("float16", torch.float16, False),
    ("float32 with momentum", torch.float32, True),
    ("bfloat16 with momentum", torch.bfloat16, True),
    ("float16 with momentum", torch.float16, True),
)


def add(suite: Suite, sizes: Sizes, isa: str) -> None:
    """A case for each kind of row, on one thread and on two, with 20 rounds."""
    rows = max(_PARTS, sizes.table // 16 // _COLUMNS)
    for name, dtype, moving in _KINDS:
        for threads in (1, 2):
            suite.add(_settled(f"settle rows, {name}", dtype, moving, rows, isa, threads))


def _settled(
    name: str, dtype: torch.dtype, moving: bool, rows: int, isa: str, threads: int
) -> Case:
    weight = torch.rand(rows, _COLUMNS).to(dtype)
    low_dtype = states.LOW_DTYPES.get(dtype)
    tables = states.StateTableSet(
        [weight],
        [torch.zeros(rows, dtype=torch.int32)],
        [_KEY],
        [0],
        [0],
        [torch.zeros(rows, _COLUMNS) if moving else None],
        [None if low_dtype is None else torch.zeros(rows, _COLUMNS, dtype=low_dtype)],
    )
    lists = [part.sort().values for part in torch.randperm(rows).chunk(_PARTS)]
    most = len(lists[0])
    from_steps = torch.randint(0, _TO_STEP, (most,), dtype=torch.int32)
    # gaps of several steps: two draws a coordinate where there is a momentum
    transition, noise = torch.full((most,), 0.99), torch.full((most,), 0.01)
    if moving:
        transition = torch.tensor([0.99, -0.1, 0.01, 0.9]).expand(most, 4)
        noise = torch.tensor([0.01, -0.01, 0.01]).expand(most, 3)
    transition, noise = transition.double(), noise.double()

    def run(repetition: int) -> None:
        listed = lists[repetition % len(lists)]
        count = len(listed)
        stale = Stale(listed, from_steps[:count], torch.tensor([count]))
        debt = (transition[:count], noise[:count])
        tables.settle(stale, to_step=_TO_STEP, owed=[debt])

    return Case(name, isa, 20, threads, most * _COLUMNS, run, weights=True)
