"""Half-precision tables whose updates are float32's: exact storage, the same run, the same law."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torchrec import DataType

from dist_dp import kernels
from dist_dp.checkpoint import save_checkpoint
from dist_dp.engine import PrivacyEngine
from dist_dp.errors import ModelError
from dist_dp.mechanisms import DPSGD, LazyDP
from dist_dp.mechanisms.row_states import give_state
from dist_dp.noise_schedule import NoiseSchedule
from dist_dp.released import Release
from dist_dp.row_gradients import apply_to_state
from dist_dp.shard_model import _check_tables
from dist_dp.sharding import TableOptimizer, embedding_collections, table_configs
from dist_dp.table_shard import TableShard
from dist_dp.wide_rows import HALF_DTYPES, join, read_rows, split, write_rows
from tests.dist_dp import sharding_runs, unsharded
from tests.dist_dp.gradients import build, unsharded_name
from tests.dist_dp.placement import model
from tests.dist_dp.test_engine import train
from tests.dist_dp.worlds import run_world


def all_patterns(chunk: int) -> Tensor:
    """One sixteenth of all float32 bit patterns."""
    start = -(2**31) + chunk * 2**28
    return torch.arange(start, start + 2**28, 251, dtype=torch.int64).to(torch.int32)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_every_float32_comes_back_bit_for_bit(dtype: torch.dtype) -> None:
    """Every exponent, sign and upper half; the lower halves in steps of 251, and all for some."""
    patterns = [all_patterns(chunk) for chunk in range(16)]
    low = torch.arange(2**16, dtype=torch.int32)
    for upper in (0, 0x3F80, 0x3F81, -0x4080, 0x7F7F, -0x8000, 0x0001):
        patterns.append((upper << 16) + low)
    for bits in patterns:
        values = bits.view(torch.float32)
        weight, rest = split(values, dtype)
        assert weight.dtype == dtype
        back = join(weight, rest)
        real = ~values.isnan()
        assert torch.equal(back.view(torch.int32)[real], bits[real])
        assert bool(back[~real].isnan().all()) and bool(weight[~real].isnan().all())


def test_the_weight_is_the_nearest_one() -> None:
    """What lookups read is the value rounded, ties aside."""
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(1))
    for dtype in HALF_DTYPES:
        weight, _ = split(values, dtype)
        tied = (weight - values).abs() == (values.to(dtype) - values).abs()
        assert bool(tied.all()) and int((weight != values.to(dtype)).sum()) < 10
    tie = torch.tensor([1.0 + 2.0**-8, -(1.0 + 2.0**-8)])
    weight, rest = split(tie, torch.bfloat16)
    assert weight.tolist() == [1.0078125, -1.0078125] and torch.equal(join(weight, rest), tie)


def shard_of(dtype: torch.dtype, rows: int = 3, columns: int = 64) -> TableShard:
    weight = torch.linspace(-1, 2, rows).unsqueeze(1).repeat(1, columns).to(dtype)
    shard = TableShard("t", rows, columns, 0, 0, weight, False, "table_wise", noise_key=bytes(32))
    give_state(shard, momentum=False)
    return shard


def test_small_updates_add_up() -> None:
    """Ten thousand updates, each far below the half weight's last place."""
    rows = torch.arange(3)
    for dtype in HALF_DTYPES:
        shard, reference = shard_of(dtype), shard_of(dtype).weight.float()
        for _ in range(10_000):
            apply_to_state(shard, rows, torch.full((3, 64), 1e-5))
            reference -= 1e-5
        assert torch.equal(read_rows(shard, rows), reference)
        assert torch.equal(shard.weight, reference.to(dtype))


