"""``dist-dp budget`` verify, history and export: what they print, and what makes them fail."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dist_dp.ledger import Ledger
from tests.cluster.small import assert_one_line_error, run
from tests.dist_dp.ledgers import filled, version_1, without_triggers
from tests.postgres_server import PostgresServer


@pytest.fixture
def path(tmp_path: Path) -> Path:
    ledger = filled(tmp_path / "ledger.sqlite")
    ledger.close()
    return ledger.path


def test_verify_counts_and_names_the_last_hash(path: Path) -> None:
    done = run("budget", "verify", "--ledger", path)
    assert done.exit_code == 0, done.output
    position = Ledger(path).position()
    assert position.hash in done.stdout and position.ledger_id in done.stdout
    assert "8 entries, 1 data sets, 1 runs" in done.stdout
    assert "5 steps_reserved" in done.stdout


def test_verify_fails_on_damage(path: Path) -> None:
    raw = without_triggers(path)
    raw.execute("UPDATE entries SET steps = 1 WHERE seq = 6")
    raw.close()
    assert_one_line_error(run("budget", "verify", "--ledger", path), "entry 6", "back-up")
    assert_one_line_error(run("budget", "show", "--ledger", path), "entry 6", str(path))


def test_a_ledger_is_adopted_on_the_command_line(path: Path) -> None:
    Path(f"{path}.witness").unlink()
    verify = ["budget", "verify", "--ledger", path]
    assert_one_line_error(run(*verify), "witness", "is missing", "--adopt --reason")
    assert_one_line_error(run(*verify, "--adopt"), "go together")
    assert_one_line_error(run(*verify, "--reason", "x"), "go together")
    done = run(*verify, "--adopt", "--reason", "moved [by hand]")
    assert done.exit_code == 0 and "1 ledger_adopted" in done.stdout
    assert run(*verify).exit_code == 0
    assert "reason moved [by hand]" in run("budget", "history", "--ledger", path).stdout


def test_history_of_all_or_of_one(path: Path) -> None:
    Ledger(path).register_dataset("views", fingerprint="v", num_records=10, epsilon=1.0, delta=1e-3)
    everything = run("budget", "history", "--ledger", path, "--json")
    entries = json.loads(everything.stdout)
    assert [entry["seq"] for entry in entries] == list(range(1, 10))
    assert entries == [vars(entry) for entry in Ledger(path).history()]
    one = run("budget", "history", "views", "--ledger", path)
    assert "dataset_registered" in one.stdout and "clicks" not in one.stdout
    table = run("budget", "history", "--ledger", path).stdout
    assert "10 from 11" in table and entries[-1]["hash"][:12] in table
    assert_one_line_error(run("budget", "history", "other", "--ledger", path), "'other'")


def test_an_export_is_checked_anywhere(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    done = run("budget", "export", out, "--ledger", path)
    assert done.exit_code == 0 and "8 entries" in done.stdout
    assert out.stat().st_mode & 0o777 == 0o600
    assert_one_line_error(run("budget", "export", out, "--ledger", path), "exists")
    lines = out.read_text().splitlines()
    position = Ledger(path).position()
    assert json.loads(lines[0]) == {"format": "dist-dp-ledger", "version": 2, **position.to_json()}
    assert [json.loads(x) for x in lines[1:]] == [vars(e) for e in Ledger(path).history()]

    alone = run("budget", "verify", out)
    assert alone.exit_code == 0 and position.hash in alone.stdout
    Ledger(path).reserve("a", 60, 1)
    both = run("budget", "verify", out, "--ledger", path)
    assert both.exit_code == 0 and "goes on to 9" in both.stdout
    other = filled(tmp_path / "other.sqlite")
    assert_one_line_error(run("budget", "verify", out, "--ledger", other.path), "another one than")
    assert_one_line_error(run("budget", "verify", out, "--adopt", "--reason", "x"), "leave it out")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda lines: [*lines[:3], *lines[4:]], "entry 3 is missing"),
        (lambda lines: lines[:-1], "says that it ends with entry 8"),
        (lambda lines: [*lines[:3], lines[4], lines[3], *lines[5:]], "entry 3 is missing"),
        (lambda lines: [x.replace('"steps":10', '"steps":1') for x in lines], "entry 2"),
        (lambda lines: [*lines, "{}"], "line 10 is no entry"),
        (lambda lines: lines[1:], "no export of a ledger"),
        (lambda lines: ["", *lines], "no export of a ledger"),
    ],
)
def test_a_damaged_export_is_found(
    path: Path, tmp_path: Path, change: object, complaint: str
) -> None:
    out = tmp_path / "out.jsonl"
    run("budget", "export", out, "--ledger", path)
    lines = change(out.read_text().splitlines())  # type: ignore[operator]
    out.write_text("\n".join(lines) + "\n")
    assert_one_line_error(run("budget", "verify", out), complaint)


def test_a_rolled_back_ledger_does_not_hold_its_export(path: Path, tmp_path: Path) -> None:
    """Also where the witness was rolled back with it."""
    copies = [Path(f"{path}{end}") for end in ("", ".witness")]
    for file in copies:
        shutil.copy(file, f"{file}.kept")
    ledger = Ledger(path)
    ledger.reserve("a", 60, 1)
    ledger.close()
    out = tmp_path / "out.jsonl"
    run("budget", "export", out, "--ledger", path)
    for file in copies:
        shutil.copy(f"{file}.kept", file)
    assert run("budget", "verify", "--ledger", path).exit_code == 0
    assert_one_line_error(run("budget", "verify", out, "--ledger", path), "entry 9 was seen")


def test_an_old_ledger_is_migrated_by_whoever_opens_it(tmp_path: Path) -> None:
    path = version_1(tmp_path / "ledger.sqlite")
    done = run("budget", "verify", "--ledger", path)
    assert done.exit_code == 0 and "1 ledger_migrated" in done.stdout


def test_the_commands_take_a_database(
    postgres_server: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    url = postgres_server.socket_url(postgres_server.new_database())
    show = run("budget", "show", "--ledger", url)
    assert_one_line_error(show, "no ledger at 'postgresql://", "train first")
    filled(url).close()
    for command in (["show"], ["verify"], ["history"], ["export", tmp_path / "out.jsonl"]):
        done = run("budget", *command, "--ledger", url)
        assert done.exit_code == 0, done.output
    assert run("budget", "verify", tmp_path / "out.jsonl", "--ledger", url).exit_code == 0
    secret = run("budget", "show", "--ledger", "postgresql://ann:hunter2@db/privacy")
    assert_one_line_error(secret, "PGPASSFILE")
    assert "hunter2" not in secret.output
