"""A sharded model with its cuts, recorder, mechanism and private optimizer, put together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dist_dp import kernels
from dist_dp.clipping.recorder import DenseRecorder
from dist_dp.cut import CutEmbeddings
from dist_dp.distributed import world_size
from dist_dp.errors import ConfigError, ModelError
from dist_dp.mechanisms import Mechanism, Read, mechanism_class
from dist_dp.noise_schedule import NoiseSchedule
from dist_dp.optimizer import LossReduction, PrivateOptimizer, watch_forwards
from dist_dp.plan import PrivacyPlan
from dist_dp.probe import check_outputs_independent
from dist_dp.shard_model import shard_model
from dist_dp.sharding import ShardingKind, TableOptimizer, embedding_collections
from dist_dp.step_state import StepState
from dist_dp.table_shard import TableShard
from dist_dp.timing import PhaseTimer


@dataclass
class PrivateModel:
    """Everything a private model consists of, for the trainer and the release."""

    model: nn.Module
    cuts: list[CutEmbeddings]
    recorder: DenseRecorder
    optimizer: PrivateOptimizer
    plan: PrivacyPlan
    state: StepState
    fixed: dict[str, Tensor] = field(default_factory=dict)

    @property
    def mechanism(self) -> Mechanism:
        """The noise mechanism of the tables."""
        return self.optimizer.mechanism

    @property
    def shards(self) -> list[TableShard]:
        """The table shards on this rank."""
        return [s for cut in self.cuts for s in cut.shards]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.optimizer._device()

    def settle(self) -> None:
        """Brings every row on this rank up to date; nothing may leave before."""
        for shard in self.shards:
            shard.check_whole()
            self.mechanism.settle(shard)

    def check_fixed_unchanged(self) -> None:
        """Refuses a model whose buffers or frozen parameters moved during training.

        Raises:
            ModelError: A running statistic (or the like) was computed from private data without
                noise; releasing it would break the guarantee.
        """
        now = dict(_fixed_tensors(self.model, self.recorder, self.cuts))
        for name in sorted(self.fixed.keys() | now.keys()):
            same = name in now and name in self.fixed
            if not same or not torch.equal(now[name].cpu(), self.fixed[name]):
                raise ModelError(
                    f"'{name}' is no trained parameter but changed during training (a running "
                    "statistic?). It was computed from private records without noise and cannot "
                    "be released; remove it from the model or keep it fixed."
                )


@dataclass(frozen=True)
class OptimizerSettings:
    """What a user's optimizer says, apart for tables and dense layers.

    Attributes:
        tables: The fused optimizer of the tables.
        table_lr: Its learning rate.
        weight_decay: Of tables and dense layers.
        kind: The dense optimizer's class.
        defaults: Its settings.
    """

    tables: TableOptimizer
    table_lr: float
    weight_decay: float
    kind: type[torch.optim.Optimizer]
    defaults: dict[str, Any]

    def rebuild(self, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer | None:
        """The same kind of optimizer over the dense parameters alone; None if there are none."""
        if not parameters:
            return None
        return self.kind(list(parameters.values()), **self.defaults)


def optimizer_settings(
    optimizer: torch.optim.Optimizer,
    tables: TableOptimizer | None = None,
    table_lr: float | None = None,
) -> OptimizerSettings:
    """Reads the settings of a user's optimizer for tables and dense layers.

    Args:
        optimizer: Over all parameters of the unsharded model, in one group.
        tables: Overrides the tables' optimizer.
        table_lr: Overrides the tables' learning rate.

    Raises:
        ConfigError: The optimizer cannot be split that way.
    """
    kind = type(optimizer)
    if len(optimizer.param_groups) != 1:
        raise ConfigError(
            f"optimizer has {len(optimizer.param_groups)} parameter groups; one is supported. Set "
            "the tables' learning rate with table_lr instead."
        )
    group = optimizer.param_groups[0]
    defaults = {k: v for k, v in group.items() if k in optimizer.defaults}
    kinds = {"SGD": "sgd", "Adagrad": "adagrad"}
    if tables is None:
        if kind.__name__ not in kinds:
            kind_for_tables: Any = kind.__name__.lower()
        else:
            kind_for_tables = kinds[kind.__name__]
        if kind_for_tables == "sgd" and (group.get("momentum") or group.get("nesterov")):
            raise ConfigError(
                "optimizer SGD with momentum cannot drive the tables: the waiting noise of a row "
                "does not merge with its momentum here. Use momentum=0, or pass "
                "table_optimizer=TableOptimizer('sgd') to keep momentum for the dense layers only"
            )
        tables = TableOptimizer(kind=kind_for_tables, eps=float(group.get("eps", 1e-8)))
    decay = float(group.get("weight_decay", 0.0))
    if decay and tables.kind != "sgd":
        raise ConfigError(
            f"weight_decay {decay} with the table optimizer '{tables.kind}' is not supported; "
            "use sgd, or weight_decay=0"
        )
    if group.get("maximize"):
        raise ConfigError("optimizer with maximize=True is not supported: negate the loss")
    lr = float(table_lr if table_lr is not None else group["lr"])
    return OptimizerSettings(tables, lr, decay, kind, defaults)


def build_private_model(
    model: nn.Module,
    plan: PrivacyPlan,
    settings: OptimizerSettings,
    *,
    secret: bytes,
    sharding: ShardingKind | Mapping[str, ShardingKind] = "auto",
    loss_reduction: LossReduction = "mean",
    device: torch.device | None = None,
    timer: PhaseTimer | None = None,
    probe_first_forward: bool = True,
) -> PrivateModel:
    """Shards a model, cuts it at its tables and gives it a private optimizer.

    It draws no batches and charges no ledger: that is the engine's part, and nothing trained
    without it has a guarantee.

    Args:
        model: The model, changed in place.
        plan: What the guarantee rests on.
        settings: Optimizers.
        secret: 32-byte run secret, the same on every rank.
        sharding: See :func:`dist_dp.sharding.plan_sharding`.
        loss_reduction: How the caller reduces per-example losses over the batch.
        device: Where tables and dense layers live.
        timer: Where to note the time of phases.
        probe_first_forward: Check on the first training batch that the model's output for one
            example does not depend on the others.

    Returns:
        The private model, in training mode.

    Raises:
        ConfigError: Mechanism, optimizer or sharding do not fit together.
        ModelError: A layer has no clipping rule.
    """
    mechanism_kind = mechanism_class(plan.mechanism)
    mechanism_kind.check_optimizer(settings.tables.kind)
    timer = timer or PhaseTimer(device)
    # A layer without a rule should be an error before anything is sharded.
    DenseRecorder(model, skip=tuple(embedding_collections(model).values())).detach()
    cuts = shard_model(
        model,
        sharding,
        optimizer=settings.tables,
        secret=secret,
        batch_size=math.ceil(plan.expected_batch_size / world_size()),
        device=device,
    )
    recorder = DenseRecorder(model, skip=tuple(cuts))
    mechanism = mechanism_kind(NoiseSchedule(), grid=plan.noise_grid, rounds=plan.noise_rounds)

    state = StepState()
    optimizer = PrivateOptimizer(
        dense=settings.rebuild(recorder.parameters),
        table_lr=settings.table_lr,
        table_weight_decay=settings.weight_decay,
        cuts=cuts,
        recorder=recorder,
        mechanism=mechanism,
        plan=plan,
        secret=secret,
        state=state,
        loss_reduction=loss_reduction,
        timer=timer,
    )

    def settle_before_lookup(reads: list[Read]) -> None:
        # a cut lookup is the only one that needs gradients
        with timer.phase("settle"):
            optimizer.mechanism.before_lookup(reads, training=torch.is_grad_enabled())

    for cut in cuts:
        cut.timer = timer
        cut.watch_lookups(settle_before_lookup)
        for shard in cut.shards:
            shard.noise_key = kernels.derive_key(secret, "tables", shard.table)
            mechanism.prepare(shard)
    watch_forwards(model, optimizer)
    if mechanism_kind.private and probe_first_forward:
        _probe_first_forward(model)
    private = PrivateModel(model, cuts, recorder, optimizer, plan, state)
    private.fixed = {n: t.detach().cpu().clone() for n, t in _fixed_tensors(model, recorder, cuts)}
    model.train()
    return private


def _probe_first_forward(model: nn.Module) -> None:
    """Checks the model on the first batch it is trained on; see :mod:`dist_dp.probe`."""
    due = [True]

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if due and module.training and torch.is_grad_enabled():
            due.clear()
            check_outputs_independent(module, args, kwargs)

    model.register_forward_pre_hook(before, with_kwargs=True)


def _fixed_tensors(
    model: nn.Module, recorder: DenseRecorder, cuts: list[CutEmbeddings]
) -> list[tuple[str, Tensor]]:
    """Buffers and untrained parameters outside the tables, by name."""
    inside = {id(t) for c in cuts for t in (*c.parameters(), *c.buffers())}
    trained = {id(p) for p in recorder.parameters.values()}
    named = [*model.named_parameters(), *model.named_buffers()]
    return [(n, t) for n, t in named if id(t) not in inside | trained]
