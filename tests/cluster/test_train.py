"""Whole trainings under Ray: a few runs, each of which many tests look at.

``trained`` goes through the command line in a process of its own; the others share this process'
Ray. Every run has two workers.
"""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dp_accounting
import pytest
import torch
from dp_accounting.pld import PLDAccountant

from dist_dp.cluster.config import load_config, parse_config
from dist_dp.cluster.serving import evaluate_release, load_model
from dist_dp.cluster.trainer import Trainer
from dist_dp.cluster.worker import fixed_secret
from dist_dp.errors import BudgetError, ConfigError, DistDpError, ModelError
from dist_dp.figures import round_up
from dist_dp.ledger import Ledger
from dist_dp.released import Release
from tests.cluster.small import charged_steps, run, runs_left, small, start, write_config

pytestmark = [pytest.mark.ray, pytest.mark.slow]

KINDS = {"C1": "row_wise", "C2": "table_wise", "C3": "column_wise", "C4": "data_parallel"}
PROMISED = (
    "mechanism epsilon delta noise_multiplier max_grad_norm expected_batch_size sampling steps auc "
    "normalized_entropy log_loss examples_per_second step_ms peak_memory_bytes world_size sharding "
    "software status private dataset num_records planned_steps phases_ms"
)


@dataclass(frozen=True)
class Run:
    """A finished run."""

    home: Path
    folder: Path
    summary: dict[str, Any]
    out: str = ""
    err: str = ""

    @property
    def ledger(self) -> Path:
        return self.home / "ledger.sqlite"

    @property
    def card(self) -> str:
        return (self.folder / "release" / "MODEL_CARD.md").read_text(encoding="utf-8")

    @property
    def store(self) -> Path:
        return next((self.home / "runs" / ".data").iterdir())

    def rows(self) -> list[dict[str, float]]:
        with (self.folder / "metrics.csv").open(encoding="utf-8") as stream:
            lines = list(csv.DictReader(stream))
        return [{key: float(value) for key, value in row.items() if value} for row in lines]


def fit(home: Path, values: dict[str, Any]) -> Run:
    trainer = Trainer(parse_config(values))
    summary = trainer.fit()
    assert trainer.run_folder is not None
    return Run(home, trainer.run_folder, summary)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, clicks: Path) -> Run:
    """The command line's run: private, one table of each sharding kind, the others ``auto``."""
    home = tmp_path_factory.mktemp("trained")
    values = small(
        home,
        clicks,
        model={"sharding": KINDS},
        train={"evaluate_every": 6},
        data={"name": "generated clicks"},
    )
    process = start("train", "-c", write_config(home, values), "--name", "first", folder=home)
    assert process.wait(timeout=300) == 0, (home / "err.txt").read_text()
    folder = home / "runs" / "first"
    summary = json.loads((folder / "summary.json").read_text())
    out, err = (home / "out.txt").read_text(), (home / "err.txt").read_text()
    return Run(home, folder, summary, out, err)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, clicks: Path, ray_local: None) -> Run:
    """A model of the user, a fixed seed, and a budget that ends before the planned steps."""
    home = tmp_path_factory.mktemp("stopped")
    values = small(
        home,
        clicks,
        model={
            "name": "custom",
            "factory": "tests.cluster.factories:additive",
            "factory_args": {"dim": 16},
            "sharding": "column_wise",
        },
        privacy={
            "epsilon": None,
            "noise_multiplier": 1.0,
            "seed": 7,
            "delta": 1e-5,
            "dataset_budget": {"epsilon": 2.5, "delta": 1e-5},
            "stop_at_budget": True,
        },
        train={"steps": 40, "lease_steps": 4},
    )
    return fit(home, values)


