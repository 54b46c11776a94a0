"""The commands that measure the kernels, and that write their random words for test suites."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from dist_dp import kernels
from dist_dp.kernels import bench, bench_cases, chacha, native
from dist_dp.kernels.bench_cases import Case, Suite, Target

needs_compiled = pytest.mark.skipif(
    not native.available(), reason="the benchmark measures the compiled kernels"
)
SECRET = bytes(range(32))


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(
        command, capture_output=True, env=os.environ | variables, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the command writes with tiny sizes."""
    path = tmp_path_factory.mktemp("bench") / "bench.json"
    done = run("dist_dp.kernels.bench", "--quick", "--repetitions", "2", "--json", str(path))
    assert done.returncode == 0, done.stderr.decode()
    assert "settle, row list, dim 128" in done.stdout.decode()
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


@needs_compiled
def test_rows(quick: dict[str, Any]) -> None:
    units = {"mnormals_per_second_per_core", "gbytes_per_second"}
    for row in quick["results"]:
        (unit,) = units & row.keys()
        assert 0 < row["low"] <= row[unit] <= row["high"], row
        assert {"name", "isa", "rounds", "threads", "ratio_to_torch_normal"} <= row.keys()
        assert row["ratio_to_torch_normal"] is None or row["ratio_to_torch_normal"] > 0
        assert row.get("fraction_of_limit", 1) > 0
    generators = [row for row in quick["results"] if row["name"] == "normals, in memory"]
    assert {(row["isa"], row["rounds"]) for row in generators if row["threads"] == 1} == {
        (isa, rounds) for isa in native.isas() for rounds in (8, 12, 20)
    }
    names = {(row["name"], row["threads"]) for row in quick["results"]}
    for dimension in (16, 64, 128):
        for what in ("row list", "whole table"):
            assert {(f"settle, {what}, dim {dimension}", threads) for threads in (1, 2)} <= names


@needs_compiled
def test_normals_are_compared_with_those_of_torch_in_the_same_size(quick: dict[str, Any]) -> None:
    unit = "mnormals_per_second_per_core"
    for size in ("in memory", "in L2"):
        (base,) = (r for r in quick["results"] if r["name"] == f"torch normal_, {size}")
        assert base["ratio_to_torch_normal"] == 1
        for row in quick["results"]:
            if row["name"] == f"normals, {size}":
                assert row["ratio_to_torch_normal"] == pytest.approx(row[unit] / base[unit])


@needs_compiled
def test_targets(quick: dict[str, Any]) -> None:
    assert len(quick["targets"]) >= 7
    for target in quick["targets"]:
        assert target["measured"] > 0
        assert target["reached"] == (target["measured"] >= target["wanted"])


@needs_compiled
def test_measuring_leaves_the_number_of_threads_alone() -> None:
    before = torch.get_num_threads()
    seen: list[int] = []
    case = Case("", "", None, before + 1, 1, lambda _: seen.append(torch.get_num_threads()))
    assert len(list(bench_cases.repetitions(Suite(cases=[case]), 3))) == 3
    assert seen == [before + 1] * 4
    assert torch.get_num_threads() == before


def test_a_limit_is_the_slowest_of_several() -> None:
    slow, fast = (Case(name, "", 20, 1, 1, print) for name in ("slow", "fast"))
    mine = Case("mine", "", 20, 2, 1, print, weights=True, limits=(slow, fast))
    suite = Suite({mine: fast}, [slow, fast, mine], [Target("", 0.8, mine, (slow, fast))])
    speeds = {slow: [4e9, 2e9, 3e9], fast: [8e9] * 3, mine: [1.5e9, 1e9, 9e9]}
    row = bench.result(suite, speeds, mine)
    assert row["gbytes_per_second"] == pytest.approx(12)
    assert (row["low"], row["high"]) == (pytest.approx(8), pytest.approx(72))
    assert row["fraction_of_limit"] == pytest.approx(0.5)
    assert row["ratio_to_torch_normal"] == pytest.approx(1.5 / 8 / 2)
    (target,) = bench.targets(suite, speeds)
    assert target["measured"] == pytest.approx(0.5)
    assert not target["reached"]
    assert bench.result(suite, speeds, fast)["mnormals_per_second_per_core"] == pytest.approx(8e3)


def test_errors_come_before_the_measuring(tmp_path: Path) -> None:
    done = run("dist_dp.kernels.bench", "--json", str(tmp_path / "none" / "bench.json"))
    assert done.returncode == 2
    assert b"no folder" in done.stderr
    done = run("dist_dp.kernels.bench", DIST_DP_KERNELS="reference")
    assert done.returncode == 1
    assert b"unset it" in done.stderr


def test_the_stream_holds_the_blocks_of_row_after_row() -> None:
    size = 4097 * 8 * 64 + 13  # beyond one part of the stream, and into a word
    done = run("dist_dp.kernels.stream", "--rounds", "8", "--bytes", str(size), "--table", "t")
    assert done.returncode == 0, done.stderr.decode()
    inputs = np.zeros((4, 4098, 8), np.uint32)
    inputs[0] = np.arange(8)  # column blocks
    inputs[1] = np.arange(4098)[:, None]  # rows
    inputs[3] = 1  # from step 0 to step 1
    key = kernels.derive_key(SECRET, "noise", "t")
    expected = chacha.blocks(key, inputs.reshape(4, -1), 8).T.astype("<u4").tobytes()
    assert done.stdout == expected[:size]


def test_the_stream_of_normals_is_uniform() -> None:
    done = run("dist_dp.kernels.stream", "--normals", "--bytes", str(1 << 20))
    assert done.returncode == 0, done.stderr.decode()
    halves = np.frombuffer(done.stdout, "<u2")
    key = kernels.derive_key(SECRET, "noise", "stream")
    z = kernels.normal(key, torch.arange(2), 0, 1, num_columns=128, rounds=12).numpy().ravel()
    assert np.array_equal(halves[:256], np.floor(stats.norm.cdf(z.astype(np.float64)) * 65536))
    counts = np.bincount(halves >> 8, minlength=256)
    assert stats.chisquare(counts).pvalue > 1e-4
    assert stats.chisquare(np.bincount(halves & 255, minlength=256)).pvalue > 1e-4


@pytest.fixture
def endless() -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "dist_dp.kernels.stream"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with process:
        yield process
        process.kill()


def test_the_stream_ends_quietly_with_its_reader(endless: subprocess.Popen[bytes]) -> None:
    assert endless.stdout is not None and endless.stderr is not None
    assert len(endless.stdout.read(100)) == 100
    endless.stdout.close()
    assert endless.wait(60) == 0
    assert endless.stderr.read() == b""


def test_the_stream_refuses_other_rounds() -> None:
    done = run("dist_dp.kernels.stream", "--rounds", "10")
    assert done.returncode == 2
    assert b"(20, 12, 8)" in done.stderr
    assert done.stdout == b""
