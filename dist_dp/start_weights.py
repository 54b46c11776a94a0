"""Starts a sharded model from a release: dense layers, and the tables row by row."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dist_dp.distributed import all_together, broadcast_object, rank
from dist_dp.errors import ReleaseError
from dist_dp.origins import origins_of
from dist_dp.release import dense_tensors
from dist_dp.released import Release
from dist_dp.table_shard import TableShard
from dist_dp.wide_rows import widen

if TYPE_CHECKING:
    from dist_dp.private_model import PrivateModel


def load_start(parts: PrivateModel, folder: Path) -> list[dict[str, Any]]:
    """Puts a release's weights into a model that was just made private; every rank calls it.

    Each rank maps the files of its tables and copies the rows and columns of its own shards, so no
    table is in memory twice, whatever sharding the release was written with. The state of
    optimizers is in no release: it starts empty.

    Guarantee:
        The weights of a release are the result of a private mechanism, and to start from them is
        post-processing of that. So for the records that the release was trained on nothing gets
        worse, and for the records of this run the start is a constant. Records that both read have
        the composition of both.

    Args:
        parts: The private model, before its first step.
        folder: The release.

    Returns:
        What the model depends on from now on; see :func:`dist_dp.origins.origins_of`.

    Raises:
        ReleaseError: It is no whole release, is damaged, or has other tables, layers or sizes.
    """
    found: list[dict[str, Any]] = []

    def load() -> None:
        # One rank reads all of it to compare it with its hashes; the others read their parts.
        release = Release.open(folder, verify=rank() == 0)
        dense = release.dense()
        _check_fits(parts, release, dense)
        _load_dense(parts, dense)
        for shard in parts.shards:
            _load_shard(release, shard)
        found.extend(origins_of(release.folder, release.manifest["privacy"]))

    all_together(load, ReleaseError, f"start from '{folder}'")
    origins: list[dict[str, Any]] = broadcast_object(found)
    return origins


def _check_fits(parts: PrivateModel, release: Release, dense: dict[str, Tensor]) -> None:
    """Compares all names and sizes before anything is changed."""
    own: dict[str, tuple[Any, ...]] = {
        n: tuple(t.shape) for n, t in dense_tensors(parts).items()
    } | {
        cut.table_id(c.name): (c.num_embeddings, c.embedding_dim)
        for cut in parts.cuts
        for c in cut.configs
    }
    given = {n: tuple(t.shape) for n, t in dense.items()} | {
        n: (info["rows"], info["dim"]) for n, info in release.manifest["tables"].items()
    }
    differing = sorted(n for n in own.keys() | given.keys() if own.get(n) != given.get(n))
    if differing:
        listed = ", ".join(
            f"{n} (model {own.get(n, 'without')}, release {given.get(n, 'without')})"
            for n in differing[:4]
        )
        raise ReleaseError(
            f"the model cannot start from '{release.folder}': {len(differing)} of its tables and "
            f"layers differ: {listed}. Give the model the sizes of the release "
            "(data.num_embeddings, data.max_num_embeddings, model), or start without it "
            "(train.start_from null)"
        )


@torch.no_grad()
def _load_dense(parts: PrivateModel, dense: dict[str, Tensor]) -> None:
    for name, tensor in dense_tensors(parts).items():
        tensor.copy_(dense[name])
        if name in parts.fixed:  # what may not move in training begins here
            parts.fixed[name] = tensor.detach().cpu().clone()


@torch.no_grad()
def _load_shard(release: Release, shard: TableShard) -> None:
    """Fills a shard from the pieces of its table that overlap it.

    Raises:
        ReleaseError: A number of it is missing, there twice, or NaN.
    """
    count, columns = shard.weight.shape
    if not count or not columns:
        return
    filled = torch.zeros(count, dtype=torch.int32)
    for rows, column, values in release.pieces(shard.table):
        first = max(column, shard.column_offset)
        last = min(column + values.shape[1], shard.column_offset + columns)
        here = rows - shard.row_offset
        inside = ((here >= 0) & (here < count)).nonzero().flatten()
        if last <= first or not inside.numel():
            continue
        here = here[inside]
        taken = values[:, first - column : last - column]
        if inside.numel() < len(rows):
            taken = taken[inside]
        place = slice(first - shard.column_offset, last - shard.column_offset)
        weight = shard.weight
        weight[here.to(weight.device), place] = taken.to(weight.device, weight.dtype)
        filled[here] += last - first
        if bool(torch.isnan(taken).any()):
            filled[here] = -1
    if bool((filled != columns).any()):
        raise ReleaseError(
            f"table '{shard.table}' in '{release.folder}' is incomplete or holds NaN; start from "
            "another release, or export the run again"
        )
    if shard.low is not None:
        widen(shard)  # a release holds the half-precision weights: of their rest nothing is left
