"""What is exported to Prometheus, and what is not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dist_dp.accounting import GaussianEvent
from dist_dp.cluster import live_metrics
from dist_dp.cluster.live_metrics import (
    LEDGER_METRICS,
    PRIVATE_METRICS,
    RUN_METRICS,
    LedgerMetrics,
    Metric,
    start_run_metrics,
)
from dist_dp.errors import BudgetError
from dist_dp.ledger import Ledger
from dist_dp.step_costs import StepCosts
from tests.cluster.small import ROOT

DASHBOARD = ROOT / "cluster" / "manifests" / "grafana-dashboard.json"


class Noted:
    """Stands where Ray's objects would be; a worker without Ray cannot make those."""

    values: dict[tuple[str, ...], float]

    def __init__(self, metrics: dict[str, Metric]) -> None:
        self.metrics = dict(metrics)
        type(self).values = {}

    def set(self, name: str, value: float, **labels: str) -> None:
        assert set(labels) == set(self.metrics[name].labels)
        assert self.metrics[name].text.isascii()  # Ray refuses others.
        self.values[(name, *labels.values())] = value

    def count(self, name: str, **labels: str) -> None:
        key = (name, *labels.values())
        self.values[key] = self.values.get(key, 0) + 1

    observe = set


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> type[Noted]:
    monkeypatch.setattr(live_metrics, "_Exported", Noted)
    return Noted


def test_by_default_nothing_private_is_exported(noted: type[Noted]) -> None:
    note = start_run_metrics("ledger", "r", 100)
    row = {"loss": 0.5, "batch_size": 17.0, "clip_fraction": 0.1}
    for step in range(1, 8):
        note(step, 5 if step <= 5 else 10, row if step % 2 else {}, 0.25)
        # A step shows when its lease begins, as in the ledger, and not before the next one.
        assert noted.values["dist_dp_run_step", "r"] == (1 if step <= 5 else 6)
    assert {name for name, *_ in noted.values} == set(RUN_METRICS)
    assert not {0.5, 17.0, 0.25, 17 / 0.25, 0.1} & set(noted.values.values())


def test_all_and_none_do_as_they_say(noted: type[Noted]) -> None:
    start_run_metrics("all", "r", 100)(1, 5, {"loss": 0.5, "batch_size": 8.0}, 0.25)
    assert {name for name, *_ in noted.values} == {*RUN_METRICS, *PRIVATE_METRICS}
    assert noted.values["dist_dp_run_examples_per_second", "r"] == 32
    noted.values = {}
    start_run_metrics("none", "r", 100)(1, 5, {"loss": 0.5, "batch_size": 8.0}, 0.25)
    assert noted.values == {}


def test_the_accountant_exports_what_the_ledger_holds(tmp_path: Path, noted: type[Noted]) -> None:
    ledger, metrics = Ledger(tmp_path / "ledger.sqlite"), LedgerMetrics()

    def call(method: str, *args: Any, **kwargs: Any) -> Any:
        return metrics.call(ledger, method, args, kwargs)

    call("register_dataset", "d", fingerprint="f", num_records=1000, epsilon=3.0, delta=1e-5)
    call("open_run", "r", "d", StepCosts.constant(GaussianEvent(1.0, 0.01), 100))
    lease = call("reserve", "r", 1, 5)
    assert noted.values["dist_dp_dataset_budget_epsilon", "d"] == 3
    assert noted.values["dist_dp_dataset_budget_delta", "d"] == 1e-5
    assert noted.values["dist_dp_dataset_spent_epsilon", "d"] == lease.epsilon_after > 0
    assert noted.values["dist_dp_run_epsilon", "d", "r"] == lease.run_epsilon
    assert noted.values["dist_dp_run_steps_charged", "d", "r"] == 5
    assert noted.values["dist_dp_ledger_call_seconds", "reserve"] > 0
    with pytest.raises(BudgetError):
        call("set_budget", "d", 0.0001, 1e-5, "less")
    assert noted.values["dist_dp_ledger_errors", "refused"] == 1
    # After a restart of the accountant the data set of the run is found again.
    again = LedgerMetrics()
    again.call(ledger, "reserve", ("r", 6, 5), {})
    assert noted.values["dist_dp_run_steps_charged", "d", "r"] == 10
    assert {name for name, *_ in noted.values} <= set(LEDGER_METRICS)


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    assert dashboard["title"] and dashboard["schemaVersion"] >= 36
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    expressions = [t["expr"] for panel in panels for t in panel.get("targets", [])]
    asked = set(re.findall(r"\bray_(dist_dp_\w+)", " ".join(expressions)))
    known = {**LEDGER_METRICS, **RUN_METRICS}
    names = {
        f"{name}{end}"
        for name, metric in known.items()
        for end in {"gauge": ("",), "counter": ("_total",), "histogram": ("_bucket",)}[metric.kind]
    }
    assert asked and asked <= names, asked - names
    # Nothing is exported that the dashboard does not show, and it shows nothing private.
    assert names - asked == set()
    chosen = [(m[1], m[2]) for e in expressions for m in re.finditer(r"ray_(\w+)\{([^}]*)\}", e)]
    assert chosen
    for name, labels in chosen:
        metric = known[re.sub("_(total|bucket)$", "", name)]
        assert set(re.findall(r"(\w+)=", labels)) <= set(metric.labels), (name, labels)
