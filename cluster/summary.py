"""``summary.json``: what a run was, cost and reached."""

from __future__ import annotations

import importlib.metadata
import math
import platform
import resource
import statistics
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from dist_dp import kernels
from dist_dp.distributed import rank, world_size
from dist_dp.release import privacy_statement

if TYPE_CHECKING:
    from dist_dp.cluster.worker import Run

_PACKAGES = (
    "dist-dp",
    "torch",
    "torchrec",
    "fbgemm-gpu-cpu",
    "fbgemm-gpu",
    "ray",
    "dp-accounting",
    "pyarrow",
    "numpy",
)


def software_versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this worker: of the GPU if it has one, else resident memory."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _gather(value: Any) -> list[Any]:
    values: list[Any] = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def say_kernels(device: torch.device) -> dict[str, Any]:
    """What makes the noise on every worker; every rank calls it.

    Returns:
        Progress to push: ``phase``, what to show; ``kernels``, the implementations with their
        workers if they differ, as one text; ``slow_kernels``, for each reason that the slow
        reference runs somewhere, a warning that names workers and remedy.
    """
    answers = _gather((kernels.implementation(device), kernels.slow_reason(device)))

    def workers(place: int) -> dict[str | None, list[int]]:
        owners: dict[str | None, list[int]] = {}
        for number, answer in enumerate(answers):
            owners.setdefault(answer[place], []).append(number)
        return owners

    names, reasons = workers(0), workers(1)
    listed = [
        f"{name} on {_numbered(owners)}" if len(names) > 1 else str(name)
        for name, owners in names.items()
    ]
    slow = [f"{_numbered(owners)}: {why}" for why, owners in reasons.items() if why is not None]
    text = ", ".join(listed)
    return {"phase": f"noise kernels: {text}", "kernels": text, "slow_kernels": slow}


def _numbered(workers: list[int]) -> str:
    shown = ", ".join(map(str, workers[:8])) + (" and more" if len(workers) > 8 else "")
    return f"worker{'s' if len(workers) > 1 else ''} {shown}"


def _sharding(run: Run) -> list[dict[str, Any]]:
    """Every table with its kind, the ranks that hold it, and its bytes over all ranks."""
    local = [
        (s.table, s.num_rows, s.dim, s.kind, s.weight.numel() * s.weight.element_size())
        for s in run.engine.parts.shards
    ]
    tables: dict[str, dict[str, Any]] = {}
    for owner, shards in enumerate(_gather(local)):
        for table, rows, dim, kind, size in shards:
            entry = tables.setdefault(
                table,
                {"table": table, "rows": rows, "dim": dim, "kind": kind, "ranks": [], "bytes": 0},
            )
            if size and owner not in entry["ranks"]:
                entry["ranks"].append(owner)
            entry["bytes"] += size
    return [tables[name] for name in sorted(tables)]


def finite(value: float | None) -> float | None:
    """None for what JSON cannot hold."""
    return value if value is not None and math.isfinite(value) else None


def make_summary(run: Run, metrics: dict[str, float], split: str | None) -> dict[str, Any]:
    """Collects the summary; every rank calls it.

    Args:
        run: The worker's run.
        metrics: Quality on held-out records.
        split: Which split they are from.

    Returns:
        Simple types, and ``card_facts`` for the model card.
    """
    parts, plan, config = run.engine.parts, run.engine.parts.plan, run.config
    steps = parts.mechanism.schedule.step
    charged = run.engine.charged_events()
    peaks = _gather(peak_memory_bytes(run.device))
    sharding = _sharding(run)
    records = plan.expected_batch_size * run.engine.records_per_unit
    private = plan.is_private and not run.engine.secret_is_given
    # The first steps pay for warming up; the median does not care.
    seconds = statistics.median(run.step_seconds) if run.step_seconds else float("nan")
    names = sorted({n for p in run.phases for n in p})
    phases = {n: statistics.median(p.get(n, 0.0) for p in run.phases) for n in names}
    summary: dict[str, Any] = {
        "run_name": run.job.run_name,
        "status": run.status,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "mechanism": plan.mechanism,
        "private": private,
        "fixed_seed": run.engine.secret_is_given,
        "epsilon": finite(plan.epsilon(charged)) if plan.is_private and charged else None,
        "target_epsilon": plan.target_epsilon,
        "delta": plan.delta if plan.is_private else None,
        "noise_multiplier": plan.noise_multiplier,
        "noise_multiplier_range": list(plan.noise_multiplier_range()),
        "max_grad_norm": plan.max_grad_norm if plan.mechanism != "none" else None,
        "num_records": len(run.train_set),
        "num_users": plan.num_users,
        "max_records_per_user": plan.max_records_per_user,
        "expected_batch_size": plan.expected_batch_size,
        "expected_records": records,
        "sample_rate": plan.sample_rate,
        "sampling": plan.sampling,
        "steps": steps,
        "planned_steps": plan.steps,
        "steps_charged": run.engine.steps_charged(),
        "evaluated_on": split,
        "auc": finite(metrics.get("auc")),
        "normalized_entropy": finite(metrics.get("normalized_entropy")),
        "log_loss": finite(metrics.get("log_loss")),
        "calibration": finite(metrics.get("calibration")),
        "evaluated_examples": int(metrics.get("examples", 0)),
        "examples_per_second": finite(records / seconds),
        "step_ms": finite(1e3 * seconds),
        "phases_ms": phases,
        "peak_memory_bytes": peaks,
        "world_size": world_size(),
        "device": str(run.device),
        "sharding": sharding,
        "learning_rate": config.train.learning_rate.model_dump(mode="json", exclude_none=True),
        "table_optimizer": config.train.table_optimizer,
        "embedding_optimizer": config.train.table_optimizer,
        "dense_optimizer": config.train.dense_optimizer,
        "kernels": run.kernels["kernels"],
        "software": software_versions(),
        "privacy_statement": privacy_statement(run.engine, charged),
        "not_covered": list(plan.not_covered()),
        "unit_of_privacy": plan.unit,
        "neighbouring_relation": plan.neighbouring_relation,
        "accountant": plan.accountant,
        "dataset": run.job.dataset,
        "started_from": run.engine.started_from,
        "skipped_rows": dict(run.store.manifest.skipped_rows),
    }
    if rank() == 0 and plan.is_private:
        assert run.engine.accountant is not None
        spend = run.engine.accountant.spent(run.job.dataset)
        summary["dataset_spent_epsilon"] = finite(spend.epsilon)
        summary["dataset_budget_epsilon"] = spend.budget_epsilon
        summary["run_epsilon_charged"] = finite(
            run.engine.accountant.run_epsilon(run.job.run_name, plan.delta)
        )
    if run.loader.leases.refusal is not None:
        summary["budget_refusal"] = run.loader.leases.refusal
    summary["card_facts"] = _card_facts(summary)
    return summary


def _card_facts(summary: dict[str, Any]) -> dict[str, Any]:
    """Lines for the model card.

    Metrics stay out: those on held-out records are computed without noise, and the card leaves
    with the release.
    """
    facts: dict[str, Any] = {"created": summary["created"], "run": summary["run_name"]}
    facts |= {f"version of {name}": v for name, v in summary["software"].items()}
    return facts
