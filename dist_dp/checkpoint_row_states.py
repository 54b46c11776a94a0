"""Optimizer state of the rows that have one, in a checkpoint: tensors as long as the rows are many.

A shard's state is saved as it is, beside the numbers of its rows, under the place of the shard::

    row_states/TABLE/ROW.COLUMN.COLUMNS/rows     int64 [n], global rows
    row_states/TABLE/ROW.COLUMN.COLUMNS/NAME     float32 [n, COLUMNS] or [n]

Whoever holds a part of the table reads all of its pieces and keeps what lies in its own rows and
columns, so any sharding can go on from any other. A number a row of a shard of columns is a mean
over these columns; where they are joined, it becomes the mean over all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from dist_dp.checkpoint_tensors import Piece
from dist_dp.distributed import rank
from dist_dp.errors import CheckpointError

if TYPE_CHECKING:
    from dist_dp.private_model import PrivateModel
    from dist_dp.row_optimizers import RowState
    from dist_dp.table_shard import TableShard

PREFIX = "row_states/"


def row_state_pieces(parts: PrivateModel) -> dict[str, list[Piece]]:
    """This rank's states, live."""
    found: dict[str, list[Piece]] = {}
    for shard in parts.shards:
        state = shard.row_state
        if state is None or not len(state.index) or (shard.replicated and rank() != 0):
            continue
        place = f"{shard.row_offset}.{shard.column_offset}.{shard.weight.shape[1]}"
        prefix = f"{PREFIX}{shard.table}/{place}/"
        found[prefix + "rows"] = [Piece.whole(state.index.rows + shard.row_offset)]
        for name in state.names:
            found[prefix + name] = [Piece.whole(state.values(name))]
    return found


def empty_row_states(parts: PrivateModel, saved: Metadata) -> dict[str, list[Piece]]:
    """Tensors for the saved states of the tables that are here, to be filled.

    Raises:
        CheckpointError: What is saved is the state of another optimizer.
    """
    tables = {shard.table for shard in parts.shards}
    known = {"rows", *_names_of(parts)}
    found: dict[str, list[Piece]] = {}
    for name, described in saved.state_dict_metadata.items():
        if not name.startswith(PREFIX) or not isinstance(described, TensorStorageMetadata):
            continue
        table, _, kept = _parts_of(name)
        if kept not in known:
            raise CheckpointError(
                f"it holds '{kept}' for rows of table '{table}', which this run's table optimizer "
                "does not keep: resume with the table optimizer that the run began with"
            )
        if table in tables:
            empty = torch.empty(described.size, dtype=described.properties.dtype)
            found[name] = [Piece.whole(empty)]
    return found


def restore_row_states(parts: PrivateModel, filled: Mapping[str, Tensor]) -> None:
    """Puts filled tensors into the shards' states.

    Args:
        parts: The run that goes on.
        filled: By name, as :func:`empty_row_states` named them.
    """
    shards: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in filled.items():
        prefix, _, kept = name.rpartition("/")
        shards[prefix][kept] = tensor
    for shard in parts.shards:
        shard.row_state = None
    for prefix, saved in shards.items():
        table, (_, column, columns), _ = _parts_of(f"{prefix}/rows")
        for shard in parts.shards:
            if shard.table == table:
                _take_over(parts, shard, column, columns, saved)


def _take_over(
    parts: PrivateModel, shard: TableShard, column: int, columns: int, saved: Mapping[str, Tensor]
) -> None:
    """What of one saved shard lies in a shard of this run."""
    mine = range(shard.column_offset, shard.column_offset + shard.weight.shape[1])
    first, last = max(mine.start, column), min(mine.stop, column + columns)
    rows = saved["rows"] - shard.row_offset
    inside = torch.nonzero((rows >= 0) & (rows < shard.weight.shape[0])).squeeze(1)
    if first >= last or not inside.numel():
        return
    state = _optimizer_of(parts, shard)
    device = shard.weight.device
    slots = state.slots(rows[inside].to(device))
    for name in state.names:
        values = saved[name][inside].to(device)
        now = state.take(name, slots)
        if values.dim() == 2:
            here = slice(first - mine.start, last - mine.start)
            now[:, here] = values[:, first - column : last - column]
        elif name == "steps":
            now = torch.maximum(now, values)
        else:
            now = now + values * ((last - first) / len(mine))
        state.put(name, slots, now)


def _optimizer_of(parts: PrivateModel, shard: TableShard) -> RowState:
    from dist_dp.mechanisms.sparse import SparseNoise

    mechanism = parts.mechanism
    assert isinstance(mechanism, SparseNoise)
    state = mechanism.optimizers[shard.group].state_of(shard)
    assert state is not None  # else nothing of the name was known
    return state


def _names_of(parts: PrivateModel) -> set[str]:
    from dist_dp.mechanisms.sparse import SparseNoise

    mechanism = parts.mechanism
    if not isinstance(mechanism, SparseNoise):
        return set()
    return {name for optimizer in mechanism.optimizers for name in optimizer.state_names}


def _parts_of(name: str) -> tuple[str, tuple[int, int, int], str]:
    """Table, (first row, first column, columns) of the shard, and what is kept.

    Raises:
        CheckpointError: The name is none of ours.
    """
    table, _, rest = name.removeprefix(PREFIX).partition("/")
    place, _, kept = rest.partition("/")
    numbers = place.split(".")
    if len(numbers) != 3 or not all(n.isdecimal() for n in numbers):
        raise CheckpointError(f"it holds '{name}', which is the name of no optimizer state")
    return table, (int(numbers[0]), int(numbers[1]), int(numbers[2])), kept
