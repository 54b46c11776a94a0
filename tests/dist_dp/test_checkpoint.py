"""A run that goes on from a checkpoint is the run that never stopped, or it is refused."""

from __future__ import annotations

import json
import shutil
import stat
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_dp import checkpoint_folder, checkpoint_storage, checkpoint_tensors
from dist_dp.accountant import LocalAccountant
from dist_dp.checkpoint import (
    CheckpointWriter,
    find_checkpoint,
    read_checkpoint_info,
    save_checkpoint,
)
from dist_dp.checkpoint_folder import has_checkpoint
from dist_dp.engine import PrivacyEngine
from dist_dp.errors import CheckpointError, DistDpError, LedgerError, ModelError, ReleaseError
from dist_dp.ledger import Ledger
from dist_dp.released import Release
from dist_dp.sharding import TableOptimizer
from tests.dist_dp.checkpoint_runs import STEPS, assert_is_the_run, end_of, go_on, train_on
from tests.dist_dp.models import Mixed
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


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Tensor]:
    """The end of a run that never stopped."""
    return end_of(go_on(tmp_path_factory.mktemp("whole")))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_going_on_is_as_if_it_never_stopped(tmp_path: Path, optimizer: Any) -> None:
    def start(module: nn.Module) -> dict[str, Any]:
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
        ({"settings": made.settings}, {"optimizer": torch.optim.Adagrad}, "dense optimizer"),
    ]
    for options, changes, words in cases:
        if "optimizer" in changes:
            module = model(meta=False)
            changes = {
                "module": module,
                "optimizer": changes["optimizer"](module.parameters(), lr=0.1),
                "table_optimizer": TableOptimizer("sgd"),
            }
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

    monkeypatch.setattr("dist_dp.checkpoint_storage._bytes_of", full)
    with pytest.raises(CheckpointError, match="disk is full"):
        save_checkpoint(made, tmp_path / "checkpoint")
    assert (folder / "checkpoint.json").read_bytes() == before
    assert [p.name for p in (tmp_path / "checkpoint").iterdir()] == [folder.name]


def test_a_disk_that_is_full_from_the_start_keeps_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = go_on(tmp_path, 1, save=True)
    home = tmp_path / "checkpoint"

    def part(path: Path, content: bytes) -> None:
        path.write_bytes(content[:7])
        full()

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_folder, "write_private", part)
        with pytest.raises(CheckpointError, match="disk is full"):
            save_checkpoint(made, home)
    assert [p.name for p in home.iterdir()] == ["save-000001"]
    # Nor is it kept where the copy of the tables fails, in the background.
    monkeypatch.setattr(checkpoint_tensors.Piece, "copied", lambda _: full())
    writer = CheckpointWriter(made, home)
    with pytest.raises(CheckpointError, match="disk is full"):
        writer.save()
    writer.close()
    assert [p.name for p in home.iterdir()] == ["save-000001"]


def full(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_training_goes_on_while_a_copy_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[Any, Tensor]
) -> None:
    reached, go = threading.Event(), threading.Event()
    bytes_of = checkpoint_storage._bytes_of

    def slow(tensor: Tensor) -> memoryview:
        reached.set()
        assert go.wait(60)
        return bytes_of(tensor)

    monkeypatch.setattr(checkpoint_storage, "_bytes_of", slow)
    made = go_on(tmp_path, 0)
    writer = CheckpointWriter(made, tmp_path / "checkpoint")
    train_on(made, 2)
    writer.save()
    assert reached.wait(60) and not writer.failed
    # Two steps on, with an evaluation, the checkpoint is of the second step all the same.
    train_on(made, 4)
    assert not has_checkpoint(tmp_path / "checkpoint")
    go.set()
    writer.close()
    assert read_checkpoint_info(tmp_path / "checkpoint")["numbers"]["step"] == 2
    train_on(made, STEPS)
    assert_is_the_run(end_of(made), whole, exact=True)
    assert_is_the_run(end_of(go_on(tmp_path)), whole, exact=True)