def short_run(mechanism: Any, dtype: torch.dtype, key: bytes) -> Tensor:
    """float64 ``[columns, 3]``: a row's value at two training reads and at the end.

    The step's noise is a fiftieth of bfloat16's last place, and the update depends on the read.
    """
    shard = shard_of(dtype, rows=1)
    shard.noise_key = key
    made = mechanism(NoiseSchedule())
    row = torch.tensor([0])
    write_rows(shard, row, torch.full((1, 64), 1.7012345))
    read = []
    for step in range(1, 10):
        trained = step in (3, 8)
        if trained:
            made.before_lookup([(shard, row)])
            read.append(read_rows(shard, row)[0])
        made.schedule.advance(0.1 / step, 1.0, 1.0, 500.0, 0.3)
        if trained:
            rate = made.schedule.gradient_learning_rate(step)
            apply_to_state(shard, row, rate * (read[-1] - 1.7).unsqueeze(0))
        made.after_update([shard])
    made.settle(shard)
    read.append(read_rows(shard, row)[0])
    return torch.stack(read, dim=1).double()


def exact_law() -> tuple[Any, Any]:
    """Mean and covariance of the three readings."""
    form, read = np.zeros(10), []
    form[0] = np.float32(1.7012345)
    for step in range(1, 10):
        rate = 0.1 / step
        gradient = np.zeros(10)
        if step in (3, 8):
            read.append(form.copy())
            gradient = form.copy()
            gradient[0] -= np.float32(1.7)
        gradient[step] += 1.0 / 500.0
        form = (1 - rate * 0.3) * form - rate * gradient
    table = np.stack([*read, form])
    return table[:, 0], table[:, 1:] @ table[:, 1:].T


def rejected(mechanism: Any, dtype: torch.dtype, family: str) -> list[str]:
    """Comparisons with the exact law that reject, at level 1e-3 together."""
    mean, covariance = exact_law()
    keys = [kernels.derive_key(bytes(32), family, str(i)) for i in range(60)]
    found = torch.cat([short_run(mechanism, dtype, key) for key in keys]).numpy()
    n = len(found)
    white = np.linalg.solve(np.linalg.cholesky(covariance), (found - mean).T).T
    p = {}
    for i in range(3):
        p[f"law {i}"] = stats.kstest(white[:, i], "norm").pvalue
        squares = float((white[:, i] ** 2).sum())
        p[f"variance {i}"] = 2 * min(stats.chi2(n).cdf(squares), stats.chi2(n).sf(squares))
        for j in range(i):
            with np.errstate(all="ignore"):  # a faulty sample may not vary: its p-value is nan
                z = np.arctanh(np.corrcoef(white[:, i], white[:, j])[0, 1]) * np.sqrt(n - 3)
            p[f"correlation {i}, {j}"] = float(2 * stats.norm.sf(abs(z)))
    return [name for name, value in p.items() if not value > 1e-3 / len(p)]


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("mechanism", [LazyDP, DPSGD])
def test_the_law_is_that_of_float32(mechanism: Any, dtype: torch.dtype) -> None:
    assert not rejected(mechanism, dtype, f"half {mechanism.name} {dtype}")


@contextmanager
def _rounded_updates() -> Iterator[None]:
    """The update goes into the half-precision weight, as FBGEMM's would."""

    def rounded(shard: TableShard, rows: Tensor, values: Tensor) -> None:
        shard.weight[rows] = values.to(shard.weight.dtype)
        shard.low[rows] = split(shard.weight[rows].float(), shard.weight.dtype)[1]  # type: ignore[index]

    with (
        mock.patch("dist_dp.row_gradients.write_rows", rounded),
        mock.patch("dist_dp.mechanisms.row_states.write_rows", rounded),
    ):
        yield


@contextmanager
def _rounded_gradients() -> Iterator[None]:
    """Only the gradient's update is rounded, before its noise."""

    def rounded(shard: TableShard, rows: Tensor, values: Tensor) -> None:
        write_rows(shard, rows, values.to(shard.weight.dtype).float())

    with mock.patch("dist_dp.row_gradients.write_rows", rounded):
        yield


