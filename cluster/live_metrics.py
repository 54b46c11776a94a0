"""What Prometheus may see of runs and budgets, through Ray's own metrics.

Privacy:
    Whoever reads a monitoring system is seldom allowed to read the training records, so by default
    only what the ledger tells is exported: steps charged, ε, budgets, and how the ledger answers.
    All of it follows from plans and budgets, none from a record. What a run's folder holds is as
    private as the records: losses and batch sizes directly, times of steps through the rows that
    a batch touches. It is exported only with ``output.live_metrics: all``, for a monitoring
    system that may know as much as the run folder does. For the same reason a run's step is
    exported when a lease begins, not with every step: the ledger's entries tell that much.

Ray exports them on each node's metrics port under the prefix ``ray_``, where ``ray[default]`` is
installed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dist_dp.distributed import rank, world_size
from dist_dp.errors import BudgetError, DistDpError

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 2.0, 10.0)
Kind = Literal["gauge", "counter", "histogram"]


@dataclass(frozen=True)
class Metric:
    """One metric: its kind, its labels, and what it says."""

    kind: Kind
    labels: tuple[str, ...]
    text: str  # Ray takes ASCII only.


LEDGER_METRICS: Mapping[str, Metric] = {
    "dist_dp_dataset_budget_epsilon": Metric(
        "gauge", ("dataset",), "Epsilon a data set may spend."
    ),
    "dist_dp_dataset_budget_delta": Metric("gauge", ("dataset",), "Delta of its budget."),
    "dist_dp_dataset_spent_epsilon": Metric(
        "gauge", ("dataset",), "Epsilon spent, an upper bound."
    ),
    "dist_dp_run_epsilon": Metric("gauge", ("dataset", "run"), "Epsilon charged to a run."),
    "dist_dp_run_steps_charged": Metric("gauge", ("dataset", "run"), "Last step charged."),
    "dist_dp_ledger_call_seconds": Metric("histogram", ("method",), "Time of a ledger's call."),
    "dist_dp_ledger_errors": Metric("counter", ("kind",), "Calls that failed or were refused."),
    "dist_dp_accountant_start_seconds": Metric("gauge", (), "When the accountant (re)started."),
}
"""Exported by the accountant."""

RUN_METRICS: Mapping[str, Metric] = {
    "dist_dp_run_step": Metric("gauge", ("run",), "Step at which the latest lease began."),
    "dist_dp_run_planned_steps": Metric("gauge", ("run",), "Steps planned."),
    "dist_dp_run_workers": Metric("gauge", ("run",), "Workers of the run."),
    "dist_dp_run_start_seconds": Metric("gauge", ("run",), "When its workers (re)started."),
}
"""Exported by a run's first worker."""

PRIVATE_METRICS: Mapping[str, Metric] = {
    "dist_dp_run_loss": Metric("gauge", ("run",), "Mean loss of a step; NOT private."),
    "dist_dp_run_examples_per_second": Metric("gauge", ("run",), "Speed; NOT private."),
    "dist_dp_run_step_seconds": Metric("gauge", ("run",), "Time of a step; NOT private."),
}
"""Exported by a run's first worker with ``output.live_metrics: all`` only."""


class _Exported:
    """Ray's objects for some metrics, made when Ray runs."""

    def __init__(self, metrics: Mapping[str, Metric]) -> None:
        from ray.util import metrics as ray_metrics

        self._metrics: dict[str, Any] = {}
        for name, metric in metrics.items():
            if metric.kind == "histogram":
                made = ray_metrics.Histogram(
                    name, metric.text, boundaries=list(_SECONDS), tag_keys=metric.labels
                )
            else:
                kind = ray_metrics.Gauge if metric.kind == "gauge" else ray_metrics.Counter
                made = kind(name, metric.text, tag_keys=metric.labels)
            self._metrics[name] = made

    def set(self, name: str, value: float, **labels: str) -> None:
        if math.isfinite(value):  # A run without noise has no ε.
            self._metrics[name].set(value, tags=labels)

    def count(self, name: str, **labels: str) -> None:
        self._metrics[name].inc(1, tags=labels)

    def observe(self, name: str, value: float, **labels: str) -> None:
        self._metrics[name].observe(value, tags=labels)


