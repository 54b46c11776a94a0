"""A released model in use: evaluate, predict, export; and what is no released model."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml

from dist_dp.cluster.config import parse_config
from dist_dp.cluster.models import build_model, logits_of
from dist_dp.cluster.prepare import prepare
from dist_dp.cluster.serving import load_model
from dist_dp.engine import PrivacyEngine
from dist_dp.errors import ConfigError, ReleaseError
from dist_dp.released import Release
from tests.cluster.small import assert_one_line_error, run, small


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, clicks: Path) -> Path:
    folder = tmp_path_factory.mktemp("store") / "clicks"
    assert run("convert", clicks, "--to", folder).exit_code == 0
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Path:
    """A run folder with the release of three private steps, taken without Ray."""
    home = tmp_path_factory.mktemp("finished")
    known = {"epsilon": None, "noise_multiplier": 1.0}
    config = parse_config(small(home, store, privacy=known, train={"steps": 3}))
    prepared = prepare(config)
    module = build_model(config.model, prepared.schema)
    engine = PrivacyEngine(dataset="clicks", ledger=home / "ledger.sqlite")
    module, optimizer, loader = engine.make_private_from_plan(
        prepared.plan,
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.5),
        data_loader=prepared.store.split("train"),
    )
    for batch in loader:
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            logits_of(module, batch), batch.labels
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = home / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(config.to_yaml())
    info = {
        "model": config.model.model_dump(mode="json"),
        "columns": prepared.schema.model_dump(mode="json"),
    }
    engine.release(folder / "release", model_info=info)
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(finished, tmp_path / "copied"))


def test_evaluate(finished: Path, store: Path, clicks: Path) -> None:
    result = run("evaluate", finished, "--data", store, "--json")
    assert result.exit_code == 0, result.output
    metrics = json.loads(result.stdout)
    assert (
        metrics["examples"]
        == json.loads((store / "manifest.json").read_text())["splits"]["test"]["rows"]
    )
    assert 0 < metrics["auc"] < 1
    # In smaller pieces, and from the release itself: the same.
    options = ["--data", store, "--json", "--batch-size", "50"]
    again = json.loads(run("evaluate", finished / "release", *options).stdout)
    assert again == pytest.approx(metrics, rel=1e-5)
    # Raw records: all of them, and for people.
    shown = run("evaluate", finished, "--data", clicks)
    assert shown.exit_code == 0 and "2,000" in shown.stdout and "normalized entropy" in shown.stdout


def test_evaluate_in_a_process_of_its_own(finished: Path, clicks: Path) -> None:
    """Where nothing else has imported torchrec yet."""
    code = "from dist_dp.cluster.cli import main; main()"
    program = [sys.executable, "-c", code, "evaluate", str(finished), "--data", str(clicks)]
    result = subprocess.run(program, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "2,000" in result.stdout


def test_evaluate_counts_the_rows_it_skips(finished: Path, clicks: Path, tmp_path: Path) -> None:
    path = tmp_path / "held_out.tsv"
    lines = clicks.read_text().splitlines()[:50]
    path.write_text("\n".join([*lines, "nonsense"]) + "\n")
    assert_one_line_error(run("evaluate", finished, "--data", path), "held_out.tsv:51")
    result = run("evaluate", finished, "--data", path, "--skip-bad-rows", "--json")
    metrics = json.loads(result.stdout)
    assert (metrics["examples"], metrics["skipped_rows"]) == (50, 1)


def test_predict_keeps_the_order(finished: Path, clicks: Path, tmp_path: Path) -> None:
    out = tmp_path / "predictions.parquet"
    result = run("predict", finished, "--data", clicks, "--out", out, "--batch-size", "300")
    assert result.exit_code == 0 and "2,000 predictions" in result.stdout
    probabilities = pq.read_table(out)["probability"].to_numpy()
    assert len(probabilities) == 2000 and 0 < probabilities.min() < probabilities.max() < 1
    # The first records alone get the same predictions.
    head = tmp_path / "head.tsv"
    head.write_text("".join(clicks.read_text().splitlines(keepends=True)[:40]))
    assert_one_line_error(
        run("predict", finished, "--data", head, "--out", out), "predictions.parquet", "exists"
    )
    assert pq.read_metadata(out).num_rows == 2000
    out = tmp_path / "head.parquet"
    assert run("predict", finished, "--data", head, "--out", out).exit_code == 0
    assert pq.read_table(out)["probability"].to_numpy() == pytest.approx(
        probabilities[:40], rel=1e-5
    )


def test_predict_leaves_nothing_half_written(finished: Path, clicks: Path, tmp_path: Path) -> None:
    nowhere = tmp_path / "no" / "such" / "folder.parquet"
    assert_one_line_error(run("predict", finished, "-d", clicks, "-o", nowhere), "folder.parquet")
    bad = tmp_path / "bad.tsv"
    bad.write_text(clicks.read_text().splitlines(keepends=True)[0] + "1\t2\n")
    out = tmp_path / "out.parquet"
    assert_one_line_error(run("predict", finished, "-d", bad, "-o", out), "bad.tsv:2")
    assert [p.name for p in tmp_path.iterdir()] == ["bad.tsv"]


def test_export(finished: Path, store: Path, tmp_path: Path) -> None:
    to = tmp_path / "deep" / "model"
    result = run("export", finished, "--to", to)
    assert result.exit_code == 0 and "MODEL_CARD.md" in result.stdout
    Release.open(to)
    assert {p.name for p in to.iterdir()} == {p.name for p in (finished / "release").iterdir()}
    assert [p.name for p in to.parent.iterdir()] == ["model"]
    # The exported folder works without the run.
    assert run("evaluate", to, "--data", store).exit_code == 0
    assert_one_line_error(run("export", finished, "--to", to), "exists", "choose another")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 kB that is all but full."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot mount a small file system here: {error}")
    (folder / "ballast").write_bytes(bytes(300_000))
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_disk_full_on_export(finished: Path, small_disk: Path) -> None:
    result = run("export", finished, "--to", small_disk / "model")
    assert_one_line_error(result, "disk is full", "Nothing was left", "free some space")
    assert [p.name for p in small_disk.iterdir()] == ["ballast"]


def test_disk_full_half_way(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same where nothing can be mounted: the third file does not fit."""
    copies = []

    def copy(source: Path, destination: Path) -> None:
        copies.append(destination)
        destination.write_bytes(Path(source).read_bytes()[:10])
        if len(copies) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(destination))

    monkeypatch.setattr(shutil, "copyfile", copy)
    result = run("export", finished, "--to", tmp_path / "model")
    assert_one_line_error(result, "disk is full", "Nothing was left", "free some space")
    assert list(tmp_path.iterdir()) == []


