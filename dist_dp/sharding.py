"""Chooses how tables are sharded: by TorchRec's planner, or explicitly for each table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn

from dist_dp.errors import ConfigError
from dist_dp.table_placement import TablePlacer, as_planned

ShardingKind = Literal[
    "auto",
    "data_parallel",
    "table_wise",
    "row_wise",
    "column_wise",
    "table_row_wise",
    "grid",
]
SHARDING_KINDS: tuple[str, ...] = get_args(ShardingKind)
SEQUENCE_KINDS = ("auto", "data_parallel", "table_wise", "row_wise", "column_wise")
"""What TorchRec can do with a sequence collection."""
NODE_KINDS = ("table_row_wise", "grid")
"""Kinds that know which workers share a host."""

_TORCHREC_NAMES = {"grid": "grid_shard"}
_OUR_NAMES = {theirs: ours for ours, theirs in _TORCHREC_NAMES.items()}


@dataclass(frozen=True)
class TableOptimizer:
    """The optimizer of sharded tables: fused into their backward, or of single rows.

    Attributes:
        kind: ``sgd``, ``adagrad``, ``rowwise_adagrad``, or ``adam`` (second moments row-wise). The
            mechanisms with noise on every row take ``sgd``; ``adam`` is never fused, see
            :mod:`dist_dp.row_optimizers`.
        eps: Denominator term of the Adagrads and of Adam.
        momentum: Of ``sgd``, below 1 (PyTorch's, no dampening, not Nesterov); 0 for none.
        betas: Of ``adam``: decay of its two moments, below 1 each.
    """

    kind: Literal["sgd", "adagrad", "rowwise_adagrad", "adam"] = "sgd"
    eps: float = 1e-8
    momentum: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)

    def __post_init__(self) -> None:
        """Refuses moments that never forget.

        Raises:
            ConfigError: A beta is not in [0, 1).
        """
        if len(self.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ConfigError(
                f"betas {self.betas} of the table optimizer: give two numbers, 0 or more and below "
                "1, such as (0.9, 0.999)"
            )


def make_sharders(optimizer: TableOptimizer) -> list[Any]:
    """TorchRec sharders for pooled and sequence collections with the given fused optimizer.

    TorchRec's planner leaves row-wise out on CPU although it runs there; these allow it.

    Raises:
        ConfigError: The optimizer cannot be fused.
    """
    if optimizer.kind == "adam":
        raise ConfigError(
            "the table optimizer 'adam' cannot be fused into the tables' backward: it needs a "
            "mechanism that updates single rows; use sgd, adagrad or rowwise_adagrad"
        )
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from torchrec.distributed.embedding import EmbeddingCollectionSharder
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder

    class PooledSharder(EmbeddingBagCollectionSharder):
        def sharding_types(self, compute_device_type: str) -> list[str]:
            return [_TORCHREC_NAMES.get(k, k) for k in SHARDING_KINDS if k != "auto"]

    class SequenceSharder(EmbeddingCollectionSharder):
        def sharding_types(self, compute_device_type: str) -> list[str]:
            return [k for k in SEQUENCE_KINDS if k != "auto"]

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
    local_size: int | None = None,
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
        local_size: Workers of a host, with consecutive ranks; by default all of them. Must
            divide ``world_size``.

    Returns:
        TorchRec's module sharding plan by the path of each collection.

    Raises:
        ConfigError: Unknown table or kind, a table that cannot be split that way, or hosts with
            unequal numbers of workers.
    """
    local_size = local_size or world_size
    if world_size % local_size:
        raise ConfigError(
            f"{world_size} workers cannot be {local_size} to a host: table_row_wise and grid need "
            "the same number of workers on every host; change the number of workers"
        )
    collections = embedding_collections(model)
    names = {c.name for m in collections.values() for c in table_configs(m)}
    kinds = _kind_by_table(sharding, names)
    for path, module in collections.items():
        _check_sequence_kinds(path, module, kinds)
    sharders = make_sharders(optimizer)
    auto = _ask_planner(model, kinds, sharders, world_size, local_size, device_type, batch_size)
    placer = TablePlacer(world_size, local_size, device_type)
    return {
        path: _plan_collection(module, kinds, auto.get(path, {}), sharders, placer, device_type)
        for path, module in collections.items()
    }


def kind_of(planned: Any) -> str:
    """The sharding kind of a ``ParameterSharding``, by the name used here."""
    theirs = str(planned.sharding_type)
    return _OUR_NAMES.get(theirs, theirs)


def _check_sequence_kinds(path: str, collection: Any, kinds: dict[str, str]) -> None:
    if hasattr(collection, "embedding_bag_configs"):
        return
    for config in table_configs(collection):
        if kinds[config.name] not in SEQUENCE_KINDS:
            raise ConfigError(
                f"sharding of table '{path}.{config.name}': {kinds[config.name]} is for pooled "
                "collections (EmbeddingBagCollection); a sequence collection takes "
                f"{', '.join(SEQUENCE_KINDS)}: name a kind by table (model.sharding)"
            )


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
    local_size: int,
    device_type: str,
    batch_size: int,
) -> dict[str, Any]:
    """The planner's choice for the tables marked auto; the others are constrained."""
    if "auto" not in kinds.values():
        return {}
    from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
    from torchrec.distributed.planner.types import ParameterConstraints, PlannerError

    # The planner has column widths of its own for a grid; what it must know is how much lies
    # where, and a grid lies evenly on all workers, as row_wise does.
    stand_ins = {"auto": ["table_wise", "row_wise"], "grid": ["row_wise"]}
    constraints = {
        name: ParameterConstraints(sharding_types=stand_ins.get(kind, [kind]))
        for name, kind in kinds.items()
    }
    planner = EmbeddingShardingPlanner(
        topology=Topology(
            world_size=world_size, compute_device=device_type, local_world_size=local_size
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
    kinds: dict[str, str],
    auto: Mapping[str, Any],
    sharders: list[Any],
    placer: TablePlacer,
    device_type: str,
) -> Any:
    from torchrec.distributed.sharding_plan import construct_module_sharding_plan

    # Largest first onto the least loaded worker.
    configs = sorted(table_configs(module), key=lambda c: -c.num_embeddings * c.embedding_dim)
    generators = {
        c.name: as_planned(auto[c.name])
        if kinds[c.name] == "auto"
        else placer.place(c, kinds[c.name])
        for c in configs
    }
    return construct_module_sharding_plan(
        module,
        generators,
        sharder=next(s for s in sharders if type(module) is s.module_type),
        local_size=placer.local_size,
        world_size=placer.world_size,
        device_type=device_type,
    )
