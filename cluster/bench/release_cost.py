"""What a release costs beyond the steps: every row is settled before it is written."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from dist_dp.cluster.bench.field import Field
from dist_dp.cluster.bench.settings import StepSettings
from dist_dp.distributed import all_reduce_max, barrier


def release_costs(
    field: Field, settings: StepSettings, say: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """Times the settling of all rows, by mechanism; every rank calls it.

    Writing costs every mechanism the same, ``none`` included, and is the disk's business; it is
    left out. Only ``lazydp`` owes anything when a run ends.

    Returns:
        ``settle_ms``, and the same spread over ``release_every`` steps, by private mechanism.
    """
    costs: dict[str, dict[str, Any]] = {}
    for contender in field.contenders:
        if contender.name not in ("lazydp", "dpsgd"):
            continue
        say(f"settling all rows: {contender.name}")
        contender.activate()
        barrier()
        start = time.perf_counter()
        field.engine.parts.settle()
        seconds = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
        settle_ms = 1e3 * float(all_reduce_max(seconds))
        costs[contender.name] = {
            "settle_ms": settle_ms,
            "spread_over_steps": settings.release_every,
            "ms_a_step": settle_ms / settings.release_every,
        }
    return costs
