"""A stream without Ray: its periods, its budget, how it goes on, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant

from dist_dp.cluster import stream as stream_module
from dist_dp.cluster.config import RunConfig, parse_config
from dist_dp.cluster.job import make_plan
from dist_dp.cluster.kept_rows import read_kept_rows, rows_changed, write_kept_rows
from dist_dp.cluster.run_folder import write_config as mark_run
from dist_dp.cluster.run_folder import write_summary
from dist_dp.cluster.stream import Stream, guarantee_of
from dist_dp.cluster.stream_budget import share_budget
from dist_dp.cluster.stream_periods import config_of, find_periods, natural_order
from dist_dp.datasets.synthetic import write_criteo_like
from dist_dp.errors import ConfigError, DataError
from dist_dp.joint_plans import calibrate_together, joint_epsilon, with_noise
from dist_dp.ledger import Ledger
from dist_dp.plan import PrivacyPlan
from tests.cluster.small import assert_one_line_error, run, small, write_config

DAYS = ("day_1", "day_2", "day_10")


@pytest.fixture(scope="module")
def days(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("days")
    for seed, day in enumerate(DAYS):
        write_criteo_like(folder / f"{day}.tsv", 60, seed=seed)
    return folder


@pytest.fixture
def home(days: Path, tmp_path: Path) -> Path:
    """A folder with days of its own."""
    shutil.copytree(days, tmp_path / "days")
    return tmp_path


def config_in(home: Path, **sections: dict[str, Any]) -> RunConfig:
    return parse_config(
        small(
            home,
            None,
            **{
                "data": {"name": "clicks", "split": {"train": 1.0}},
                "output": {"name": "week"},
                "stream": {"periods": str(home / "days" / "*.tsv")},
                **sections,
            },
        )
    )


class Pretended:
    """What a trainer would leave, without training."""

    def __init__(self, *, stop_in: str | None = None) -> None:
        self.calls: list[tuple[str, str | None]] = []
        self.resumed: list[str] = []
        self.stop_in = stop_in

    def __call__(
        self, made: RunConfig | Path, changes: Mapping[str, Any]
    ) -> tuple[dict[str, Any], Path]:
        if isinstance(made, Path):
            folder, changed = made, dict(changes)
            assert changed.keys() == {"cluster"}
            self.resumed.append(folder.name)
            dataset = json.loads((folder / "dataset.json").read_text())
            shutil.rmtree(folder / "private")
        else:
            assert made.output.name is not None and made.stream is None
            folder = Path(made.output.folder) / made.output.name
            self.calls.append((folder.name, made.train.start_from))
            folder.mkdir(parents=True)
            mark_run(folder, made.to_yaml())
            dataset = made.data.name
            (folder / "dataset.json").write_text(json.dumps(dataset))
        (folder / "release").mkdir(exist_ok=True)
        (folder / "release" / "release.json").write_text("{}")
        status = "completed"
        if folder.name == self.stop_in:
            status = "interrupted"
            checkpoint = folder / "private" / "checkpoint" / "save-000001"
            checkpoint.mkdir(parents=True)
        summary = {
            "status": status,
            "dataset": dataset,
            "num_records": 60,
            "num_users": None,
            "private": True,
            "unit_of_privacy": "record",
            "epsilon": 7.5,
            "delta": 1e-4,
            "started_from": [],
        }
        write_summary(folder, summary)
        return summary, folder


@pytest.fixture(autouse=True)
def no_metrics(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Evaluations are noted, not made."""
    asked: list[tuple[str, str]] = []

    def evaluate(folder: Path, store: str, **options: Any) -> dict[str, float]:
        assert options["whole"] is True
        asked.append((folder.name, Path(store).name))
        return {"auc": 0.6, "log_loss": float("nan"), "examples": 60.0}

    monkeypatch.setattr("dist_dp.cluster.serving.evaluate_release", evaluate)
    return asked


# Periods.


