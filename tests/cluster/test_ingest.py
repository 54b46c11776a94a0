"""Conversion on Ray Data: the store of one pass, also after a conversion was killed."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from dist_dp.cluster.ingest import convert_distributed
from dist_dp.datasets.convert import write_store
from dist_dp.datasets.readers import open_reader
from dist_dp.datasets.store import ArrowStore
from dist_dp.datasets.synthetic import criteo_like_schema, write_criteo_like
from dist_dp.datasets.truth import SyntheticSettings
from dist_dp.errors import DataError
from tests.cluster.small import start

pytestmark = [pytest.mark.ray, pytest.mark.slow]

CHUNK = 64 << 10


@pytest.fixture
def with_bad_rows(tmp_path: Path, clicks: Path) -> Path:
    lines = clicks.read_text().splitlines()
    for row in (3, 700, 1999):
        lines[row] = lines[row].replace("\t", " ", 1)
    path = tmp_path / "bad.tsv"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.usefixtures("ray_local")
def test_the_store_is_that_of_one_pass(tmp_path: Path, with_bad_rows: Path) -> None:
    said: list[tuple[int, int]] = []
    made = convert_distributed(
        with_bad_rows,
        tmp_path / "made",
        skip_bad_rows=True,
        watch=lambda *seen: said.append(seen),
        part_bytes=CHUNK,
    )
    reader = open_reader(with_bad_rows, chunk_bytes=CHUNK, skip_bad_rows=True)
    assert made == write_store(reader, tmp_path / "whole")
    assert made.skipped_rows == {"wrong number of fields": 3}
    parts = len(reader.spans(CHUNK))
    assert parts > 5 and said == [(done, parts) for done in range(parts + 1)]
    assert ArrowStore.open(tmp_path / "made", verify=True).manifest == made
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.tsv", "made", "whole"]
    # What is there already is not made again, and Ray is not asked.
    assert convert_distributed(with_bad_rows, tmp_path / "made", skip_bad_rows=True) == made


@pytest.mark.usefixtures("ray_local")
def test_bad_rows_are_errors_as_in_one_pass(tmp_path: Path, with_bad_rows: Path) -> None:
    with pytest.raises(DataError, match=r"bad\.tsv:(4|701|2000): 39 fields where 40 belong"):
        convert_distributed(with_bad_rows, tmp_path / "made", part_bytes=CHUNK)
    with pytest.raises(DataError, match=r"3 bad rows so far \(3 wrong.*more than the 2 allowed"):
        convert_distributed(
            with_bad_rows, tmp_path / "made", skip_bad_rows=True, max_bad_rows=2, part_bytes=CHUNK
        )
    assert not (tmp_path / "made").exists()


@pytest.mark.usefixtures("ray_local")
def test_a_killed_conversion_goes_on_with_what_is_whole(tmp_path: Path) -> None:
    source = tmp_path / "clicks.tsv"
    write_criteo_like(source, 25_000, seed=2)
    store, parts = tmp_path / "store", tmp_path / ".store.parts"
    command = ["convert", source, "--to", store, "--distributed", "--part-mib", "1"]
    process = start(*command, folder=tmp_path)
    deadline = time.monotonic() + 60
    while len(whole := list(parts.glob("part-*/part.json"))) < 2:
        assert process.poll() is None, (tmp_path / "err.txt").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not store.exists()
    with pytest.raises(DataError, match="not a converted data set"):
        ArrowStore.open(parts)
    kept = {path: path.stat().st_mtime_ns for path in whole}
    seen: list[dict[Path, int]] = []

    def watch(done: int, count: int) -> None:
        seen.append({path: path.stat().st_mtime_ns for path in kept})
        said.append((done, count))

    said: list[tuple[int, int]] = []
    made = convert_distributed(source, store, part_bytes=1 << 20, watch=watch)
    assert said[0][0] >= 2 and said[-1][0] == said[-1][1] > said[0][0]
    assert seen[-1] == kept
    reader = open_reader(source, chunk_bytes=1 << 20)
    assert made == write_store(reader, tmp_path / "whole")
    assert not parts.exists()


@pytest.mark.usefixtures("ray_local")
def test_users_are_those_of_one_pass(tmp_path: Path) -> None:
    source = tmp_path / "clicks.parquet"
    write_criteo_like(source, 500, seed=3, num_users=40)
    schema = criteo_like_schema(SyntheticSettings(num_users=40))
    made = convert_distributed(source, tmp_path / "made", schema=schema)
    assert made == write_store(open_reader(source, schema=schema), tmp_path / "whole")
    assert ArrowStore.open(tmp_path / "made", verify=True).manifest.data_schema.user == "user"
