"""``dist-dp plan``: what a run would be, without running it."""

from __future__ import annotations

import json
import resource
import warnings
from pathlib import Path
from typing import Any

import pytest

from dist_dp.accounting import GaussianEvent, epsilon_of
from dist_dp.calibration import calibrate_noise_multiplier
from dist_dp.cluster.config import parse_config
from dist_dp.cluster.job import make_plan
from dist_dp.errors import ConfigError
from dist_dp.noise_schedule import NoiseSchedule
from dist_dp.schedules import learning_rate_at
from tests.cluster.small import assert_one_line_error, run, runs_left, small, write_config

KNOWN_NOISE = {"epsilon": None, "noise_multiplier": 1.0}


def planned(tmp_path: Path, source: Path | None, *options: str, **sections: Any) -> dict[str, Any]:
    values = small(tmp_path, source, **sections)
    result = run("plan", "-c", write_config(tmp_path, values), "--json", *options)
    assert result.exit_code == 0, result.output
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def test_noise_is_what_the_calibration_finds(tmp_path: Path) -> None:
    report = planned(tmp_path, None, "--num-records", "100000", "--epsilon", "3")
    rate, delta = 128 / 100_000, 0.1 / 100_000
    assert report["sample_rate"] == rate and report["delta"] == delta
    sigma = calibrate_noise_multiplier(3.0, delta, rate, 12, "pld")
    assert report["noise_multiplier"] == sigma
    assert 2.99 < epsilon_of({GaussianEvent(sigma, rate): 12}, delta) <= 3
    assert report["epsilon"] <= 3
    assert "ε = 3" in report["statement"]


def test_noise_that_changes(tmp_path: Path) -> None:
    falling = {"kind": "step", "step_size": 6, "gamma": 0.5}
    privacy = {**KNOWN_NOISE, "noise_multiplier": 4.0, "noise_multiplier_schedule": falling}
    report = planned(tmp_path, None, "--num-records", "100000", privacy=privacy)
    rate = 128 / 100_000
    events = {GaussianEvent(4.0, rate): 6, GaussianEvent(2.0, rate): 6}
    assert report["epsilon"] == epsilon_of(events, report["delta"])
    assert report["noise_multiplier_range"] == [2.0, 4.0]
    assert "2 to 4, by a schedule fixed in advance" in report["statement"]
    path = write_config(tmp_path, small(tmp_path, None, privacy=privacy))
    shown = run("plan", "-c", path, "--num-records", "100000")
    assert "2 to 4, by schedule" in shown.stdout


