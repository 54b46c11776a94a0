"""Rows that do not survive a step: weight and optimizer state stay, bit for bit, in a real run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dist_dp.engine import PrivacyEngine
from dist_dp.mechanisms.sparse import SparseNoise
from dist_dp.sharding import TableOptimizer
from dist_dp.sparse_settings import SparseSettings
from dist_dp.table_shard import TableShard
from tests.dist_dp.placement import features_of, model
from tests.dist_dp.test_engine import DELTA, LOSSES, data_loader, engine

STEPS = 8
Row = tuple[Tensor, dict[str, Tensor]]
"""Its weight, and its state by name; none if it has no state yet."""


def row_of(shard: TableShard, row: int) -> Row:
    state = shard.row_state
    found: dict[str, Tensor] = {}
    if state is not None:
        slot = int(state.lookup(torch.tensor([row])))
        found = {} if slot < 0 else {n: v[slot].clone() for n, v in state.values.items()}
    return shard.weight[row].clone(), found


def same(one: Row, other: Row) -> bool:
    (weight, state), (later, kept) = one, other
    return (
        torch.equal(weight, later)
        and state.keys() == kept.keys()
        and all(torch.equal(state[n], kept[n]) for n in state)
    )


def survivors_of(made: PrivacyEngine) -> dict[str, set[int]]:
    """Filled with each step's surviving rows, by table."""
    mechanism, alive = made.parts.mechanism, {}
    assert isinstance(mechanism, SparseNoise)
    proper = mechanism.after_update

    def noted(shards: Iterable[TableShard]) -> None:
        for shard in made.parts.shards:
            alive[shard.table] = set(mechanism.survivors(shard).tolist())
        proper(shards)

    mechanism.after_update = noted  # type: ignore[method-assign]
    return alive


@pytest.mark.filterwarnings("ignore::dist_dp.selection_forecast.DenseSelectionWarning")
@pytest.mark.parametrize(
    ("kind", "momentum"), [("sgd", 0.8), ("adagrad", 0.0), ("rowwise_adagrad", 0.0), ("adam", 0.0)]
)
def test_losers_stay_as_they_are(tmp_path: Path, kind: str, momentum: float) -> None:
    few = SparseSettings(threshold=1.5, selection_share=0.3, max_contribution_norm=2.0)
    made = engine(tmp_path, mechanism="adafest", sparse=few, run_id="run")
    module = model(meta=False)
    trained, optimizer, loader = made.make_private_with_epsilon(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=data_loader(),
        target_epsilon=4.0,
        target_delta=DELTA,
        max_grad_norm=1.0,
        epochs=2,
        features_of=features_of,
        table_optimizer=TableOptimizer(kind, momentum=momentum),
        table_lr=0.1,
    )
    alive = survivors_of(made)
    losers = stateful = moved = 0
    for _, batch in zip(range(STEPS), loader, strict=False):
        before = {s.table: [row_of(s, r) for r in range(s.num_rows)] for s in made.parts.shards}
        LOSSES(trained(*batch.inputs), batch.labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        for shard in made.parts.shards:
            for row, was in enumerate(before[shard.table]):
                stayed = same(was, row_of(shard, row))
                if row in alive[shard.table]:
                    moved += not stayed
                else:
                    assert stayed, (shard.table, row)
                    losers += 1
                    stateful += bool(was[1])
    assert losers > 20 and stateful > 10 and moved > 20
