"""Rates of one process, each by a small benchmark of one kind of work on data made for it.

The shapes are those of MLPerf's DLRM, so that matrix products and passes over activations run as
they do in a step. No step is run here and nothing is fitted to one.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional

from dist_dp.step_shapes import FLOAT

BATCH = 2048
LAYERS = ((512, 256), (479, 1024), (1024, 1024), (1024, 512))
"""Inputs and outputs of the linear layers that are timed."""
VECTORS, WIDTH = 27, 128
"""Vectors of the interaction, and their width."""


def seconds(run: Callable[[], object], repeats: int = 5) -> float:
    """Median wall time of a call, after one that is not counted."""
    run()
    found = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        found.append(time.perf_counter() - begin)
    return median(found)


def matmul_rate() -> float:
    """Flops a second of a linear layer's forward product and the two of its backward."""
    flops, total = 0.0, 0.0
    for inputs, outputs in LAYERS:
        x, delta = torch.randn(BATCH, inputs), torch.randn(BATCH, outputs)
        weight, bias = torch.randn(outputs, inputs), torch.randn(outputs)
        products: tuple[Callable[[], Tensor], ...] = (
            lambda x=x, w=weight, b=bias: functional.linear(x, w, b),  # type: ignore[misc]
            lambda d=delta, w=weight: d @ w,  # type: ignore[misc]
            lambda d=delta, x=x: d.t() @ x,  # type: ignore[misc]
        )
        flops += len(products) * 2 * BATCH * inputs * outputs
        total += sum(seconds(run) for run in products)
    return flops / total


def small_matmul_rate() -> float:
    """Flops a second of the interaction's batched products, forward and backward."""
    vectors = torch.randn(BATCH, VECTORS, WIDTH)
    square = torch.randn(BATCH, VECTORS, VECTORS)
    total = seconds(lambda: torch.bmm(vectors, vectors.transpose(1, 2)))
    total += seconds(lambda: torch.bmm(square, vectors))
    total += seconds(lambda: torch.bmm(vectors.transpose(1, 2), square))
    return 3 * 2 * BATCH * VECTORS * VECTORS * WIDTH / total


def activation_rate() -> float:
    """Bytes a second of passes over activations: ReLU and its backward, a concatenation, a norm."""
    hidden, pooled = torch.randn(BATCH, 1024), torch.randn(BATCH, (VECTORS - 1) * WIDTH)
    parts = list(pooled.split(WIDTH, dim=1))
    total = seconds(lambda: hidden.clamp_min(0.0))
    total += seconds(lambda: torch.ops.aten.threshold_backward(hidden, hidden, 0))
    total += seconds(lambda: torch.cat(parts, dim=1))
    total += seconds(lambda: torch.linalg.vector_norm(pooled, dim=1))
    return FLOAT * (5 * hidden.numel() + 3 * pooled.numel()) / total


def fresh_rate() -> float:
    """Bytes a second of memory from the system, beyond the time of the pass that fills it."""
    kept = torch.empty(1 << 24)
    anew = seconds(lambda: torch.empty(1 << 24).fill_(1.0))
    again = seconds(lambda: kept.fill_(1.0))
    return FLOAT * kept.numel() / max(anew - again, 1e-6)


def indexed_rate() -> float:
    """Numbers a second gathered from, and scattered into, the interaction's triangle."""
    square = torch.randn(BATCH, VECTORS, VECTORS)
    rows, columns = torch.triu_indices(VECTORS, VECTORS, offset=1)
    pairs = square[:, rows, columns]
    everything = torch.arange(BATCH).unsqueeze(1)
    total = seconds(lambda: square[:, rows, columns])
    total += seconds(lambda: square.index_put_((everything, rows, columns), pairs, accumulate=True))
    return 2 * pairs.numel() / total


def disk_rate(folder: Path, size: int = 1 << 27) -> float:
    """Bytes a second written to a new file in a folder, until they are on the disk."""
    data = os.urandom(1 << 20)
    begin = time.perf_counter()
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(size // len(data)):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return size / (time.perf_counter() - begin)
