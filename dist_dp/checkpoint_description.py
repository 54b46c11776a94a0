"""What a checkpoint says about the run it is of, and whether a run may go on from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from dist_dp.accountant import Accountant
from dist_dp.checkpoint_groups import check_same_groups
from dist_dp.checkpoint_rows import check_same_row_states, row_state_kinds
from dist_dp.checkpoint_state import numbers_of
from dist_dp.distributed import (
    all_gather_objects,
    all_reduce_max,
    broadcast_object,
    rank,
    world_size,
)
from dist_dp.errors import CheckpointError

if TYPE_CHECKING:
    from dist_dp.engine import PrivacyEngine
    from dist_dp.private_model import PrivateModel


def describe(engine: PrivacyEngine) -> dict[str, Any]:
    """What a checkpoint says about itself: simple types; every rank calls it.

    Raises:
        CheckpointError: A setting of the optimizer cannot be kept.
    """
    parts = engine.parts
    behind = torch.tensor([float(any(not parts.mechanism.is_settled(s) for s in parts.shards))])
    settled = not bool(all_reduce_max(behind.to(parts.device)).item())
    kinds: dict[str, str] = {}
    for here in all_gather_objects(row_state_kinds(parts.shards)):
        kinds |= here
    return {
        "numbers": numbers_of(parts),
        "settled": settled,
        "world_size": world_size(),
        "settings": engine.settings,
        "run_id": engine.run_id,
        "dataset": engine.dataset,
        "fixed_secret": engine.secret_is_given,
        "plan": parts.plan.model_dump(),
        "dense_optimizer": _kind_of_optimizer(parts),
        "row_states": kinds,
        "steps_charged": engine.steps_charged(),
        "ledger": _ledger_position(engine),
    }


def check_same_run(engine: PrivacyEngine, info: Mapping[str, Any]) -> None:
    """Refuses a run that is not the one described: other noise, records or model.

    Args:
        engine: The run that would go on, just made private.
        info: What :func:`describe` gave.

    Raises:
        CheckpointError: It names what differs.
    """
    parts = engine.parts
    for subject, saved, now in (
        ("privacy plan", info["plan"], parts.plan.model_dump()),
        ("run", info["run_id"], engine.run_id),
        ("training settings", info["settings"], engine.settings),
        ("dense optimizer", info["dense_optimizer"], _kind_of_optimizer(parts)),
    ):
        if saved != json.loads(json.dumps(now)):
            raise CheckpointError(
                f"it was saved with another {subject}; resume with the same configuration"
            )
    check_same_row_states(parts.shards, info.get("row_states", {}))
    check_same_groups(parts, info["numbers"]["param_groups"])


def _ledger_position(engine: PrivacyEngine) -> dict[str, Any] | None:
    """How far the ledger had come: one that is resumed on must have come as far at least."""
    held = engine.accountant if rank() == 0 else None
    position = held.position().to_json() if isinstance(held, Accountant) else None
    return broadcast_object(position)


def _kind_of_optimizer(parts: PrivateModel) -> str | None:
    dense = parts.optimizer.dense
    return None if dense is None else type(dense).__name__