def test_plan_of_data(tmp_path: Path, clicks: Path) -> None:
    report = planned(tmp_path, clicks, privacy=KNOWN_NOISE, train={"steps": None, "epochs": 2})
    assert 1500 < report["num_records"] < 1700  # the train split
    assert report["steps"] == -(-2 * report["num_records"] // 128)
    assert report["dataset"] == "clicks"
    assert len(report["tables"]) == 26
    # Nothing ran, nothing is charged.
    assert runs_left(tmp_path) == [] and not (tmp_path / "ledger.sqlite").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_memory_adds_up(tmp_path: Path, workers: int) -> None:
    report = planned(
        tmp_path,
        None,
        "--num-records=1000",
        f"--num-workers={workers}",
        data={"max_num_embeddings": 1000},
        model={"sharding": "row_wise"},
        privacy=KNOWN_NOISE,
    )
    tables = report["tables"]
    memory = report["memory_bytes_by_worker"]
    assert len(memory) == workers
    total = sum(table["rows"] * table["dim"] * 4 for table in tables)
    assert sum(entry["weights"] for entry in memory) == total
    assert sum(entry["history"] for entry in memory) == sum(t["rows"] * 4 for t in tables)
    # Row-wise at two workers is half for each (rows are whole, so up to one row a table).
    for entry in memory:
        assert abs(entry["weights"] - total / workers) <= 26 * 8 * 4
        assert entry["optimizer"] == 0


def test_copies_and_columns_cost_what_they_cost(tmp_path: Path) -> None:
    report = planned(
        tmp_path,
        None,
        "--num-records=1000",
        model={"sharding": {"C1": "data_parallel", "C2": "table_wise", "C3": "column_wise"}},
        privacy={"mechanism": "none", "epsilon": None},
        train={"table_optimizer": "adagrad"},
    )
    tables = {t["table"].rpartition(".")[2]: t for t in report["tables"]}
    shards = {name: [s["size"] for s in tables[name]["shards"]] for name in ("C1", "C2", "C3")}
    assert shards == {"C1": [[300, 8]] * 2, "C2": [[300, 8]], "C3": [[300, 4]] * 2}
    for entry in report["memory_bytes_by_worker"]:
        assert entry["optimizer"] == entry["weights"]
    assert report["epsilon"] is None and "not private" in report["statement"]


def test_hosts_in_a_plan(tmp_path: Path) -> None:
    report = planned(
        tmp_path,
        None,
        "--num-records=1000",
        model={"sharding": {"C1": "grid", "C2": "table_row_wise"}},
        cluster={"num_workers": 4, "workers_per_node": 2},
        privacy=KNOWN_NOISE,
    )
    tables = {t["table"].rpartition(".")[2]: t for t in report["tables"]}
    assert tables["C1"]["kind"] == "grid" and tables["C2"]["kind"] == "table_row_wise"
    assert tables["C1"]["shards"] == [
        {"rank": 0, "offset": [0, 0], "size": [150, 4]},
        {"rank": 1, "offset": [150, 0], "size": [150, 4]},
        {"rank": 2, "offset": [0, 4], "size": [150, 4]},
        {"rank": 3, "offset": [150, 4], "size": [150, 4]},
    ]
    ranks = [s["rank"] for s in tables["C2"]["shards"]]
    assert ranks in ([0, 1], [2, 3]) and len(report["memory_bytes_by_worker"]) == 4


def test_a_table_of_a_thousand_million_rows_is_only_counted(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report = planned(
        tmp_path,
        None,
        "--num-records=1000",
        data={"num_embeddings": {"C1": 1_000_000_000}},
        model={"sharding": {"C1": "row_wise"}},
        privacy=KNOWN_NOISE,
    )
    (big,) = (t for t in report["tables"] if t["rows"] == 1_000_000_000)
    assert big["bytes"] == 32_000_000_000
    assert sum(e["weights"] for e in report["memory_bytes_by_worker"]) > 32e9
    # In KiB; importing what plans takes some hundred MiB, the table would take 31 GiB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4 << 20


def test_a_plan_for_people(tmp_path: Path) -> None:
    values = small(tmp_path, None, privacy=KNOWN_NOISE)
    result = run("plan", "-c", write_config(tmp_path, values), "--num-records", "5000")
    assert result.exit_code == 0, result.output
    for words in ("noise multiplier", "expected batch", "memory per worker", "sharding", "C26"):
        assert words in result.stdout
    assert result.stderr == ""


def test_options_that_train_has_too(tmp_path: Path, clicks: Path) -> None:
    path = tmp_path / "bad.tsv"
    lines = clicks.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines, "nonsense\n"]))
    config = write_config(tmp_path, small(tmp_path, path, privacy=KNOWN_NOISE))
    assert_one_line_error(run("plan", "-c", config), "bad.tsv:2001")
    shown = run("plan", "-c", config, "--skip-bad-rows")
    assert shown.exit_code == 0 and "1 bad rows (1 " in shown.stdout
    report = json.loads(run("plan", "-c", config, "--skip-bad-rows", "--json").stdout)
    assert sum(report["skipped_rows"].values()) == 1
    large = ["plan", "-c", config, "--num-records=1000", "--delta=0.01", "--json"]
    assert_one_line_error(run(*large), "delta 0.01", "--force-delta")
    report = json.loads(run(*large, "--force-delta").stdout)
    assert report["delta"] == 0.01 and report["skipped_rows"] == {}


SCHEDULES: list[tuple[dict[str, Any], int | None]] = [
    ({"kind": "step", "base": 0.5, "step_size": 1, "gamma": 0.1}, 29),
    ({"kind": "step", "base": 0.5, "step_size": 50, "gamma": 1e-200, "warmup_steps": 7}, 58),
    ({"kind": "step", "base": 0.5, "step_size": 3, "gamma": 0.5}, None),
    ({"kind": "cosine", "base": 0.5, "total_steps": 40}, None),  # the rate is 0 from there on
    ({"kind": "cosine", "base": 0.5, "total_steps": 40, "final_fraction": 1e-40}, 40),
    ({"base": 1e-30}, 1),
    ({"base": 1e-27, "warmup_steps": 100}, 1),
    ({"base": 1e33, "warmup_steps": 50}, 50),  # the warm-up stops sooner; the peak is named
    ({"base": 0.5, "warmup_steps": 1000}, None),
]


@pytest.mark.parametrize(("schedule", "wrong"), SCHEDULES)
def test_a_rate_whose_noise_is_lost_is_refused(schedule: dict[str, Any], wrong: int | None) -> None:
    """The plan refuses exactly the schedules that would stop at a step."""
    train = {"steps": 100, "learning_rate": schedule}
    config = parse_config(small(Path(), None, privacy=KNOWN_NOISE, train=train))
    noise = NoiseSchedule()

    def train_all() -> None:
        for step in range(1, 101):
            noise.advance(learning_rate_at(config.train.learning_rate, step), 1.0, 1.0, 128.0)

    if wrong is None:
        train_all()
        make_plan(config, 1000)
    else:
        with pytest.raises(ConfigError, match="cannot be represented"):
            train_all()
        assert noise.step < wrong
        with pytest.raises(
            ConfigError, match=rf"train\.learning_rate: .*at step {wrong}, .*choose"
        ):
            make_plan(config, 1000)


