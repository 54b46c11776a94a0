"""Work is counted from shapes, and priced with the rates of a machine."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_dp.cost_model import MachineRates, predict, release_seconds
from dist_dp.errors import ConfigError
from dist_dp.step_counts import all_reduce, step_counts, table_access, total
from dist_dp.step_shapes import (
    MECHANISMS,
    DenseShape,
    LinearShape,
    ShardShape,
    TableShape,
    Workload,
    distinct_rows,
)
from dist_dp.step_work import Access, Work

BATCH = 64.0


def workload(mechanism: str = "lazydp", **changes: Any) -> Workload:
    table = TableShape(rows=1000, dim=16, bags=2, pooling=3.0)
    base = Workload(
        mechanism=mechanism,
        batch=BATCH,
        world_size=1,
        tables=(table,),
        shards=(ShardShape(table, 1000, 16),),
        dense=DenseShape((LinearShape(8, 32, bottom=True), LinearShape(64, 1, relu=False))),
    )
    return replace(base, **changes)


def test_products_of_a_step() -> None:
    """Forward, the gradient of what is below, and of the parameters: the same for all."""
    below, first = 2 * BATCH * 64 * 1, 2 * BATCH * 8 * 32
    for mechanism in MECHANISMS:
        assert total(step_counts(workload(mechanism))).matmul_flops == 3 * below + 2 * first


def test_lookups_updates_and_noise() -> None:
    ids = BATCH * 2 * 3
    lazy = step_counts(workload())
    access = lazy["forward"].lookup
    assert access == lazy["embedding_update"].update
    assert (access.bags, access.ids, access.id_bytes) == (BATCH * 2, ids, 4 * 16 * ids)
    assert access.rows == lazy["settle"].search_rows == distinct_rows(1000, ids)
    assert lazy["settle"].settle_normals == 16 * access.rows
    assert lazy["settle"].search_ids == ids
    dense = 9 * 32 + 65
    assert lazy["noise"].stream_normals == dense
    assert step_counts(workload("dpsgd"))["noise"].stream_normals == dense + 16_000
    assert step_counts(workload("dpsgd-torch"))["noise"].torch_normals == 16_000
    assert "noise" not in step_counts(workload("none"))


def test_lazy_work_does_not_grow_with_the_rows() -> None:
    def normals(mechanism: str, rows: int) -> float:
        table = TableShape(rows=rows, dim=16)
        shards = (ShardShape(table, rows, 16),)
        work = total(step_counts(workload(mechanism, tables=(table,), shards=shards)))
        return work.settle_normals + work.stream_normals

    assert normals("lazydp", 10**9) == pytest.approx(normals("lazydp", 10**7), rel=1e-4)
    assert normals("dpsgd", 10**9) > 99 * normals("dpsgd", 10**7)


def touched(rows: int, pooling: float, skew: float = 0.0, share: float = 1.0) -> Access:
    table = TableShape(rows, 128, pooling=pooling, skew=skew)
    shards = (ShardShape(table, int(share * rows), 128, "row_wise"),)
    return table_access(workload(tables=(table,), shards=shards, batch=2048.0))


def test_rows_are_paid_once_and_their_repeats_as_ids() -> None:
    """A small table, or a popular part of one, is mostly repeats."""
    large, small, popular = touched(10**7, 32), touched(100, 32), touched(10**7, 32, skew=1.2)
    assert large.ids == small.ids == popular.ids == 2048 * 32
    assert large.rows > 0.99 * large.ids
    assert small.rows == pytest.approx(100)
    assert popular.rows < 0.3 * popular.ids
    half = touched(10**7, 32, share=0.5)
    assert half.ids == large.ids / 2 and half.bags == large.bags


def test_close_rows_share_a_region() -> None:
    """64 rows of 128 columns lie in each."""
    sparse, dense, small = touched(10**7, 1), touched(10**6, 80), touched(64, 80)
    assert sparse.regions > 0.99 * sparse.rows
    assert dense.regions == pytest.approx(10**6 / 64, rel=0.01)
    assert small.regions == 1


@pytest.mark.parametrize(("pooling", "long"), [(1.0, 0.0), (16.5, 0.5), (32.0, 1.0), (80.0, 1.0)])
def test_repeats_in_bags(pooling: float, long: float) -> None:
    table = TableShape(1000, 16, bags=2, pooling=pooling)
    clip = step_counts(workload(tables=(table,)))["clip"]
    ids = BATCH * 2 * pooling
    assert (clip.short_bag_ids, clip.long_bag_ids) == ((1 - long) * ids, long * ids)


@pytest.mark.parametrize("skew", [0.0, 0.6, 1.0, 1.2])
def test_distinct_rows_against_a_draw(skew: float) -> None:
    """Mean of 200 draws with a fixed seed; its deviation is under 0.3 % of the count."""
    rows, ids = 500, 800
    if skew == 1.0:
        mass = np.diff(np.log(np.arange(1, rows + 2)))
    else:
        mass = np.diff(np.arange(1, rows + 2) ** (1 - skew))
    generator = np.random.default_rng(1)
    draws = generator.choice(rows, size=(200, ids), p=mass / mass.sum())
    found = np.mean([np.unique(draw).size for draw in draws])
    assert distinct_rows(rows, ids, skew) == pytest.approx(found, rel=0.01)


def test_messages_of_two_workers() -> None:
    table = TableShape(rows=1000, dim=16)
    halves = (ShardShape(table, 500, 16, "row_wise"),)
    two = step_counts(workload(world_size=2, tables=(table,), shards=halves))["communication"]
    assert two.all_to_all_bytes == 0.5 * (8 * BATCH + 4 * BATCH * 2)
    dense = all_reduce(4.0 * (9 * 32 + 65), 2)
    sums = all_reduce(4 * BATCH * 2 * 16, 2)
    assert two.all_reduce_bytes == dense.all_reduce_bytes + sums.all_reduce_bytes
    assert two.all_gather_bytes == 4 * BATCH * 16
    assert "communication" not in step_counts(workload())


def test_an_unknown_mechanism() -> None:
    with pytest.raises(ConfigError, match="mechanism 'adafest' has no cost model"):
        workload("adafest")


def test_every_kind_of_work_has_a_price() -> None:
    """Doubling a rate or a cost moves the total of some step: none is forgotten."""
    rates = MachineRates.shipped()
    table = TableShape(rows=10**6, dim=16, pooling=2.0)
    pieces = tuple(ShardShape(table, 5 * 10**5, 16, k) for k in ("row_wise", "table_wise"))
    steps = [
        workload(m, world_size=2, batch=10.0**6, tables=(table, table), shards=pieces)
        for m in MECHANISMS
    ]
    steps = [replace(w, dense=replace(w.dense, vectors=3, width=16)) for w in steps]
    before = [predict(w, rates)["total"] for w in steps]
    unpriced = {"threads", "rounds", "source", "disk_bytes_per_second"}
    for name in {f.name for f in fields(MachineRates)} - unpriced:
        value = getattr(rates, name)
        # a cost may be measured as nothing
        doubled = (
            [value | {k: 2 * v or 1e-9} for k, v in value.items()]
            if isinstance(value, dict)
            else [2 * value or 1e-9]
        )
        for double in doubled:
            after = [predict(w, replace(rates, **{name: double}))["total"] for w in steps]
            assert after != before, name
    assert {f.name for f in fields(Work)} >= {"settle_normals"}


def test_threads_and_network() -> None:
    rates = MachineRates.shipped()
    four = rates.with_threads(2 * rates.threads)
    assert four.matmul_flops_per_second == 2 * rates.matmul_flops_per_second
    assert four.settle_row_seconds == rates.settle_row_seconds / 2
    assert four.lookup_seconds["rows"] == rates.lookup_seconds["rows"] / 2
    assert four.round_seconds == rates.round_seconds
    slow = rates.with_network(1e6, 1e-3)
    assert slow.all_to_all_bytes_per_second == 1e6 and slow.round_seconds == 1e-3
    fast = rates.with_network(1e15, 1e-6)
    assert fast.all_to_all_bytes_per_second == rates.all_to_all_bytes_per_second


def test_a_release_waits_for_the_slower_of_disk_and_noise() -> None:
    rates = replace(
        MachineRates.shipped(), disk_bytes_per_second=1e9, stream_normals_per_second=1e6
    )
    assert release_seconds(workload(), rates) == pytest.approx(16_000 / 1e6)
    assert release_seconds(workload("none"), rates) == pytest.approx(4 * 16_000 / 1e9)


def test_rates_come_back_from_their_file(tmp_path: Path) -> None:
    rates = MachineRates.shipped()
    rates.save(tmp_path / "rates.json")
    assert MachineRates.load(tmp_path / "rates.json") == rates
    assert set(rates.step_seconds) == set(rates.table_seconds) == set(MECHANISMS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 0}, "no rates of this version"),
        ({"more": 1}, "does not know, more"),
        ({"matmul_flops_per_second": 0}, "matmul_flops_per_second is 0"),
        ({"round_seconds": -1.0}, "round_seconds is -1"),
        ({"step_seconds": {"none": "fast"}}, "step_seconds is"),
        ({"table_seconds": {"none": 1.0}}, "table_seconds is not of dpsgd, .*none"),
        ({"lookup_seconds": 1e-9}, "lookup_seconds is not of bag_bytes, bags"),
    ],
)
def test_what_is_no_file_of_rates(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    MachineRates.shipped().save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=message):
        MachineRates.load(path)
    path.write_text("[")
    with pytest.raises(ConfigError, match="cannot read the machine's rates"):
        MachineRates.load(path)
