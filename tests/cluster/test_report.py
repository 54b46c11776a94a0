"""The page of a run: what is on it, that it loads nothing, and that nothing breaks it."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_dp.cluster.metrics_log import METRICS_FILE, STEP_COLUMNS, MetricsLog
from dist_dp.cluster.report import write_report
from dist_dp.cluster.report.charts import step_charts
from dist_dp.cluster.report.figures import tick_label
from dist_dp.cluster.report.page import render
from dist_dp.cluster.report.phases import median_phases
from dist_dp.cluster.report.sections import privacy
from dist_dp.cluster.report.series import (
    downsample,
    linear_ticks,
    log_ticks,
    smooth,
    smoothing_window,
)
from dist_dp.cluster.report.style import STYLE_PHASES
from dist_dp.cluster.report.text import DASH, count, milliseconds, show, size
from dist_dp.errors import DataError

SECTIONS = ("privacy", "training", "time", "sharding", "software", "configuration")
CHARTS = (
    "Training loss",
    "Validation AUC",
    "ε by step",
    "Clip fraction",
    "Gradient norms",
    "Signal to noise",
    "Batch size",
    "Learning rate",
    "Step time",
)
CONFIG = "privacy:\n  mechanism: lazydp\n  seed: null\n"


def _summary(**changes: Any) -> dict[str, Any]:
    return {
        "run_name": "criteo-eps8",
        "status": "completed",
        "created": "2026-01-02 03:04 UTC",
        "mechanism": "lazydp",
        "private": True,
        "epsilon": 7.92,
        "target_epsilon": 8.0,
        "delta": 1e-6,
        "noise_multiplier": 0.684127,
        "max_grad_norm": 1.25,
        "num_records": 412_873,
        "expected_batch_size": 2048,
        "sample_rate": 2048 / 412_873,
        "sampling": "Poisson by worker",
        "steps": 1000,
        "auc": 0.78912,
        "normalized_entropy": 0.8123,
        "log_loss": 0.4561,
        "calibration": 1.012,
        "best_auc": 0.8034,
        "examples_per_second": 31_412.7,
        "step_ms": 65.25,
        "peak_memory_bytes": [3 << 30, 2 << 30],
        "world_size": 2,
        "sharding": [
            {
                "table": "t_cat_0",
                "rows": 1_000_000,
                "dim": 64,
                "kind": "row_wise",
                "ranks": [0, 1],
                "bytes": 256_000_000,
            }
        ],
        "software": {"torch": "2.13.0", "torchrec": "1.8.0"},
        "privacy_statement": "First paragraph.\n\nSecond paragraph.",
        "not_covered": ["checkpoints", "several records of one person"],
        "unit_of_privacy": "one record",
        "neighbouring_relation": "add or remove one",
        "accountant": "PLD",
        "dataset": "criteo",
        "dataset_spent_epsilon": 11.2,
        "dataset_budget_epsilon": 20.0,
        "phases_ms": {"data": 2.0, "forward": 24.0, "settle": 4.0, "clip": 3.0, "noise": 1.0},
        "kernels": "native",
        "dense_optimizer": "sgd",
        "embedding_optimizer": "exact_sgd",
        "learning_rate": 0.2,
        **changes,
    }


def _columns(n: int = 1000, **changes: np.ndarray) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    columns = {name: np.exp(rng.normal(size=n)) for name in STEP_COLUMNS}
    columns["step"] = np.arange(1.0, n + 1)
    columns["clip_fraction"] = rng.uniform(size=n)
    columns["epsilon"] = np.linspace(1, 7.9, n)
    columns["valid_auc"] = np.where(columns["step"] % 100 == 0, 0.78, np.nan)
    return columns | changes


def _write(folder: Path, summary: Mapping[str, Any], columns: Mapping[str, np.ndarray]) -> str:
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.yaml").write_text(CONFIG)
    with MetricsLog(folder, tensorboard=False) as log:
        for i in range(len(columns["step"])):
            log.write({k: v[i] for k, v in columns.items() if not np.isnan(v[i])})
    return write_report(folder).read_text("utf-8")


class _Page(HTMLParser):
    """Collects text, attributes that load something, and checks that tags are balanced."""

    void = frozenset({"meta", "link", "br"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.ids: set[str] = set()
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.void:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "data", "action", "poster", "xlink:href"):
                self.loads.append(value or "")
            if name == "id":
                self.ids.add(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["script"], ["style"]):
            self.text += data + " "


def _svgs(page: str) -> list[ET.Element]:
    return [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def test_page_has_every_section_and_chart(tmp_path: Path) -> None:
    page = _write(tmp_path, _summary(), _columns(200))
    parsed = _Page(page)
    assert set(SECTIONS) <= parsed.ids
    titles = re.findall(r"<h3>(.*?)</h3>", page)
    assert set(CHARTS) <= set(titles)
    for expected in (
        "criteo-eps8", "completed", "7.92", "of a budget of 8", "1 × 10⁻⁶", "0.7891", "0.8123",
        "0.4561", "31,413", "65.2 ms", "3 GiB", "best possible 0.8034", "First paragraph.",
        "Second paragraph.", "several records of one person", "add or remove one", "0.684127",
        "Poisson by worker", "PLD", "11.2 of 20", "budget ε = 8", "clip norm 1.25", "t_cat_0",
        "row wise", "244 MiB", "2.13.0", "mechanism: lazydp", "Keep this page private",
        "Only the folder", "release/", "exact_sgd",
    ):  # fmt: skip
        assert expected in parsed.text, expected
    assert "<p>First paragraph.</p><p>Second paragraph.</p>" in page
    assert "NOT private" not in page


def test_page_is_self_contained(tmp_path: Path) -> None:
    page = _write(tmp_path, _summary(), _columns(50))
    parsed = _Page(page)
    assert all(target.startswith("#") or target == "data:," for target in parsed.loads)
    assert not {"img", "iframe", "object", "embed", "base", "form", "video"} & set(parsed.tags)
    assert parsed.tags.count("link") == 1  # the empty icon
    assert "@import" not in page and "url(" not in page
    namespace = "http://www.w3.org/2000/svg"  # a name that createElementNS needs, not an address
    assert "://" not in page.replace(namespace, "")
    assert "default-src 'none'" in page


def test_every_svg_is_well_formed(tmp_path: Path) -> None:
    svgs = _svgs(_write(tmp_path, _summary(), _columns()))
    assert len(svgs) == len(CHARTS) + 2  # the bar of the phases, the meter of the budget
    for svg in svgs:
        assert "viewBox" in svg.attrib
    plots = [svg for svg in svgs if svg.get("class") == "plot"]
    assert len(plots) == len(CHARTS)
    for plot in plots:
        json.loads(plot.attrib["data-plot"])
        for line in plot.iter("polyline"):
            points = [tuple(map(float, p.split(","))) for p in line.attrib["points"].split()]
            assert 1 <= len(points) <= 400
            assert all(44 <= x <= 350 and 12 <= y <= 182 for x, y in points)


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    evil = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>&"
    summary = _summary()
    for key, value in summary.items():
        if isinstance(value, str) and key != "mechanism":
            summary[key] = evil
    summary["mechanism"] = evil
    summary["not_covered"] = [evil]
    summary["software"] = {evil: evil}
    summary["phases_ms"] = {evil: 3.0, "data": 1.0}
    summary["sharding"] = [{k: evil for k in ("table", "rows", "dim", "kind", "bytes")}]
    summary["sharding"][0]["ranks"] = [evil]
    page = render(summary, _columns(20), f"data: {evil}\n</pre>{evil}")
    parsed = _Page(page)
    assert parsed.tags.count("script") == 1
    assert "img" not in parsed.tags
    assert evil in parsed.text
    assert all(_svgs(page))


def test_every_single_key_may_be_missing_or_null(tmp_path: Path) -> None:
    columns = _columns(12)
    for key in _summary():
        without = _summary()
        del without[key]
        for summary in (without, _summary(**{key: None})):
            page = render(summary, columns, CONFIG)
            _Page(page)
            assert len(_svgs(page)) >= len(CHARTS)
            assert "None" not in page


def test_nothing_but_an_empty_summary(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("{}")
    page = write_report(tmp_path).read_text("utf-8")
    parsed = _Page(page)
    assert set(SECTIONS) <= parsed.ids
    assert parsed.text.count(DASH) > 20
    assert "no measurements by step" in parsed.text
    assert "no config.yaml" in parsed.text
    # A run that does not say that it is private is not shown as one.
    assert "This run is NOT private" in parsed.text


@pytest.mark.parametrize("key", sorted(_summary()))
@pytest.mark.parametrize("value", [[], {}, "text", -1, True, [None], [[1]]])
def test_values_of_a_wrong_kind_do_not_break_the_page(key: str, value: object) -> None:
    _Page(render(_summary(**{key: value}), _columns(3), None))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_values_that_are_not_finite(tmp_path: Path, value: float) -> None:
    summary = {k: value if isinstance(v, float | int) else v for k, v in _summary().items()}
    summary["private"] = True
    columns = _columns(60)
    for name in STEP_COLUMNS[1:]:
        columns[name][::3] = value
    page = render(summary, columns, CONFIG)
    _Page(page)
    for plot in _svgs(page):
        text = json.dumps(plot.attrib) + "".join(json.dumps(e.attrib) for e in plot.iter())
        assert "inf" not in text and "nan" not in text.lower()
    for name in STEP_COLUMNS[1:]:
        columns[name][:] = value
    page = render(summary, columns, CONFIG)
    assert "no measurements by step" in page


def test_infinite_epsilon_is_said(tmp_path: Path) -> None:
    columns = _columns(10)
    columns["epsilon"][4:] = math.inf
    page = _write(tmp_path, _summary(epsilon=math.inf), columns)
    assert '<dd>\N{INFINITY}</dd><dd class="sub">of a budget of 8</dd>' in page
    assert "Some steps have no finite ε" in page


def test_a_diverged_loss_is_said() -> None:
    columns = _columns(10)
    columns["loss"][7:] = math.nan
    assert "3 of 10 steps have no finite value" in render(_summary(), columns, None)


def test_a_run_without_privacy_says_so_loudly(tmp_path: Path) -> None:
    columns = _columns(40)
    for name in STEP_COLUMNS:
        if name == "epsilon" or name.startswith(("clip", "grad_norm", "signal")):
            columns[name] = np.full(40, np.nan)
    page = _write(tmp_path, _summary(mechanism="none", private=False, epsilon=None), columns)
    text = _Page(page).text
    assert "This run is NOT private. " in text
    assert "without any privacy mechanism" in text
    assert "of a budget" not in text
    assert "Only the folder" not in text
    assert "Not recorded in this run: Validation AUC, ε by step, Clip fraction" in text


def test_none_is_not_private_whatever_the_summary_claims() -> None:
    assert "This run is NOT private" in render(
        _summary(mechanism="none", private=True), _columns(3), CONFIG
    )


@pytest.mark.parametrize(
    ("config", "changes", "seeded"),
    [
        ("privacy:\n  seed: 7\n", {}, True),
        ("privacy:\n  run_seed: '7'\n", {}, True),
        ("privacy:\n  seed: null\n", {"seed": 7}, True),
        ("privacy:\n  seed: null\n", {}, False),
        ("", {}, False),
    ],
)
def test_a_fixed_seed_says_so_loudly(config: str, changes: dict[str, Any], seeded: bool) -> None:
    text = _Page(render(_summary(private=False, **changes), _columns(3), config)).text
    assert "This run is NOT private. " in text
    assert ("run with a fixed seed" in text) is seeded


@pytest.mark.parametrize(
    ("ends", "text"),
    [
        ([0.25, 0.684127], "0.25 to 0.684127, by schedule"),
        ([0.684127, 0.684127], "0.684127</dd>"),
        (None, "0.684127</dd>"),
        ([1.0], "0.684127</dd>"),
    ],
)
def test_noise_that_changes_is_shown_as_a_range(ends: Any, text: str) -> None:
    assert text in privacy(_summary(noise_multiplier_range=ends))


def test_a_budget_overspent_is_said() -> None:
    assert "over the budget" in render(_summary(dataset_spent_epsilon=21.0), _columns(3), None)


@pytest.mark.parametrize("status", ["completed", "interrupted", "stopped at the budget", "failed"])
def test_status(status: str) -> None:
    page = render(_summary(status=status.replace(" ", "_")), _columns(3), None)
    assert re.search(rf'class="status \w+">{status}<', page)


def test_errors_name_the_file_and_keep_the_old_page(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"summary\.json"):
        write_report(tmp_path)
    _write(tmp_path, _summary(), _columns(5))
    old = (tmp_path / "report.html").read_bytes()
    (tmp_path / METRICS_FILE).write_text("step,loss\nx,y\n")
    with pytest.raises(DataError, match=r"metrics\.csv"):
        write_report(tmp_path)
    for broken in ("{", "[1]"):
        (tmp_path / "summary.json").write_text(broken)
        with pytest.raises(DataError, match=r"summary\.json"):
            write_report(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == old
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.yaml",
        "metrics.csv",
        "report.html",
        "summary.json",
    ]


def test_a_million_steps_make_a_small_page() -> None:
    columns = _columns(1_000_000)
    page = render(_summary(steps=1_000_000), columns, CONFIG)
    assert len(page) < 400_000
    assert len(_svgs(page)) == len(CHARTS) + 2


@pytest.mark.parametrize("n", [1, 2, 3, 399, 400, 401, 1000, 12_345])
def test_downsampling_keeps_first_last_and_extremes(n: int) -> None:
    rng = np.random.default_rng(n)
    x = np.cumsum(rng.uniform(0.1, 1, size=n))
    y = rng.normal(size=n)
    few_x, few_y = downsample(x, y)
    assert len(few_x) == len(few_y) <= 400
    assert (np.diff(few_x) > 0).all()
    pairs = set(zip(x.tolist(), y.tolist(), strict=True))
    assert set(zip(few_x.tolist(), few_y.tolist(), strict=True)) <= pairs
    assert (few_x[0], few_y[0], few_x[-1], few_y[-1]) == (x[0], y[0], x[-1], y[-1])
    assert (few_y.min(), few_y.max()) == (y.min(), y.max())
    if n <= 400:
        assert len(few_x) == n
    else:
        assert len(few_x) > 300


def test_downsampling_keeps_one_spike_anywhere() -> None:
    x = np.arange(5000.0)
    for at in (0, 1, 17, 2500, 4998, 4999):
        y = np.zeros(5000)
        y[at] = 1.0
        assert (at, 1.0) in set(zip(*downsample(x, y), strict=True))


def test_downsampling_a_rising_line_keeps_it_rising() -> None:
    x = np.arange(10_000.0)
    _, y = downsample(x, np.sqrt(x))
    assert (np.diff(y) > 0).all()


def test_smoothing_is_the_mean_of_what_is_around() -> None:
    y = np.random.default_rng(0).normal(size=101)
    got = smooth(y, 7)
    expected = [y[max(0, i - 3) : i + 4].mean() for i in range(101)]
    np.testing.assert_allclose(got, expected, atol=1e-12)
    np.testing.assert_allclose(smooth(np.full(50, 2.5), 9), 2.5)
    assert smooth(y, 1) is y
    assert all(smoothing_window(n) % 2 == 1 for n in range(2000))


def test_ticks() -> None:
    np.testing.assert_allclose(linear_ticks(0, 1), [0, 0.2, 0.4, 0.6, 0.8, 1.0], atol=1e-12)
    assert linear_ticks(1, 1000) == [200, 400, 600, 800, 1000]
    assert linear_ticks(2, 2) == [2]
    assert log_ticks(0.09, 110) == pytest.approx([0.1, 1, 10, 100])
    assert log_ticks(0.6, 1.7) == [1] or len(log_ticks(0.6, 1.7)) >= 1
    assert len(log_ticks(1e-9, 1e9)) <= 10
    for low, high in ((1e-8, 3e-8), (-5, 5), (0.7893, 0.7901), (0, 1e12)):
        assert 3 <= len(linear_ticks(low, high)) <= 11
    assert [tick_label(v) for v in (0, 0.75, 800, 1000, 12_500, 2e6)] == [
        "0", "0.75", "800", "1k", "12.5k", "2M",
    ]  # fmt: skip


def test_flat_and_single_lines_have_axes() -> None:
    for n in (1, 2):
        columns = _columns(n)
        for name in STEP_COLUMNS[1:]:
            columns[name] = np.full(n, 0.5)
        charts, missing = step_charts(columns, {})
        assert len(charts) == len(CHARTS) and missing == []
        assert len(_svgs(render({}, columns, None))) >= len(CHARTS)
        for name in STEP_COLUMNS[1:]:
            columns[name] = np.zeros(n)
        assert "Gradient norms" in step_charts(columns, {})[1]  # nothing to show on a log scale
        _Page(render({}, columns, None))


def test_settling_is_taken_out_of_the_forward_pass_and_the_rest_is_other() -> None:
    phases = median_phases({}, _summary(step_ms=40.0))
    assert phases == {
        "data": 2.0,
        "forward": 20.0,
        "settle": 4.0,
        "clip": 3.0,
        "noise": 1.0,
        "other": 10.0,
    }
    with_suffix = {"forward_ms": 24.0, "settle_ms": 4.0}
    assert median_phases({}, {"phases_ms": with_suffix}) == {"forward": 20.0, "settle": 4.0}
    columns = {name: np.full(3, np.nan) for name in STEP_COLUMNS}
    columns["forward_ms"] = np.array([9.0, 10.0, 50.0])
    columns["settle_ms"] = np.array([1.0, 1.0, 1.0])
    columns["select_ms"] = np.array([2.0, 3.0, 4.0])
    assert median_phases(columns, {}) == {"forward": 9.0, "settle": 1.0, "select": 3.0}
    assert ".phase.p-select{" in STYLE_PHASES


def test_the_bar_is_as_wide_as_its_phases() -> None:
    page = render(_summary(step_ms=40.0), _columns(3), None)
    bar = next(svg for svg in _svgs(page) if svg.get("class") == "bar")
    at = [float(r.attrib["x"]) for r in bar.iter("rect")]
    np.testing.assert_allclose(at, [0, 50, 550, 650, 725, 750])


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, DASH), (True, DASH), ("x", DASH), (0, "0"), (8.0, "8"), (7.9246, "7.925"),
        (1e-6, "1 × 10⁻⁶"), (1.25e-5, "1.25 × 10⁻⁵"), (12345.678, "12,346"), ("inf", "∞"),
        (math.inf, "∞"), (-math.inf, "−∞"), (math.nan, "not a number"), (-0.5, "−0.5"),
    ],
)  # fmt: skip
def test_show(value: object, expected: str) -> None:
    assert show(value) == expected


def test_units() -> None:
    assert [size(v) for v in (0, 512, 1 << 20, 1.5 * (1 << 30), 1 << 41)] == [
        "0 B", "512 B", "1 MiB", "1.5 GiB", "2 TiB",
    ]  # fmt: skip
    assert [milliseconds(v) for v in (0.351, 4.2, 15, 963.4)] == [
        "0.35 ms", "4.20 ms", "15.0 ms", "963 ms",
    ]  # fmt: skip
    assert (count(1e6), count(None), count(math.inf)) == ("1,000,000", DASH, "∞")
