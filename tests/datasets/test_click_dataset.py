from __future__ import annotations

import pickle
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from dist_dp.datasets.hashing import hash_tokens
from dist_dp.datasets.readers import parquet
from dist_dp.datasets.schema import DataSchema
from dist_dp.datasets.store import ArrowStore, ClickDataset, convert
from dist_dp.errors import DataError

ROWS = 1000
SCHEMA: dict[str, Any] = {
    "label": "y",
    "dense": [{"name": "d0"}, {"name": "d1"}],
    "sparse": [
        {"name": "a", "num_embeddings": 101},
        {"name": "bag", "num_embeddings": 53, "ragged": True, "weight_column": "w"},
        {"name": "c", "num_embeddings": 10, "hashed": False},
        {"name": "b", "num_embeddings": 101, "table": "a"},
        {"name": "other", "num_embeddings": 9, "ragged": True, "hashed": False},
    ],
}


@pytest.fixture(scope="module")
def columns() -> dict[str, Any]:
    rng = np.random.default_rng(5)
    bag = [rng.integers(0, 40, rng.integers(0, 5)).tolist() for _ in range(ROWS)]
    return {
        "y": rng.integers(0, 2, ROWS).tolist(),
        "d0": rng.normal(size=ROWS).tolist(),
        "d1": np.arange(ROWS, dtype=float).tolist(),
        "a": [f"t{v}" for v in rng.integers(0, 500, ROWS)],
        "bag": bag,
        "w": [rng.random(len(v)).tolist() for v in bag],
        "c": [None if v == 10 else int(v) for v in rng.integers(0, 11, ROWS)],
        "b": [f"t{v}" for v in rng.integers(0, 500, ROWS)],
        "other": [rng.integers(0, 9, rng.integers(0, 3)).tolist() for _ in range(ROWS)],
    }


