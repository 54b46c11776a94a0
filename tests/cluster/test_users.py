"""Users as the unit of privacy: the configuration, the plan, and a whole run that is resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from dist_dp.cluster.config import load_config, parse_config
from dist_dp.cluster.monitor import NAMESPACE, monitor_name
from dist_dp.cluster.prepare import open_data, prepare
from dist_dp.cluster.trainer import Trainer
from dist_dp.datasets.store import ArrowStore
from dist_dp.datasets.synthetic import write_criteo_like
from dist_dp.errors import BudgetError, ConfigError
from dist_dp.ledger import Ledger
from dist_dp.user_records import users_of
from tests.cluster.small import (
    ROOT,
    assert_one_line_error,
    charged_steps,
    run,
    small,
    write_config,
)

EXAMPLE = ROOT / "examples" / "users_dlrm.yaml"
COLUMNS = yaml.safe_load(EXAMPLE.read_text())["data"]["columns"]
MOST = 3


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3,000 records of up to 300 users."""
    path = tmp_path_factory.mktemp("users") / "clicks.parquet"
    write_criteo_like(path, 3000, seed=3, num_users=300)
    return path


def values_of(folder: Path, source: Path | None, **sections: dict[str, Any]) -> dict[str, Any]:
    data = {"format": "parquet", "columns": COLUMNS, "user": "user", "max_num_embeddings": None}
    # Given noise and few leases: calibrations and compositions at this sample rate take seconds.
    noise = {"epsilon": None, "noise_multiplier": 3.0}
    privacy = {"unit": "user", "max_records_per_user": MOST, **noise}
    privacy |= sections.pop("privacy", {})
    train = {"expected_batch_size": 64, "lease_steps": 30, **sections.pop("train", {})}
    data |= sections.pop("data", {})
    return small(folder, source, data=data, privacy=privacy, train=train, **sections)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"privacy": {"max_records_per_user": None}}, r"privacy\.max_records_per_user: is missing"),
        ({"privacy": {"unit": "record"}}, r"max_records_per_user: goes with unit 'user'"),
        ({"privacy": {"unit": "person"}}, r"'privacy\.unit'"),
        ({"privacy": {"max_records_per_user": 0}}, r"'privacy\.max_records_per_user'"),
        ({"train": {"micro_batch_size": 2}}, r"micro_batch_size: 2 is below .*user 3"),
        ({"data": {"format": "criteo"}}, r"data\.user: the Criteo layout does not say"),
    ],
)
def test_what_does_not_fit_together(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(values_of(tmp_path, None, **changes))


def test_a_plan_counts_users(tmp_path: Path, log: Path) -> None:
    config = parse_config(values_of(tmp_path, log, train={"steps": None, "epochs": 2}))
    prepared = prepare(config, progress=False)
    plan = prepared.plan
    users = users_of(prepared.store.split("train"))
    assert (plan.unit, plan.num_users, plan.num_records) == ("user", users.num_users, None)
    assert 200 < users.num_users <= 300
    assert plan.sample_rate == 64 / users.num_users
    assert plan.steps == -(-2 * users.num_users // 64) and plan.delta == 0.1 / users.num_users
    assert prepared.records_per_unit == users.mean_records(MOST)


def test_a_source_that_does_not_say_whose_records_are(tmp_path: Path, log: Path) -> None:
    with pytest.raises(ConfigError, match=r"converted without users.*data\.user"):
        prepare(parse_config(values_of(tmp_path, log, data={"user": None})), progress=False)
    stored = values_of(tmp_path, log, data={"user": None, "columns": {**COLUMNS, "user": "user"}})
    assert prepare(parse_config(stored), progress=False).plan.unit == "user"
    for made in (tmp_path / "runs" / ".data").iterdir():
        again = values_of(tmp_path, made, data={"user": None, "columns": None, "format": "auto"})
        if ArrowStore.open(made).schema.user is None:
            with pytest.raises(ConfigError, match="converted without users"):
                prepare(parse_config(again), progress=False)
        else:
            assert prepare(parse_config(again), progress=False).plan.unit == "user"


def test_dist_dp_plan(tmp_path: Path, log: Path) -> None:
    config = write_config(tmp_path, values_of(tmp_path, log))
    found = run("plan", "-c", config, "--json")
    report = json.loads(found.stdout)
    assert report["unit"] == "user" and 200 < report["num_users"] <= 300
    assert "num_records" not in report and report["max_records_per_user"] == MOST
    assert 64 < report["expected_records"] < 64 * MOST
    assert report["forecast"]["step_ms"] > 0
    assert "adding or removing one such user" in report["statement"]
    text = " ".join(run("plan", "-c", config).stdout.split())
    for said in ("for each user", "64 users over 2 worker(s)", "records of a user at most 3 in"):
        assert said in text
    without = run("plan", "-c", config, "--num-users", "1000", "--json")
    report = json.loads(without.stdout)
    assert report["num_users"] == 1000 and report["expected_records"] == 64 * MOST
    wrong = run("plan", "-c", config, "--num-records", "1000")
    assert_one_line_error(wrong, "one user", "--num-users", "privacy.unit")


def test_the_example_is_for_what_generate_writes(tmp_path: Path) -> None:
    out = tmp_path / "clicks.parquet"
    assert run("generate", out, "--records", "500", "--users", "100").exit_code == 0
    config = load_config(EXAMPLE, {"data.path": str(out), "output.folder": str(tmp_path)})
    store, schema = open_data(config, progress=False)
    assert schema.user == "user"
    assert users_of(store.split("train")).num_users == pytest.approx(95, abs=6)
    refused = run("generate", tmp_path / "clicks.tsv", "--users", "100")
    assert_one_line_error(refused, "no place for users", ".parquet")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
def test_a_whole_run(tmp_path: Path, log: Path) -> None:
    """Two workers, parts of batches, stopped and resumed; what it says, and who it charges."""
    import ray

    def stop_soon(progress: dict[str, Any]) -> None:
        if progress.get("step", 0) >= 2:
            ray.get_actor(monitor_name("users"), namespace=NAMESPACE).request_stop.remote()

    values = values_of(
        tmp_path,
        log,
        train={"steps": 40, "checkpoint_every": 30, "micro_batch_size": 32, "look_ahead": True},
        output={"name": "users"},
        data={"name": "people"},
    )
    first = Trainer(parse_config(values), watch=stop_soon)
    stopped = first.fit()
    assert stopped["status"] == "interrupted" and 2 <= stopped["steps"] < 40
    folder = first.run_folder
    assert folder is not None
    refused = run("train", "--resume", folder, "--set", "privacy.unit=record")
    assert refused.exit_code == 1 and "'privacy.unit' cannot be changed" in refused.stderr
    summary = Trainer.resumed(folder).fit()

    assert summary["status"] == "completed" and summary["steps"] == 40 and summary["private"]
    assert summary["unit_of_privacy"] == "user" and summary["epsilon"] > 0
    assert 200 < summary["num_users"] <= 300 and summary["num_records"] > 2000
    assert 64 < summary["expected_records"] < 64 * MOST
    text = (folder / "report.html").read_text(encoding="utf-8")
    for said in ("Records of a user in a step", "at most 3", "users</dd>", "one such user"):
        assert said in text
    card = (folder / "release" / "MODEL_CARD.md").read_text(encoding="utf-8")
    users = f"{summary['num_users']:,}"
    for said in ("| one user |", f"| users | {users} |", "at most 3 |", "for each user"):
        assert said in card
    released = json.loads((folder / "release" / "release.json").read_text())
    assert released["privacy"]["plan"]["num_records"] is None
    assert released["model"]["columns"]["user"] is None

    ledger = Ledger(tmp_path / "ledger.sqlite")
    (budget,) = ledger.datasets()
    assert (budget.name, budget.unit) == ("people", "user")
    assert budget.num_records == summary["num_users"]
    assert charged_steps(tmp_path / "ledger.sqlite", "people", "users") >= 40
    shown = run("budget", "show", "--ledger", tmp_path / "ledger.sqlite").stdout
    assert "user" in shown

    # Whoever scores records with the model need not say whose they are.
    plain = tmp_path / "plain.parquet"
    pq.write_table(pq.read_table(log).drop_columns(["user"]), plain)
    found = run("evaluate", folder, "--data", plain)
    assert found.exit_code == 0, found.stderr
    by_record = values_of(
        tmp_path,
        log,
        privacy={"unit": "record", "max_records_per_user": None},
        output={"name": "records"},
        data={"name": "people"},
    )
    with pytest.raises(BudgetError, match="unit of privacy 'user', not 'record'"):
        Trainer(parse_config(by_record)).fit()
