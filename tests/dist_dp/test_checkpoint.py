"""A run that goes on from a checkpoint is the run that never stopped, or it is refused."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dist_dp.accountant import LocalAccountant
from dist_dp.checkpoint import save_checkpoint
from dist_dp.engine import PrivacyEngine
from dist_dp.errors import CheckpointError, DistDpError, LedgerError, ReleaseError
from dist_dp.ledger import Ledger
from dist_dp.released import Release
from tests.dist_dp.placement import model
from tests.dist_dp.test_engine import train

SECRET = bytes(range(32))


def engine(home: Path, **options: Any) -> PrivacyEngine:
    options = {"run_id": "run", "sharding": "table_wise", **options}
    return PrivacyEngine(dataset="clicks", ledger=home / "ledger.sqlite", **options)


def weights(made: PrivacyEngine) -> dict[str, torch.Tensor]:
    """Everything trained, settled."""
    made.parts.settle()
    found = {f"{s.table} {s.column_offset}": s.weight.clone() for s in made.parts.shards}
    return found | {n: p.detach().clone() for n, p in made.parts.recorder.parameters.items()}


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_going_on_is_as_if_it_never_stopped(tmp_path: Path, optimizer: Any) -> None:
    def start(module: nn.Module) -> dict[str, Any]:
        from dist_dp.sharding import TableOptimizer

        return {
            "optimizer": optimizer(module.parameters(), lr=0.1, weight_decay=0.01),
            "table_optimizer": TableOptimizer("sgd"),
            "table_lr": 0.5,
        }

    module = model(meta=False)
    first = module.state_dict()
    first = {n: t.clone() for n, t in first.items()}
    whole = engine(tmp_path / "a", secret=SECRET)
    train(whole, module, **start(module))

    module = model(meta=False)
    module.load_state_dict(first)
    stopped = engine(tmp_path / "b", secret=SECRET)
    train(stopped, module, most=3, **start(module))
    folder = save_checkpoint(stopped, tmp_path / "b" / "checkpoint")

    module = model(meta=False)
    resumed = engine(tmp_path / "b", resume_from=folder)
    _, _, loader = train(resumed, module, **start(module))
    assert loader.steps_drawn == 8 and resumed.secret_is_given
    one, other = weights(whole), weights(resumed)
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name
    ledger = LocalAccountant(Ledger(tmp_path / "b" / "ledger.sqlite"))
    assert ledger.run_steps("run") == 8


def test_a_crash_charges_the_steps_that_run_again(tmp_path: Path) -> None:
    stopped = engine(tmp_path)
    # Room for the steps that will run twice.
    train(stopped, most=2, budget=(40.0, 1e-3))
    folder = save_checkpoint(stopped, tmp_path / "checkpoint")
    ledger = LocalAccountant(Ledger(tmp_path / "ledger.sqlite"))
    lost = ledger.reserve("run", 3, 4)
    del lost
    resumed = engine(tmp_path, resume_from=folder)
    train(resumed, budget=(40.0, 1e-3))
    assert ledger.run_steps("run") == 2 + 4 + 6
    privacy = Release.open(resumed.release(tmp_path / "released")).manifest["privacy"]
    assert privacy["steps"] == 8 and privacy["steps_charged"] == 12
    assert privacy["epsilon"] > 4.0 and "12 steps" in privacy["statement"]


def test_a_release_after_the_checkpoint_bars_going_on(tmp_path: Path) -> None:
    stopped = engine(tmp_path)
    train(stopped, most=2)
    folder = save_checkpoint(stopped, tmp_path / "checkpoint")
    assert not json.loads((folder / "checkpoint.json").read_text())["settled"]
    stopped.release(tmp_path / "released")
    # The rows of the checkpoint of step 2 are not settled, those of the release are.
    with pytest.raises(LedgerError, match="released a model of step 2 after its checkpoint"):
        train(engine(tmp_path, resume_from=folder))
    # Settled first and saved again, the run may go on.
    folder = save_checkpoint(stopped, tmp_path / "checkpoint")
    assert json.loads((folder / "checkpoint.json").read_text())["settled"]
    train(engine(tmp_path, resume_from=folder), most=4)


def test_a_checkpoint_is_private_and_no_release(tmp_path: Path) -> None:
    made = engine(tmp_path)
    train(made, most=1)
    folder = save_checkpoint(made, tmp_path / "checkpoint")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "secret").stat().st_mode) == 0o600
    assert (folder / "secret").read_bytes() == made.secret
    with pytest.raises(ReleaseError, match="training checkpoint, not a released model"):
        Release.open(folder)
    with pytest.raises(ReleaseError, match=r"engine\.release"):
        made.parts.model.state_dict()


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    made = engine(tmp_path, settings={"learning_rate": 0.1})
    train(made, most=1)
    folder = save_checkpoint(made, tmp_path / "checkpoint")
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"settings": {"learning_rate": 0.2}}, {}, "training settings"),
        ({"settings": made.settings, "run_id": "other"}, {}, "another run"),
        ({"settings": made.settings}, {"max_grad_norm": 2.0}, "privacy plan"),
        ({"settings": made.settings, "sharding": "row_wise"}, {}, "sharding"),
    ]
    for options, changes, words in cases:
        with pytest.raises(CheckpointError, match=words):
            train(engine(tmp_path, resume_from=folder, **options), **changes)
    with pytest.raises(DistDpError, match="no checkpoint"):
        train(engine(tmp_path, resume_from=tmp_path / "nowhere"))
    (folder / "secret").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="damaged"):
        train(engine(tmp_path, resume_from=folder, settings=made.settings))


def test_a_failed_save_keeps_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine(tmp_path)
    train(made, most=1)
    folder = save_checkpoint(made, tmp_path / "checkpoint")
    before = (folder / "checkpoint.json").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dist_dp.checkpoint._save", full)
    with pytest.raises(CheckpointError, match="disk is full"):
        save_checkpoint(made, folder)
    assert (folder / "checkpoint.json").read_bytes() == before
