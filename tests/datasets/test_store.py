from __future__ import annotations

import errno
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dist_dp.datasets import writing
from dist_dp.datasets.readers import open_reader
from dist_dp.datasets.schema import DataSchema
from dist_dp.datasets.store import ArrowStore, convert
from dist_dp.errors import ConfigError, DataError

SCHEMA = DataSchema.model_validate(
    {
        "label": "y",
        "dense": [{"name": "d"}],
        "sparse": [
            {"name": "a", "num_embeddings": 100},
            {"name": "b", "num_embeddings": 50, "ragged": True},
            {"name": "c", "num_embeddings": 10, "hashed": False},
        ],
    }
)


def write_source(path: Path, rows: int = 500, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    columns = {
        "y": rng.integers(0, 2, rows),
        "d": rng.normal(size=rows),
        "a": rng.integers(0, 1000, rows),
        "b": [rng.integers(0, 9, rng.integers(0, 4)).tolist() for _ in range(rows)],
        "c": rng.integers(0, 10, rows),
    }
    pq.write_table(pa.table(columns), path)
    return path


def rows_of(folder: Path) -> dict[str, list[str]]:
    """Records of each split, as text."""
    store = ArrowStore.open(folder, verify=True)
    result = {}
    for name, info in store.manifest.splits.items():
        table = pa.ipc.open_file(pa.memory_map(str(folder / info.file))).read_all()
        result[name] = [json.dumps(row) for row in table.to_pylist()]
    return result


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "in.parquet")


def test_splits_partition_the_records(source: Path, tmp_path: Path) -> None:
    manifest = convert(source, tmp_path / "out", schema=SCHEMA)
    assert list(manifest.splits) == ["train", "valid", "test"]
    assert manifest.num_rows == 500
    assert 350 < manifest.splits["train"].rows < 450
    whole = convert(source, tmp_path / "all", schema=SCHEMA, split=None)
    assert list(whole.splits) == ["all"]
    parts = rows_of(tmp_path / "out")
    assert sorted(itertools.chain(*parts.values())) == sorted(rows_of(tmp_path / "all")["all"])
    other = convert(source, tmp_path / "seed", schema=SCHEMA, split_seed=1)
    assert other.splits["test"].fingerprint != manifest.splits["test"].fingerprint
    assert other.fingerprint != manifest.fingerprint


