"""A store made to hurt: refused by name, nothing in it runs, nothing outside it is read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from dist_dp.datasets.manifest import SplitInfo, combined_fingerprint
from dist_dp.datasets.store import ArrowStore, convert
from dist_dp.errors import DataError
from tests.datasets.test_store import SCHEMA, write_source
from tests.dist_dp.hostile import DEEP, planted_pickle, sparse


@pytest.fixture
def store(tmp_path: Path) -> Path:
    convert(write_source(tmp_path / "in.parquet"), tmp_path / "store", schema=SCHEMA, split=None)
    return tmp_path / "store"


def rewritten(store: Path, change: Callable[[Any], object], content: bytes | None = None) -> Path:
    """The store with another manifest, whose digests are right."""
    path = store / "manifest.json"
    values = json.loads(path.read_text())
    info = values["splits"]["all"]
    if content is not None:
        (store / "all.arrow").write_bytes(content)
        info |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    change(info)
    named = {"all": SplitInfo.model_construct(**info)}
    values["fingerprint"] = combined_fingerprint(named)
    path.write_text(json.dumps(values))
    return store


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("../outside.arrow", "is a path"),
        ("/etc/passwd", "is a path"),
        ("..", "leads out"),
        ("a\0b", "control character"),
        ("link.arrow", "link that leads out"),
    ],
)
def test_files_elsewhere_are_not_read(store: Path, name: str, words: str) -> None:
    shutil.copy(store / "all.arrow", store.parent / "outside.arrow")
    (store / "link.arrow").symlink_to(store.parent / "outside.arrow")
    with pytest.raises(DataError, match=words):
        ArrowStore.open(rewritten(store, lambda info: info.update(file=name)))


@pytest.mark.parametrize("rows", [-1, 10**18])
def test_rows_that_are_not_there(store: Path, rows: int) -> None:
    with pytest.raises(DataError, match=r"the manifest says|damaged at 'splits\.all\.rows'"):
        ArrowStore.open(rewritten(store, lambda info: info.update(rows=rows))).split("all")


@pytest.mark.parametrize("length", [10**18, 501, -1])
def test_a_batch_that_claims_more_than_it_holds(store: Path, length: int) -> None:
    content = (store / "all.arrow").read_bytes()
    bad = content.replace(struct.pack("<q", 500), struct.pack("<q", length))
    assert bad != content
    rewritten(store, lambda info: info.update(rows=length if length > 0 else 500), bad)
    with pytest.raises(DataError, match="is damaged"):
        ArrowStore.open(store, verify=True).split("all")


@pytest.mark.parametrize("offset", [-5, 2**31 - 1, -(2**31)])
def test_lists_that_lie_outside_their_batch(store: Path, offset: int) -> None:
    whole = pa.ipc.open_file(pa.memory_map(str(store / "all.arrow"))).read_all()
    offsets = np.asarray(whole.column("bag:b").chunk(0).offsets)
    content = (store / "all.arrow").read_bytes()
    place = content.index(offsets.tobytes()) + 4 * 100
    bad = content[:place] + struct.pack("<i", offset) + content[place + 4 :]
    split = ArrowStore.open(rewritten(store, lambda info: None, bad), verify=True).split("all")
    for record in (99, 100):
        began = time.monotonic()
        with pytest.raises(DataError, match="lists that do not lie in their batch"):
            split.batch(np.array([record]))
        assert time.monotonic() - began < 20  # gigabytes would take longer


def test_pickles_depths_and_lengths(store: Path, tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    planted = planted_pickle(touched)
    copied = Path(shutil.copytree(store, tmp_path / "copied"))
    with pytest.raises(DataError, match="is damaged"):
        ArrowStore.open(rewritten(copied, lambda info: None, planted)).split("all")
    path = store / "manifest.json"
    for content in (planted, DEEP):
        path.write_bytes(content)
        with pytest.raises(DataError, match="cannot be read"):
            ArrowStore.open(store)
    sparse(path, 10 << 30)
    with pytest.raises(DataError, match="10,737,418,240 bytes"):
        ArrowStore.open(store)
    assert not touched.exists()


@pytest.mark.parametrize(
    ("source", "umask", "store"),
    [(0o644, 0o022, 0o755), (0o600, 0o022, 0o700), (0o640, 0o022, 0o750), (0o644, 0o077, 0o700)],
)
def test_a_store_is_read_by_those_who_may_read_its_source(
    tmp_path: Path, source: int, umask: int, store: int
) -> None:
    path = tmp_path / "rows.parquet"
    write_source(path)
    path.chmod(source)
    before = os.umask(umask)
    try:
        convert(path, tmp_path / "store", schema=SCHEMA)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "store").stat().st_mode) == store