def test_numbers_sort_by_value(days: Path) -> None:
    names = ["day_10", "day_2", "b", "a10b2", "a10b10", "a9", "day_02"]
    ordered = sorted(names, key=natural_order)
    assert ordered == ["a9", "a10b2", "a10b10", "b", "day_02", "day_2", "day_10"]
    assert [p.name for p in find_periods(str(days / "*.tsv"))] == list(DAYS)
    # A list is in order of time as it stands.
    backwards = [str(days / f"{day}.tsv") for day in reversed(DAYS)]
    assert [p.name for p in find_periods(backwards)] == list(reversed(DAYS))


def test_names_are_of_files_and_folders(tmp_path: Path) -> None:
    for name in ("2024.01.02.tsv.gz", "date=2024-01-03", "day 4.parquet"):
        (tmp_path / name).touch()
    found = [p.name for p in find_periods(str(tmp_path / "*"))]
    assert found == ["2024.01.02", "date-2024-01-03", "day-4"]


def test_wrong_periods_are_named(home: Path) -> None:
    one = str(home / "days" / "day_1.tsv")
    (home / "other").mkdir()
    shutil.copy(home / "days" / "day_2.tsv", home / "other" / "day_1.tsv")
    for given, words in (
        (str(home / "none" / "*"), "nothing is at"),
        ([], "is empty"),
        ([one, str(home / "nowhere.tsv")], r"nowhere\.tsv' does not exist"),
        ([one, one], "is there twice.*take one out"),
        ([one, str(home / "days" / ".." / "days" / "day_1.tsv")], "is there twice"),
        ([one, str(home / "other" / "day_1.tsv")], "would both be called 'day_1'; rename one"),
    ):
        with pytest.raises(ConfigError, match=words):
            find_periods(given)


def test_the_same_records_twice_are_refused(home: Path) -> None:
    shutil.copy(home / "days" / "day_2.tsv", home / "days" / "day_11.tsv")
    fit = Pretended()
    with pytest.raises(ConfigError, match=r"day_2\.tsv' and .*day_11\.tsv' hold the same records"):
        Stream(config_in(home), fit).run()
    assert fit.calls == []  # before anything is trained or charged
    # In a folder that holds another period.
    shutil.move(home / "days" / "day_11.tsv", home / "day_11.tsv")
    week = home / "all"
    shutil.copytree(home / "days", week)
    given = [str(home / "days" / "day_1.tsv"), str(week)]
    with pytest.raises(ConfigError, match="hold the same records"):
        Stream(config_in(home, stream={"periods": given}), fit).run()


def test_the_same_records_written_otherwise_are_refused_before_their_run(home: Path) -> None:
    text = (home / "days" / "day_1.tsv").read_text()
    (home / "days" / "day_2.tsv").write_text(text.rstrip("\n"))  # not the same bytes
    fit = Pretended()
    with pytest.raises(ConfigError, match=r"day_2\.tsv' and .*day_1\.tsv' hold the same records"):
        Stream(config_in(home), fit).run()
    assert [name for name, _ in fit.calls] == ["week-day_1"]


def test_each_period_has_its_settings(home: Path) -> None:
    privacy = {
        "mechanism": "fest",
        "sparse": {"rows": 5, "frequencies": "counts-{period}.parquet"},
    }
    config = config_in(
        home, privacy=privacy, data={"store": str(home / "{period}"), "name": "clicks"}
    )
    period = find_periods(str(home / "days" / "*.tsv"))[2]
    made = config_of(config, "week", "clicks/day_10", period, home / "week")
    assert made.privacy.sparse is not None
    assert made.privacy.sparse.frequencies == "counts-day_10.parquet"
    assert made.data.store == str(home / "day_10") and made.data.path == period.path
    assert (made.output.name, made.data.name) == ("week-day_10", "clicks/day_10")
    assert made.stream is None and made.privacy.epsilon == 8
    one = config_in(home, data={"store": str(home / "store")})
    with pytest.raises(ConfigError, match=r"data\.store: .* cannot hold every period"):
        config_of(one, "week", "clicks/day_10", period, home / "week")