def refused(folder: Path, data: Path, tmp_path: Path, *words: str) -> None:
    """Neither evaluation, prediction nor export takes the folder."""
    outputs = {"predict": ["--out", tmp_path / "out.parquet"], "evaluate": []}
    for command, more in outputs.items():
        assert_one_line_error(run(command, folder, "--data", data, *more), *words)
    assert_one_line_error(run("export", folder, "--to", tmp_path / "exported"), *words)
    assert not (tmp_path / "out.parquet").exists() and not (tmp_path / "exported").exists()


def test_checkpoint_is_no_release(copied: Path, store: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "checkpoint.json").write_text("{}")
    refused(checkpoint, store, tmp_path, "training checkpoint", "not settled", "Keep it private")
    # Nor one that somebody dressed up as a release.
    (copied / "release" / "checkpoint.json").write_text("{}")
    refused(copied / "release", store, tmp_path, "training checkpoint")


def rewrite(release: Path, change: Any) -> None:
    path = release / "release.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m["model"].update(over_arch=[1 << 40, 1]), "does not fit|cannot be built"),
        (lambda m: m["model"].update(name="dlrm_dcn", dcn_layers=10**9), "layers"),
        (lambda m: m["columns"]["sparse"][0].update(num_embeddings=10**15), "does not fit|built"),
        (lambda m: m["columns"]["sparse"][0].update(num_embeddings=-1), "num_embeddings"),
        (lambda m: m.pop("columns"), "does not say how its model is built"),
    ],
)
def test_a_model_beyond_its_files_takes_no_memory(copied: Path, change: Any, words: str) -> None:
    rewrite(copied / "release", lambda manifest: change(manifest["model"]))
    with pytest.raises(ReleaseError, match=words):
        load_model(copied)


