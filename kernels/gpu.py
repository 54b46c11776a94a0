"""The twin of the kernels for CUDA devices, written in Triton.

Random words are those of a CPU bit for bit: counters and key are the same. Normals and updates
are meant to be: each operation is the same, in the same order, and rounded as IEEE 754 says (see
`gpu_words`). What is promised is that normals lie within 2 units in the last place; `why_not`
checks that on the device before it is used.

Without a GPU the kernels run under Triton's interpreter, on tensors of the CPU, in a process that
has set TRITON_INTERPRET=1 before Triton is first imported. It is slow and meant for tests; its
`tl.fma` rounds twice, which costs normals up to 3 units in the last place.

Guarantee:
    That of `dist_dp.kernels`. The key reaches a kernel as 32 bytes of device memory and never as a
    constant, so it is in no compiled kernel on disk. Its copy stays in the device's memory until
    torch's allocator hands that block out again.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch

from dist_dp.kernels import reference
from dist_dp.kernels.request import Update

# Lanes of a program: a warp's. The interpreter pays for operations, not for lanes.
_LANES, _INTERPRETED_LANES = 32, 1024
# One operation is one rounding: no contraction into fused multiply-adds.
_OPTIONS = {"num_warps": 1, "enable_fp_fusion": False}
_LOWEST_CAPABILITY = (8, 0)
_LARGEST_ERROR = 2  # units in the last place


def why_not(device: torch.device) -> str | None:
    """Say why these kernels cannot work on tensors of `device`, or None where they can.

    The first call for a GPU compiles a kernel and compares its numbers with the reference's.
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; CUDA builds of torch bring it along (pip install triton)"
    if device.type == "cpu":
        return None if _interpreted() else "the CPU has kernels of its own"
    if device.type != "cuda" or torch.version.cuda is None:
        return f"{device} is not a CUDA device"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if _interpreted():
        return "TRITON_INTERPRET is set, so kernels would be interpreted on the CPU; unset it"
    index = torch.cuda.current_device() if device.index is None else device.index
    return _fault(index)


@functools.cache
def _fault(index: int) -> str | None:
    """What is wrong with a GPU, found out by using it."""
    device = torch.device("cuda", index)
    capability = torch.cuda.get_device_capability(device)
    if capability < _LOWEST_CAPABILITY:
        return (
            f"{torch.cuda.get_device_name(device)} has compute capability "
            f"{'.'.join(map(str, capability))}; "
            f"{'.'.join(map(str, _LOWEST_CAPABILITY))} or above is needed"
        )
    rows = torch.arange(2**40, 2**40 + 256)
    steps = torch.zeros_like(rows)
    key = bytes(range(32))
    expected = reference.normals(key, rows.numpy(), steps.numpy(), 1, 0, 16, 20)
    try:
        made = normals(key, rows.to(device), steps.to(device), 1, 0, 16, 20).cpu().numpy()
    except Exception as error:  # whatever a compiler or driver may raise
        return f"Triton cannot build or run kernels here ({type(error).__name__}: {error})"
    distance = np.abs(made.view(np.int32).astype(np.int64) - expected.view(np.int32)).max()
    if distance > _LARGEST_ERROR:
        return (
            f"normals made on {torch.cuda.get_device_name(device)} are up to {distance} units in "
            f"the last place off; at most {_LARGEST_ERROR} are allowed. Please report this"
        )
    return None


def _interpreted() -> bool:
    """Whether Triton interprets kernels in this process."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def _kernels() -> ModuleType:
    """The module that imports Triton, for which this one must be importable without."""
    from dist_dp.kernels import gpu_kernels

    return gpu_kernels


def _lanes() -> int:
    return _INTERPRETED_LANES if _interpreted() else _LANES


def _on_device(key: bytes, device: torch.device) -> torch.Tensor:
    """The key's 8 words, int32 [8]."""
    return torch.frombuffer(bytearray(key), dtype=torch.int32).to(device, non_blocking=True)


@dataclass(frozen=True)
class _Tiling:
    """How rows of columns are dealt out to programs; see `gpu_kernels`.

    Attributes:
        first_block: number of the block that holds the first column.
        skip: columns of that block before the first column.
        group: neighbouring blocks of one program.
        num_groups: of one row.
        lanes: of one program.
        programs: how many.
    """

    first_block: int
    skip: int
    group: int
    num_groups: int
    lanes: int
    programs: int


