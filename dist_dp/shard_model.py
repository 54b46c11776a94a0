"""Shards a model's collections with TorchRec and puts the graph cut in their place."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dist_dp import kernels
from dist_dp.cut import CutEmbeddings
from dist_dp.distributed import (
    agree_on_hosts,
    broadcast_object,
    local_world_size,
    rank,
    world_size,
)
from dist_dp.errors import ConfigError, ModelError
from dist_dp.file_names import why_no_path
from dist_dp.sharding import (
    NODE_KINDS,
    ShardingKind,
    TableOptimizer,
    embedding_collections,
    kind_of,
    make_sharders,
    plan_sharding,
    table_configs,
)
from dist_dp.table_shard import TableShard

_INIT_CHUNK_ROWS = 1 << 16
_TABLE_DTYPES = {"FP32": torch.float32, "BF16": torch.bfloat16, "FP16": torch.float16}


def shard_model(
    model: nn.Module,
    sharding: ShardingKind | Mapping[str, ShardingKind],
    *,
    optimizer: TableOptimizer,
    secret: bytes,
    batch_size: int,
    device: torch.device | None = None,
) -> list[CutEmbeddings]:
    """Replaces every TorchRec collection by its sharded, cut form, in place.

    Tables on the meta device are initialised by a keyed generator, so that their start does not
    depend on the sharding; others keep their weights. Dense layers take rank 0's values.

    Args:
        model: The model.
        sharding: See :func:`dist_dp.sharding.plan_sharding`.
        optimizer: Fused optimizer of the tables.
        secret: 32-byte run secret, for the initialisation.
        batch_size: Expected examples a worker and step.
        device: Target device; by default the device of the dense parameters, else CPU.

    Returns:
        The cuts, in model order, the same on every rank.

    Raises:
        ConfigError: The sharding does not fit the model, or the world.
        ModelError: The model has no TorchRec collection, one in two places, a table that is frozen,
            of a precision that is not served or a weighted mean, or a dense part on the meta
            device.
    """
    from torchrec.distributed.comm_ops import set_gradient_division
    from torchrec.distributed.types import ShardingEnv

    collections = embedding_collections(model)
    if not collections:
        raise ModelError(
            "the model has no torchrec EmbeddingBagCollection or EmbeddingCollection; without "
            "tables there is nothing to shard"
        )
    if "" in collections:
        raise ModelError("the model is a bare collection; wrap it in a module with a loss")
    _refuse_shared(model, collections)
    for path, collection in collections.items():
        _check_tables(path, collection, optimizer)
    device = device or _device_of(model, collections)
    # Sharded gradients must be sums: TorchRec would divide them by the world size.
    set_gradient_division(False)
    plan = _agree_on_plan(model, sharding, optimizer, batch_size, device)
    env = ShardingEnv.from_process_group(dist.group.WORLD)
    sharders = make_sharders(optimizer)
    cuts: list[CutEmbeddings] = []
    for path, collection in collections.items():
        sharder = next(s for s in sharders if type(collection) is s.module_type)
        given = sharder.shardable_parameters(collection)
        kinds = {name: kind_of(p) for name, p in plan[path].items()}
        if optimizer.kind != "sgd" and "data_parallel" in kinds.values():
            raise ConfigError(
                f"data_parallel tables of '{path}' are updated by SGD, not {optimizer.kind}; "
                "choose another kind for them, such as table_wise or row_wise"
            )
        with quiet_torchrec():
            sharded = sharder.shard(collection, plan[path], env, device)
        cut = CutEmbeddings(sharded, collection, path, kinds, optimizer)
        for shard in cut.shards:
            weight = given[shard.table.removeprefix(path + ".")]
            if weight.is_meta:
                _initialise(shard, secret)
            else:
                # TorchRec starts sharded tables afresh; the user's values must survive.
                _copy(shard, weight)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, cut)
        cuts.append(cut)
    _place_dense(model, cuts, device)
    return cuts


def _agree_on_plan(
    model: nn.Module,
    sharding: ShardingKind | Mapping[str, ShardingKind],
    optimizer: TableOptimizer,
    batch_size: int,
    device: torch.device,
) -> dict[str, Any]:
    """Rank 0's plan, or its complaint, on every rank."""
    named = {sharding} if isinstance(sharding, str) else {*sharding.values()}
    local_size = None
    if not named.isdisjoint(NODE_KINDS):
        agree_on_hosts()
        local_size = local_world_size()
    plan: dict[str, Any] = {}
    complaint: ConfigError | None = None
    if rank() == 0:
        try:
            with quiet_torchrec():
                plan = plan_sharding(
                    model,
                    sharding,
                    world_size=world_size(),
                    device_type=device.type,
                    batch_size=batch_size,
                    optimizer=optimizer,
                    local_size=local_size,
                )
        except ConfigError as error:
            complaint = error
    plan, message = broadcast_object((plan, str(complaint) if complaint else None))
    if message is not None:
        raise complaint or ConfigError(message)
    return plan