@pytest.fixture(scope="module")
def without_privacy(tmp_path_factory: pytest.TempPathFactory, clicks: Path, ray_local: None) -> Run:
    """Mechanism ``none``, DLRM-DCN, an adaptive optimizer for the tables."""
    home = tmp_path_factory.mktemp("without")
    values = small(
        home,
        clicks,
        model={"name": "dlrm_dcn", "dcn_layers": 1, "dcn_low_rank_dim": 4, "sharding": "row_wise"},
        privacy={"mechanism": "none", "epsilon": None},
        train={
            "table_optimizer": "rowwise_adagrad",
            "dense_optimizer": "adam",
            "learning_rate": 0.02,
        },
        output={"name": "plain", "tensorboard": False},
    )
    return fit(home, values)


# The command line's run.


def test_output_is_quiet(trained: Run) -> None:
    phases = ["reading the data", "starting Ray", f"noise kernels: {trained.summary['kernels']}"]
    phases += ["training"]
    phases += ["evaluating", "settling and releasing", "writing the report"]
    # "evaluating" and the like may pass between two looks at the monitor.
    lines = [line.removesuffix(" …") for line in trained.err.splitlines()]
    assert lines == [phase for phase in phases if phase in lines]
    assert lines[:4] == phases[:4]
    named = [line.split()[0] for line in trained.out.splitlines()]
    assert named == ["privacy", "budget", "quality", "noise", "speed", "steps", "run", "model"]


def test_result_is_printed(trained: Run) -> None:
    assert f"ε = {trained.summary['epsilon']:.4g}" in trained.out
    assert f"AUC {trained.summary['auc']:.4f}" in trained.out
    assert "12 of 12, completed" in trained.out
    assert "runs/first/release" in trained.out


def test_run_folder_is_whole_and_private(trained: Run) -> None:
    names = {p.name for p in trained.folder.iterdir()}
    assert names == {
        "config.yaml", "summary.json", "metrics.csv", "tensorboard", "report.html", "release"
    }  # fmt: skip
    assert trained.folder.stat().st_mode & 0o777 == 0o700
    assert trained.store.parent.stat().st_mode & 0o777 == 0o700
    events = list((trained.folder / "tensorboard").iterdir())
    assert events and all(p.stat().st_size for p in events)
    report = (trained.folder / "report.html").read_text(encoding="utf-8")
    assert trained.summary["privacy_statement"][:80] in report


def test_summary_has_what_was_promised(trained: Run) -> None:
    summary = trained.summary
    assert set(PROMISED.split()) <= set(summary)
    assert summary["private"] is True and summary["status"] == "completed"
    assert summary["mechanism"] == "lazydp" and summary["sampling"] == "poisson"
    assert summary["steps"] == summary["planned_steps"] == 12
    assert summary["world_size"] == len(summary["peak_memory_bytes"]) == 2
    assert min(summary["peak_memory_bytes"]) > 1e8
    assert 0 < summary["auc"] < 1 and summary["log_loss"] > 0 and summary["normalized_entropy"] > 0
    assert {"torch", "torchrec", "ray", "dp-accounting", "python"} <= set(summary["software"])
    assert summary["skipped_rows"] == {}


def test_every_sharding_kind_took_part(trained: Run) -> None:
    shards = {s["table"].rpartition(".")[2]: s for s in trained.summary["sharding"]}
    assert len(shards) == 26
    assert {name: shards[name]["kind"] for name in KINDS} == KINDS
    for name, table in shards.items():
        copies = 2 if table["kind"] == "data_parallel" else 1
        assert table["bytes"] == copies * 4 * table["rows"] * table["dim"], name
    owners = {name: len(shards[name]["ranks"]) for name in KINDS}
    assert owners == {"C1": 2, "C2": 1, "C3": 2, "C4": 2}


def test_resolved_configuration_loads_again(trained: Run) -> None:
    config = load_config(trained.folder / "config.yaml")
    given = load_config(trained.home / "config.yaml")
    assert config.cluster.use_gpu is not None
    assert config.output.name == "first"
    assert (config.model, config.privacy, config.train) == (given.model, given.privacy, given.train)


