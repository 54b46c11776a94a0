"""The runs of ``test_sparse_mechanisms`` and ``test_selection``: one world, many placements."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from dist_dp import contributions
from dist_dp.distributed import world_size
from dist_dp.mechanisms import sparse
from dist_dp.private_model import PrivateModel
from dist_dp.sparse_settings import SparseSettings
from dist_dp.survivors import SelectionNoise
from tests.dist_dp import unsharded
from tests.dist_dp.gradients import build
from tests.dist_dp.sharding_runs import KINDS, private_run
from tests.dist_dp.sparse_reference import kept_rows

ADAPTIVE = {"selection_share": 0.3, "max_contribution_norm": 2.0, "threshold": 1.2}
CHOSEN = {"rows": 3, "frequencies": "counts.parquet"}
SETTINGS = {
    "adafest": SparseSettings(**ADAPTIVE),
    "fest": SparseSettings(**CHOSEN),
    "adafest+": SparseSettings(**ADAPTIVE, **CHOSEN),
}
KINDS_OF: dict[int, tuple[str, ...]] = {
    1: ("table_wise", "data_parallel"),
    2: tuple(KINDS),
    4: ("table_row_wise", "grid", "mixed"),
}
"""Kinds of sharding by the number of workers."""
SOME_KINDS = ("data_parallel", "row_wise", "mixed")
"""Of two workers, for everything but AdaFEST on records."""


def sparse_run(mechanism: str, kind: Any, **options: Any) -> dict[str, Any]:
    """One run; see :func:`private_run`."""
    kept = None if mechanism == "adafest" else kept_rows()
    return private_run(kind, mechanism=mechanism, sparse=SETTINGS[mechanism], kept=kept, **options)


def all_runs(local_size: int | None) -> dict[Any, Any]:
    """AdaFEST on the world's kinds, with gradients and without; the others on some."""
    if local_size is not None:
        os.environ["LOCAL_WORLD_SIZE"] = str(local_size)
    found: dict[Any, Any] = {}
    for name in KINDS_OF[world_size()]:
        kind = KINDS[name]
        found["adafest", name, "records"] = sparse_run("adafest", kind)
        found["adafest", name, "zero"] = sparse_run("adafest", kind, zero=True)
    for name in SOME_KINDS if world_size() == 2 else ():
        kind = KINDS[name]
        found["fest", name, "records"] = sparse_run("fest", kind)
        found["adafest+", name, "records"] = sparse_run("adafest+", kind)
        found["adafest+", name, "users"] = sparse_run("adafest+", kind, by_user=True)
        found["adafest", name, "parts"] = sparse_run("adafest", kind, micro_batch_size=2)
    return found


def batch_in_flight(private: PrivateModel, model: Any, records: list[int]) -> torch.Tensor:
    """Looks a batch up, as a training forward does, and returns its mask."""
    batch = unsharded.records().select(records)
    model(*batch.inputs)
    return torch.ones(len(records), dtype=torch.bool)


def survivals(mechanism: str, sigma: float, steps: int, fault: str | None) -> dict[str, Any]:
    """How often each row of each table survives, for one batch at many steps."""
    model = unsharded.model()
    kept = None if mechanism == "adafest" else kept_rows()
    private = build(
        model,
        kind="table_wise",
        clip=1.0,
        sigma=sigma,
        mechanism=mechanism,
        sparse=SETTINGS[mechanism],
        kept=kept,
    )
    chosen = private.mechanism
    assert isinstance(chosen, sparse.SparseNoise)
    times = {s.table: torch.zeros(s.num_rows, dtype=torch.int64) for s in private.shards}
    is_real = batch_in_flight(private, model, RECORDS)
    with FAULTS[fault]() if fault else mock.patch.dict({}):
        for step in range(1, steps + 1):
            chosen.contribute(private.cuts, is_real, None)
            chosen.select(private.cuts, step, [(0.0, 0.0)])
            for shard in private.shards:
                times[shard.table][chosen._survivors[id(shard)]] += 1
    private.optimizer.forget()
    return times


RECORDS = [0, 3, 5, 9, 14, 20, 21, 31]


@contextmanager
def _no_noise_on_counts() -> Iterator[None]:
    proper = SelectionNoise.of_touched

    def without(self: SelectionNoise, *args: Any, **options: Any) -> Any:
        return proper(self, *args, **options | {"deviation": 0.0})

    with mock.patch.object(SelectionNoise, "of_touched", without):
        yield


@contextmanager
def _no_false_positives() -> Iterator[None]:
    def none(self: SelectionNoise, **_: Any) -> torch.Tensor:
        return torch.empty(0, dtype=torch.int64)

    with mock.patch.object(SelectionNoise, "of_untouched", none):
        yield


@contextmanager
def _unclipped() -> Iterator[None]:
    proper = contributions.contribution_maps

    def whole(cuts: Any, is_real: Any, users: Any, max_norm: float, kept: Any = None) -> Any:
        return proper(cuts, is_real, users, 1e9, kept)

    with mock.patch.object(sparse, "contribution_maps", whole):
        yield


FAULTS: dict[str, Callable[[], Any]] = {
    "threshold without noise": _no_noise_on_counts,
    "false positives omitted": _no_false_positives,
    "contribution unclipped": _unclipped,
}
