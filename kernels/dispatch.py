"""Which implementation runs, and what to tell the user about it.

CPU tensors: the compiled kernels with the best instructions the processor has; without them the
NumPy reference. CUDA tensors: the Triton kernels; without them the reference, by way of the CPU.
All return the same bits, so the choice bears on speed alone, but by a factor of fifty: the
reference never runs without a warning that names the remedy.
"""

from __future__ import annotations

import os
import warnings
from types import ModuleType

import torch

from dist_dp.kernels import native, reference

VARIABLE = "DIST_DP_KERNELS"
"""Environment variable that asks for `reference`, `portable`, `avx2` or `avx512`."""

_NAMES = {
    "portable": "compiled (portable)",
    "avx2": "compiled (AVX2)",
    "avx512": "compiled (AVX-512)",
}
_warned: set[str] = set()


class SlowKernelsWarning(UserWarning):
    """The slow reference makes the noise where fast kernels could."""


def implementation(device: torch.device | str = "cpu") -> str:
    """Name what makes the noise on a device, for the user and the run's summary."""
    where = torch.device(device)
    if where.type == "cuda" and _gpu(where) is not None:
        return "Triton"
    isa = chosen_isa()
    return reference.NAME if isa is None else _NAMES[isa]


def slow_reason(device: torch.device | str = "cpu") -> str | None:
    """Why the slow reference would run on a device and what to do, or None if it would not."""
    where = torch.device(device)
    if where.type == "cuda":
        from dist_dp.kernels import gpu

        reason = gpu.why_not(where)
        if reason is None:
            return None
        return (
            f"noise for tables on {where} is made by the NumPy reference on the CPU, which is "
            f"slow: {reason}"
        )
    chosen_isa()  # an impossible wish is an error already here
    if os.environ.get(VARIABLE) == "reference":
        return f"noise is made by the NumPy reference because {VARIABLE}=reference; unset it"
    if not native.available():
        return (
            "noise is made by the NumPy reference, about fifty times slower than the compiled "
            "kernels, which were not built. Install a C++ compiler (Debian: apt install g++), "
            "then reinstall: `make setup` in a checkout, else "
            "`pip install --force-reinstall --no-deps dist-dp`"
        )
    return None


def chosen_isa() -> str | None:
    """The path of the compiled kernels that runs, or None for the reference.

    Raises:
        ValueError: the environment variable asks for what this machine does not have.
    """
    wanted = os.environ.get(VARIABLE)
    if wanted == "reference":
        return None
    if not native.available():
        if wanted:
            raise ValueError(f"{VARIABLE}={wanted}: the compiled kernels were not built")
        return None
    usable = native.isas()
    if not wanted:
        return usable[-1]
    if wanted not in usable:
        raise ValueError(
            f"{VARIABLE}={wanted}: this machine has {', '.join(usable)}, and reference"
        )
    return wanted


def gpu_or_none(device: torch.device) -> ModuleType | None:
    """The Triton kernels if the device is a GPU and they can run there; else None, with a warning.

    A GPU without Triton is served by the reference.
    """
    if device.type != "cuda":
        return None
    found = _gpu(device)
    if found is None:
        warn_if_slow(device, stacklevel=3)
    return found


def warn_if_slow(device: torch.device | str = "cpu", *, stacklevel: int = 2) -> None:
    """Warn once for each reason that the reference runs.

    Args:
        device: where the tensors are.
        stacklevel: whose line the warning names: 1 this function's caller, 2 that one's caller, …
    """
    reason = slow_reason(device)
    if reason is not None and reason not in _warned:
        _warned.add(reason)
        warnings.warn(reason, SlowKernelsWarning, stacklevel=stacklevel + 1)


def _gpu(device: torch.device) -> ModuleType | None:
    from dist_dp.kernels import gpu  # triton takes a while to import

    return gpu if gpu.why_not(device) is None else None