def test_metrics_have_one_row_a_step(trained: Run) -> None:
    rows = trained.rows()
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert all(math.isfinite(row["loss"]) for row in rows)
    epsilons = [row["epsilon"] for row in rows]
    assert epsilons == sorted(epsilons)
    assert epsilons[0] > 0 and epsilons[-1] <= 8
    assert epsilons[-1] == pytest.approx(trained.summary["epsilon"], rel=1e-6)
    assert all(0 <= row["clip_fraction"] <= 1 for row in rows)
    # Poisson batches differ; their mean is what was asked for (5 standard errors).
    sizes = [row["batch_size"] for row in rows]
    assert len(set(sizes)) > 1
    assert abs(sum(sizes) / 12 - 128) < 5 * math.sqrt(128 / 12)
    assert [row["step"] for row in rows if "valid_auc" in row] == [6, 12]


def test_epsilon_is_what_dp_accounting_says(trained: Run) -> None:
    summary = trained.summary
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    step = dp_accounting.PoissonSampledDpEvent(
        summary["expected_batch_size"] / summary["num_records"],
        dp_accounting.GaussianDpEvent(summary["noise_multiplier"]),
    )
    accountant.compose(step, summary["steps"])
    assert summary["epsilon"] == pytest.approx(accountant.get_epsilon(summary["delta"]), rel=1e-3)
    assert 7.9 < summary["epsilon"] <= 8


def test_ledger_holds_exactly_what_was_spent(trained: Run) -> None:
    ledger = Ledger(trained.ledger)
    spend = ledger.spent("generated clicks")
    assert spend.epsilon == pytest.approx(trained.summary["epsilon"], rel=1e-9)
    assert spend.runs == ("first",) and spend.budget_epsilon == 8
    assert charged_steps(trained.ledger, "generated clicks", "first") == 12
    kinds = [entry.kind for entry in ledger.history("generated clicks")]
    assert kinds[:2] == ["dataset_registered", "run_opened"]
    assert kinds[-1] == "run_closed"
    leases = [e for e in ledger.history("generated clicks") if e.kind == "steps_reserved"]
    assert [(e.first_step, e.steps) for e in leases] == [(1, 5), (6, 5), (11, 2)]


def test_steps_are_charged_before_their_results(trained: Run) -> None:
    """The lease of a step is older in the ledger than the file that shows its result."""
    granted = 0
    for entry in Ledger(trained.ledger).history("generated clicks"):
        if entry.kind == "steps_reserved":
            assert entry.first_step == granted + 1
            granted += entry.steps or 0
        elif entry.kind == "steps_settled":
            assert entry.steps is not None and entry.steps <= granted
    assert granted >= len(trained.rows())


def test_release_loads(trained: Run) -> None:
    release = Release.open(trained.folder / "release")
    assert release.manifest["settled_to_step"] == 12
    model, schema = load_model(trained.folder)
    state = model.state_dict()
    assert len(schema.sparse) == 26 and not any(t.is_meta for t in state.values())
    assert all(bool(torch.isfinite(t).all()) for t in state.values())
    # Every row of a table bears its noise: none is as another shard's default would be.
    table = release.table(next(t for t in release.manifest["tables"] if t.endswith(".C3")))
    assert table.shape == (300, 8) and len(torch.unique(table, dim=0)) == 300


def test_model_card_states_the_guarantee(trained: Run) -> None:
    summary, card = trained.summary, trained.card
    assert f"| ε | {round_up(summary['epsilon'], 5)} |" in card
    assert f"| δ | {summary['delta']:g} |" in card
    assert "| unit of privacy | one record |" in card
    assert "adding or removing one record" in card
    assert "does **not** cover" in card
    for sentence in summary["not_covered"]:
        assert sentence in card
    # Metrics of held-out records are computed without noise; the card leaves with the model.
    assert "AUC" not in card and str(summary["auc"]) not in card