@pytest.mark.parametrize("fault", [_rounded_updates, _rounded_gradients])
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_rounding_before_the_noise_is_caught(fault: Any, dtype: torch.dtype) -> None:
    with fault():
        assert rejected(LazyDP, dtype, "rounded")


def halve(whole: Any, data_type: str) -> None:
    """Makes the tables of the model half precision, as if they had been built so."""
    dtype = {"BF16": torch.bfloat16, "FP16": torch.float16}[data_type]
    for collection in embedding_collections(whole).values():
        for config in table_configs(collection):
            config.data_type = DataType[data_type]
        for parameter in collection.parameters():
            parameter.data = parameter.data.to(dtype)


def half_run(dtype: str, kind: str, mechanism: str, momentum: float) -> dict[str, Any]:
    """Float32 values of all table pieces after a short private run of a model of all lookups.

    Args:
        dtype: TorchRec's name of the tables' type.
        kind: One of :data:`sharding_runs.KINDS`.
        mechanism: The noise mechanism.
        momentum: Of SGD.
    """
    whole = unsharded.model()
    if dtype != "FP32":
        halve(whole, dtype)
    private = build(
        whole,
        kind=sharding_runs.KINDS[kind],
        clip=0.5,
        sigma=0.0 if mechanism == "none" else 0.8,
        mechanism=mechanism,
        optimizer=torch.optim.SGD(whole.parameters(), lr=0.5, weight_decay=0.1, momentum=momentum),
        expected=unsharded.EXPECTED,
    )
    for batch in sharding_runs.loader_of(private, 5):
        private.optimizer.zero_grad()
        unsharded.LOSSES(whole(*batch.inputs), batch.labels).backward()
        private.optimizer.step()
    private.settle()
    assert all((s.low is None) == (dtype == "FP32") for s in private.shards)
    return {
        (unsharded_name(private, s.table), s.row_offset, s.column_offset): read_rows(
            s, torch.arange(s.weight.shape[0])
        )
        for s in private.shards
    }


@cache
def reference(mechanism: str, momentum: float) -> dict[str, Tensor]:
    (found,) = run_world(half_run, 1, "FP32", "table_wise", mechanism, momentum)
    return {name: table for (name, _, _), table in found.items()}


def assert_close(ranks: list[dict[Any, Tensor]], wanted: dict[str, Tensor]) -> None:
    """Within what half-precision lookups and starting weights explain: 2^-8 of weights near 1."""
    seen = set()
    for found in ranks:
        for (name, row, column), piece in found.items():
            part = wanted[name][row : row + piece.shape[0], column : column + piece.shape[1]]
            torch.testing.assert_close(piece, part, rtol=0, atol=2e-2)
            seen.add(name)
    assert seen == set(wanted)


@pytest.mark.parametrize(
    ("dtype", "kind", "mechanism", "momentum"),
    [
        ("BF16", "table_wise", "lazydp", 0.0),
        ("FP16", "row_wise", "lazydp", 0.0),
        ("BF16", "row_wise", "dpsgd", 0.9),
        ("BF16", "data_parallel", "lazydp", 0.9),
        ("FP16", "data_parallel", "lazydp", 0.0),
        ("FP16", "column_wise", "none", 0.0),
    ],
)
def test_runs_stay_by_float32_runs(dtype: str, kind: str, mechanism: str, momentum: float) -> None:
    found = run_world(half_run, 1, dtype, kind, mechanism, momentum)
    assert_close(found, reference(mechanism, momentum))


TWO_WORKERS = (
    ("mixed", 0.9),
    ("data_parallel", 0.9),
    ("grid", 0.0),
    ("table_row_wise", 0.9),
)
"""(Kind, momentum)."""


def two_workers() -> list[dict[Any, Tensor]]:
    return [half_run("BF16", kind, "lazydp", momentum) for kind, momentum in TWO_WORKERS]


