"""Checkpoints and releases made to hurt: refused by name, quickly, and nothing in them runs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from dist_dp import checkpoint_folder
from dist_dp.checkpoint import find_checkpoint, read_checkpoint_info
from dist_dp.errors import CheckpointError, DistDpError, ReleaseError
from dist_dp.ledger import Ledger
from dist_dp.ledger_export import verify_export
from dist_dp.released import Release, load_release
from dist_dp.trail import StepTrail
from tests.dist_dp.checkpoint_runs import go_on
from tests.dist_dp.hostile import DEEP, planted_pickle, sparse
from tests.dist_dp.placement import model

Change = Callable[[Any], object]


@pytest.fixture(autouse=True)
def quickly() -> Iterator[None]:
    """Whatever a file claims: no second is spent on it, nor a gigabyte."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < 60


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and a release, without noise: there is no ε to compose."""
    home = tmp_path_factory.mktemp("made")
    go_on(home, 1, save=True, mechanism="none").release(home / "release")
    return home


@pytest.fixture
def home(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "home"))


@pytest.fixture
def planted(tmp_path: Path) -> Iterator[bytes]:
    """A pickle; at the end nobody has loaded it."""
    touched = tmp_path / "touched"
    yield planted_pickle(touched)
    assert not touched.exists()


# Checkpoints, sealed by whoever changed them.


def resealed(home: Path, change: Change, file: str = "index.json") -> None:
    folder = find_checkpoint(home / "checkpoint")
    info = json.loads((folder / "checkpoint.json").read_text())
    values = info if file == "checkpoint.json" else json.loads((folder / file).read_text())
    change(values)
    if file != "checkpoint.json":
        (folder / file).write_text(json.dumps(values))
        info["index_sha256"] = hashlib.sha256((folder / file).read_bytes()).hexdigest()
    info["seal"] = checkpoint_folder._seal(info, (folder / "secret").read_bytes())
    (folder / "checkpoint.json").write_text(json.dumps(info))


def dense(index: Any) -> Any:
    return next(t for name, t in index["tensors"].items() if name.startswith("dense/"))


def put(key: str, value: Any) -> Change:
    return lambda index: dense(index)["chunks"][0].update({key: value})


def huge(index: Any) -> None:
    """A schedule is allocated in the size that is claimed."""
    index["tensors"]["schedules/0/prefix"] = {
        "dtype": "float64",
        "shape": [1 << 40],
        "chunks": [{**dense(index)["chunks"][0], "offsets": [0], "sizes": [1 << 40]}],
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put("sizes", [1 << 60]), "lies outside"),
        (put("sizes", [-4, -8]), "no sizes"),
        (put("sizes", [10**30, 1]), "no sizes"),
        (put("offsets", [-1, 0]), "no sizes"),
        (put("start", 1 << 60), "shorter than the index says"),
        (put("start", -1), "no sizes"),
        (put("file", "../../../secret"), "is a path|leads out"),
        (put("file", "/etc/passwd"), "absolute path"),
        (put("file", ".."), "leads out"),
        (put("file", "gone.bin"), "is missing"),
        (huge, "shorter than the index says .tensor 'schedules/0/prefix'"),
        (lambda index: dense(index).update(dtype="load"), "no dtype"),
        (lambda index: dense(index).update(shape=[1 << 50, 1 << 50]), "outside|not the whole"),
        (lambda index: index.update(tensors=[]), "damaged"),
    ],
)
def test_an_index_that_claims_too_much(home: Path, change: Change, words: str) -> None:
    resealed(home, change)
    with pytest.raises(CheckpointError, match=words):
        go_on(home, mechanism="none")


def test_a_checkpoint_that_lacks_what_it_must_say(home: Path) -> None:
    resealed(home, lambda info: info.pop("plan"), "checkpoint.json")
    with pytest.raises(CheckpointError, match="lacks 'plan'"):
        read_checkpoint_info(home / "checkpoint")


@pytest.mark.parametrize("name", ["checkpoint.json", "index.json", "secret", "tensors-00000.bin"])
def test_pickles_pipes_depths_and_lengths_in_a_checkpoint(
    home: Path, planted: bytes, name: str
) -> None:
    path = find_checkpoint(home / "checkpoint") / name
    for content in (planted, DEEP):
        path.write_bytes(content)
        with pytest.raises(CheckpointError):
            go_on(home, mechanism="none")
    if name != "tensors-00000.bin":
        sparse(path, 10 << 30)
        with pytest.raises(CheckpointError, match=r"10,737,418,240 bytes"):
            go_on(home, mechanism="none")
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(CheckpointError, match="no regular file"):
            go_on(home, mechanism="none")


# Releases, whose hashes are those of what is in them.


def rewritten(home: Path, change: Change | None = None, **files: bytes) -> Path:
    folder = home / "release"
    manifest = json.loads((folder / "release.json").read_text())
    for name, content in files.items():
        path = next(p for p in folder.rglob("*") if name in p.name)
        path.write_bytes(content)
        facts = manifest["files"][str(path.relative_to(folder))]
        facts |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    if change is not None:
        change(manifest)
    (folder / "release.json").write_text(json.dumps(manifest))
    return folder


def first_table(manifest: Any) -> Any:
    return next(iter(manifest["tables"].values()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m["files"].update({"../x": {"bytes": 1, "sha256": ""}}), "leads out"),
        (lambda m: m["files"].update({"/etc/passwd": {"bytes": 1, "sha256": ""}}), "absolute"),
        (
            lambda m: m["files"].update(
                {"../release/MODEL_CARD.md": m["files"].pop("MODEL_CARD.md")}
            ),
            "leads out",
        ),
        (lambda m: m["files"].update({"a\0b": {"bytes": 1, "sha256": ""}}), "control"),
        (lambda m: m["files"].pop("dense.safetensors"), "lacks dense.safetensors"),
        (lambda m: first_table(m).update(rows=10**18), "claims 1000000000000000000 rows"),
        (lambda m: first_table(m).update(dim=-4), "damaged at 'tables"),
        (lambda m: first_table(m).update(rows="9"), "damaged at 'tables"),
        (lambda m: m.update(files=[]), "damaged at 'files'"),
        (lambda m: m.pop("tables"), "damaged at 'tables'"),
    ],
)
def test_a_manifest_that_claims_too_much(home: Path, change: Change, words: str) -> None:
    with pytest.raises(ReleaseError, match=words):
        Release.open(rewritten(home, change))


def test_a_link_out_of_a_release(home: Path, tmp_path: Path) -> None:
    folder = home / "release"
    shutil.move(folder / "MODEL_CARD.md", tmp_path / "elsewhere.md")
    (folder / "MODEL_CARD.md").symlink_to(tmp_path / "elsewhere.md")
    with pytest.raises(ReleaseError, match="link that leads out"):
        Release.open(folder)


def load(folder: Path) -> None:
    module = model(meta=False)
    module.register_buffer("fixed", torch.zeros(3))  # as the run's has
    load_release(folder, module)


def test_the_release_itself_loads(home: Path) -> None:
    load(rewritten(home))


def header(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


@pytest.mark.parametrize(
    "content",
    [
        header(b"{}", 1 << 60),
        header(DEEP),
        header(b'{"a":{"dtype":"F32","shape":[1152921504606846976],"data_offsets":[0,4]}}'),
        header(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}') + bytes(4),
        b"",
    ],
    ids=["header", "depth", "shape", "negative", "empty"],
)
def test_dense_layers_that_claim_too_much(home: Path, content: bytes) -> None:
    with pytest.raises(ReleaseError, match=r"dense\.safetensors' is damaged"):
        load(rewritten(home, **{"dense.safetensors": content}))


def batch(rows: Any, width: int, offset: str = "0", kind: Any = None) -> bytes:
    values = pa.array([0.0] * (len(rows) * width), kind or pa.float32())
    schema = pa.schema(
        [("row", pa.int64()), ("embedding", pa.list_(values.type, width))],
        metadata={"column_offset": offset},
    )
    columns = [pa.array(rows, pa.int64()), pa.FixedSizeListArray.from_arrays(values, width)]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch(columns, schema=schema))
    return bytes(sink.getvalue().to_pybytes())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (batch([10**18], 8), "rows .* are not all in"),
        (batch([-1], 8), "rows .* are not all in"),
        (batch([0], 8, "-8"), "columns .* are not all in"),
        (batch([0], 8, "9" * 5000), "columns .* are not all in"),
        (batch([0], 4096), "columns .* are not all in"),
        (batch([0], 8, kind=pa.float64()), "not those of a released table"),
        (batch([None], 8), "lacks values"),
    ],
)
def test_tables_that_lie_elsewhere(home: Path, content: bytes, words: str) -> None:
    pad = next((home / "release").rglob("part-00000-000*")).with_name("pad.arrow")
    pad.write_bytes(bytes(1 << 20))  # so that it is not the sizes that are refused
    facts = {"bytes": 1 << 20, "sha256": hashlib.sha256(bytes(1 << 20)).hexdigest()}
    name = str(pad.relative_to(home / "release"))
    folder = rewritten(
        home, lambda m: m["files"].update({name: facts}), **{"part-00000-000": content}
    )
    with pytest.raises(ReleaseError, match=words):
        load(folder)


def test_pickles_and_lengths_in_a_release(home: Path, planted: bytes) -> None:
    for name in ("dense.safetensors", "part-00000-000"):
        copied = Path(shutil.copytree(home, home.with_name(name)))
        with pytest.raises(ReleaseError, match=r"is damaged|claims"):
            load(rewritten(copied, **{name: planted}))
    path = home / "release" / "release.json"
    for content in (planted, DEEP):
        path.write_bytes(content)
        with pytest.raises(ReleaseError, match="damaged"):
            load(home / "release")
    sparse(path, 10 << 30)
    with pytest.raises(ReleaseError, match="10,737,418,240 bytes"):
        load(home / "release")


# What else is read.


def test_pickles_elsewhere(tmp_path: Path, planted: bytes) -> None:
    for name in ("ledger.sqlite", "x.jsonl"):
        (tmp_path / name).write_bytes(planted)
    with pytest.raises(DistDpError):
        Ledger(tmp_path / "ledger.sqlite")
    with pytest.raises(DistDpError):
        verify_export(tmp_path / "x.jsonl")
    whole = Ledger(tmp_path / "whole.sqlite")
    whole.register_dataset("clicks", fingerprint="f", num_records=10, epsilon=1.0, delta=1e-5)
    witness = tmp_path / "whole.sqlite.witness"
    witness.write_bytes(planted)
    with pytest.raises(DistDpError, match="witness"):
        Ledger(tmp_path / "whole.sqlite").datasets()
    # A trail is records of 16 bytes, whatever they say: nothing in it agrees with a step.
    (tmp_path / "trail").write_bytes(planted)
    trail = StepTrail(tmp_path / "trail")
    assert trail.last_step_after(0) == 0 and not trail.is_whole
    trail.close()
