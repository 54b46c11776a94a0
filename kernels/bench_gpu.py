"""The benchmark's rows for a GPU, where there is one that the kernels can use."""

from __future__ import annotations

import torch

from dist_dp.kernels import draws, gpu
from dist_dp.kernels.bench_cases import Case, Sizes, Suite, Table

_KEY = draws.derive_key(bytes(32), "noise", "bench")
_FACTOR = 4  # a GPU needs more to do than a core


def add(suite: Suite, sizes: Sizes) -> str:
    """Add torch's and our normals, settle and copy on the GPU.

    Returns:
        The GPU's name, or why none is measured.
    """
    if not torch.cuda.is_available():
        return "no GPU"
    device = torch.device("cuda")
    reason = gpu.why_not(device)
    if reason is not None:
        return f"GPU not measured: {reason}"
    output = torch.empty(_FACTOR * sizes.large, device=device)

    def torch_normal(_: int) -> None:
        output.normal_()
        torch.cuda.synchronize()

    name = "GPU: torch normal_"
    base = suite.add(Case(name, "cuda", None, 1, output.numel(), torch_normal))
    suite.torch_normal[base] = base
    for rounds in (8, 12, 20):
        suite.add(_normals(output.numel(), device, rounds), base)
    memory, other = (torch.rand(_FACTOR * sizes.table, device=device) for _ in range(2))
    for what, number in (("list", memory.numel() // 8), ("table", memory.numel())):

        def copy(_: int, number: int = number) -> None:
            other[:number].copy_(memory[:number])
            torch.cuda.synchronize()

        suite.add(
            Case(f"GPU: copy as many bytes as a {what}", "cuda", None, 1, number, copy,
                 weights=True)
        )  # fmt: skip
    table = Table(memory, 128)
    for whole in (False, True):
        what = "whole table" if whole else "row list"
        for rounds in (12, 20):
            case = table.settled(
                f"GPU: settle, {what}, dim 128", whole, "triton", rounds, 1, len(suite.cases)
            )
            suite.add(_synchronised(case), base)
    return torch.cuda.get_device_name(device)


def _normals(number: int, device: torch.device, rounds: int) -> Case:
    rows = torch.arange(number // 128, device=device)
    steps = torch.zeros(1, dtype=torch.int64, device=device).expand(len(rows))

    def run(_: int) -> None:
        gpu.normals(_KEY, rows, steps, 1, 0, 128, rounds)
        torch.cuda.synchronize()

    return Case("GPU: normals", "triton", rounds, 1, number, run)


def _synchronised(case: Case) -> Case:
    """The same case, timed until the GPU is done."""

    def run(repetition: int) -> None:
        case.run(repetition)
        torch.cuda.synchronize()

    return Case(
        case.name, case.isa, case.rounds, case.threads, case.numbers, run, weights=case.weights
    )
