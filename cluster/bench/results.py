"""From turns to figures: medians over rounds, their spread, and ratios within each round."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from dist_dp.cluster.bench.contenders import Sample
from dist_dp.cluster.bench.rounds import Measured, Turn
from dist_dp.cluster.bench.settings import LEASE_STEPS, StepSettings

CRITICAL_PHASES = (
    "data",
    "ledger",
    "forward",
    "settle",
    "communication",
    "backward",
    "clip",
    "noise",
    "embedding_update",
    "dense_update",
    "other",
)
"""Phases that add up to the step."""

BESIDE = ("sampling", "fetch")
"""Phases in the loader's thread, beside the step before."""


def lease_ms(measured: Sequence[Measured]) -> float:
    """Median time of a lease; the ledger does not know the mechanisms apart, so over all."""
    leases = [ms for m in measured for ms in m.leases_ms]
    return median(leases) if leases else 0.0


def step_ms(turn: Turn, ledger_ms: float) -> float:
    """A turn's step: the median of its steps without their ledger, plus a step's share of it."""
    return median(_own_ms(s) for s in turn.samples) + ledger_ms


def _own_ms(sample: Sample) -> float:
    return 1e3 * sample.seconds - sample.phases_ms.get("ledger", 0.0)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": median(values), "low": min(values), "high": max(values)}


def summarise(
    measured: Sequence[Measured], settings: StepSettings, release: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """One object for each mechanism.

    Args:
        measured: What was timed; ``none`` is among them.
        settings: What was measured.
        release: What a release costs by mechanism, if that was measured.
    """
    share = lease_ms(measured) / LEASE_STEPS
    by_round = {
        m.name: {t.round: step_ms(t, 0.0 if m.name == "none" else share) for t in m.turns}
        for m in measured
    }
    floor = next(m for m in measured if m.name == "none")
    rows = []
    for mine in measured:
        row = _summary(mine, by_round[mine.name], settings)
        row |= _ratios("ratio_to_none", by_round["none"], by_round[mine.name])
        if "lazydp" in by_round:
            row |= _ratios("lazydp_speedup", by_round[mine.name], by_round["lazydp"])
        extra = mine.peak_bytes - floor.peak_bytes
        row["memory_beyond_none_bytes"] = extra
        row["memory_beyond_none_bytes_a_row"] = extra / sum(settings.rows)
        row["phases_ms"] = phases_ms(mine, 0.0 if mine is floor else share)
        row["lease_ms"] = None if mine is floor else share * LEASE_STEPS
        row["release"] = release.get(mine.name)
        rows.append(row)
    return rows


def _summary(mine: Measured, by_round: dict[int, float], settings: StepSettings) -> dict[str, Any]:
    times = spread(list(by_round.values()))
    samples = [s for t in mine.turns for s in t.samples]
    return {
        "mechanism": mine.name,
        "examples_per_second": 1e3 * settings.batch / times["median"],
        "step_ms": times["median"],
        "step_ms_low": times["low"],
        "step_ms_high": times["high"],
        "step_ms_by_round": {str(r): ms for r, ms in sorted(by_round.items())},
        "rounds": len(mine.turns),
        "steps_a_round": mine.steps,
        "warmup_steps_a_round": mine.warmup,
        "examples_a_step": median(s.examples for s in samples),
        "padded_examples_a_step": median(s.padded for s in samples),
        "peak_memory_bytes": mine.peak_bytes,
        "state_bytes": mine.state_bytes,
    }


def _ratios(name: str, slower: dict[int, float], faster: dict[int, float]) -> dict[str, float]:
    """How many times the examples a second of one are another's, in the rounds both took part in.

    Both drew the same batches, so it is a ratio of step times.
    """
    found = spread([slower[r] / faster[r] for r in slower.keys() & faster.keys()])
    return {name: found["median"], f"{name}_low": found["low"], f"{name}_high": found["high"]}


def phases_ms(mine: Measured, ledger_ms: float) -> dict[str, float]:
    """Median milliseconds by phase; being medians, they add up to the step only nearly."""
    samples = [s for t in mine.turns for s in t.samples]
    names = {name for s in samples for name in s.phases_ms}
    found = {n: median(s.phases_ms.get(n, 0.0) for s in samples) for n in names}
    found["ledger"] = ledger_ms
    found["other"] = median(1e3 * s.seconds - sum(s.phases_ms.values()) for s in samples)
    found |= {name: ms / len(mine.turns) for name, ms in mine.beside_ms.items()}
    return {name: found.get(name, 0.0) for name in (*CRITICAL_PHASES, *BESIDE)}


def machine(settings: StepSettings) -> dict[str, Any]:
    """Where it was measured."""
    import torch

    from dist_dp import kernels
    from dist_dp.kernels.bench import processor

    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_bytes": _memory_bytes(),
        "system": platform.platform(),
        "torch": torch.__version__,
        "torchrec": _version("torchrec"),
        "fbgemm": _version("fbgemm-gpu-cpu") or _version("fbgemm-gpu"),
        "kernels": kernels.implementation("cpu"),
        "threads_a_worker": threads(settings.workers),
        "huge_pages": os.environ.get("THP_MEM_ALLOC_ENABLE", "") == "1",
    }


def threads(workers: int) -> int:
    """Threads of each worker: the cores shared out."""
    return max(1, (os.cpu_count() or 1) // workers)


def _version(name: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _memory_bytes() -> int:
    try:
        words = Path("/proc/meminfo").read_text(encoding="ascii").split()
        return int(words[words.index("MemTotal:") + 1]) * 1024
    except (OSError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