# Going on.


def test_every_run_starts_from_the_one_before(
    home: Path, no_metrics: list[tuple[str, str]]
) -> None:
    fit = Pretended()
    results = Stream(config_in(home), fit).run()
    folder = home / "runs" / "week"
    starts = [None, str(folder / "week-day_1"), str(folder / "week-day_2")]
    assert fit.calls == list(zip([f"week-{d}" for d in DAYS], starts, strict=True))
    assert [entry["dataset"] for entry in results] == [f"clicks/{day}" for day in DAYS]
    assert [name for name, _ in no_metrics] == ["week-day_1", "week-day_2"]
    assert [store.split("-")[0] for _, store in no_metrics] == ["day_2", "day_10"]
    assert results[0]["next"] == {
        "period": "day_2", "auc": 0.6, "log_loss": None, "examples": 60.0
    }  # fmt: skip
    assert "ε = 7.5" in guarantee_of(results) and "counts as two" in guarantee_of(results)
    assert "last-year" not in guarantee_of(results)
    begun = [{**results[0], "origins": ["last-year"]}, *results[1:]]
    assert "data set 'last-year', of whose records this says nothing" in guarantee_of(begun)

    # Called again it does nothing; with a new day it trains that, and evaluates the one before.
    Stream(config_in(home), fit).run()
    assert len(fit.calls) == 3 and len(no_metrics) == 2
    write_criteo_like(home / "days" / "day_11.tsv", 60, seed=9)
    Stream(config_in(home), fit).run()
    assert fit.calls[3:] == [("week-day_11", str(folder / "week-day_10"))]
    assert [name for name, _ in no_metrics[2:]] == ["week-day_10"]


def test_a_stopped_period_is_resumed(home: Path) -> None:
    fit = Pretended(stop_in="week-day_2")
    said: list[str] = []
    Stream(config_in(home), fit, say=said.append).run()
    assert [name for name, _ in fit.calls] == ["week-day_1", "week-day_2"]
    assert "stopped in period day_2" in said[-1]
    fit.stop_in = None
    Stream(config_in(home), fit).run()
    assert fit.resumed == ["week-day_2"]
    assert [name for name, _ in fit.calls] == [f"week-{day}" for day in DAYS]


def test_a_period_that_cannot_go_on_is_not_begun_again(home: Path) -> None:
    folder = home / "runs" / "week" / "week-day_1"
    folder.mkdir(parents=True)
    mark_run(folder, "")
    fit = Pretended()
    with pytest.raises(ConfigError, match="has no checkpoint to go on from; what it was charged"):
        Stream(config_in(home), fit).run()
    assert fit.calls == []


def test_a_trained_period_whose_run_is_gone_is_not_trained_again(home: Path) -> None:
    fit = Pretended()
    Stream(config_in(home), fit).run()
    shutil.rmtree(home / "runs" / "week" / "week-day_2")
    with pytest.raises(ConfigError, match=r"'day_2' was trained, but its run .* is gone"):
        Stream(config_in(home), fit).run()
    assert len(fit.calls) == 3


def test_other_periods_settings_and_records_are_refused(home: Path) -> None:
    def refused(match: str, **sections: dict[str, Any]) -> None:
        fit = Pretended()
        with pytest.raises((ConfigError, DataError), match=match):
            Stream(config_in(home, **sections), fit).run()
        assert fit.calls == []

    Stream(config_in(home), Pretended()).run()
    one, two, ten = (str(home / "days" / f"{day}.tsv") for day in DAYS)
    # Left out, put in between, in another order.
    refused("has 'day_2' as period 2, and now 'day_10'", stream={"periods": [one, ten]})
    refused("has 'day_1' as period 1, and now 'day_2'", stream={"periods": [two, one, ten]})
    refused("has 'day_10' as period 3, and now nothing", stream={"periods": [one, two]})
    refused(r"train\.steps: a stream goes on with the settings", train={"steps": 13})
    refused(r"privacy\.epsilon: a stream goes on", privacy={"epsilon": 9.0})
    Stream(config_in(home, cluster={"num_workers": 1}), Pretended()).run()  # may change
    write_criteo_like(home / "days" / "day_1.tsv", 60, seed=77)
    refused(r"day_1\.tsv' holds other records than when the stream began")
    state = home / "runs" / "week" / "stream.json"
    assert state.stat().st_mode & 0o777 == 0o600
    state.write_text("{")
    refused(r"stream\.json' cannot be read")