def test_a_release_alone_calls_no_function(copied: Path, tmp_path: Path, clicks: Path) -> None:
    """A factory is called where the run's own configuration names it, and nowhere else."""
    (tmp_path / "planted.py").write_text(
        f"open({str(tmp_path / 'touched')!r}, 'w')\ndef make(schema): ...\n"
    )
    named = {"name": "custom", "factory": "planted:make"}
    rewrite(copied / "release", lambda manifest: manifest["model"]["model"].update(named))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        for folder in (copied / "release", copied):
            refused_ = run("evaluate", folder, "--data", clicks)
            assert_one_line_error(refused_, "planted:make", "would be run", "load_release")
        assert not (tmp_path / "touched").exists()
        config = yaml.safe_load((copied / "config.yaml").read_text())
        config["model"].update(named)
        (copied / "config.yaml").write_text(yaml.safe_dump(config))
        with pytest.raises(ConfigError, match="returned a NoneType"):
            load_model(copied)
        assert (tmp_path / "touched").exists()


def change_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda r: change_byte(r / "dense.safetensors"), ["dense.safetensors", "was changed"]),
        (lambda r: change_byte(next(r.rglob("*.arrow"))), [".arrow", "was changed"]),
        (lambda r: (r / "MODEL_CARD.md").unlink(), ["lacks MODEL_CARD.md"]),
        (lambda r: (r / "release.json").write_text("{"), ["release.json", "damaged"]),
        (lambda r: (r / "release.json").write_text("{}"), ["does not describe a release"]),
        (lambda r: (r / "release.json").unlink(), ["no release.json"]),
    ],
    ids=["dense", "table", "card", "cut manifest", "empty manifest", "no manifest"],
)
def test_damaged_release(
    copied: Path, store: Path, tmp_path: Path, damage: Any, words: list[str]
) -> None:
    damage(copied / "release")
    refused(copied, store, tmp_path, *words)


def test_run_without_release(copied: Path, store: Path, tmp_path: Path) -> None:
    shutil.rmtree(copied / "release")
    refused(copied, store, tmp_path, "copied", "no released model", "did not finish")
    refused(tmp_path / "nowhere", store, tmp_path, "nowhere", "does not exist")
    (tmp_path / "other").mkdir()
    refused(tmp_path / "other", store, tmp_path, "other", "no release.json")


def test_release_of_the_python_api_says_how_to_load_it(
    copied: Path, store: Path, tmp_path: Path
) -> None:
    path = copied / "release" / "release.json"
    manifest = json.loads(path.read_text())
    manifest["model"] = None
    path.write_text(json.dumps(manifest))
    result = run("evaluate", copied, "--data", store)
    assert_one_line_error(result, "Python API", "load_release(folder, model)")


def test_store_of_other_columns(finished: Path, tmp_path: Path) -> None:
    schema = {"label": "y", "sparse": [{"name": "a", "num_embeddings": 5}]}
    values = {
        "data": {"format": "parquet", "columns": schema},
        "privacy": {"mechanism": "none"},
        "train": {"steps": 1},
    }
    import pyarrow as pa
    import yaml

    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    pq.write_table(pa.table({"y": [0, 1] * 50, "a": list(range(100))}), tmp_path / "a.parquet")
    other = tmp_path / "other"
    options = ["--to", other, "--config", tmp_path / "config.yaml"]
    result = run("convert", tmp_path / "a.parquet", *options)
    assert result.exit_code == 0, result.output
    assert_one_line_error(run("evaluate", finished, "--data", other), "other")


def test_loaded_model_is_the_released_one(finished: Path) -> None:
    model, schema = load_model(finished)
    release = Release.open(finished / "release")
    assert not model.training and len(schema.sparse) == 26
    state = model.state_dict()
    for name, tensor in release.dense().items():
        assert torch.equal(state[name], tensor)