def make(
    tmp_path: Path, columns: dict[str, Any], schema: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> ClickDataset:
    """A data set of several record batches, so that every batch crosses their bounds."""
    monkeypatch.setattr(parquet, "_ROWS_PER_BATCH", 97)
    pq.write_table(pa.table(columns), tmp_path / "in.parquet")
    convert(
        tmp_path / "in.parquet",
        tmp_path / "out",
        schema=DataSchema.model_validate(schema),
        split=None,
    )
    return ArrowStore.open(tmp_path / "out").split("all")


def expected(
    columns: dict[str, Any], schema: dict[str, Any], row: int
) -> dict[str, tuple[list[int], list[float]]]:
    """Ids and weights of every feature of a record, by plain Python."""
    result = {}
    for feature in schema["sparse"]:
        value = columns[feature["name"]][row]
        tokens = value if feature.get("ragged") else [value]
        size = feature["num_embeddings"]
        if feature.get("hashed", True):
            texts = [str(t).encode() for t in tokens]
            ids = hash_tokens(feature.get("table", feature["name"]), texts) % size
        else:
            ids = np.array([t for t in tokens if t is not None], dtype=np.int64)
        weights = columns["w"][row] if "weight_column" in feature else [1.0] * len(ids)
        result[feature["name"]] = (ids.tolist(), weights)
    return result


@pytest.mark.parametrize("weighted", [True, False])
def test_batches_equal_plain_python(
    tmp_path: Path, columns: dict[str, Any], monkeypatch: pytest.MonkeyPatch, weighted: bool
) -> None:
    schema = {**SCHEMA, "sparse": [dict(f) for f in SCHEMA["sparse"]]}
    if not weighted:
        del schema["sparse"][1]["weight_column"]
    dataset = make(tmp_path, columns, schema, monkeypatch)
    assert len(dataset) == ROWS
    indices = np.random.default_rng(0).integers(0, ROWS, 200)
    indices[:4] = [0, ROWS - 1, 96, 97]
    batch = dataset.batch(indices, padded_size=205)
    assert len(batch) == 205
    assert batch.is_real.tolist() == [True] * 200 + [False] * 5
    assert batch.labels.dtype == batch.dense_features.dtype == torch.float32
    assert batch.labels.tolist() == [columns["y"][i] for i in indices] + [0] * 5
    dense = np.zeros((205, 2), dtype=np.float32)
    dense[:200] = [[columns["d0"][i], columns["d1"][i]] for i in indices]
    assert np.array_equal(batch.dense_features.numpy(), dense)

    features = batch.sparse_features
    assert features.keys() == [f["name"] for f in schema["sparse"]]
    assert features.stride() == 205
    assert features.values().dtype == torch.int64
    assert features.lengths().dtype == torch.int32
    assert (features.weights_or_none() is not None) == weighted
    rows = [expected(columns, schema, i) for i in indices]
    for name in features.keys():  # noqa: SIM118 - not a dict
        jagged = features[name]
        assert jagged.lengths().tolist() == [len(r[name][0]) for r in rows] + [0] * 5
        assert jagged.values().tolist() == list(chain(*(r[name][0] for r in rows)))
        if weighted:
            want = np.array(list(chain(*(r[name][1] for r in rows))), dtype=np.float32)
            assert np.array_equal(jagged.weights().numpy(), want)


def test_single_hashed_features_alone(
    tmp_path: Path, columns: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # This kind takes a shorter way through the code; no dense features either.
    schema = {"label": "y", "sparse": [SCHEMA["sparse"][0], SCHEMA["sparse"][3]]}
    dataset = make(tmp_path, columns, schema, monkeypatch)
    batch = dataset.batch(np.array([3, 1, 3]), padded_size=4)
    rows = [expected(columns, schema, i) for i in (3, 1, 3)]
    for name in ("a", "b"):
        assert batch.sparse_features[name].values().tolist() == [r[name][0][0] for r in rows]
        assert batch.sparse_features[name].lengths().tolist() == [1, 1, 1, 0]
    assert batch.dense_features.shape == (4, 0)


def test_empty_and_impossible_batches(
    tmp_path: Path, columns: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = make(tmp_path, columns, SCHEMA, monkeypatch)
    none = np.array([], dtype=np.int64)
    for size in (None, 0, 1, 3):
        batch = dataset.batch(none, padded_size=size)
        assert len(batch) == (size or 0)
        assert not batch.is_real.any()
        assert batch.sparse_features.values().numel() == 0
        assert batch.sparse_features.lengths().tolist() == [0] * 5 * (size or 0)
        assert batch.dense_features.shape == (size or 0, 2)
    for indices, size, words in (
        ([0, 1, 2], 2, "do not fit padded_size=2"),
        ([0, ROWS], None, f"record {ROWS} is not in"),
        ([-1], None, "record -1 is not in"),
    ):
        with pytest.raises(DataError, match=words):
            dataset.batch(np.array(indices), padded_size=size)


def test_an_empty_split_opens(tmp_path: Path, columns: dict[str, Any]) -> None:
    pq.write_table(pa.table(columns).slice(0, 2), tmp_path / "in.parquet")
    split = {"train": 1 - 1e-7, "test": 1e-7}
    schema = DataSchema.model_validate(SCHEMA)
    convert(tmp_path / "in.parquet", tmp_path / "out", schema=schema, split=split)
    dataset = ArrowStore.open(tmp_path / "out", verify=True).split("test")
    assert len(dataset) == 0
    assert len(dataset.batch(np.array([], dtype=np.int64), padded_size=2)) == 2


def test_pickling_and_devices(
    tmp_path: Path, columns: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = make(tmp_path, columns, SCHEMA, monkeypatch)
    again = pickle.loads(pickle.dumps(dataset))
    assert (again.name, again.schema, again.fingerprint) == (
        "all",
        dataset.schema,
        dataset.fingerprint,
    )
    indices = np.arange(0, ROWS, 7)
    a, b = dataset.batch(indices), again.batch(indices).to("cpu")
    assert torch.equal(a.sparse_features.values(), b.sparse_features.values())
    assert torch.equal(a.dense_features, b.dense_features)
    assert torch.equal(a.is_real, b.is_real)


def test_batches_are_writable_copies(
    tmp_path: Path, columns: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = make(tmp_path, columns, SCHEMA, monkeypatch)
    first = dataset.batch(np.arange(5))
    kept = first.dense_features.clone()
    first.dense_features.zero_()
    first.sparse_features.values().zero_()
    assert torch.equal(dataset.batch(np.arange(5)).dense_features, kept)


@pytest.mark.gpu
def test_batches_move_to_a_gpu(
    tmp_path: Path, columns: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = make(tmp_path, columns, SCHEMA, monkeypatch).batch(np.arange(50))
    moved = batch.pin_memory().to("cuda", non_blocking=True)
    torch.cuda.synchronize()
    moved.record_stream(torch.cuda.current_stream())
    assert moved.labels.is_cuda
    assert torch.equal(moved.sparse_features.values().cpu(), batch.sparse_features.values())
