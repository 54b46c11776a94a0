"""Which charts a run has: from the columns of its metrics and its summary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dist_dp.cluster.report.figures import Band, Chart, Line, Reference
from dist_dp.cluster.report.series import Array, finite_points, smooth, smoothing_window
from dist_dp.cluster.report.text import count, finite, fixed, milliseconds, share, show

Columns = Mapping[str, Array]
Summary = Mapping[str, Any]


def step_charts(metrics: Columns, summary: Summary) -> tuple[list[Chart], list[str]]:
    """Build the charts by step.

    Args:
        metrics: As `dist_dp.cluster.metrics_log.read_metrics` returns them.
        summary: Content of ``summary.json``.

    Returns:
        The charts that have something to show, and the titles of those that have not.
    """
    candidates = [
        _loss(metrics),
        _auc(metrics, summary),
        _epsilon(metrics, summary),
        _clip_fraction(metrics),
        _norms(metrics, summary),
        _signal_to_noise(metrics),
        _batch_size(metrics, summary),
        _learning_rate(metrics),
        _step_time(metrics),
    ]
    return (
        [chart for chart in candidates if chart.drawable()],
        [chart.title for chart in candidates if not chart.drawable()],
    )


def _latest(y: Array) -> float | None:
    known = y[np.isfinite(y)]
    return float(known[-1]) if len(known) else None


def _smoothed(metrics: Columns, column: str, name: str, top: float | None = None) -> list[Line]:
    """Return the raw line, faint, below its moving mean; alone where steps are few.

    What lies above ``top`` enters the mean as ``top``, as it is drawn.
    """
    x, y = finite_points(metrics["step"], metrics[column])
    window = smoothing_window(len(x))
    if window == 1:
        return [Line(name, x, y)]
    return [
        Line("each step", x, y, "faint"),
        Line(f"mean of {window} steps", x, smooth(np.minimum(y, top or np.inf), window)),
    ]


def _not_finite(metrics: Columns, column: str) -> str:
    # An empty cell reads as NaN too, so a column is only suspect where it has any number at all.
    y = metrics[column]
    bad = int(np.count_nonzero(~np.isfinite(y)))
    if not 0 < bad < len(y):
        return ""
    return f"{bad:,} of {len(y):,} steps have no finite value here."


def _loss(metrics: Columns) -> Chart:
    lines = _smoothed(metrics, "loss", "training loss")
    return Chart(
        "Training loss",
        fixed(_latest(metrics["loss"]), 4),
        "Mean over the batch of each step, measured before the update.",
        lines,
        warning=_not_finite(metrics, "loss"),
    )


def _auc(metrics: Columns, summary: Summary) -> Chart:
    x, y = finite_points(metrics["step"], metrics["valid_auc"])
    best = finite(summary.get("best_auc"))
    return Chart(
        "Validation AUC",
        fixed(_latest(y), 4),
        "On records held out of the training, with settled tables."
        + (" The dashed line is the best any model can reach." if best else ""),
        [Line("validation AUC", x, y, points=len(x) <= 40)],
        references=[Reference(f"best possible {best:.4f}", best)] if best else [],
    )


def _epsilon(metrics: Columns, summary: Summary) -> Chart:
    x, y = finite_points(metrics["step"], metrics["epsilon"])
    charged = Line("charged", x, y, style="faint")
    lines = [charged]
    exact = summary.get("epsilon_by_step")
    if isinstance(exact, list) and exact:
        points = np.asarray(exact, dtype=np.float64).reshape(-1, 2)
        x, y = finite_points(points[:, 0], points[:, 1])
        lines.append(Line("spent", x, y))
    else:
        charged.style = "main"
    target = finite(summary.get("target_epsilon"))
    infinite = bool(np.isinf(metrics["epsilon"]).any())
    return Chart(
        "ε by step",
        show(_latest(y)),
        "ε of the steps taken, and what the accountant had charged ahead of them (an upper bound), "
        "at the δ above.",
        lines,
        references=[Reference(f"budget ε = {show(target)}", target)] if target else [],
        low=0.0,
        warning="Some steps have no finite ε; they are not drawn." if infinite else "",
    )


def _clip_fraction(metrics: Columns) -> Chart:
    lines = _smoothed(metrics, "clip_fraction", "clipped")
    latest = _latest(metrics["clip_fraction"])
    return Chart(
        "Clip fraction",
        share(latest) if latest is not None else "",
        "Share of the batch's examples whose gradient was longer than the clip norm.",
        lines,
        percent=True,
        low=0.0,
        high=1.0,
    )


def _norms(metrics: Columns, summary: Summary) -> Chart:
    step = metrics["step"]
    quantiles = {}
    for q in (10, 50, 90, 99):
        x, y = finite_points(step, metrics[f"grad_norm_p{q}"])
        quantiles[q] = (x, smooth(y, smoothing_window(len(x))))
    window = smoothing_window(len(quantiles[50][0]))
    clip = finite(summary.get("max_grad_norm"))
    mean = f", each the mean of {window} steps" if window > 1 else ""
    return Chart(
        "Gradient norms",
        f"median {show(_latest(metrics['grad_norm_p50']), 3)}",
        f"Quantiles over the examples of a batch, before clipping{mean}. Log scale.",
        [Line("99 %", *quantiles[99], "second"), Line("median", *quantiles[50], "main")],
        bands=[
            Band("10–90 %", ("90 %", "10 %"), quantiles[10][0], quantiles[10][1], quantiles[90][1])
        ],
        references=[Reference(f"clip norm {show(clip)}", clip)] if clip else [],
        log=True,
    )


def _signal_to_noise(metrics: Columns) -> Chart:
    lines = _smoothed(metrics, "signal_to_noise", "signal to noise")
    y = metrics["signal_to_noise"]
    known = y[np.isfinite(y) & (y > 0)]
    wide = len(known) > 0 and float(known.max()) > 50 * float(known.min())
    return Chart(
        "Signal to noise",
        show(_latest(y), 3),
        "Length of the clipped gradient sum over that of the noise added to it."
        + (" Log scale." if wide else ""),
        lines,
        log=wide,
        low=None if wide else 0.0,
    )


def _batch_size(metrics: Columns, summary: Summary) -> Chart:
    lines = _smoothed(metrics, "batch_size", "batch size")
    y = metrics["batch_size"]
    expected = finite(summary.get("expected_records", summary.get("expected_batch_size")))
    size = "number of users" if summary.get("unit_of_privacy") == "user" else "size"
    return Chart(
        "Batch size",
        count(_latest(y)),
        f"Records drawn into each step's batch; gradients are divided by the expected {size}.",
        lines,
        references=[Reference(f"expected {count(expected)}", expected)] if expected else [],
    )


def _learning_rate(metrics: Columns) -> Chart:
    x, y = finite_points(metrics["step"], metrics["learning_rate"])
    return Chart(
        "Learning rate",
        show(_latest(y), 3),
        "The rate that each step's update was made with.",
        [Line("learning rate", x, y)],
        low=0.0,
    )


def _step_time(metrics: Columns) -> Chart:
    y = metrics["step_ms"]
    known = y[np.isfinite(y)]
    high, warning, median = None, "", None
    if len(known):
        # A first step that compiles or connects must not flatten all the others.
        median = float(np.median(known))
        top = max(2 * median, 1.1 * float(np.quantile(known, 0.98)))
        slow = int(np.count_nonzero(known > top))
        if slow:
            high = top
            warning = (
                f"{slow:,} slower {'step is' if slow == 1 else 'steps are'} cut at the top; "
                f"the slowest took {milliseconds(float(known.max()))}."
            )
    return Chart(
        "Step time",
        f"median {milliseconds(median)}",
        "Milliseconds from one step to the next, without evaluations.",
        _smoothed(metrics, "step_ms", "step", high),
        low=0.0,
        high=high,
        warning=warning,
    )