@pytest.mark.parametrize("asked", ["save", "release"])
def test_a_failure_in_the_background_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    # Without noise the release has no ε to compose, which takes seconds.
    made = go_on(tmp_path, 1, mechanism="none")
    writer = CheckpointWriter(made, tmp_path / "checkpoint")
    writer.save()
    writer.wait()
    kept = find_checkpoint(tmp_path / "checkpoint")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_storage, "_bytes_of", full)
        writer.save()
        while not writer.failed:
            time.sleep(0.01)
    calls = {"save": writer.save, "release": lambda: made.release(tmp_path / "released")}
    with pytest.raises(CheckpointError, match="disk is full"):
        calls[asked]()
    assert find_checkpoint(tmp_path / "checkpoint") == kept
    # Said once; then it goes on.
    calls[asked]()
    writer.close()
    assert (find_checkpoint(tmp_path / "checkpoint") == kept) == (asked == "release")


def test_only_whole_folders_count(tmp_path: Path, whole: dict[Any, Tensor]) -> None:
    made = go_on(tmp_path, 3, save=True)
    home = tmp_path / "checkpoint"
    first = find_checkpoint(home)
    assert first.name == "save-000001"
    partial = home / ".save-000002.partial"
    shutil.copytree(first, partial)
    (partial / "checkpoint.json").unlink()
    assert find_checkpoint(home) == first
    assert_is_the_run(end_of(go_on(tmp_path)), whole, exact=True)
    second = save_checkpoint(made, home)
    assert second.name == "save-000002" and [*home.iterdir()] == [second]
    assert sorted(p.name for p in second.iterdir()) == [
        "checkpoint.json",
        "index.json",
        "secret",
        "tensors-00000.bin",
    ]
    assert {stat.S_IMODE(p.stat().st_mode) for p in second.iterdir()} == {0o600}
    with pytest.raises(CheckpointError, match="no checkpoint"):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("tensors-00000.bin", lambda raw: raw[:-1], "damaged"),
        ("tensors-00000.bin", lambda raw: raw[:99] + bytes([raw[99] ^ 1]) + raw[100:], "damaged"),
        ("index.json", lambda raw: raw.replace(b'"start": 0', b'"start": 8'), "damaged"),
        ("checkpoint.json", lambda raw: raw[:-9], "cannot be read"),
        (
            "checkpoint.json",
            lambda raw: raw.replace(b'"lr": 0.5', b'"lr": 0.9'),
            "checkpoint.json' or 'secret' beside it is damaged",
        ),
        ("checkpoint.json", lambda raw: raw.replace(b'"seal"', b'"zeal"'), "is damaged"),
        (
            "secret",
            lambda raw: bytes([raw[0] ^ 1]) + raw[1:],
            "checkpoint.json' or 'secret' beside it is damaged",
        ),
        (
            "checkpoint.json",
            lambda raw: raw.replace(b'"format_version": 3', b'"format_version": 2'),
            "format version 2, this package reads 3; go on with the package version",
        ),
    ],
)
def test_damage_and_other_versions_are_refused(
    tmp_path: Path, file: str, change: Any, words: str
) -> None:
    go_on(tmp_path, 1, save=True)
    path = find_checkpoint(tmp_path / "checkpoint") / file
    content = path.read_bytes()
    path.write_bytes(change(content))
    assert path.read_bytes() != content
    with pytest.raises(CheckpointError, match=words):
        go_on(tmp_path)


def test_a_checkpoint_of_the_first_format_is_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "checkpoint.json").write_text(
        json.dumps({"format": "dist-dp-checkpoint", "format_version": 1})
    )
    with pytest.raises(CheckpointError, match="format version 1"):
        go_on(tmp_path)


