"""Puts the page together and writes it into the run folder."""

from __future__ import annotations

import base64
import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from dist_dp.cluster.metrics_log import METRICS_FILE, STEP_COLUMNS, read_metrics
from dist_dp.cluster.report import sections
from dist_dp.cluster.report.charts import step_charts
from dist_dp.cluster.report.figures import figure
from dist_dp.cluster.report.phases import breakdown, median_phases
from dist_dp.cluster.report.series import Array
from dist_dp.cluster.report.style import SCRIPT, STYLE, STYLE_PHASES
from dist_dp.cluster.report.text import escape
from dist_dp.errors import DataError
from dist_dp.limits import MAX_CONFIG_BYTES, read_json, read_whole

REPORT_FILE = "report.html"
SUMMARY_FILE = "summary.json"
CONFIG_FILE = "config.yaml"


def write_report(run_folder: Path) -> Path:
    """Write ``report.html`` of a run: one page that loads nothing and needs no network.

    Reads ``summary.json``, ``config.yaml`` (resolved) and ``metrics.csv`` of the folder. The last
    two may be missing, and so may any key of the first: the page then says so or shows a dash.
    The page is replaced as a whole, so that a failure leaves the previous one.

    Guarantee:
        None. The page shows unnoised measurements of the training data and says so; it is for
        those who may see the data. Only the release folder is covered by the run's guarantee.

    Args:
        run_folder: The folder of a training run.

    Returns:
        Path of the page.

    Raises:
        DataError: ``summary.json`` is missing or not a JSON object, ``metrics.csv`` is not a
            table of numbers, or the page cannot be written.
    """
    folder = Path(run_folder)
    summary = _read_summary(folder / SUMMARY_FILE)
    metrics: dict[str, Array] = (
        read_metrics(folder)
        if (folder / METRICS_FILE).exists()
        else {name: np.empty(0) for name in STEP_COLUMNS}
    )
    config = folder / CONFIG_FILE
    config_text = _config_text(config) if config.exists() else None
    path = folder / REPORT_FILE
    unfinished = path.with_name(REPORT_FILE + ".unfinished")
    try:
        unfinished.write_text(render(summary, metrics, config_text), "utf-8")
        os.replace(unfinished, path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise DataError(
            f"Cannot write {path} ({error.strerror}); free some space or allow writing there."
        ) from error
    return path


def render(summary: dict[str, Any], metrics: dict[str, Array], config_text: str | None) -> str:
    """Return the page as HTML; see `write_report` for the parts it is made from."""
    # Nothing is fetched even if markup slipped in: everything is denied but our own two blocks.
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    title = escape(summary.get("run_name"))
    links = "".join(
        f'<a href="#{name}">{text}</a>'
        for name, text in (
            ("privacy", "Privacy"),
            ("training", "Training"),
            ("time", "Time"),
            ("sharding", "Sharding"),
            ("software", "Software"),
            ("configuration", "Configuration"),
        )
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="robots" content="noindex"><link rel="icon" href="data:,">'
        f"<title>{title} – training report</title><style>{STYLE}{STYLE_PHASES}</style></head>"
        f"<body><main>{sections.header(summary)}<nav>{links}</nav>"
        f"{sections.warnings(summary, config_text or '')}{sections.key_figures(summary)}"
        f"{sections.privacy(summary)}{_training(metrics, summary)}{_time(metrics, summary)}"
        f"{sections.sharding(summary)}{sections.setup(summary)}"
        f"{sections.configuration(config_text)}"
        "<footer>Written by dist-dp from summary.json, config.yaml and metrics.csv of the run. "
        "Private: not part of the release.</footer></main>"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def _training(metrics: dict[str, Array], summary: dict[str, Any]) -> str:
    charts, missing = step_charts(metrics, summary)
    if not charts:
        content = (
            '<div class="card"><p class="quiet">There are no measurements by step '
            f"({METRICS_FILE} is missing or has no rows).</p></div>"
        )
    else:
        content = f'<div class="charts">{"".join(figure(chart) for chart in charts)}</div>'
        if missing:
            content += f'<p class="note after">Not recorded in this run: {", ".join(missing)}.</p>'
    return (
        '<section id="training"><h2>Training by step</h2><p class="lead">Measured on the private '
        "training data without noise: for those who may see the data, and not covered by the "
        f"guarantee.</p>{content}</section>"
    )


def _time(metrics: dict[str, Array], summary: dict[str, Any]) -> str:
    phases = median_phases(metrics, summary)
    content = (
        breakdown(phases, str(summary.get("mechanism") or "this run"))
        if phases
        else '<p class="quiet">The times of the phases were not recorded.</p>'
    )
    return (
        '<section id="time"><h2>Where a step\'s time goes</h2><p class="lead">Median of each '
        "phase over the run; settling happens inside the forward pass and is counted apart."
        f'</p><div class="card">{content}</div></section>'
    )


def _config_text(path: Path) -> str:
    try:
        return read_whole(path, MAX_CONFIG_BYTES).decode("utf-8", "replace")
    except (OSError, ValueError) as error:
        raise DataError(f"Cannot read {path} ({error}); restore it from the run.") from error


def _read_summary(path: Path) -> dict[str, Any]:
    try:
        summary = read_json(path)
    except OSError as error:
        raise DataError(
            f"Cannot read {path} ({error.strerror}); give the folder of a training run."
        ) from error
    except ValueError as error:
        raise DataError(
            f"{path} is not valid JSON ({error}); restore it from the run, or run again."
        ) from error
    if not isinstance(summary, dict):
        raise DataError(f"{path} holds no JSON object; it was not written by a training run.")
    return summary
