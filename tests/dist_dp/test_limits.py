"""Files are measured before they are read, and names checked before they are paths."""

from __future__ import annotations

import json
import os
import struct
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dist_dp.arrow_file import ArrowFile
from dist_dp.cluster.config import load_config
from dist_dp.datasets.manifest import identify_file
from dist_dp.datasets.readers import open_reader
from dist_dp.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    LedgerError,
    StaleAttemptError,
)
from dist_dp.fence import Fence
from dist_dp.file_names import safe_name, why_no_name, why_no_path, why_not_inside
from dist_dp.ledger import Ledger
from dist_dp.ledger_address import ledger_address
from dist_dp.ledger_entry import Position
from dist_dp.ledger_export import verify_export
from dist_dp.ledger_witness import Witness
from dist_dp.ledger_witness_folder import WitnessFolder
from dist_dp.limits import MAX_TRAIL_BYTES, parse_json, read_json, read_whole
from dist_dp.trail import StepTrail
from tests.dist_dp.hostile import DEEP, sparse


def test_json_is_read_within_limits(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"a": [1, 2.5, null]}')
    assert read_json(path) == {"a": [1, 2.5, None]}
    assert read_whole(path, most=21) == path.read_bytes()
    with pytest.raises(ValueError, match="21 bytes, at most 20"):
        read_whole(path, most=20)
    sparse(path, 10 << 30)
    began = time.monotonic()
    with pytest.raises(ValueError, match="10,737,418,240 bytes, at most"):
        read_json(path)
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json(DEEP)
    with pytest.raises(ValueError):
        parse_json("9" * 100_000)
    assert time.monotonic() - began < 5


def test_what_is_no_file_keeps_nobody_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(ValueError if path != tmp_path else OSError):
            read_json(path)


def ledger_with_a_pipe_for_its_witness(path: Path) -> None:
    Ledger(path.with_name("ledger.sqlite")).close()
    os.rename(path, f"{path.with_name('ledger.sqlite')}.witness")
    Ledger(path.with_name("ledger.sqlite"))


def address_file_of_a_server(path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(path.parent))
        known = WitnessFolder(ledger_address("postgresql://host/database"))
    known.folder.mkdir(parents=True)
    os.rename(path, known.address_file)
    known.expected()


def attempt(path: Path) -> None:
    fence = Fence.take(path.parent / "private" / "attempts")
    os.rename(path, path.parent / "private" / "attempts" / f"{fence.number:06d}")
    fence.check()


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("read", "error", "words"),
    [
        (Witness.read, LedgerError, "witness .* cannot be used .*no regular file"),
        (Witness.advance, LedgerError, "witness .* cannot be used .*no regular file"),
        (ledger_with_a_pipe_for_its_witness, LedgerError, "witness .* cannot be used"),
        (address_file_of_a_server, LedgerError, "cannot be used .*no regular file"),
        (verify_export, DataError, "no regular file"),
        (attempt, StaleAttemptError, "given up"),
        (StepTrail, CheckpointError, "no regular file"),
        (ArrowFile, ValueError, "no regular file"),
        (load_config, ConfigError, "no regular file"),
        (open_reader, DataError, "no regular file"),
        (identify_file, ValueError, "no regular file"),
    ],
)
def test_a_pipe_in_a_file_s_place_keeps_nobody_waiting(
    tmp_path: Path, read: Any, error: type[Exception], words: str
) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    if read in (Witness.read, Witness.advance):
        arguments: tuple[Any, ...] = (Position("0" * 32, 1, "0" * 64),)
        arguments = (Witness(path), *(arguments if read == Witness.advance else ()))
    else:
        arguments = (path,)
    with pytest.raises(error, match=words):
        read(*arguments)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "/etc/passwd", "a\0b", "a\nb", "x" * 256, "\udcff", None, 3]
)
def test_what_is_no_name(name: Any) -> None:
    assert why_no_name(name) is not None


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "a//b", "a/./b", "a/", None])
def test_what_is_no_path_below(name: Any) -> None:
    assert why_no_path(name) is not None


def test_links_are_followed(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "in").mkdir(parents=True)
    (folder / "in" / "file").touch()
    (folder / "link").symlink_to(folder / "in" / "file")
    (folder / "away").symlink_to("/etc")
    assert why_no_name("day_0.arrow") is None
    assert why_not_inside(folder, "in/file") is None
    assert why_not_inside(folder, "link") is None
    assert "leads out" in str(why_not_inside(folder, "away/passwd"))


def test_texts_become_names() -> None:
    assert safe_name("clicks-2026") == "clicks-2026"
    for text in ("../../etc", "/abs", "a\0b", "x" * 9999, "…", "", "."):
        assert why_no_name(safe_name(text)) is None and not safe_name(text).startswith(".")


def test_exports_with_endless_lines_or_brackets(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    sparse(path, 10 << 30)
    with pytest.raises(DataError, match="a line is longer"):
        verify_export(path)
    head = {"format": "dist-dp-ledger", "version": 2, "ledger_id": "a", "seq": 1, "hash": "b"}
    path.write_bytes(json.dumps(head).encode() + b"\n" + DEEP + b"\n")
    with pytest.raises(LedgerError, match="line 2 is no entry"):
        verify_export(path)


def test_a_trail_beyond_belief(tmp_path: Path) -> None:
    sparse(tmp_path / "trail", MAX_TRAIL_BYTES + 1)
    with pytest.raises(CheckpointError, match="no trail"):
        StepTrail(tmp_path / "trail")


def arrow(path: Path, batch: Any, **options: Any) -> bytes:
    with pa.ipc.new_file(str(path), batch.schema, options=pa.ipc.IpcWriteOptions(**options)) as to:
        to.write_batch(batch)
    return path.read_bytes()


def test_arrow_files_hold_what_they_claim(tmp_path: Path) -> None:
    path = tmp_path / "x.arrow"
    rows = 0x1234567
    content = arrow(path, pa.record_batch([pa.array(range(1000), pa.int64())], ["a"]))
    assert [b.num_rows for b in ArrowFile(path).batches()] == [1000]
    # The length of the batch, and of its column, as they stand in the file.
    for length in (10**18, rows, -1):
        bad = content.replace(struct.pack("<q", 1000), struct.pack("<q", length))
        assert bad != content
        path.write_bytes(bad)
        with pytest.raises(ValueError):
            list(ArrowFile(path).batches())
    for bad in (content[:100], content[:-1], b"", content[:-10] + b"\xff\xff\xff\x7fARROW1"):
        path.write_bytes(bad)
        with pytest.raises(ValueError):
            list(ArrowFile(path).batches())
    zeros = pa.record_batch([pa.array([0] * 100_000, pa.int64())], ["a"])
    arrow(path, zeros, compression="zstd")
    with pytest.raises(ValueError, match="compressed"):
        list(ArrowFile(path).batches())