def test_noise_grid_of_a_plan(tmp_path: Path) -> None:
    """`auto` knows the least and the greatest noise of the schedule."""
    rates = {"kind": "cosine", "base": 64.0, "total_steps": 50, "final_fraction": 0.01}
    options = {"privacy": KNOWN_NOISE, "train": {"steps": 100, "learning_rate": rates}}
    auto = {**options, "noise": {"grid": "auto", "rounds": 12}}
    report = planned(tmp_path, None, "--num-records=1000", **auto)
    # 64 / 128 a step at most: 8 * sqrt(100) * 0.5 = 40 must be within reach of 2^24 multiples.
    assert report["noise_grid"] == 2.0**-18
    assert "2^-18" in report["statement"] and "ChaCha12" in report["statement"]
    path = write_config(tmp_path, small(tmp_path, None, **auto))
    shown = run("plan", "-c", path, "--num-records=1000")
    assert "noise grid" in shown.stdout and "2^-18, table weights within ±64" in shown.stdout
    plain = planned(tmp_path, None, "--num-records=1000", **options)
    assert plain["noise_grid"] is None and plain["epsilon"] == report["epsilon"]
    # The last steps' noise is 0.005: an eighth of it is 2^-10.7.
    path = write_config(tmp_path, small(tmp_path, None, **options, noise={"grid": "2^-10"}))
    coarse = run("plan", "-c", path, "--num-records=1000")
    assert_one_line_error(coarse, "noise.grid", "2^-10 is more than an eighth", "give 2^-11")
    to_zero = {**options["train"], "learning_rate": {**rates, "final_fraction": 0.0}}
    with pytest.raises(ConfigError, match=r"rate is 0 at the last step.*final_fraction"):
        make_plan(parse_config(small(tmp_path, None, **{**auto, "train": to_zero})), 1000)
    slow = {**rates, "final_fraction": 0.0, "base": 0.5, "total_steps": 100}
    wrong = {**auto, "train": {**options["train"], "learning_rate": slow}}
    path = write_config(tmp_path, small(tmp_path, None, **wrong))
    refused = run("plan", "-c", path, "--num-records=1000")
    assert_one_line_error(refused, "noise.grid: none fits", "±8", "final_fraction")


def test_what_cannot_be_planned(tmp_path: Path) -> None:
    values = small(tmp_path, None, privacy=KNOWN_NOISE)
    path = write_config(tmp_path, values)
    assert_one_line_error(run("plan", "-c", path), "data.path is missing")
    few = run("plan", "-c", path, "--num-records", "100")
    assert_one_line_error(few, "expected_batch_size 128", "larger than")
    unknown = run("plan", "-c", path, "--num-records", "1000", "--set", "data.format=auto")
    assert_one_line_error(unknown, "data.format", "data.columns")
    table = run("plan", "-c", path, "--num-records=1000", "--set", "model.sharding.C99=row_wise")
    assert_one_line_error(table, "C99")


def test_a_selection_that_selects_nearly_all_is_said(tmp_path: Path) -> None:
    privacy = {**KNOWN_NOISE, "mechanism": "adafest", "sparse": {"threshold": -100.0}}
    report = planned(tmp_path, None, "--num-records", "100000", privacy=privacy)
    rows = sum(t["rows"] for t in report["tables"])
    assert report["selection"]["false_positives"] == pytest.approx(rows)
    assert f"{rows:,} of {rows:,} rows" in report["selection"]["warning"]
    values = small(tmp_path, None, privacy=privacy)
    shown = run("plan", "-c", write_config(tmp_path, values), "--num-records", "100000")
    assert "warning" in shown.stdout and "raise sparse.threshold" in " ".join(shown.stdout.split())


def test_ids_in_a_bag_are_all_looked_up(tmp_path: Path) -> None:
    privacy = {**KNOWN_NOISE, "mechanism": "adafest", "sparse": {"threshold": 50.0}}
    train = {"expected_batch_size": 4}
    sections = {"privacy": privacy, "train": train}
    one, three = (
        planned(tmp_path, None, "--num-records", "100000", *more, **sections)["selection"]
        for more in ((), ("--pooling", "3"))
    )
    assert three["most_rows"] > 2.5 * one["most_rows"]


def test_a_run_says_so_too(tmp_path: Path, clicks: Path) -> None:
    from dist_dp.cluster.prepare import prepare
    from dist_dp.cluster.trainer import _warn_if_dense

    for threshold, expected in ((-100.0, 1), (50.0, 0)):
        privacy = {**KNOWN_NOISE, "mechanism": "adafest", "sparse": {"threshold": threshold}}
        config = parse_config(small(tmp_path, clicks, privacy=privacy))
        with warnings.catch_warnings(record=True) as caught:
            _warn_if_dense(config, prepare(config, progress=False))
        assert len(caught) == expected
