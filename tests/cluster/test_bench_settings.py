"""Presets, options and the generated records of ``dist-dp bench``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dist_dp.cluster.bench.clicks import HashedClicks
from dist_dp.cluster.bench.presets import MLPERF_ROWS, PRESETS, chosen
from dist_dp.cluster.bench.settings import SKEWS, StepSettings
from tests.cluster.small import assert_one_line_error, run


def test_the_mlperf_tables_are_the_papers() -> None:
    assert len(MLPERF_ROWS) == 26
    assert sum(MLPERF_ROWS) == 187_767_399
    assert 4 * 128 * sum(MLPERF_ROWS) == pytest.approx(96e9, rel=0.01)


def test_presets_cover_the_papers_experiments_and_fit() -> None:
    wanted = [f"mlperf-b{b}" for b in (1024, 2048, 4096)]
    wanted += [f"mlperf-pooling{p}" for p in (10, 20, 30)]
    wanted += [f"mlperf-skew-{s}" for s in ("low", "medium", "high")]
    wanted += ["rmc1", "rmc2", "rmc3"]
    assert set(wanted) | {"default"} == set(PRESETS)
    for name, (settings, text) in PRESETS.items():
        assert settings.preset == name and text
        assert settings.bottom[-1] == settings.dim and settings.top[-1] == 1
        assert settings.table_bytes < 13e9
    assert [PRESETS[f"mlperf-b{b}"][0].batch for b in (1024, 2048, 4096)] == [1024, 2048, 4096]
    assert [PRESETS[f"mlperf-pooling{p}"][0].pooling for p in (10, 20, 30)] == [10, 20, 30]
    rmc = [PRESETS[f"rmc{i}"][0] for i in (1, 2, 3)]
    assert [(len(r.rows), r.dim, r.pooling) for r in rmc] == [
        (10, 32, 80),
        (40, 32, 80),
        (10, 32, 20),
    ]


def test_list_presets_prints_them_all() -> None:
    shown = run("bench", "step", "--list-presets")
    assert shown.exit_code == 0
    assert all(name in shown.stdout for name in PRESETS)


def test_options_change_a_preset() -> None:
    settings = chosen("rmc3", tables=4, rows=10, dim=64).changed(batch=7, records=70, skew=None)
    assert settings.rows == (10,) * 4 and settings.batch == 7 and settings.skew == "uniform"
    assert settings.bottom == (2560, 512, 64)
    assert settings.as_dict()["rows"] == 10 and settings.as_dict()["tables"] == 4
    assert chosen(None, tables=3, rows=None, dim=None).rows == (900_000,) * 3


def test_none_is_always_measured_and_first() -> None:
    assert StepSettings(mechanisms=("lazydp", "none", "lazydp")).mechanisms == ("none", "lazydp")


def test_sharding_follows_the_workers_unless_given() -> None:
    assert StepSettings().kind == "table_wise"
    assert StepSettings().changed(workers=2).kind == "row_wise"
    assert StepSettings(workers=2, sharding="column_wise").as_dict()["sharding"] == "column_wise"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--preset", "rmc9"], ("--preset", "rmc9", "rmc1")),
        (["--mechanisms", "lazy"], ("--mechanisms", "lazy", "lazydp")),
        (["--skew", "steep"], ("--skew", "steep", "high")),
        (["--sharding", "data_parallel"], ("--sharding", "data_parallel", "row_wise")),
        (["--batch", "11", "--records", "10"], ("--batch 11", "--records 10")),
        (["--preset", "mlperf-b1024", "--rows", "5"], ("--tables and --rows",)),
    ],
)
def test_wrong_options_are_named(options: list[str], words: tuple[str, ...]) -> None:
    assert_one_line_error(run("bench", "step", *options), *words)


def test_a_missing_folder_is_an_error_before_anything_runs(tmp_path: Path) -> None:
    result = run("bench", "step", "--json", tmp_path / "no" / "a.json")
    assert result.exit_code == 2 and "no folder" in result.stderr


def test_a_file_that_cannot_be_written_is_an_error_before_anything_runs(tmp_path: Path) -> None:
    result = run("bench", "step", "--json", tmp_path)
    said = " ".join(result.stderr.replace("│", "").split())  # it is wrapped in a box
    assert result.exit_code == 2 and "is a folder; name a file" in said
    result = run("bench", "scaling", "--plot", tmp_path)
    assert result.exit_code == 2 and "--plot" in result.stderr


def clicks(
    exponent: float = 0.0, rows: tuple[int, ...] = (1000, 3, 7), pooling: int = 2
) -> HashedClicks:
    return HashedClicks(rows, pooling=pooling, exponent=exponent, records=500, dense_features=4)


def test_a_record_is_the_same_whatever_batch_it_is_in() -> None:
    source = clicks()
    alone = source.batch(np.array([17]))
    among = source.batch(np.array([3, 17, 400]), padded_size=5)
    assert len(source) == 500 and len(among) == 5
    for name in source.names:
        bags = among.sparse_features[name].to_dense()
        assert [len(b) for b in bags] == [2, 2, 2, 0, 0], "padding has empty bags"
        assert bags[1].tolist() == alone.sparse_features[name].to_dense()[0].tolist()
    assert among.dense_features[1].equal(alone.dense_features[0])
    assert among.labels[1] == alone.labels[0]
    assert not among.dense_features[3:].any() and among.is_real.tolist() == [True] * 3 + [False] * 2


@pytest.mark.parametrize("skew", SKEWS)
def test_ids_are_rows_of_their_table(skew: str) -> None:
    rows = (1, 2, 1000, 900_000)
    ids = clicks(SKEWS[skew], rows, pooling=3).ids(np.arange(2000))
    assert ids.shape == (4, 6000) and ids.dtype == np.int64
    assert (ids.min(1) >= 0).all() and (ids.max(1) < rows).all()
    assert len(np.unique(ids[1])) == 2, "every row of a small table is read"


def test_uniform_ids_are_uniform() -> None:
    counts = np.bincount(clicks().ids(np.arange(50_000))[0], minlength=1000)
    # chi-square with 999 degrees of freedom: mean 999, deviation 45; the ids are fixed
    assert abs(((counts - 100.0) ** 2 / 100.0).sum() - 999) < 6 * 45


def test_skews_are_in_order() -> None:
    """The share of reads that the most popular hundredth of the rows gets."""
    shares = []
    for exponent in SKEWS.values():
        counts = np.bincount(
            clicks(exponent, (10_000,)).ids(np.arange(50_000))[0], minlength=10_000
        )
        shares.append(np.sort(counts)[-100:].sum() / counts.sum())
    assert shares[0] < 0.03 and shares == sorted(shares)
    assert shares[1] > 0.08 and shares[3] > 0.6


def test_popular_rows_are_scattered() -> None:
    """Neighbouring rows would share pages, and one shard would have them all."""
    counts = np.bincount(clicks(1.2, (10_000,)).ids(np.arange(50_000))[0], minlength=10_000)
    popular = np.sort(np.argsort(counts)[-20:])
    assert np.diff(popular).min() > 10 and popular[0] < 2000 and popular[-1] > 8000