def test_evaluating_the_release_gives_the_summary_again(trained: Run) -> None:
    result = run("evaluate", trained.folder, "--data", trained.store, "--json")
    assert result.exit_code == 0, result.output
    metrics = json.loads(result.stdout)
    assert metrics["examples"] == trained.summary["evaluated_examples"]
    for name in ("auc", "log_loss", "normalized_entropy", "calibration"):
        assert metrics[name] == pytest.approx(trained.summary[name], rel=1e-4), name


def test_budget_is_shown_and_set(trained: Run) -> None:
    shown = run("budget", "show", "--ledger", trained.ledger)
    assert shown.exit_code == 0
    assert "generated clicks" in shown.stdout and "8" in shown.stdout
    history = run("budget", "show", "generated clicks", "--ledger", trained.ledger)
    assert history.stdout.count("steps_reserved") == 3
    name, ledger = "generated clicks", ["--ledger", trained.ledger]
    lower = run("budget", "set", name, "--epsilon", "1", "--reason", "less", *ledger)
    assert lower.exit_code == 1 and "cannot be lowered" in lower.stderr
    same = run("budget", "set", name, "--epsilon", "8", "--reason", "a test", *ledger)
    assert same.exit_code == 0 and "8 → 8" in same.stdout
    assert Ledger(trained.ledger).datasets()[0].epsilon == 8


@pytest.mark.usefixtures("ray_local")
def test_a_second_run_on_the_same_records_is_refused(trained: Run, clicks: Path) -> None:
    before = Ledger(trained.ledger).spent("generated clicks")
    values = small(
        trained.home, clicks, data={"name": "generated clicks"}, output={"name": "again"}
    )
    with pytest.raises(BudgetError) as caught:
        Trainer(parse_config(values)).fit()
    message = str(caught.value)
    for words in ("'generated clicks'", "spent ε = 8 of 8", "budget set", "stop_at_budget"):
        assert words in message, message
    assert Ledger(trained.ledger).spent("generated clicks") == before
    assert runs_left(trained.home) == ["first"]


# The run that stops at its budget.


def test_stops_at_the_budget_with_a_release(stopped: Run) -> None:
    summary = stopped.summary
    assert summary["status"] == "stopped_at_budget"
    assert "used up" in summary["budget_refusal"]
    assert 0 < summary["steps"] < 40
    assert 2.2 < summary["epsilon"] <= 2.5
    assert charged_steps(stopped.ledger, "clicks", stopped.folder.name) == summary["steps"]
    spend = Ledger(stopped.ledger).spent("clicks")
    assert spend.epsilon == pytest.approx(summary["epsilon"], rel=1e-6)
    assert len(stopped.rows()) == summary["steps"]
    assert Release.open(stopped.folder / "release").manifest["settled_to_step"] == summary["steps"]


def test_fixed_seed_is_marked_as_not_private(stopped: Run) -> None:
    assert stopped.summary["private"] is False and stopped.summary["fixed_seed"] is True
    assert "not private" in stopped.summary["privacy_statement"]
    assert "not private" in stopped.card
    assert (
        "not private" in Release.open(stopped.folder / "release").manifest["privacy"]["statement"]
    )


def test_the_secret_is_stored_nowhere(stopped: Run) -> None:
    secret = fixed_secret(7)
    forms = (secret, secret.hex().encode(), str(list(secret)).encode())
    files = [p for p in stopped.home.rglob("*") if p.is_file()]
    assert len(files) > 10
    for path in files:
        content = path.read_bytes()
        assert not any(form in content for form in forms), path


def test_model_of_the_user_is_built_again(stopped: Run) -> None:
    assert {s["kind"] for s in stopped.summary["sharding"]} == {"column_wise"}
    assert {s["dim"] for s in stopped.summary["sharding"]} == {16}
    metrics = evaluate_release(stopped.folder, str(stopped.store))
    assert metrics["auc"] == pytest.approx(stopped.summary["auc"], rel=1e-4)


# The run without privacy.


