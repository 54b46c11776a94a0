"""The command line itself: help, generate, convert, epsilon, budget, exit statuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dist_dp.accounting import GaussianEvent
from dist_dp.datasets.store import ArrowStore
from dist_dp.ledger import Ledger
from dist_dp.step_costs import StepCosts
from tests.cluster.small import assert_one_line_error, run

COMMANDS = "train plan evaluate predict export convert generate epsilon budget bench demo"


def test_help_names_every_command() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for command in COMMANDS.split():
        assert command in result.stdout
        assert run(command, "--help").exit_code == 0


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from dist_dp.cluster.cli import app\n"
        "assert CliRunner().invoke(app, ['train', '--help']).exit_code == 0\n"
        "print([m for m in ('torch', 'ray', 'torchrec', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_unknown_options_and_missing_arguments() -> None:
    assert run("train", "--epsilom", "3").exit_code == 2
    assert run("evaluate").exit_code == 2
    assert run("nothing").exit_code == 2


@pytest.mark.parametrize(
    "command",
    [
        "predict run --data x --out y --batch-size",
        "evaluate run --data x --batch-size",
        "generate x.tsv --records",
        "demo --records",
        "demo --workers",
        "epsilon --noise-multiplier 1 --sample-rate 0.1 --steps",
        "epsilon --noise-multiplier 1 --batch-size 10 --records",
        "plan --num-records",
    ],
)
@pytest.mark.parametrize("value", ["0", "-5"])
def test_counts_begin_at_one(command: str, value: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*command.split(), value)
    assert result.exit_code == 2 and "Invalid value for" in result.stderr, result.output
    assert list(tmp_path.iterdir()) == []


def test_a_negative_batch_has_no_epsilon() -> None:
    options = ["--noise-multiplier", "1", "--records", "10"]
    result = run("epsilon", *options, "--batch-size", "-1")
    assert result.exit_code == 2 and "Invalid value for '--batch-size'" in result.stderr


def test_generate_overwrites_nothing(tmp_path: Path) -> None:
    out = tmp_path / "a.tsv"
    for name in ("a.tsv", "a.tsv.truth.json"):
        (tmp_path / name).write_text("mine")
        assert_one_line_error(run("generate", out, "--records", "5"), name, "exists", "remove it")
        assert [p.read_text() for p in tmp_path.iterdir()] == ["mine"]
        (tmp_path / name).unlink()


def test_generate_and_convert(tmp_path: Path) -> None:
    result = run("generate", tmp_path / "a.tsv", "--records", "300", "--seed", "3")
    assert result.exit_code == 0 and "best possible AUC 0." in result.stdout
    assert len((tmp_path / "a.tsv").read_text().splitlines()) == 300
    result = run("convert", tmp_path / "a.tsv", "--to", tmp_path / "store")
    assert result.exit_code == 0, result.output
    store = ArrowStore.open(tmp_path / "store", verify=True)
    assert sum(len(store.split(name)) for name in store.split_names()) == 300
    assert_one_line_error(run("generate", tmp_path / "a.tsv" / "b.tsv", "--records", "5"), "b.tsv")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # The example of TensorFlow Privacy's tests: RDP as published, and the tighter PLD.
        (["--accountant", "rdp"], 0.7242234),
        (["--accountant", "pld"], 0.64011),
    ],
)
def test_epsilon_against_a_published_value(options: list[str], expected: float) -> None:
    setting = "--noise-multiplier 1.3 --records 60000 --batch-size 150 --steps 6000 --delta 1e-5"
    result = run("epsilon", *setting.split(), *options)
    assert result.exit_code == 0, result.output
    value = float(result.stdout.partition("ε = ")[2].split()[0])
    assert value == pytest.approx(expected, rel=2e-4)


def test_epsilon_needs_what_it_computes_from() -> None:
    assert_one_line_error(run("epsilon", "--epsilon", "1"), "--sample-rate", "--batch-size")
    rate = ["--sample-rate", "0.1"]
    assert_one_line_error(run("epsilon", *rate), "--noise-multiplier or --epsilon")
    both = ["--epsilon", "1", "--noise-multiplier", "1"]
    assert_one_line_error(run("epsilon", *rate, *both), "--noise-multiplier or --epsilon")
    other = ["--noise-multiplier", "1", "--accountant", "moments"]
    assert run("epsilon", *rate, *other).exit_code == 2


def test_budget(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    assert_one_line_error(run("budget", "show", "--ledger", path), "no ledger", "train first")
    name = "a data set with a name that is rather long"
    ledger = Ledger(path)
    ledger.register_dataset(name, fingerprint="f", num_records=1234, epsilon=3.0, delta=1e-5)
    ledger.open_run("run-1", name, StepCosts.constant(GaussianEvent(1.0, 0.01), 10))
    ledger.settle(ledger.reserve("run-1", 1, 10).lease_id, 7)
    shown = run("budget", "show", "--ledger", path)
    assert shown.exit_code == 0
    row = next(line for line in shown.stdout.splitlines() if name in line)
    assert "1,234" in row and f"{ledger.spent(name).epsilon:.4g}" in row and "1e-05" in row
    history = run("budget", "show", name, "--ledger", path).stdout
    assert "steps_reserved" in history and "run-1 7 steps" in history
    assert_one_line_error(run("budget", "show", "other", "--ledger", path), "'other'")

    change = ["--ledger", path, "--reason", "a second model"]
    assert_one_line_error(run("budget", "set", "other", "--epsilon", "5", *change), "'other'")
    done = run("budget", "set", name, "--epsilon", "5", *change)
    assert done.exit_code == 0 and "3 → 5" in done.stdout
    assert Ledger(path).datasets()[0].epsilon == 5
    assert Ledger(path).history(name)[-1].details["reason"] == "a second model"
    low = run("budget", "set", name, "--epsilon", "0.0001", *change)
    assert_one_line_error(low, "cannot be lowered")
    assert run("budget", "set", name, "--epsilon", "5", "--ledger", path).exit_code == 2
