"""``dist-dp bench sparsity``: the command, its JSON file, and what a run of it trains."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from dist_dp.cluster.bench import sparsity_training
from dist_dp.cluster.bench.sparsity import run_sparsity
from dist_dp.cluster.bench.sparsity_runs import Job, Runs
from dist_dp.cluster.bench.sparsity_settings import RATES, Point, SparsitySettings, chosen
from dist_dp.cluster.bench.sparsity_training import Rates, Trained
from tests.cluster.small import assert_one_line_error, run

SVG = "{http://www.w3.org/2000/svg}"
ROWS = 40


def tiny(**changes: Any) -> SparsitySettings:
    """Small enough for a test: a few steps on tables of at most 40 rows."""
    few = {"records": 400, "other_records": 200, "batch": 40, "steps": 3, "max_rows": ROWS}
    one = {"epsilons": (3.0,), "seeds": (0,), "kept_rows": (2,), "rates": ((1.0, 0.5),)}
    return chosen(**{"mechanisms": ("fest",), **few, **one, **changes})


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the command writes for a tiny run of all mechanisms."""
    folder = tmp_path_factory.mktemp("sparsity")
    path, plot = folder / "sparsity.json", folder / "sparsity.svg"
    size = "--records 400 --other-records 200 --batch 40 --steps 3 --max-rows 40"
    points = "--kept-rows 2 --thresholds 2,4 --ratios 0.5 --selections 5 --rates 1:0.5"
    options = [*size.split(), *points.split(), "--epsilon", "3", "--seeds", "0,1"]
    done = run("bench", "sparsity", *options, "--json", path, "--plot", plot)
    assert done.exit_code == 0, done.output + repr(done.exception)
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return {**result, "printed": done.output, "svg": plot.read_text(encoding="utf-8"), "at": path}


def test_every_result_has_the_fields_of_the_contract(measured: dict[str, Any]) -> None:
    names = [r["mechanism"] for r in measured["results"]]
    assert set(names) == {"none", "lazydp", "fest", "adafest", "adafest+", "exponential"}
    assert names.count("adafest") == names.count("adafest+") == 2, "a point for each τ"
    for row in measured["results"]:
        assert row["epsilon"] == (None if row["mechanism"] == "none" else 3.0)
        assert 0 <= row["auc"] <= 1 and row["auc_low"] <= row["auc"] <= row["auc_high"]
        assert row["noised_coordinates_per_step"] >= 0
        assert set(row["rates"]) == {"tables", "dense"} and row["seeds"][0] == 0
    adafest = next(r for r in measured["results"] if r["mechanism"] == "adafest")
    assert adafest["settings"] == {"threshold": 2.0, "contribution_norm": 1.0, "share": 0.5}


def test_reductions_follow_from_the_coordinates_that_were_noised(measured: dict[str, Any]) -> None:
    every = measured["data"]["table_coordinates"]
    assert every == 8 * sum(measured["data"]["table_rows"])
    for row in measured["results"]:
        noised = row["noised_coordinates_per_step"]
        expected = every / noised if noised else None
        assert row["reduction_vs_dpsgd"] == (expected and pytest.approx(expected))
        assert noised == 8 * row["noised_rows_per_step"]
    by_name = {r["mechanism"]: r for r in measured["results"]}
    assert by_name["none"]["reduction_vs_dpsgd"] is None
    assert by_name["lazydp"]["reduction_vs_dpsgd"] == 1
    assert by_name["fest"]["noised_coordinates_per_step"] == 26 * 2 * 8, "k rows of every table"
    assert by_name["exponential"]["noised_coordinates_per_step"] == 5 * 8, "m rows in all"


def test_losses_are_paired_with_lazydp_at_the_same_seed(measured: dict[str, Any]) -> None:
    by_name = {r["mechanism"]: r for r in measured["results"]}
    lazydp, fest = by_name["lazydp"], by_name["fest"]
    assert lazydp["auc_loss"] == 0 and lazydp["seeds"] == [0, 1]
    losses = [lazydp["auc_by_seed"][s] - auc for s, auc in fest["auc_by_seed"].items()]
    assert fest["auc_loss"] == pytest.approx(sum(losses) / len(losses))
    assert by_name["none"]["auc_loss"] is None


def test_every_family_has_as_many_tries(measured: dict[str, Any]) -> None:
    tries = [t["mechanism"] for t in measured["tries"]]
    assert sorted(tries) == ["adafest", "exponential", "fest", "lazydp", "none"]
    assert {len(rates) for rates in RATES.values()} == {4}, "by default"
    assert set(measured["frozen_tables"]) == {"none", "3"}


def test_the_frontier_was_run_with_every_seed(measured: dict[str, Any]) -> None:
    (found,) = measured["frontiers"]
    seeds = {(r["mechanism"], json.dumps(r["settings"])): r["seeds"] for r in measured["results"]}
    assert found["points"]
    for point in found["points"]:
        assert seeds[point["mechanism"], json.dumps(point["settings"])] == [0, 1]


def test_what_was_measured_is_printed_and_plotted_again(
    measured: dict[str, Any], tmp_path: Path
) -> None:
    assert "Most with an AUC loss below 0.005" in measured["printed"]
    root = ElementTree.fromstring(measured["svg"])
    circles = [c for c in root.iter(f"{SVG}circle") if c.get("class") != "legend"]
    shown = [r for r in measured["results"] if r["reduction_vs_dpsgd"]]
    assert len(circles) == len(shown) - 1, "lazydp is the line at 0"
    again = tmp_path / "again.svg"
    done = run("bench", "sparsity", "--from-json", measured["at"], "--plot", again)
    assert done.exit_code == 0 and again.read_text(encoding="utf-8") == measured["svg"]


