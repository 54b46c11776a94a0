"""Chooses how tables are sharded: by TorchRec's planner, or explicitly for each table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from dist_dp.errors import ConfigError

ShardingKind = Literal["auto", "data_parallel", "table_wise", "row_wise", "column_wise"]
SHARDING_KINDS: tuple[str, ...] = (
    "auto",
    "data_parallel",
    "table_wise",
    "row_wise",
    "column_wise",
)


@dataclass(frozen=True)
class TableOptimizer:
    """The optimizer fused into the backward of sharded tables.

    Attributes:
        kind: ``sgd``, ``adagrad`` or ``rowwise_adagrad``. The private mechanisms take ``sgd``.
        eps: Denominator term of the Adagrads.
    """

    kind: Literal["sgd", "adagrad", "rowwise_adagrad"] = "sgd"
    eps: float = 1e-8


def make_sharders(optimizer: TableOptimizer) -> list[Any]:
    """TorchRec sharders for pooled and sequence collections with the given fused optimizer.

    TorchRec's planner leaves row-wise out on CPU although it runs there; these allow it.
    """
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from torchrec.distributed.embedding import EmbeddingCollectionSharder
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder

    kinds = ["data_parallel", "table_wise", "row_wise", "column_wise"]

    class PooledSharder(EmbeddingBagCollectionSharder):
        def sharding_types(self, compute_device_type: str) -> list[str]:
            return kinds

    class SequenceSharder(EmbeddingCollectionSharder):
        def sharding_types(self, compute_device_type: str) -> list[str]:
            return kinds

    fused = {
        "sgd": EmbOptimType.EXACT_SGD,
        "adagrad": EmbOptimType.EXACT_ADAGRAD,
        "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    }[optimizer.kind]
    # The learning rate is set before every update; FBGEMM wants one now.
    params: dict[str, Any] = {"optimizer": fused, "learning_rate": 0.0}
    if optimizer.kind != "sgd":
        params["eps"] = optimizer.eps
    # FBGEMM's default would round updates of half-precision tables at random, unseeded by us.
    params["stochastic_rounding"] = False
    return [PooledSharder(fused_params=dict(params)), SequenceSharder(fused_params=dict(params))]


def embedding_collections(model: nn.Module) -> dict[str, nn.Module]:
    """Every TorchRec collection of a model, by its path."""
    from torchrec import EmbeddingBagCollection, EmbeddingCollection

    kinds = (EmbeddingBagCollection, EmbeddingCollection)
    return {path: m for path, m in model.named_modules() if type(m) in kinds}


def table_configs(collection: Any) -> list[Any]:
    """The table configurations of a pooled or sequence collection."""
    if hasattr(collection, "embedding_bag_configs"):
        configs: list[Any] = collection.embedding_bag_configs()
    else:
        configs = collection.embedding_configs()
    return configs


def plan_sharding(
    model: nn.Module,
    sharding: ShardingKind | Mapping[str, ShardingKind],
    *,
    world_size: int,
    device_type: str,
    batch_size: int,
    optimizer: TableOptimizer,
) -> dict[str, Any]:
    """Plans every collection of a model without touching a process group.

    Args:
        model: The unsharded model (tables may be on the meta device).
        sharding: One kind for all tables, or a kind by table name; tables not named are
            ``auto``, which asks TorchRec's planner.
        world_size: Number of workers.
        device_type: ``cpu`` or ``cuda``.
        batch_size: Expected examples a worker and step, for the planner's estimates.
        optimizer: The fused optimizer; its state counts for the planner's memory.

    Returns:
        TorchRec's module sharding plan by the path of each collection.

    Raises:
        ConfigError: Unknown table or kind, or a table that cannot be split that way.
    """
    collections = embedding_collections(model)
    names = {c.name for m in collections.values() for c in table_configs(m)}
    kinds = _kind_by_table(sharding, names)
    sharders = make_sharders(optimizer)
    auto = _ask_planner(model, kinds, sharders, world_size, device_type, batch_size)
    return {
        path: _plan_collection(
            module, path, kinds, auto.get(path, {}), sharders, world_size, device_type
        )
        for path, module in collections.items()
    }


def _kind_by_table(
    sharding: ShardingKind | Mapping[str, ShardingKind], names: set[str]
) -> dict[str, str]:
    if isinstance(sharding, str):
        sharding = dict.fromkeys(names, sharding)
    for table, kind in sharding.items():
        if table not in names:
            raise ConfigError(
                f"sharding names the table '{table}', which the model does not have; its tables "
                f"are {sorted(names)}"
            )
        if kind not in SHARDING_KINDS:
            raise ConfigError(
                f"sharding of table '{table}': unknown kind '{kind}'; choose one of "
                f"{', '.join(SHARDING_KINDS)}"
            )
    return {name: sharding.get(name, "auto") for name in names}


def _ask_planner(
    model: nn.Module,
    kinds: dict[str, str],
    sharders: list[Any],
    world_size: int,
    device_type: str,
    batch_size: int,
) -> dict[str, Any]:
    """The planner's choice for the tables marked auto; the others are constrained."""
    if "auto" not in kinds.values():
        return {}
    from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
    from torchrec.distributed.planner.types import ParameterConstraints, PlannerError

    constraints = {
        name: ParameterConstraints(
            sharding_types=["table_wise", "row_wise"] if kind == "auto" else [kind]
        )
        for name, kind in kinds.items()
    }
    planner = EmbeddingShardingPlanner(
        topology=Topology(
            world_size=world_size, compute_device=device_type, local_world_size=world_size
        ),
        batch_size=max(1, batch_size),
        constraints=constraints,
        debug=False,
    )
    try:
        plan: dict[str, Any] = planner.plan(model, sharders).plan
    except PlannerError as error:
        raise ConfigError(
            "TorchRec's planner found no sharding that fits the workers' memory: "
            f"{str(error).splitlines()[0]} Add workers, or choose the sharding yourself "
            "(model.sharding)."
        ) from error
    return plan


