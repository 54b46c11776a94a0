"""Optimizer state of few rows in checkpoints: a run goes on on other workers and shardings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_dp.checkpoint_rows import row_state_pieces
from dist_dp.errors import CheckpointError
from dist_dp.sharding import TableOptimizer
from dist_dp.sparse_settings import SparseSettings
from tests.dist_dp.checkpoint_runs import assert_is_the_run, end_of, go_on, stages
from tests.dist_dp.worlds import run_world

SPARSE = SparseSettings(threshold=0.8, selection_share=0.3, max_contribution_norm=2.0)
pytestmark = pytest.mark.filterwarnings("ignore::dist_dp.selection_forecast.DenseSelectionWarning")
KINDS = ("adagrad", "rowwise_adagrad", "adam", "sgd")
CHAIN = [(4, "row_wise"), (5, {"a": "column_wise", "b": "data_parallel", "s": "row_wise"})]


def plain(module: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.05)


def options(kind: str) -> dict[str, Any]:
    momentum = 0.8 if kind == "sgd" else 0.0
    return {
        "mechanism": "adafest",
        "sparse": SPARSE,
        "optimizer": plain,
        "tables": TableOptimizer(kind, momentum=momentum),  # type: ignore[arg-type]
        "table_lr": 0.2,
        "falling": False,
    }


def in_two(homes: dict[str, Path]) -> None:
    for kind, home in homes.items():
        # A column split changes what a row-wise state is the mean over.
        chain = CHAIN if kind in ("adagrad", "sgd") else CHAIN[:1]
        stages(home, chain, **options(kind))


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[Any, Tensor]]:
    """From one worker to two of several shardings, and back."""
    root = tmp_path_factory.mktemp("states")
    homes = {kind: root / kind for kind in KINDS}
    for kind, home in homes.items():
        stages(home, [(2, "table_wise")], **options(kind))
    run_world(in_two, 2, homes)
    found = {}
    for kind, home in homes.items():
        end = stages(home, [(8, "table_wise")], **options(kind))
        assert end is not None
        found[kind] = end
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_run_ends_as_one_that_never_stopped(
    ends: dict[str, dict[Any, Tensor]], kind: str, tmp_path: Path
) -> None:
    whole = end_of(go_on(tmp_path, dropout=0.0, **options(kind)))
    assert_is_the_run(ends[kind], whole, exact=False)


def test_only_rows_that_survived_are_saved(tmp_path: Path) -> None:
    few = {"sparse": SPARSE.model_copy(update={"threshold": 2.5})}
    made = go_on(tmp_path, 2, dropout=0.0, **options("adagrad") | few)
    saved = row_state_pieces(made.parts.shards)
    counts = {
        s.table: sum(
            p[0].tensor.numel() for n, p in saved.items() if f"/{s.table}/" in n and "/rows" in n
        )
        for s in made.parts.shards
    }
    assert sum(counts.values()) > 0
    assert all(counts[s.table] < s.num_rows for s in made.parts.shards)


def test_another_optimizers_state_is_refused(tmp_path: Path) -> None:
    stages(tmp_path, [(2, "table_wise")], **options("adagrad"))
    with pytest.raises(CheckpointError, match="adagrad"):
        go_on(tmp_path, dropout=0.0, **options("adam"))
