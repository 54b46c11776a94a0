"""Conversion in parts gives the store of one pass, whoever writes which part when."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dist_dp.datasets.convert import DEFAULT_SPLIT, write_store
from dist_dp.datasets.manifest import Manifest, SplitInfo
from dist_dp.datasets.parts import PartsPlan, assemble, part_folder, parts_folder, read_part
from dist_dp.datasets.parts import write_part as write_one
from dist_dp.datasets.readers import Reader, open_reader
from dist_dp.datasets.readers.spans import Span, lines_before, text_spans
from dist_dp.datasets.schema import DataSchema
from dist_dp.errors import DataError
from tests.datasets.test_criteo import line
from tests.datasets.test_movielens import write_100k

CHUNK = 4000
RAGGED = DataSchema.model_validate(
    {
        "label": "y",
        "dense": [{"name": "x"}],
        "sparse": [{"name": "bag", "num_embeddings": 50, "ragged": True}],
    }
)


def criteo(folder: Path) -> Path:
    path = folder / "a.tsv"
    path.write_text("".join(line(i) + "\n" for i in range(200)))
    return path


def compressed(folder: Path) -> Path:
    path = folder / "a.tsv.gz"
    path.write_bytes(gzip.compress(criteo(folder).read_bytes()))
    return path


def parquet(folder: Path) -> Path:
    place = folder / "tables"
    place.mkdir()
    for part in range(3):
        rows = {
            "y": [i % 2 for i in range(40)],
            "x": [float(i + part) for i in range(40)],
            "bag": [[part, *range(i % 4)] for i in range(40)],
        }
        pq.write_table(pa.table(rows), place / f"{part}.parquet")
    return place


def convert_in_parts(
    reader: Reader, destination: Path, order: Callable[[int], list[int]] = lambda n: [*range(n)]
) -> Manifest:
    def fill(reader: Reader, folder: Path, split: dict[str, float] | None) -> dict[str, SplitInfo]:
        plan = PartsPlan.of(reader, split, CHUNK)
        with parts_folder(destination, plan) as parts:
            for index in order(len(plan.spans)):
                write_one(parts, plan, index)
            found = [read_part(parts, index) for index in range(len(plan.spans))]
            whole = [part for part in found if part is not None]
            assert len(whole) == len(found)
            splits, reader.skipped = assemble(parts, whole, reader.schema, folder)
            return splits

    return write_store(reader, destination, fill=fill)


@pytest.mark.parametrize(
    ("make", "schema", "parts"),
    [(criteo, None, 15), (compressed, None, 1), (write_100k, None, 1), (parquet, RAGGED, 3)],
)
def test_the_store_is_that_of_one_pass(
    tmp_path: Path, make: Callable[[Path], Path], schema: DataSchema | None, parts: int
) -> None:
    source = make(tmp_path)
    source = tmp_path if make is write_100k else source
    whole = write_store(open_reader(source, schema=schema, chunk_bytes=CHUNK), tmp_path / "whole")
    reader = open_reader(source, schema=schema, chunk_bytes=CHUNK)
    assert len(reader.spans(CHUNK)) == parts
    rng = np.random.default_rng(0)
    made = convert_in_parts(reader, tmp_path / "made", lambda n: rng.permutation(n).tolist())
    # Sha256 of the files too: not a byte differs.
    assert made == whole


def test_spans_cover_the_file_in_whole_lines(tmp_path: Path) -> None:
    path = criteo(tmp_path)
    data = path.read_bytes()
    spans = text_spans(path, 2 * CHUNK, CHUNK)
    assert [s.start for s in spans] == [0, *(s.end for s in spans[:-1])]
    assert spans[-1].end is None
    for span in spans[1:]:
        assert data[span.start - 1 : span.start] == b"\n"
        assert lines_before(span) == data[: span.start].count(b"\n")
    sizes = [(s.end or len(data)) - s.start for s in spans]
    assert max(sizes) < 2 * CHUNK + max(map(len, data.split(b"\n")))


def test_a_line_longer_than_a_span_is_not_cut(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_bytes(b"a\n" + b"b" * 70_000 + b"\nc\n" + b"d" * 2000)
    spans = text_spans(path, 1000, 1000)
    assert spans == [Span(str(path), 0, 2), Span(str(path), 2, 70_005), Span(str(path), 70_005)]


def test_a_bad_row_is_named_by_its_line(tmp_path: Path) -> None:
    path = criteo(tmp_path)
    lines = path.read_text().splitlines()
    lines[150] = lines[150].replace("\t", " ", 1)
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"a\.tsv:151: 39 fields where 40 belong"):
        convert_in_parts(open_reader(path, chunk_bytes=CHUNK), tmp_path / "made")
    reader = open_reader(path, chunk_bytes=CHUNK, skip_bad_rows=True)
    made = convert_in_parts(reader, tmp_path / "made")
    assert made.skipped_rows == {"wrong number of fields": 1}
    whole = write_store(
        open_reader(path, chunk_bytes=CHUNK, skip_bad_rows=True), tmp_path / "whole"
    )
    assert made == whole


def test_whole_parts_are_kept_and_others_made_again(tmp_path: Path) -> None:
    path, destination = criteo(tmp_path), tmp_path / "made"
    reader = open_reader(path, chunk_bytes=CHUNK)
    plan = PartsPlan.of(reader, DEFAULT_SPLIT, CHUNK)
    with parts_folder(destination, plan) as folder:
        for index in (0, 3, 5):
            write_one(folder, plan, index)
        kept = part_folder(folder, 3).stat().st_ino
        train = part_folder(folder, 5) / "train.arrow"
        train.write_bytes(train.read_bytes()[:-1])  # A disk that lost the end.
        (folder / ".part-000007.abc").mkdir()  # What a killed process leaves.
        with pytest.raises(DataError, match="another process"), parts_folder(destination, plan):
            pass
    with parts_folder(destination, plan) as folder:
        assert [i for i in range(15) if read_part(folder, i)] == [0, 3]
        assert not (folder / ".part-000007.abc").exists()
    convert_in_parts(reader, destination)
    assert part_folder(folder, 3).stat().st_ino == kept
    # Another plan starts anew.
    other = PartsPlan(**{**asdict(plan), "spans": plan.spans, "split_seed": 1})
    with parts_folder(destination, other) as folder:
        assert not any(read_part(folder, i) for i in range(15))


def test_a_damaged_part_makes_no_store(tmp_path: Path) -> None:
    path, destination = criteo(tmp_path), tmp_path / "made"
    reader = open_reader(path, chunk_bytes=CHUNK)
    plan = PartsPlan.of(reader, DEFAULT_SPLIT, CHUNK)
    with parts_folder(destination, plan) as folder:
        write_one(folder, plan, 2)
        train = part_folder(folder, 2) / "train.arrow"
        data = bytearray(train.read_bytes())
        data[len(data) // 2] ^= 1
        train.write_bytes(data)
    with pytest.raises(DataError, match=r"part-000002/train.arrow: is damaged.*remove"):
        convert_in_parts(reader, destination)
    assert not destination.exists()


def test_more_bad_rows_than_allowed_are_an_error(tmp_path: Path) -> None:
    path = criteo(tmp_path)
    with path.open("a") as stream:
        stream.write("bad\nworse\n\n")
    reader = open_reader(path, chunk_bytes=CHUNK, skip_bad_rows=True)
    reader.max_bad_rows = 2
    with pytest.raises(DataError, match=r"3 bad rows so far \(1 empty line, 2 wrong number"):
        write_store(reader, tmp_path / "made")
    reader = open_reader(path, chunk_bytes=CHUNK, skip_bad_rows=True)
    reader.max_bad_rows = 3
    assert sum(write_store(reader, tmp_path / "made").skipped_rows.values()) == 3