def _plan_collection(
    module: nn.Module,
    path: str,
    kinds: dict[str, str],
    auto: Mapping[str, Any],
    sharders: list[Any],
    world_size: int,
    device_type: str,
) -> Any:
    from torchrec.distributed import sharding_plan as sp

    sharder = next(s for s in sharders if type(module) is s.module_type)
    load = [0] * world_size
    generators: dict[str, Any] = {}
    configs = sorted(table_configs(module), key=lambda c: -c.num_embeddings * c.embedding_dim)
    for config in configs:
        kind = kinds[config.name]
        if kind == "data_parallel":
            generators[config.name] = sp.data_parallel()
        elif kind == "table_wise":
            # Largest first onto the least loaded worker.
            rank = min(range(world_size), key=load.__getitem__)
            load[rank] += config.num_embeddings * config.embedding_dim
            generators[config.name] = sp.table_wise(rank=rank, compute_kernel="fused")
        elif kind == "row_wise":
            generators[config.name] = sp.row_wise(compute_kernel="fused")
        elif kind == "column_wise":
            parts = max(2, world_size)
            if config.embedding_dim % (4 * parts):
                raise ConfigError(
                    f"table '{config.name}': column_wise over {parts} parts needs an "
                    f"embedding_dim that is a multiple of {4 * parts}, not "
                    f"{config.embedding_dim}; choose another dim or row_wise"
                )
            ranks = [i % world_size for i in range(parts)]
            generators[config.name] = sp.column_wise(ranks=ranks, compute_kernel="fused")
        else:
            generators[config.name] = _given(auto[config.name])
    return sp.construct_module_sharding_plan(
        module,
        generators,
        sharder=sharder,
        local_size=world_size,
        world_size=world_size,
        device_type=device_type,
    )


def _given(planned: Any) -> Any:
    """A generator that hands back what the planner chose."""

    def generate(*_args: Any, **_kwargs: Any) -> Any:
        return planned

    return generate
