"""Bad input through the command line: one clear line, nothing charged, nothing half-written.

None of these gets as far as starting Ray.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dist_dp.cluster.config import parse_config
from dist_dp.cluster.prepare import prepare
from tests.cluster.small import (
    assert_one_line_error,
    run,
    runs_left,
    small,
    write_config,
)

PARQUET = {
    "label": "click",
    "dense": [{"name": "price"}],
    "sparse": [{"name": "shop", "num_embeddings": 5, "hashed": False}],
}


def refused(tmp_path: Path, values: dict[str, Any], *words: str, options: Any = ()) -> None:
    """Training is refused in one line with these words, and leaves neither run nor ledger."""
    result = run("train", "-c", write_config(tmp_path, values), *options)
    assert_one_line_error(result, *words)
    assert runs_left(tmp_path) == []
    assert not (tmp_path / "ledger.sqlite").exists()


# Where a plan is made, calibrating the noise would take seconds.
KNOWN_NOISE = {"epsilon": None, "noise_multiplier": 1.0}


def stores(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "runs").rglob("manifest.json"))


def edited(source: Path, folder: Path, line: int, edit: Callable[[list[str]], list[str]]) -> Path:
    lines = source.read_text().splitlines()
    lines[line - 1] = "\t".join(edit(lines[line - 1].split("\t")))
    path = folder / "bad.tsv"
    path.write_text("\n".join(lines) + "\n")
    return path


def with_field(index: int, value: str) -> Callable[[list[str]], list[str]]:
    return lambda fields: [*fields[:index], value, *fields[index + 1 :]]


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda fields: fields[:-1], ["39 fields where 40"]),
        (with_field(3, "three"), ["I3", "'three'"]),
        (with_field(0, "2"), ["label", "2"]),
        (with_field(0, ""), ["label"]),
        (with_field(5, "nan"), ["I5", "nan"]),
    ],
    ids=["missing field", "non-number", "label of 2", "no label", "NaN"],
)
def test_bad_line(tmp_path: Path, clicks: Path, edit: Any, words: list[str]) -> None:
    path = edited(clicks, tmp_path, 1234, edit)
    refused(tmp_path, small(tmp_path, path), "bad.tsv:1234", *words)
    assert stores(tmp_path) == []


def test_skipped_rows_are_counted_and_reported(tmp_path: Path, clicks: Path) -> None:
    path = edited(clicks, tmp_path, 1234, with_field(3, "three"))
    prepared = prepare(
        parse_config(small(tmp_path, path, data={"skip_bad_rows": True}, privacy=KNOWN_NOISE))
    )
    assert sum(prepared.store.manifest.skipped_rows.values()) == 1
    rows = [len(prepared.store.split(name)) for name in prepared.store.split_names()]
    assert sum(rows) == 1999
    result = run("convert", path, "--to", tmp_path / "store", "--skip-bad-rows")
    assert result.exit_code == 0
    assert "left out: 1 bad rows (1 " in result.stdout
    assert_one_line_error(run("convert", path, "--to", tmp_path / "other"), "bad.tsv:1234")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("column", "values", "words"),
    [
        ("shop", [0, 7, 1], ["row 1", "shop is 7", "[0, 5)"]),
        ("price", [0.0, float("nan"), 1.0], ["row 1", "price is nan"]),
        ("click", [0, 1, 3], ["row 2", "is 3"]),
    ],
)
def test_bad_parquet(tmp_path: Path, column: str, values: Any, words: list[str]) -> None:
    table = {"click": [0, 1, 1], "price": [1.0, 2.0, 3.0], "shop": [0, 1, 4], column: values}
    path = tmp_path / "clicks.parquet"
    pq.write_table(pa.table(table), path)
    data = {"format": "parquet", "columns": PARQUET, "max_num_embeddings": None}
    refused(tmp_path, small(tmp_path, path, data=data), "clicks.parquet", *words)


def test_empty_and_missing_data(tmp_path: Path) -> None:
    (tmp_path / "empty.tsv").touch()
    refused(tmp_path, small(tmp_path, tmp_path / "empty.tsv"), "empty.tsv", "the file is empty")
    refused(tmp_path, small(tmp_path, tmp_path / "none.tsv"), "none.tsv", "no such file")
    refused(tmp_path, small(tmp_path, None), "data.path is missing", "--data")


def test_impossible_privacy(tmp_path: Path, clicks: Path) -> None:
    values = small(tmp_path, clicks)
    refused(tmp_path, values, "delta 0.01", "1/num_records", options=["--delta", "0.01"])
    refused(tmp_path, values, "privacy.epsilon", "above 0", options=["--epsilon", "0"])
    refused(tmp_path, values, "privacy.epsilon", "above 0", options=["--epsilon", "-2"])
    refused(tmp_path, values, "privacy.delta", options=["--delta", "0"])
    values = small(tmp_path, clicks, train={"expected_batch_size": 4000})
    refused(tmp_path, values, "expected_batch_size 4000", "larger than", "lower")
    # A large δ can be forced.
    forced = {**KNOWN_NOISE, "delta": 0.01, "allow_large_delta": True}
    forced_config = parse_config(small(tmp_path, clicks, privacy=forced))
    assert prepare(forced_config).plan.delta == 0.01


def test_optimizer_that_the_mechanism_cannot_serve(tmp_path: Path, clicks: Path) -> None:
    values = small(tmp_path, clicks, train={"table_optimizer": "adagrad"})
    refused(tmp_path, values, "train.table_optimizer", "lazydp", "adagrad", "use sgd")


def test_unknown_tables(tmp_path: Path, clicks: Path) -> None:
    values = small(tmp_path, clicks, model={"sharding": {"C99": "row_wise"}})
    refused(tmp_path, values, "model.sharding", "no table 'C99'", "C26")
    values = small(tmp_path, clicks, data={"num_embeddings": {"C99": 5}})
    refused(tmp_path, values, "no table is called 'C99'", "C26")


def test_run_folder_that_exists(tmp_path: Path, clicks: Path) -> None:
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    (folder / "precious.txt").write_text("keep")
    path = write_config(tmp_path, small(tmp_path, clicks))
    result = run("train", "-c", path, "--name", "mine")
    assert_one_line_error(result, "mine", "exists", "--name")
    assert [p.name for p in folder.iterdir()] == ["precious.txt"]
    assert stores(tmp_path) == []  # Said before any work was done.


def test_corrupted_store(tmp_path: Path, clicks: Path) -> None:
    store = tmp_path / "store"
    assert run("convert", clicks, "--to", store).exit_code == 0
    path = next(store.glob("train*.arrow"))
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 8] = np.random.default_rng(0).bytes(8)
    path.write_bytes(content)
    refused(tmp_path, small(tmp_path, store), path.name, "convert")
    path.write_bytes(content[: len(content) // 2])
    refused(tmp_path, small(tmp_path, store), path.name, "convert")
    (store / "manifest.json").write_text("{")
    refused(tmp_path, small(tmp_path, store), "manifest.json")


def test_a_changed_source_is_converted_again(tmp_path: Path, clicks: Path) -> None:
    path = tmp_path / "clicks.tsv"
    lines = clicks.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:1500]))
    values = small(tmp_path, path, privacy=KNOWN_NOISE)
    first = prepare(parse_config(values))
    assert prepare(parse_config(values)).store.fingerprint == first.store.fingerprint
    path.write_text("".join(lines))
    second = prepare(parse_config(values))
    assert second.plan.num_records > first.plan.num_records
    assert len(stores(tmp_path)) == 1
    # A folder that the user named is not replaced.
    kept = small(tmp_path, path, data={"store": str(tmp_path / "mine")}, privacy=KNOWN_NOISE)
    prepare(parse_config(kept))
    path.write_text("".join(lines[:1000]))
    refused(tmp_path, kept, "mine", "another source")


def test_unreadable_configuration(tmp_path: Path) -> None:
    missing = tmp_path / "none.yaml"
    assert_one_line_error(run("train", "-c", missing), "none.yaml", "No such file")
    listed = write_config(tmp_path, ["a", "b"])
    assert_one_line_error(run("train", "-c", listed), "config.yaml", "keys and values")
    unknown = write_config(tmp_path, small(tmp_path, None, privacy={"epsilom": 3}))
    assert_one_line_error(run("train", "-c", unknown), "'privacy.epsilom'", "known keys")
    assert_one_line_error(run("train", "--set", "train"), "--set train", "KEY=VALUE")
    assert_one_line_error(run("train"), "'privacy' is missing", "'train' is missing")


def test_factories_that_are_none(tmp_path: Path, clicks: Path) -> None:
    """``plan`` builds the model too, so a wrong name shows before training."""

    def planned(factory: str) -> Any:
        values = small(tmp_path, clicks, model={"name": "custom", "factory": factory})
        return run("plan", "-c", write_config(tmp_path, values))

    assert_one_line_error(planned("no_such_module:make"), "model.factory", "PYTHONPATH")
    assert_one_line_error(planned("tests.cluster.factories:nobody"), "nobody")
    assert_one_line_error(planned("tests.cluster.factories:no_module"), "returned a dict")