def test_two_workers_are_one_worker() -> None:
    """Placement changes nothing but the order of sums: far below bfloat16's last place."""
    ranks = run_world(two_workers, 2)
    for case, (_, momentum) in enumerate(TWO_WORKERS):
        (alone,) = run_world(half_run, 1, "BF16", "table_wise", "lazydp", momentum)
        wanted = {name: table for (name, _, _), table in alone.items()}
        assert_close([r[case] for r in ranks], wanted)
        for found in (r[case] for r in ranks):
            for (name, row, column), piece in found.items():
                part = wanted[name][row : row + piece.shape[0], column : column + piece.shape[1]]
                assert float((piece - part).abs().median()) < 1e-6


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("kind", ["table_wise", "row_wise", "data_parallel"])
def test_weighted_bags_of_half_rows(kind: str, dtype: torch.dtype) -> None:
    """A lookup gives the weighted sum of the rounded rows, in float32 (float16: rounded once)."""
    run_world(int, 1)
    whole = unsharded.model()
    halve(whole, "FP16" if dtype == torch.float16 else "BF16")
    features = unsharded.records().sparse[1]
    exact = unsharded.model().weighted
    for name, table in exact.embedding_bags.items():
        table.weight.data = whole.weighted.embedding_bags[name].weight.detach().float()
    build(whole, kind=kind)
    whole.eval()
    found, wanted = whole.weighted(features).values(), exact(features).values().detach()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("data_type", "momentum"), [("FP16", 0.0), ("BF16", 0.9)])
def test_resume_and_release(tmp_path: Path, data_type: str, momentum: float) -> None:
    """A resumed run is the whole run, bit for bit; the release holds the half-precision weights."""

    def run(home: str, most: int = 10**6, **options: Any) -> PrivacyEngine:
        made = PrivacyEngine(
            dataset="clicks",
            ledger=tmp_path / home / "ledger.sqlite",
            run_id="run",
            sharding="row_wise",
            **options,
        )
        whole = model(meta=False)
        halve(whole, data_type)
        optimizer = torch.optim.SGD(whole.parameters(), lr=0.3, momentum=momentum)
        train(made, whole, most, optimizer=optimizer)
        return made

    whole = run("a", secret=bytes(32))
    stopped = run("b", 3, secret=bytes(32))
    saved = save_checkpoint(stopped, tmp_path / "b" / "checkpoint")
    resumed = run("b", resume_from=saved)
    folder = resumed.release(tmp_path / "released")
    whole.parts.settle()
    names = {"weight", "low", "last_step"} | ({"momentum"} if momentum else set())
    for one, other in zip(whole.parts.shards, resumed.parts.shards, strict=True):
        state, resumed_state = one.state_tensors(), other.state_tensors()
        assert set(state) == set(resumed_state) == names
        for name, tensor in state.items():
            assert torch.equal(tensor, resumed_state[name]), (one.table, name)
        table = Release.open(folder).table(one.table)
        assert torch.equal(table, one.weight.float())
    assert not torch.equal(stopped.parts.shards[0].weight, whole.parts.shards[0].weight)


def test_what_is_refused() -> None:
    whole = model(meta=False)
    for config in whole.sequence.embedding_configs():
        config.data_type = DataType.FP16
    with pytest.raises(ModelError, match=r"sequence\.s' has data_type FP16 and weights of"):
        _check_tables("sequence", whole.sequence, TableOptimizer())
    for parameter in whole.sequence.parameters():
        parameter.data = parameter.data.half()
    _check_tables("sequence", whole.sequence, TableOptimizer())
    with pytest.raises(ModelError, match="take the table optimizer sgd, not adagrad"):
        _check_tables("sequence", whole.sequence, TableOptimizer("adagrad"))
    for config in whole.sequence.embedding_configs():
        config.data_type = DataType.INT8
    with pytest.raises(ModelError, match="data_type INT8"):
        _check_tables("sequence", whole.sequence, TableOptimizer())
