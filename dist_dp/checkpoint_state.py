"""What a run needs to go on, as named tensors and a few numbers; and its way back into a run.

==========================  ========================================================================
``tables/TABLE/weight``     weights, *not settled*, and beside them ``last_step`` and whatever else
                            the shards keep; one global tensor each, whatever the sharding
``kept/TABLE``              rows that are trained at all, where they were chosen once
``row_states/TABLE/…``      state of updated rows, see :mod:`dist_dp.checkpoint_rows`
``dense/PARAMETER``         dense layers
``optimizer/PARAMETER/…``   state of their optimizer
``fixed/NAME``              buffers and frozen parameters
``schedules/GROUP/…``       prefix sums of the noise schedule of each group of tables
``generators/RANK/DEVICE``  torch's own generator (dropout), for a run with as many workers
==========================  ========================================================================
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from dist_dp.checkpoint_groups import groups_of, restore_settings
from dist_dp.checkpoint_rows import RestoredRows, row_state_pieces
from dist_dp.checkpoint_tensors import Piece
from dist_dp.distributed import all_reduce_max, rank
from dist_dp.errors import CheckpointError
from dist_dp.mechanisms.sparse import SparseNoise

if TYPE_CHECKING:
    from dist_dp.private_model import PrivateModel
    from dist_dp.table_shard import TableShard


def pieces_of(parts: PrivateModel) -> dict[str, list[Piece]]:
    """This rank's pieces of everything that is saved, live; every rank calls it.

    Raises:
        CheckpointError: The dense optimizer keeps something that is no tensor.
    """
    _agree_on_history(parts)
    found = _table_pieces(parts) | row_state_pieces(parts.shards)
    if isinstance(parts.mechanism, SparseNoise):
        for table, rows in parts.mechanism.kept.items():
            found[f"kept/{table}"] = [Piece.whole(rows)]
    for name, parameter in parts.recorder.parameters.items():
        found[f"dense/{name}"] = [Piece.whole(parameter.detach())]
    for name, tensor in _optimizer_state(parts).items():
        found[f"optimizer/{name}"] = [Piece.whole(tensor)]
    for name, tensor in parts.fixed.items():
        found[f"fixed/{name}"] = [Piece.whole(tensor)]
    for group, schedule in enumerate(parts.mechanism.schedules):
        for name, value in schedule.state_dict().items():
            if isinstance(value, Tensor):
                found[f"schedules/{group}/{name}"] = [Piece.whole(value)]
    for device, state in _generators(parts).items():
        found[f"generators/{rank()}/{device}"] = [Piece.whole(state)]
    return found


def numbers_of(parts: PrivateModel) -> dict[str, Any]:
    """The step, and the optimizer's groups: simple types.

    Raises:
        CheckpointError: A setting of the optimizer cannot be kept.
    """
    return {"step": parts.mechanism.schedule.step, "param_groups": groups_of(parts)}


class Restored:
    """A run's pieces as a checkpoint fills them, then put into place by :meth:`finish`.

    Tables, dense layers and fixed tensors are filled where they are; what grows with the run
    (schedules, optimizer state) is allocated in the size that was saved.

    Args:
        parts: The run that goes on, just made.
        saved: What the checkpoint holds.
        same_world: Whether it was saved by as many workers.

    Attributes:
        pieces: What is read first.
        row_states: The states of rows; their values are read next.

    Raises:
        CheckpointError: The checkpoint holds tensors that this model does not have.
    """

    def __init__(self, parts: PrivateModel, saved: Metadata, same_world: bool) -> None:
        self._parts = parts
        names = set(saved.state_dict_metadata)
        for shard in parts.shards:
            # Allocated on first use by mechanisms that may never need it.
            if f"tables/{shard.table}/last_step" in names:
                shard.last_step  # noqa: B018 (allocates)
        self.pieces = _table_pieces(parts)
        for name, parameter in parts.recorder.parameters.items():
            self.pieces[f"dense/{name}"] = [Piece.whole(parameter.detach())]
        for name, tensor in parts.fixed.items():
            self.pieces[f"fixed/{name}"] = [Piece.whole(tensor)]
        kept = ["kept/", "optimizer/", "schedules/"] + [f"generators/{rank()}/"] * same_world
        for name, described in saved.state_dict_metadata.items():
            if name.startswith(tuple(kept)) and isinstance(described, TensorStorageMetadata):
                empty = torch.empty(described.size, dtype=described.properties.dtype)
                self.pieces[name] = [Piece.whole(empty)]
        self.row_states = RestoredRows(parts.shards, saved)
        self.pieces |= self.row_states.rows
        self._refuse_unknown(names)

    def _refuse_unknown(self, names: set[str]) -> None:
        """Every tensor must have its place, on this rank or on another."""
        tables = {f"tables/{cut.table_id(c.name)}" for cut in self._parts.cuts for c in cut.configs}
        for name in sorted(names - set(self.pieces)):
            known = (
                name.startswith("generators/")
                or (name.startswith("tables/") and name.rpartition("/")[0] in tables)
                or (self.row_states.knows(name) and f"tables/{name.split('/')[1]}" in tables)
            )
            # A table's state that lies here was asked for by name already, if it is kept at all.
            here = name.rpartition("/")[0] in {f"tables/{s.table}" for s in self._parts.shards}
            if not known or here:
                raise CheckpointError(f"it holds '{name}', which this model does not have")

    def _group(self, kind: str) -> dict[str, dict[str, Tensor]]:
        """Filled tensors of a kind, by the middle of their names and the last part."""
        found: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for name, (piece, *_) in self.pieces.items():
            first, _, rest = name.partition("/")
            if first == kind:
                middle, _, last = rest.rpartition("/")
                found[middle][last] = piece.tensor
        return found

    def finish(self, numbers: dict[str, Any]) -> None:
        """Puts into place what was not filled in place.

        Args:
            numbers: What :func:`numbers_of` gave.

        Raises:
            CheckpointError: The optimizer or the schedules are of another kind.
        """
        parts = self._parts
        self.row_states.finish()
        self._finish_kept()
        schedules = self._group("schedules")
        for group, schedule in enumerate(parts.mechanism.schedules):
            schedule.load_state_dict({"step": numbers["step"], **schedules[str(group)]})
        live = dict([*parts.model.named_parameters(), *parts.model.named_buffers()])
        for name, tensor in parts.fixed.items():
            live[name].copy_(tensor)
        self._finish_optimizer()
        restore_settings(parts, numbers["param_groups"])
        for states in self._group("generators").values():
            torch.set_rng_state(states["cpu"])
            if "cuda" in states:
                torch.cuda.set_rng_state(states["cuda"], parts.device)

    def _finish_kept(self) -> None:
        kept = {
            name.removeprefix("kept/"): piece.tensor
            for name, (piece, *_) in self.pieces.items()
            if name.startswith("kept/")
        }
        mechanism = self._parts.mechanism
        if not isinstance(mechanism, SparseNoise) or not mechanism.chooses_once:
            if kept:
                raise CheckpointError("it holds chosen rows, which this mechanism does not choose")
            return
        rows = {
            cut.table_id(c.name): c.num_embeddings for cut in self._parts.cuts for c in cut.configs
        }
        for table, chosen in kept.items():
            ordered = chosen.dtype == torch.int64 and bool((chosen[1:] > chosen[:-1]).all())
            inside = not chosen.numel() or (
                int(chosen[0]) >= 0 and int(chosen[-1]) < rows.get(table, 0)
            )
            if not (ordered and inside):
                raise CheckpointError(f"the chosen rows of table '{table}' are damaged")
        mechanism.keep(kept, self._parts.shards)

    def _finish_optimizer(self) -> None:
        parts = self._parts
        dense = parts.optimizer.dense
        state = self._group("optimizer")
        if dense is not None:
            groups = dense.param_groups
            names = {id(p): name for name, p in parts.recorder.parameters.items()}
            ordered = [names[id(p)] for group in groups for p in group["params"]]
            numbered = {n: state[name] for n, name in enumerate(ordered) if name in state}
            dense.load_state_dict(
                {"state": numbered, "param_groups": dense.state_dict()["param_groups"]}
            )
            # It put copies in their place, which the private optimizer would not know.
            dense.param_groups = groups


def _table_pieces(parts: PrivateModel) -> dict[str, list[Piece]]:
    found: dict[str, list[Piece]] = defaultdict(list)
    for shard in parts.shards:
        for name, tensor in shard.state_tensors().items():
            found[f"tables/{shard.table}/{name}"].append(_piece_of(shard, tensor))
    return dict(found)


def _piece_of(shard: TableShard, tensor: Tensor) -> Piece:
    """A state tensor's place in the whole table: rows, and columns if it has any."""
    if tensor.dim() == 1:
        return Piece((shard.num_rows,), (shard.row_offset,), tensor)
    return Piece((shard.num_rows, shard.dim), (shard.row_offset, shard.column_offset), tensor)


def _agree_on_history(parts: PrivateModel) -> None:
    """If some shard has a history every shard has: a table is saved whole or not at all."""
    kept = torch.tensor([float(any(s.has_history for s in parts.shards))], device=parts.device)
    if all_reduce_max(kept).item():
        for shard in parts.shards:
            shard.last_step  # noqa: B018 (allocates)


def _optimizer_state(parts: PrivateModel) -> dict[str, Tensor]:
    dense = parts.optimizer.dense
    if dense is None:
        return {}
    found: dict[str, Tensor] = {}
    for name, parameter in parts.recorder.parameters.items():
        for key, value in dense.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                found[f"{name}/{key}"] = value.detach()
            elif value is not None:
                raise CheckpointError(
                    f"the dense optimizer {type(dense).__name__} keeps '{key}' as a "
                    f"{type(value).__name__}, which a checkpoint does not hold; use SGD, Adagrad "
                    "or Adam, or save no checkpoints"
                )
    return found


def _generators(parts: PrivateModel) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if parts.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(parts.device)
    return states