class LedgerMetrics:
    """The accountant's side: watches the calls of a ledger."""

    def __init__(self) -> None:
        self._exported = _Exported(LEDGER_METRICS)
        self._exported.set("dist_dp_accountant_start_seconds", time.time())
        self._dataset_of: dict[str, str] = {}

    def call(self, ledger: Any, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls a method of the ledger and notes how it went; what it raises goes through."""
        began = time.perf_counter()
        try:
            result = getattr(ledger, method)(*args, **kwargs)
        except DistDpError as error:
            kind = "refused" if isinstance(error, BudgetError) else "failed"
            self._exported.count("dist_dp_ledger_errors", kind=kind)
            raise
        self._exported.observe(
            "dist_dp_ledger_call_seconds", time.perf_counter() - began, method=method
        )
        try:
            self._note(ledger, method, args, result)
        except DistDpError:
            # The call itself went well; what it answered must reach the run.
            self._exported.count("dist_dp_ledger_errors", kind="failed")
        return result

    def _note(self, ledger: Any, method: str, args: tuple[Any, ...], result: Any) -> None:
        if method in ("register_dataset", "set_budget", "datasets"):
            budgets = result if method == "datasets" else ledger.datasets()
            for budget in budgets:
                put = self._exported.set
                put("dist_dp_dataset_budget_epsilon", budget.epsilon, dataset=budget.name)
                put("dist_dp_dataset_budget_delta", budget.delta, dataset=budget.name)
        elif method == "spent":
            self._exported.set("dist_dp_dataset_spent_epsilon", result.epsilon, dataset=args[0])
        elif method == "open_run":
            self._dataset_of[args[0]] = args[1]
        elif method == "reserve":
            run, dataset = args[0], self._dataset(ledger, args[0])
            put, last = self._exported.set, result.first_step + result.steps - 1
            put("dist_dp_run_epsilon", result.run_epsilon, dataset=dataset, run=run)
            put("dist_dp_run_steps_charged", float(last), dataset=dataset, run=run)
            put("dist_dp_dataset_spent_epsilon", result.epsilon_after, dataset=dataset)

    def _dataset(self, ledger: Any, run: str) -> str:
        """The data set of a run; after a restart it is looked up once."""
        if run not in self._dataset_of:
            for budget in ledger.datasets():
                for entry in ledger.history(budget.name):
                    if entry.run_id is not None:
                        self._dataset_of.setdefault(entry.run_id, budget.name)
        return self._dataset_of.get(run, "")


class RunMetrics:
    """A run's side, on its first worker.

    Args:
        run: Name of the run.
        planned_steps: Steps it plans.
        workers: Workers it has.
        private: Also export what is as private as the run folder.
    """

    def __init__(self, run: str, planned_steps: int, workers: int, private: bool) -> None:
        self._run = run
        self._exported = _Exported({**RUN_METRICS, **(PRIVATE_METRICS if private else {})})
        self._private = private
        self._charged_until: int | None = None
        self._put("dist_dp_run_planned_steps", planned_steps)
        self._put("dist_dp_run_workers", workers)
        self._put("dist_dp_run_start_seconds", time.time())

    def step(self, step: int, charged_until: int, row: Mapping[str, float], seconds: float) -> None:
        """Notes a step.

        Args:
            step: Its number.
            charged_until: Last step of the latest lease; it changes when a lease begins.
            row: Loss and sizes of the step, if they were worked out.
            seconds: Time of the step.
        """
        if charged_until != self._charged_until:
            self._charged_until = charged_until
            self._put("dist_dp_run_step", step)
        if self._private and row:
            self._put("dist_dp_run_loss", row["loss"])
            self._put("dist_dp_run_examples_per_second", row["batch_size"] / max(seconds, 1e-9))
            self._put("dist_dp_run_step_seconds", seconds)

    def _put(self, name: str, value: float) -> None:
        self._exported.set(name, value, run=self._run)


def start_run_metrics(mode: str, run: str, planned_steps: int) -> Callable[..., None]:
    """What every worker calls after a step (:meth:`RunMetrics.step`), by ``output.live_metrics``.

    The first worker exports; on the others, and with mode ``none``, the call does nothing.
    """
    if mode == "none" or rank() != 0:
        return lambda *_: None
    return RunMetrics(run, planned_steps, world_size(), private=mode == "all").step