def test_mechanisms_share_weights_and_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault planted: a seed that depended on the mechanism would change what is drawn."""
    runs = Runs(tiny(mechanisms=("fest", "adafest"), thresholds=(2.0,)), tmp_path)
    seen: dict[str, Any] = {}
    real = sparsity_training.logits_of

    def note(model: Any, batch: Any) -> Any:
        logits = real(model, batch)
        seen.setdefault(name, (batch.labels.clone(), logits.detach().clone()))
        return logits

    monkeypatch.setattr(sparsity_training, "logits_of", note)
    for point in (Point("none"), Point("lazydp"), *runs.settings.points):
        name = point.mechanism
        runs.take(Job(point, None if name == "none" else 0.7, Rates(1.0, 0.1), 0))
    labels, logits = seen["none"]
    for name, (drawn, first) in seen.items():
        assert drawn.equal(labels), name
        assert first.allclose(logits, atol=1e-5), name


def test_fest_keeps_the_rows_that_public_records_read_most(tmp_path: Path) -> None:
    """The private records have no part in it: with others the same rows are kept."""
    runs = Runs(tiny(), tmp_path)
    plan = runs.plan(runs.settings.points[0], 0.7)
    kept = runs._kept(plan)
    assert kept is not None
    data = runs.data
    runs.data = replace(data, train=data.test)
    assert all(kept[t].equal(rows) for t, rows in (runs._kept(plan) or {}).items())
    public = data.public.batch(np.arange(len(data.public))).sparse_features
    counts = public["C3"].values().bincount(minlength=ROWS)
    table = next(t for t in kept if t.endswith(".t_C3") or t.endswith("C3"))
    assert set(counts[kept[table]].tolist()) == set(counts.topk(2).values.tolist())


@pytest.mark.slow
def test_several_processes_find_the_same() -> None:
    one = run_sparsity(tiny(), lambda _: None)
    two = run_sparsity(tiny(), lambda _: None, workers=2)
    for mine, theirs in zip(one["results"], two["results"], strict=True):
        assert {**mine, "seconds": 0} == {**theirs, "seconds": 0}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--mechanisms", "dpsgd"], ["--mechanisms", "lazydp's distribution"]),
        (["--ratios", "1.5"], ["--ratios", "less than 1"]),
        (["--data", "nowhere.tsv"], ["nowhere.tsv"]),
        (["--from-json", "nowhere.json"], ["nowhere.json"]),
    ],
)
def test_wrong_settings_are_errors_that_name_them(options: list[str], said: list[str]) -> None:
    assert_one_line_error(run("bench", "sparsity", *options), *said)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--epsilon", "0"),
        ("--thresholds", "x"),
        ("--kept-rows", "1.5"),
        ("--seeds", "-1"),
        ("--rates", "10"),
        ("--rates", "10:0"),
    ],
)
def test_lists_are_numbers(option: str, value: str) -> None:
    result = run("bench", "sparsity", f"{option}={value}")
    assert result.exit_code == 2 and option in result.stderr


def made_up(job: Job) -> Trained:
    """Training that is over at once: the second rates are the best, the first diverge."""
    auc = {1.0: math.nan, 2.0: 0.8, 3.0: 0.7}.get(job.rates.tables, 0.5)
    rows = float(job.point.rows or 1000)
    auc -= 0.01 * (job.point.rows == 4) + 0.001 * job.seed
    return Trained(auc, auc, 8 * rows, rows, 8000, 50, 0.0)


def test_what_is_tried_chosen_and_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A diverged try wins nothing, all get the best rates, and a beaten point gets no more runs."""
    jobs: list[Job] = []

    def take(_self: Runs, job: Job) -> Trained:
        jobs.append(job)
        return made_up(job)

    monkeypatch.setattr(Runs, "take", take)
    monkeypatch.setattr(Runs, "noise_multiplier", lambda _self, epsilon: 1 / epsilon)
    saved: list[dict[str, Any]] = []
    rates = ((1.0, 1.0), (2.0, 1.0), (3.0, 1.0))
    settings = tiny(kept_rows=(2, 4), rates=rates, seeds=(5, 6, 7))
    result = run_sparsity(settings, lambda _: None, save=saved.append)
    assert [s["settings"]["seeds"] for s in saved] == [[5], [5, 6], [5, 6, 7]], "kept as it goes"
    assert {r["rates"]["tables"] for r in result["results"]} == {2.0}
    seeds = {(r["mechanism"], r["settings"].get("rows")): r["seeds"] for r in result["results"]}
    every = [5, 6, 7]
    assert seeds == {
        ("none", None): every,
        ("lazydp", None): every,
        ("fest", 2): every,
        ("fest", 4): [5],
    }, "4 rows a table are more than 2 and no better"
    runs = [(j.point, j.rates, j.seed, j.noise_multiplier) for j in jobs]
    assert len(set(runs)) == len(runs), "nothing is trained twice"
    fest = next(r for r in result["results"] if r["settings"] == {"rows": 2})
    assert fest["auc_loss"] == pytest.approx(0), "as lazydp at each seed, which all differ"
    assert fest["auc_high"] - fest["auc_low"] == pytest.approx(0.002)