def test_none_is_marked_as_not_private(without_privacy: Run) -> None:
    summary = without_privacy.summary
    assert summary["private"] is False and summary["epsilon"] is None and summary["delta"] is None
    assert summary["max_grad_norm"] is None
    assert "not private" in summary["privacy_statement"]
    assert "not private" in without_privacy.card
    assert "| ε |" not in without_privacy.card
    rows = without_privacy.rows()
    assert len(rows) == 12 and all(row["epsilon"] == math.inf for row in rows)
    assert not (without_privacy.folder / "tensorboard").exists()


def test_none_learns(without_privacy: Run) -> None:
    rows = without_privacy.rows()
    assert sum(r["loss"] for r in rows[-3:]) < sum(r["loss"] for r in rows[:3])


# The run on a grid, with the slow reference.


def test_a_run_on_a_grid_with_slow_kernels(tmp_path: Path, clicks: Path) -> None:
    """Every released number is on the grid; the console says that the reference runs, and why."""
    values = small(
        tmp_path,
        clicks,
        privacy={"epsilon": None, "noise_multiplier": 1.0, "seed": 3},
        noise={"grid": "auto", "rounds": 12},
        train={"steps": 3},
    )
    process = start(
        "train", "-c", write_config(tmp_path, values), "--name", "slow", folder=tmp_path,
        DIST_DP_KERNELS="reference",
    )  # fmt: skip
    assert process.wait(timeout=300) == 0, (tmp_path / "err.txt").read_text()
    folder = tmp_path / "runs" / "slow"
    said = (tmp_path / "err.txt").read_text().splitlines()
    assert "noise kernels: reference (NumPy) …" in said
    (warning,) = (line for line in said if "SlowKernelsWarning: " in line)
    assert "workers 0, 1: noise is made by the NumPy reference" in warning
    assert "DIST_DP_KERNELS=reference; unset it" in warning
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["kernels"] == "reference (NumPy)"
    release = Release.open(folder / "release")
    spacing = release.manifest["privacy"]["plan"]["noise_grid"]
    for name in release.manifest["tables"]:
        multiples = release.table(name).double() / spacing
        assert bool((multiples == multiples.round()).all())
    (bits,) = (s for s in summary["not_covered"] if "grid" in s)
    assert bits in (folder / "release" / "MODEL_CARD.md").read_text(encoding="utf-8")


# Errors in workers.


@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize(
    ("factory", "kind", "words"),
    [
        ("broken", DistDpError, ["RuntimeError", "colour of this model is not known", "--verbose"]),
        ("mixing", ModelError, ["mixes the examples", "in-batch negatives"]),
    ],
)
def test_errors_of_workers_are_readable(
    tmp_path: Path, clicks: Path, factory: str, kind: type[Exception], words: list[str]
) -> None:
    values = small(
        tmp_path,
        clicks,
        model={"name": "custom", "factory": f"tests.cluster.factories:{factory}"},
        privacy={"epsilon": None, "noise_multiplier": 1.0},
        cluster={"num_workers": 2 if factory == "mixing" else 1},
    )
    with pytest.raises(kind) as caught:
        Trainer(parse_config(values)).fit()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    for word in words:
        assert word in message, message
    assert runs_left(tmp_path) == []
    ledger = Ledger(tmp_path / "ledger.sqlite")
    assert sum(ledger.spent(d.name).epsilon for d in ledger.datasets()) == 0


@pytest.mark.usefixtures("ray_local")
def test_a_cluster_without_room_says_so(tmp_path: Path, clicks: Path) -> None:
    known = {"epsilon": None, "noise_multiplier": 1.0}
    values = small(tmp_path, clicks, privacy=known, cluster={"num_workers": 3})
    with pytest.raises(ConfigError, match=r"num_workers: 3 workers need 3 CPUs.*has 2.*lower"):
        Trainer(parse_config(values)).fit()
    values = small(tmp_path, clicks, privacy=known, cluster={"use_gpu": True, "num_workers": 2})
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"use_gpu: 2 workers need a GPU each.*has 0"):
            Trainer(parse_config(values)).fit()
    assert runs_left(tmp_path) == []
