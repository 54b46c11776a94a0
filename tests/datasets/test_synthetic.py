from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest

from dist_dp.datasets.auc import ScoreHistogram
from dist_dp.datasets.readers import open_reader
from dist_dp.datasets.readers.criteo import default_schema
from dist_dp.datasets.store import ArrowStore, convert
from dist_dp.datasets.synthetic import (
    SyntheticReader,
    SyntheticSettings,
    Truth,
    iter_chunks,
    write_criteo_like,
    write_synthetic_store,
)
from dist_dp.errors import ConfigError, DataError

SMALL = (50, 3, 100_000)


def test_the_file_reads_as_criteo(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    summary = write_criteo_like(path, 3000, seed=4)
    assert json.loads((tmp_path / "a.tsv.truth.json").read_text()) == summary
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tsv", "a.tsv.truth.json"]
    lines = path.read_text().splitlines()
    assert len(lines) == 3000
    fields = [line.split("\t") for line in lines]
    assert {len(f) for f in fields} == {40}
    tokens = {t for f in fields for t in f[14:]}
    assert "" in tokens
    assert all(len(t) == 8 and not set(t) - set("0123456789abcdef") for t in tokens if t)
    labels = [r for b in open_reader(path) for r in b.column("label").to_pylist()]
    assert np.mean(labels) == summary["click_rate"]


def test_generating_in_memory_gives_the_same_records(tmp_path: Path) -> None:
    settings = SyntheticSettings(seed=9)
    write_criteo_like(tmp_path / "a.tsv", 2000, seed=9)
    schema = default_schema()
    (written,) = open_reader(tmp_path / "a.tsv", "criteo", schema)
    (direct,) = SyntheticReader(settings, 2000, schema)
    for name in ("label", "dense", "ids"):
        assert written.column(name).equals(direct.column(name)), name


def test_a_longer_log_begins_with_the_shorter_one(tmp_path: Path) -> None:
    settings = {"seed": 2, "num_dense": 2, "cardinalities": SMALL}
    write_criteo_like(tmp_path / "long.tsv", 70_000, **settings)  # two blocks
    write_criteo_like(tmp_path / "short.tsv", 66_000, **settings)
    long, short = ((tmp_path / n).read_bytes() for n in ("long.tsv", "short.tsv"))
    assert long.startswith(short)
    write_criteo_like(tmp_path / "other.tsv", 100, **{**settings, "seed": 3})
    assert not long.startswith((tmp_path / "other.tsv").read_bytes()[:500])


def test_labels_follow_the_stated_probability() -> None:
    # Each z below is standard normal if labels are Bernoulli(probability); |z| < 5 has level
    # 6e-7 a test, seeds fixed.
    settings = SyntheticSettings(seed=1, num_dense=3, cardinalities=SMALL)
    (chunk,) = iter_chunks(settings, 60_000)
    p, y = chunk.probability, chunk.labels
    for low, high in ((0, 0.1), (0.1, 0.3), (0.3, 0.6), (0.6, 1)):
        chosen = (p >= low) & (p < high)
        assert chosen.sum() > 500
        z = (y[chosen] - p[chosen]).sum() / np.sqrt((p * (1 - p))[chosen].sum())
        assert abs(z) < 5
    assert abs(p.mean() - 0.25) < 0.005


def test_the_probability_is_a_function_of_the_visible_features() -> None:
    truth = Truth(SyntheticSettings(seed=1, num_dense=3, cardinalities=SMALL))
    chunk = truth.block(3)
    assert np.allclose(1 / (1 + np.exp(-truth.logit(chunk.dense, chunk.ranks))), chunk.probability)
    # A missing integer counts as 0, as the reader takes it.
    zero = np.where(chunk.dense < 0, 0, chunk.dense)
    assert np.array_equal(truth.logit(zero, chunk.ranks), truth.logit(chunk.dense, chunk.ranks))


def test_tokens_are_distinct_and_skewed() -> None:
    settings = SyntheticSettings(seed=1, cardinalities=(1000, 1000), zipf_exponent=1.2)
    truth = Truth(settings)
    ranks = np.arange(0, 1001)
    texts = truth.tokens(0, ranks).to_pylist()
    assert texts[0] is None
    assert len(set(texts)) == 1001
    assert set(texts[1:]).isdisjoint(truth.tokens(1, ranks).to_pylist()[1:])
    drawn = truth.block(0).ranks[:, 0]
    assert drawn.min() == 0
    assert drawn.max() <= 1000
    counts = np.bincount(drawn, minlength=1001)
    # In the tail, counts fall as rank**-1.2: compare two stretches with equal relative width.
    ratio = counts[20:40].sum() / counts[200:400].sum()
    assert ratio == pytest.approx(10**0.2, rel=0.1)


def test_the_best_auc_is_about_080() -> None:
    scores = ScoreHistogram()
    for seed in range(3):
        one = ScoreHistogram()
        for chunk in iter_chunks(SyntheticSettings(seed=seed), 65_536):
            one.add(chunk.probability, chunk.labels)
            scores.add(chunk.probability, chunk.labels)
        assert one.auc() == pytest.approx(0.805, abs=0.015)
    assert scores.normalized_entropy() < 0.9


def test_auc_against_the_definition() -> None:
    rng = np.random.default_rng(0)
    p = rng.beta(1, 3, 1500)
    p[::7] = p[0]  # ties
    y = (rng.random(1500) < p).astype(np.int64)
    scores = ScoreHistogram()
    for part in np.array_split(np.arange(1500), 4):
        scores.add(p[part], y[part])
    difference = p[y == 1][:, None] - p[y == 0][None, :]
    exact = (difference > 0).mean() + (difference == 0).mean() / 2
    assert scores.auc() == pytest.approx(exact, abs=1e-4)
    loss = -np.mean(y * np.log(p) + (1 - y) * np.log(1 - p))
    assert scores.log_loss() == pytest.approx(loss, rel=1e-9)
    rate = y.mean()
    entropy = -rate * np.log(rate) - (1 - rate) * np.log(1 - rate)
    assert scores.normalized_entropy() == pytest.approx(loss / entropy, rel=1e-9)


def test_speed(tmp_path: Path) -> None:
    # A loose bound, for machines under load; alone on one core it takes about a second.
    start = time.perf_counter()
    write_criteo_like(tmp_path / "a.tsv", 100_000, seed=0)
    assert time.perf_counter() - start < 15


def test_store_of_synthetic_records(tmp_path: Path) -> None:
    settings = SyntheticSettings(num_dense=2, cardinalities=SMALL)
    manifest = write_synthetic_store(tmp_path / "s", 5000, settings=settings)
    truth = json.loads((tmp_path / "s" / "truth.json").read_text())
    assert truth["num_records"] == 5000
    assert write_synthetic_store(tmp_path / "s", 5000, settings=settings) == manifest
    store = ArrowStore.open(tmp_path / "s", verify=True)
    batch = store.split("train").batch(np.arange(10))
    assert batch.dense_features.shape == (10, 2)
    assert list(store.schema.table_rows().values()) == [100, 64, 200_000]
    with pytest.raises(DataError, match="another source"):
        write_synthetic_store(tmp_path / "s", 5001, settings=settings)


def test_other_widths_convert_with_their_own_reader_only(tmp_path: Path) -> None:
    write_criteo_like(tmp_path / "a.tsv", 100, seed=0, cardinalities=SMALL)
    with pytest.raises(DataError, match=r"a\.tsv:1: 17 fields where 40 belong"):
        convert(tmp_path / "a.tsv", tmp_path / "s", format="criteo")


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": -1},
        {"cardinalities": ()},
        {"cardinalities": (0,)},
        {"zipf_exponent": 0},
        {"click_rate": 1.0},
        {"num_dense": -1},
    ],
)
def test_impossible_settings(tmp_path: Path, changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="synthetic data"):
        write_criteo_like(tmp_path / "a.tsv", 10, **{"seed": 0, **changes})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="num_records"):
        write_criteo_like(tmp_path / "a.tsv", 0, seed=0)
    assert not list(tmp_path.iterdir())
