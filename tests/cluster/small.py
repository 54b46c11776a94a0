"""A small configuration, runs of the command line, and what a ledger says about a run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from typer.testing import CliRunner, Result

from dist_dp.cluster.cli import app
from dist_dp.ledger import Ledger

ROOT = Path(__file__).resolve().parents[2]

SMALL: dict[str, Any] = {
    "data": {"format": "criteo", "max_num_embeddings": 300},
    "model": {"embedding_dim": 8, "dense_arch": [16, 8], "over_arch": [16, 1]},
    "privacy": {"epsilon": 8.0, "max_grad_norm": 1.0},
    "train": {
        "steps": 12,
        "expected_batch_size": 128,
        "learning_rate": 0.5,
        "lease_steps": 5,
    },
    "cluster": {"num_workers": 2, "threads_per_worker": 1},
}


def small(folder: Path, source: Path | None, **sections: dict[str, Any]) -> dict[str, Any]:
    """The small configuration with changes by section; runs and ledger go to ``folder``."""
    values = {name: dict(section) for name, section in SMALL.items()}
    values["output"] = {"folder": str(folder / "runs")}
    values["privacy"]["ledger"] = str(folder / "ledger.sqlite")
    if source is not None:
        values["data"]["path"] = str(source)
    for name, section in sections.items():
        values.setdefault(name, {}).update(section)
        values[name] = {key: value for key, value in values[name].items() if value is not None}
    return values


def write_config(folder: Path, values: Any) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def run(*arguments: str | Path) -> Result:
    """The command line, in this process."""
    return CliRunner().invoke(app, [str(a) for a in arguments])


def start(*arguments: str | Path, folder: Path, **environment: str) -> subprocess.Popen[str]:
    """The command line in a process group of its own, as a shell starts it; output to files."""
    script = Path(sys.executable).with_name("dist-dp")
    program = [str(script)] if script.exists() else [sys.executable, "-m", "dist_dp.cluster.cli"]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "TORCH_"))}
    with (folder / "out.txt").open("w") as out, (folder / "err.txt").open("w") as err:
        return subprocess.Popen(
            [*program, *(str(a) for a in arguments)],
            stdout=out,
            stderr=err,
            text=True,
            cwd=folder,
            env={**clean, **environment},
            process_group=0,
        )


def charged_steps(ledger: Path | str, dataset: str, run_id: str) -> int:
    """Steps of a run that count in the ledger: settled ones as used, other leases whole."""
    leases: dict[str, int] = {}
    for entry in Ledger(ledger).history(dataset):
        if entry.run_id == run_id and entry.kind in ("steps_reserved", "steps_settled"):
            assert entry.lease_id is not None and entry.steps is not None
            leases[entry.lease_id] = entry.steps
    return sum(leases.values())


def runs_left(folder: Path) -> list[str]:
    """Run folders, finished or not; the cache of converted data is none."""
    runs = folder / "runs"
    return [p.name for p in runs.iterdir() if p.name != ".data"] if runs.exists() else []


def assert_one_line_error(result: Result, *words: str) -> None:
    """Exit status 1, one line on stderr that holds the words, and nothing on stdout."""
    assert result.exit_code == 1, result.output + repr(result.exception)
    lines = [line for line in result.stderr.splitlines() if not line.endswith("…")]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in lines[0], (word, lines[0])