def test_wrong_settings_are_one_line(home: Path) -> None:
    for sections, words in (
        ({"stream": {"periods": 3}}, ("stream.periods",)),
        ({"stream": {"period": "x"}}, ("unknown key 'stream.period'", "periods")),
        ({"data": {"path": "x"}, "stream": {"periods": ["x"]}}, ("data.path", "stream.periods")),
        ({}, ("stream.periods is missing", "--period")),
    ):
        config = write_config(home, small(home, None, **sections))
        assert_one_line_error(run("stream", "-c", config), *words)
    # A stream is not one run.
    values = small(home, home / "days" / "day_1.tsv", stream={"periods": ["x"]})
    assert_one_line_error(run("train", "-c", write_config(home, values)), "dist-dp stream")


# Budget.


def plan(users: int, batch: float, steps: int) -> PrivacyPlan:
    return PrivacyPlan(
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        unit="user",
        num_users=users,
        max_records_per_user=4,
        expected_batch_size=batch,
        steps=steps,
        delta=1e-6,
    )


def test_users_of_all_periods_stay_within_the_budget(tmp_path: Path) -> None:
    """The composition by dp_accounting itself, and by the ledger."""
    plans = [plan(10_000, 200, 50), plan(6_000, 100, 90)]
    sigma = calibrate_together(plans, 3.0, 1e-6)
    reference = PLDAccountant()
    for item in plans:
        event = PoissonSampledDpEvent(item.sample_rate, GaussianDpEvent(sigma))
        reference.compose(SelfComposedDpEvent(event, item.steps))
    together = reference.get_epsilon(1e-6)
    assert 3.0 * (1 - 1e-3) < together <= 3.0
    assert all(with_noise(p, sigma).epsilon() < 3.0 for p in plans)
    assert joint_epsilon([with_noise(p, sigma) for p in plans], 1e-6) == pytest.approx(together)
    # A planted fault: a period taken twice passes the budget.
    assert joint_epsilon([with_noise(p, sigma) for p in [*plans, plans[0]]], 1e-6) > 3.0

    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.register_dataset(
        "u", fingerprint="f", num_records=20_000, epsilon=3.0, delta=1e-6, unit="user"
    )
    for number, item in enumerate(plans):
        ledger.open_run(f"run-{number}", "u", with_noise(item, sigma).step_costs())
        ledger.reserve(f"run-{number}", 1, item.steps)
    spent = ledger.spent("u")
    assert spent.epsilon == pytest.approx(together) and spent.epsilon <= 3.0