def test_the_split_does_not_depend_on_the_order(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", schema=SCHEMA)
    table = pq.read_table(source)
    pq.write_table(table.take(np.random.default_rng(1).permutation(len(table))), source)
    convert(source, tmp_path / "again", schema=SCHEMA)
    first, second = rows_of(tmp_path / "out"), rows_of(tmp_path / "again")
    assert {k: sorted(v) for k, v in first.items()} == {k: sorted(v) for k, v in second.items()}
    assert first != second


def test_conversion_happens_once(source: Path, tmp_path: Path) -> None:
    destination = tmp_path / "out"
    manifest = convert(source, destination, schema=SCHEMA)
    before = (destination / "train.arrow").stat().st_mtime_ns
    assert convert(source, destination, schema=SCHEMA) == manifest
    # Other table sizes and pooling need no new conversion; the caller gets what it asked for.
    bigger = SCHEMA.with_num_embeddings({"a": 7, "c": 20})
    again = convert(source, destination, schema=bigger)
    assert again.data_schema == bigger
    assert again.fingerprint == manifest.fingerprint
    assert (destination / "train.arrow").stat().st_mtime_ns == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.parquet", "out"]


def test_a_store_that_does_not_fit_is_not_reused(source: Path, tmp_path: Path) -> None:
    destination = tmp_path / "out"
    first = convert(source, destination, schema=SCHEMA)
    cases: list[tuple[str, dict[str, Any]]] = [
        ("another split", {"split": None}),
        ("another split", {"split_seed": 4}),
        ("another schema", {"schema": SCHEMA.model_copy(update={"dense": ()})}),
    ]
    for words, changes in cases:
        with pytest.raises(DataError, match=words):
            convert(source, destination, **({"schema": SCHEMA} | changes))
    with pytest.raises(DataError, match="do not fit num_embeddings=9"):
        convert(source, destination, schema=SCHEMA.with_num_embeddings({"c": 9}))
    status = source.stat()
    write_source(source, seed=1)
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(DataError, match="another source"):
        convert(source, destination, schema=SCHEMA)
    assert ArrowStore.open(destination, verify=True).fingerprint == first.fingerprint
    second = convert(source, destination, schema=SCHEMA, overwrite=True)
    assert second.fingerprint != first.fingerprint
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.parquet", "out"]


def test_overwrite_replaces_only_stores(source: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(DataError, match="is not a converted data set"):
            convert(source, tmp_path / "mine", schema=SCHEMA, overwrite=overwrite)
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_the_fingerprint_depends_on_records_alone(source: Path, tmp_path: Path) -> None:
    first = convert(source, tmp_path / "a", schema=SCHEMA)
    moved = source.rename(tmp_path / "moved.parquet")
    os.utime(moved, (1, 1))
    second = convert(moved, tmp_path / "b", schema=SCHEMA.with_num_embeddings({"a": 5}))
    assert second.fingerprint == first.fingerprint
    table = pq.read_table(moved)
    labels = table.column("y").to_numpy().copy()
    labels[17] = 1 - labels[17]
    pq.write_table(table.set_column(0, "y", pa.array(labels)), moved)
    third = convert(moved, tmp_path / "c", schema=SCHEMA)
    assert third.fingerprint != first.fingerprint


def test_skipped_rows_are_reported(source: Path, tmp_path: Path) -> None:
    destination = tmp_path / "out"
    small = SCHEMA.with_num_embeddings({"c": 9})
    with pytest.raises(DataError, match="c is 9"):
        convert(source, destination, schema=small)
    assert not destination.exists()
    manifest = convert(source, destination, schema=small, skip_bad_rows=True)
    skipped = manifest.skipped_rows["c out of range"]
    assert skipped > 0
    assert manifest.num_rows == 500 - skipped
    assert ArrowStore.open(destination).manifest == manifest
    # Who does not accept skipped rows does not get a store that lacks them.
    with pytest.raises(DataError, match="another skip_bad_rows"):
        convert(source, destination, schema=small)
    assert convert(source, destination, schema=small, skip_bad_rows=True) == manifest


def test_no_usable_row(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("1\t2\n" * 5)
    with pytest.raises(DataError, match=r"no usable row is left \(5 skipped\)"):
        convert(path, tmp_path / "out", format="criteo", skip_bad_rows=True)
    assert [p.name for p in tmp_path.iterdir()] == ["a.tsv"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"split": {"train": 0.5}}, "must sum to 1"),
        ({"split": {"train": 1.5, "test": -0.5}}, r"lies in \(0, 1\]"),
        ({"split": {"../x": 1.0}}, "cannot name a split"),
        ({"split_seed": -1}, "split_seed"),
    ],
)
def test_impossible_options(
    source: Path, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        convert(source, tmp_path / "out", schema=SCHEMA, **options)


def test_a_full_disk_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(self: object, data: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writing._HashingFile, "write", write)
    with pytest.raises(DataError, match=r"No space left.*free some space"):
        convert(source, tmp_path / "out", schema=SCHEMA)
    assert [p.name for p in tmp_path.iterdir()] == ["in.parquet"]


def test_a_full_disk_keeps_the_old_store(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = convert(source, tmp_path / "out", schema=SCHEMA)

    def fail(self: object, batch: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writing.SplitWriter, "write", fail)
    with pytest.raises(DataError, match="No space left"):
        convert(source, tmp_path / "out", schema=SCHEMA, overwrite=True, split_seed=3)
    assert ArrowStore.open(tmp_path / "out", verify=True).manifest == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.parquet", "out"]


def test_a_source_that_changes_meanwhile_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = writing.SplitWriter.write

    def write(self: writing.SplitWriter, batch: object) -> None:
        original(self, batch)
        os.utime(source, (5, 5))

    monkeypatch.setattr(writing.SplitWriter, "write", write)
    with pytest.raises(DataError, match="changed while it was read"):
        convert(source, tmp_path / "out", schema=SCHEMA)
    assert not (tmp_path / "out").exists()


def test_what_a_killed_conversion_leaves_is_removed(source: Path, tmp_path: Path) -> None:
    script = """
import sys, time
from dist_dp.datasets import writing
with writing.partial_folder(__import__("pathlib").Path(sys.argv[1])) as folder:
    print(folder, flush=True)
    time.sleep(60)
"""
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        left = Path(process.stdout.readline().strip())
        try:
            # While the other process works, its folder is not touched.
            convert(source, tmp_path / "out", schema=SCHEMA)
            assert left.is_dir()
        finally:
            process.kill()
            process.wait()
    assert left.is_dir()
    convert(source, tmp_path / "out", schema=SCHEMA, split=None, overwrite=True)
    assert not left.exists()


def test_a_store_made_meanwhile_by_another_process_is_used(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader_type = type(open_reader(source, schema=SCHEMA))
    original = reader_type.batches
    nested = []

    def batches(self: Any) -> Any:
        if not nested:
            nested.append(True)
            nested.append(convert(source, tmp_path / "out", schema=SCHEMA))
        return original(self)

    monkeypatch.setattr(reader_type, "batches", batches)
    assert convert(source, tmp_path / "out", schema=SCHEMA) == nested[1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.parquet", "out"]


@pytest.mark.chaos
def test_damage_is_noticed(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    convert(source, folder, schema=SCHEMA)
    train, manifest = folder / "train.arrow", folder / "manifest.json"
    content, text = train.read_bytes(), manifest.read_text()

    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    train.write_bytes(flipped)
    with pytest.raises(DataError, match=r"train\.arrow: is damaged .*sha256"):
        ArrowStore.open(folder, verify=True)
    train.write_bytes(content[:-100])
    with pytest.raises(DataError, match="bytes, not"):
        ArrowStore.open(folder)
    with pytest.raises(DataError, match="bytes, not"):
        convert(source, folder, schema=SCHEMA)
    train.write_bytes(b"x" * len(content))  # the right size, but not Arrow
    with pytest.raises(DataError, match=r"train\.arrow: is damaged"):
        ArrowStore.open(folder).split("train")
    train.unlink()
    with pytest.raises(DataError, match="is missing"):
        ArrowStore.open(folder)
    train.write_bytes(content)

    for damaged, words in (
        (text[:50], "cannot be read"),
        ("[]", "format version None"),
        (text.replace('"format_version": 1', '"format_version": 9'), "format version 9"),
        (text.replace('"split_seed"', '"seed"'), "damaged at"),
        (text.replace('"fingerprint": "', '"fingerprint": "0'), "fingerprint"),
    ):
        manifest.write_text(damaged)
        with pytest.raises(DataError, match=words):
            ArrowStore.open(folder)
    manifest.unlink()
    with pytest.raises(DataError, match="convert the source first"):
        ArrowStore.open(folder)
    manifest.write_text(text)
    ArrowStore.open(folder, verify=True)


def test_opening_with_another_schema(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", schema=SCHEMA)
    bigger = SCHEMA.with_num_embeddings({"a": 12345})
    store = ArrowStore.open(tmp_path / "out", schema=bigger)
    assert store.split("train").schema == bigger
    with pytest.raises(DataError, match="another schema"):
        ArrowStore.open(tmp_path / "out", schema=SCHEMA.model_copy(update={"label": "z"}))
    with pytest.raises(DataError, match="has no split 'holdout'; it has train, valid, test"):
        store.split("holdout")


def test_progress_is_silent_without_a_terminal(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(source, tmp_path / "out", schema=SCHEMA, progress=True)
    assert capsys.readouterr() == ("", "")


@pytest.mark.real_data
def test_real_criteo_is_converted_quickly(real_data: Path, tmp_path: Path) -> None:
    # Ten copies: 100,000 lines. The bound is loose: machines and their load differ.
    head = (real_data / "criteo_head10k" / "train_first10000.tsv").read_bytes()
    (tmp_path / "in.tsv").write_bytes(head * 10)
    start = time.perf_counter()
    manifest = convert(tmp_path / "in.tsv", tmp_path / "out")
    assert time.perf_counter() - start < 20
    assert manifest.num_rows == 100_000
    # Copies of a record stay in one split.
    assert all(info.rows % 10 == 0 for info in manifest.splits.values())