def _refuse_shared(model: nn.Module, collections: dict[str, nn.Module]) -> None:
    """Refuses a collection under two attributes: the cut would take the place of one of them."""
    paths = {id(collection): path for path, collection in collections.items()}
    seen: set[int] = set()
    # A parent in two places is met once, and its collection is replaced for both.
    for parent_path, parent in model.named_modules():
        for name, child in parent._modules.items():
            if id(child) in seen:
                raise ModelError(
                    f"collection '{paths[id(child)]}' is registered a second time, as "
                    f"'{f'{parent_path}.{name}'.removeprefix('.')}': shared collections are not "
                    "supported. Register it once and call it twice."
                )
            if id(child) in paths:
                seen.add(id(child))


def _check_tables(path: str, collection: Any, optimizer: TableOptimizer) -> None:
    """Refuses tables that the fused update would treat otherwise than they say."""
    weights = {name.split(".")[-2]: weight for name, weight in collection.named_parameters()}
    weighted = hasattr(collection, "is_weighted") and collection.is_weighted()
    for config in table_configs(collection):
        weight = weights[config.name]
        # A release has a folder for each table.
        if (why := why_no_path(f"{path}.{config.name}")) is not None:
            raise ModelError(
                f"table '{path}.{config.name}' cannot name a folder of the release: it {why}; "
                "give the table another name (table: of its feature)"
            )
        # PyTorch has no such lookup; TorchRec's kernels disagree on what it means, and so would
        # the clip norm.
        if weighted and config.pooling.name == "MEAN":
            raise ModelError(
                f"table '{path}.{config.name}' takes the mean of weighted bags (is_weighted=True "
                "with PoolingType.MEAN), which is not supported: use PoolingType.SUM and divide "
                "the id weights by the length of their bag, or build the collection with "
                "is_weighted=False"
            )
        if not weight.requires_grad:
            raise ModelError(
                f"table '{path}.{config.name}' is frozen (requires_grad=False), but every table of "
                "a collection is trained: unfreeze it, or keep it outside the collection, as a "
                "buffer that the model looks up itself"
            )
        if weight.dtype != _TABLE_DTYPES.get(config.data_type.name):
            raise ModelError(
                f"table '{path}.{config.name}' has data_type {config.data_type.name} and weights "
                f"of {weight.dtype}; private training takes tables of float32, bfloat16 and "
                "float16: build it with data_type=DataType.FP32 (the default), BF16 or FP16"
            )
        if optimizer.kind != "sgd" and weight.dtype != torch.float32:
            raise ModelError(
                f"table '{path}.{config.name}' is {weight.dtype}: half-precision tables take the "
                f"table optimizer sgd, not {optimizer.kind}; use it, or data_type=DataType.FP32"
            )


def _device_of(model: nn.Module, collections: dict[str, nn.Module]) -> torch.device:
    inside = {id(p) for c in collections.values() for p in c.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in inside and not parameter.is_meta:
            return parameter.device
    return torch.device("cpu")


def _initialise(shard: TableShard, secret: bytes) -> None:
    """Uniform in ±1/√rows, TorchRec's default, keyed by table and row."""
    key = kernels.derive_key(secret, "initialisation", shard.table)
    bound = 1.0 / math.sqrt(shard.num_rows)
    count, columns = shard.weight.shape
    for start in range(0, count, _INIT_CHUNK_ROWS):
        rows = torch.arange(start, min(count, start + _INIT_CHUNK_ROWS))
        values = kernels.uniform_rows(
            key,
            rows + shard.row_offset,
            num_columns=columns,
            column_offset=shard.column_offset,
            low=-bound,
            high=bound,
        )
        shard.weight[start : start + len(rows)] = values.to(shard.weight)


def _copy(shard: TableShard, weight: torch.Tensor) -> None:
    count, columns = shard.weight.shape
    rows = slice(shard.row_offset, shard.row_offset + count)
    shard.weight.copy_(weight.detach()[rows, shard.column_offset : shard.column_offset + columns])


def _place_dense(model: nn.Module, cuts: list[CutEmbeddings], device: torch.device) -> None:
    """Moves everything outside the tables to the device, with rank 0's values."""
    inside = {id(t) for c in cuts for t in (*c.parameters(), *c.buffers())}
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if id(tensor) in inside:
                continue
            if tensor.is_meta:
                raise ModelError(
                    f"'{name}' is on the meta device; only embedding tables may be: build dense "
                    "layers on the CPU or the GPU"
                )
            tensor.data = tensor.data.to(device)
            if world_size() > 1:
                dist.broadcast(tensor.data, src=0)


@contextmanager
def quiet_torchrec() -> Iterator[None]:
    """Keeps TorchRec's remarks on planning and sharding away from the user.

    They are about TorchRec's own interfaces; what a user can act on comes as an exception.
    """
    level = logging.root.manager.disable
    logging.disable(max(level, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