def test_a_stream_for_users_shares_one_budget(home: Path) -> None:
    config = config_in(
        home,
        data={"name": "people", "format": "auto"},
        # Quick to compose; the test above is of the tight accountant.
        privacy={"unit": "user", "max_records_per_user": 4, "epsilon": 4.0, "accountant": "rdp"},
        train={"steps": 20, "expected_batch_size": 50},
    )
    periods = find_periods(str(home / "days" / "*.tsv"))
    configs = [config_of(config, "week", "people", p, home) for p in periods]
    units = [1000, 800, 1500]
    share = share_budget(config, configs, units, [{"C1": 300}] * 3)
    assert share.delta == pytest.approx(0.1 / sum(units))
    assert 3.99 < share.epsilon <= 4.0
    privacy = share.privacy(config)
    assert privacy["dataset_budget"] == {"epsilon": 4.0, "delta": share.delta}
    made = config_of(config, "week", "people", periods[0], home, **privacy)
    assert made.privacy.epsilon is None
    assert made.privacy.noise_multiplier == share.noise_multiplier
    # What the runs themselves will plan and charge.
    runs = [config_of(config, "week", "people", p, home, **privacy) for p in periods]
    plans = [make_plan(r, n, {"C1": 300}) for r, n in zip(runs, units, strict=True)]
    assert joint_epsilon(plans, share.delta) == pytest.approx(share.epsilon, rel=1e-12)
    # Private choices of rows are part of it.
    chosen = config.privacy.model_copy(update={"mechanism": "fest", "sparse": _choosing(1.0)})
    fest = config.model_copy(update={"privacy": chosen})
    configs = [config_of(fest, "week", "people", p, home) for p in periods]
    with_choice = share_budget(fest, configs, units, [{"C1": 300}] * 3)
    assert with_choice.epsilon <= 4.0 and with_choice.noise_multiplier > share.noise_multiplier
    chosen = chosen.model_copy(update={"sparse": _choosing(3.9)})
    fest = config.model_copy(update={"privacy": chosen})
    configs = [config_of(fest, "week", "people", p, home) for p in periods]
    with pytest.raises(ConfigError, match="leaves nothing for the steps"):
        share_budget(fest, configs, units, [{"C1": 300}] * 3)


def _choosing(epsilon: float) -> Any:
    from dist_dp.sparse_settings import SparseSettings

    return SparseSettings(rows=10, choice_epsilon=epsilon, choice_noise="gaussian")


def test_users_are_counted_in_every_period_before_the_first(tmp_path: Path) -> None:
    (tmp_path / "days").mkdir()
    for seed, day in enumerate(DAYS):
        write_criteo_like(tmp_path / "days" / f"{day}.parquet", 400, seed=seed, num_users=100)
    columns = json.loads(_columns())
    sections: dict[str, Any] = {
        "data": {
            "name": "people", "format": "parquet", "user": "user", "columns": columns,
            "split": {"train": 1.0},
        },
        "privacy": {
            "unit": "user", "max_records_per_user": 4, "epsilon": 4.0, "accountant": "rdp",
        },
        "train": {"steps": 5, "expected_batch_size": 20},
        "stream": {"periods": str(tmp_path / "days" / "*.parquet")},
    }  # fmt: skip
    fit = Pretended()
    Stream(config_in(tmp_path, **sections), fit).run()
    state = json.loads((tmp_path / "runs" / "week" / "stream.json").read_text())
    assert len(state["share"]["units"]) == 3 and state["share"]["epsilon"] <= 4.0
    assert [entry["dataset"] for entry in state["periods"]] == ["people"] * 3
    sections["stream"]["periods"] = [str(tmp_path / "days" / f"{day}.parquet") for day in DAYS]
    write_criteo_like(tmp_path / "days" / "day_11.parquet", 400, seed=8, num_users=100)
    sections["stream"]["periods"].append(str(tmp_path / "days" / "day_11.parquet"))
    with pytest.raises(ConfigError, match="the budget was divided among the 3 periods"):
        Stream(config_in(tmp_path, **sections), fit).run()


def _columns() -> str:
    from dist_dp.datasets.readers.criteo import default_schema

    return default_schema(300).model_dump_json()


# Rows.


def test_changed_rows_are_counted(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder in folders:
        folder.mkdir()
    write_kept_rows(folders[0], {"t": torch.tensor([1, 5, 9]), "u": torch.tensor([0])})
    write_kept_rows(folders[1], {"t": torch.tensor([1, 6, 9]), "u": torch.tensor([2, 3])})
    assert np.array_equal(read_kept_rows(folders[0])["t"], [1, 5, 9])
    assert rows_changed(folders[0], folders[1]) == (5, 3)
    assert rows_changed(None, folders[1]) == (5, None)
    assert rows_changed(folders[0], folders[2]) == (0, 0)
    (folders[1] / "kept_rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="is damaged"):
        rows_changed(folders[0], folders[1])
    assert stream_module.is_finished(folders[0]) is False