def _tiling(count: int, column_offset: int, num_columns: int) -> _Tiling:
    first_block, skip = divmod(column_offset, reference.COLUMNS_PER_BLOCK)
    num_blocks = -(-(skip + num_columns) // reference.COLUMNS_PER_BLOCK)
    lanes = _lanes()
    group = math.gcd(num_blocks, _LANES)
    num_groups = num_blocks // group
    programs = -(-count * group // lanes) * num_groups
    return _Tiling(first_block, skip, group, num_groups, lanes, programs)


def blocks(key: bytes, counters: torch.Tensor, rounds: int) -> torch.Tensor:
    """Raw words of ChaCha blocks.

    Args:
        key: 32 bytes.
        counters: words 12..15 of each block: int32 (the words' patterns) or int64 [4, n].
        rounds: 20, 12 or 8.

    Returns:
        int32 [16, n], the words' patterns, on the device of `counters`.
    """
    count = counters.shape[1]
    output = torch.empty((16, count), dtype=torch.int32, device=counters.device)
    if count:
        lanes = _lanes()
        with torch.cuda.device_of(counters):
            _kernels().blocks_kernel[(-(-count // lanes),)](
                output, counters.contiguous(), _on_device(key, counters.device), count,
                ROUNDS=rounds, LANES=lanes, **_OPTIONS,
            )  # fmt: skip
    return output


def normals(
    key: bytes,
    rows: torch.Tensor,
    from_steps: torch.Tensor,
    to_step: int,
    column_offset: int,
    num_columns: int,
    rounds: int,
) -> torch.Tensor:
    """Standard normals; see `dist_dp.kernels.normal`.

    Args:
        key: 32 bytes.
        rows: global row numbers, int64 or int32 [n].
        from_steps: int64 or int32 [n], on the device of `rows`; may have stride 0.
        to_step: below 2^31.
        column_offset: global number of the first column.
        num_columns: columns to return.
        rounds: 20, 12 or 8.

    Returns:
        float32 [n, num_columns] on the device of `rows`.
    """
    count = rows.numel()
    output = torch.empty((count, num_columns), dtype=torch.float32, device=rows.device)
    if output.numel():
        tiling = _tiling(count, column_offset, num_columns)
        with torch.cuda.device_of(rows):
            _kernels().normals_kernel[(tiling.programs,)](
                output, rows, from_steps, _on_device(key, rows.device),
                rows.stride(0), from_steps.stride(0), count, to_step,
                tiling.first_block, tiling.num_groups, tiling.skip, num_columns,
                ROUNDS=rounds, GROUP=tiling.group, LANES=tiling.lanes, **_OPTIONS,
            )  # fmt: skip
    return output


def settle(update: Update) -> None:
    """In place; see `dist_dp.kernels.settle_rows` and `settle_range`."""
    weight, rows = update.weight, update.rows
    num_columns = weight.shape[1]
    if update.count == 0 or num_columns == 0:
        return
    kernels = _kernels()
    kinds = {
        torch.float32: kernels.FLOAT32.value,
        torch.bfloat16: kernels.BFLOAT16.value,
        torch.float16: kernels.FLOAT16.value,
    }
    # halves go as patterns: Triton's interpreter has no bfloat16 arithmetic of its own
    stored = weight if weight.dtype == torch.float32 else weight.view(torch.int16)
    tiling = _tiling(update.count, update.column_offset, num_columns)
    with torch.cuda.device_of(weight):
        kernels.settle_kernel[(tiling.programs,)](
            stored, rows, update.from_steps, update.decay, update.scale,
            _on_device(update.key, weight.device),
            0 if rows is None else rows.stride(0), update.from_steps.stride(0),
            update.decay.stride(0), update.scale.stride(0),
            update.first_row, update.count, update.row_offset, update.to_step,
            tiling.first_block, tiling.num_groups, float(update.grid),
            weight.stride(0), weight.stride(1), tiling.skip, num_columns,
            LISTED=rows is not None, KIND=kinds[weight.dtype], STOCHASTIC=update.stochastic,
            ON_GRID=update.grid > 0, ROUNDS=update.rounds, GROUP=tiling.group,
            LANES=tiling.lanes, **_OPTIONS,
        )  # fmt: skip
