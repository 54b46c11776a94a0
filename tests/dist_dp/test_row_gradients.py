"""Row gradients that are handed over equal FBGEMM's own update, and brute force, to 1e-5."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

import pytest
from torch import Tensor

from dist_dp.local_tables import LocalTables
from dist_dp.row_gradients import RowGradients
from tests.dist_dp import gradients
from tests.dist_dp.models import BATCH
from tests.dist_dp.worlds import run_world

TOLERANCE = 1e-5
USED = ("mixed-sum-mean-1", "mixed-weighted-3", "oddities")
KINDS = ("row_wise", "table_wise", "column_wise", "data_parallel")
ALL = list(range(BATCH))
SPLITS = {1: [ALL], 2: [ALL[:6], ALL[6:]]}


def own_all(tables: LocalTables) -> None:
    """Takes the update from every kernel; plain float32 weights then take SGD's step here."""
    for kernel in tables.kernels:
        tables.own_update(kernel)


def owned_steps(work: list[tuple[Any, ...]]) -> dict[tuple[Any, ...], dict[str, Any]]:
    with mock.patch.object(LocalTables, "own_updates", own_all):
        return gradients.all_cases(work)


@cache
def results(workers: int) -> list[dict[tuple[Any, ...], dict[str, Any]]]:
    work = []
    for case in USED:
        clip = gradients.brute_force(case, ALL)[1]
        for kind in KINDS:
            work.append(((case, kind), case, kind, clip, SPLITS[workers], "mean", None))
    return run_world(owned_steps, workers, work)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", USED)
def test_sums_are_those_of_brute_force(case: str, kind: str, workers: int) -> None:
    """Repeated ids, shared tables, weights, mean pooling, sequences, empty bags."""
    ranks = [r[case, kind] for r in results(workers)]
    found = gradients.errors(ranks, gradients.brute_force(case, ALL)[0])
    assert not {name: e for name, e in found.items() if not e <= TOLERANCE}


@contextmanager
def _weights_forgotten() -> Iterator[None]:
    proper = RowGradients._uses

    def unweighted(self: RowGradients, *args: Any) -> Any:
        return [(rows, places, None, part) for rows, places, _, part in proper(self, *args)]

    with mock.patch.object(RowGradients, "_uses", unweighted):
        yield


@contextmanager
def _repeats_overwrite() -> Iterator[None]:
    """One entry of a row stands for all."""

    def first_only(
        places: Tensor, table: Tensor, offsets: Tensor, *, mode: str, per_sample_weights: Tensor
    ) -> Tensor:
        return table[places[offsets]] * per_sample_weights[offsets].unsqueeze(1)

    with mock.patch("torch.nn.functional.embedding_bag", first_only):
        yield


@contextmanager
def _first_feature_only() -> Iterator[None]:
    """The second feature of a table is forgotten."""
    proper = RowGradients._uses

    with mock.patch.object(RowGradients, "_uses", lambda self, *args: proper(self, *args)[:1]):
        yield


@pytest.mark.parametrize("fault", [_weights_forgotten, _repeats_overwrite, _first_feature_only])
@pytest.mark.parametrize("case", ["mixed-sum-mean-1", "mixed-weighted-3"])
def test_a_fault_is_caught(case: str, fault: Any) -> None:
    wanted, clip = gradients.brute_force(case, ALL)
    work = [((), case, "table_wise", clip, [ALL], "mean", None)]
    with fault():
        (found,) = run_world(owned_steps, 1, work)
    assert max(gradients.errors([found[()]], wanted).values()) > 100 * TOLERANCE