def test_a_tensor_that_does_not_fit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on(tmp_path, 1, save=True)
    with monkeypatch.context() as patch:
        patch.setattr("tests.dist_dp.checkpoint_runs.model", lambda meta: Mixed(14, 9, 8, 6, False))
        with pytest.raises(CheckpointError, match=r"pooled.a/.*' was saved with shape \(13,"):
            go_on(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("dist_dp.table_shard.TableShard.state_tensors", lambda s: {"w": s.weight})
        with pytest.raises(CheckpointError, match=r"pooled\.a/last_step', which this model does"):
            go_on(tmp_path)
    reads = checkpoint_tensors.create_read_items_for_chunk_list
    with monkeypatch.context() as patch:
        patch.setattr(
            checkpoint_tensors, "create_read_items_for_chunk_list", lambda *a: reads(*a)[1:]
        )
        with pytest.raises(CheckpointError, match=r"it holds 0 of the \d+ numbers of"):
            go_on(tmp_path)


def test_large_pieces_come_in_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[Any, Tensor]
) -> None:
    monkeypatch.setattr(checkpoint_tensors, "CHUNK_BYTES", 100)
    folder = find_checkpoint((go_on(tmp_path, 3, save=True) and tmp_path) / "checkpoint")
    index = json.loads((folder / "index.json").read_text())["tensors"]
    # Three rows of eight float32 fit into 100 bytes.
    offsets = [chunk["offsets"] for chunk in index["tables/pooled.a/weight"]["chunks"]]
    assert offsets == [[row, 0] for row in (0, 3, 6, 9, 12)]
    assert_is_the_run(end_of(go_on(tmp_path)), whole, exact=True)


def test_a_ledger_that_knows_of_fewer_steps_is_refused(tmp_path: Path) -> None:
    made = engine(tmp_path / "a")
    train(made, most=3)
    folder = save_checkpoint(made, tmp_path / "checkpoint")
    train(engine(tmp_path / "b"), most=2)
    with pytest.raises(LedgerError, match="is another one"):
        train(engine(tmp_path / "b", resume_from=folder))


def test_a_ledger_rolled_back_with_its_witness_is_refused(tmp_path: Path) -> None:
    """A snapshot of the whole disk is consistent in itself; the checkpoint has seen more."""
    made = engine(tmp_path / "a")
    train(made, most=1, lease_steps=1)
    shutil.copytree(tmp_path / "a", tmp_path / "kept")
    folder = save_checkpoint(made, tmp_path / "first")
    assert made.accountant is not None
    made.accountant.reserve("run", 2, 1)
    folder = save_checkpoint(made, tmp_path / "second")
    shutil.rmtree(tmp_path / "a")
    (tmp_path / "kept").rename(tmp_path / "a")
    with pytest.raises(LedgerError, match="older copy"):
        train(engine(tmp_path / "a", resume_from=folder))


def test_a_buffer_that_moved_is_not_saved(tmp_path: Path) -> None:
    made = go_on(tmp_path, 0)
    name, kept = next(iter(made.parts.fixed.items()))
    dict(made.parts.model.named_buffers())[name].add_(1.0)
    with pytest.raises(ModelError, match=f"'{name}' is no trained parameter"):
        save_checkpoint(made, tmp_path / "checkpoint")
    dict(made.parts.model.named_buffers())[name].copy_(kept)
    save_checkpoint(made, tmp_path / "checkpoint")
    # Whatever a new process gives it, it comes back as it was.
    fixed = go_on(tmp_path, 0, fixed=7.0).parts
    assert torch.equal(fixed.fixed[name], kept)
    assert torch.equal(dict(fixed.model.named_buffers())[name], kept)


def test_history_that_is_kept_on_demand_comes_back(tmp_path: Path) -> None:
    end = end_of(go_on(tmp_path / "a", mechanism="none"))
    go_on(tmp_path / "b", 1, mechanism="none", save=True)
    assert_is_the_run(end_of(go_on(tmp_path / "b", mechanism="none")), end, exact=True)
