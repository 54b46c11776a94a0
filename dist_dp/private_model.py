"""A sharded model with its cuts, recorder, mechanism and private optimizer, put together."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from dist_dp import kernels
from dist_dp.clipping.recorder import DenseRecorder
from dist_dp.contributions import KeptRows
from dist_dp.cut import CutEmbeddings
from dist_dp.distributed import world_size
from dist_dp.errors import ConfigError, ModelError, ReleaseError
from dist_dp.mechanisms import Mechanism, Read, SparseNoise, mechanism_class
from dist_dp.mechanisms.row_states import give_state, has_own_state
from dist_dp.momentum_schedule import MomentumSchedule
from dist_dp.noise_schedule import NoiseSchedule
from dist_dp.optimizer import LossReduction, PrivateOptimizer, watch_forwards
from dist_dp.optimizer_settings import OptimizerSettings, TableGroup
from dist_dp.plan import PrivacyPlan
from dist_dp.probe import check_outputs_independent
from dist_dp.row_optimizers import RowOptimizer
from dist_dp.selection_forecast import forecast_selection, warn_if_dense
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
        return self.optimizer.device

    def settle(self) -> None:
        """Brings every row on this rank up to date; nothing may leave before."""
        self.ready_to_settle()
        for shard in self.shards:
            self.mechanism.settle(shard)

    def ready_to_settle(self) -> None:
        """Waits for what still settles in the background, before all rows are settled.

        Raises:
            ReleaseError: The settling of a shard was cut short.
            DistDpError: A step is in flight whose noise is drawn already.
        """
        self.optimizer.check_between_steps()
        for finish in self.optimizer.before_step_ends:
            finish()
        for shard in self.shards:
            shard.check_whole()

    def check_mechanism(self) -> None:
        """Refuses a model whose noise was not made by the mechanism that its plan names.

        Guarantee:
            What is saved or released under a plan was noised as the plan says. A mechanism put
            into the optimizer by hand (to time it) may add less, and would pass for the plan's
            once a run goes on from its checkpoint.

        Raises:
            ReleaseError: Another mechanism is at work.
        """
        if type(self.mechanism) is not mechanism_class(self.plan.mechanism):
            raise ReleaseError(
                f"the tables are trained with mechanism '{self.mechanism.name}' "
                f"({type(self.mechanism).__name__}), but the plan says '{self.plan.mechanism}': "
                "nothing can be saved or released from this process. Start a run with the "
                "mechanism of its plan."
            )

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
    records_per_unit: float = 1.0,
    kept: KeptRows | None = None,
    substitute: Callable[[Mechanism], Mechanism] | None = None,
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
        records_per_unit: Mean records of a unit in a step, for TorchRec's planner.
        kept: The rows that are trained, by unique table name, for mechanisms that choose them once.
        substitute: Makes another mechanism of the plan's, to compare with: what it trains can be
            neither saved nor released (:meth:`PrivateModel.check_mechanism`).

    Returns:
        The private model, in training mode.

    Raises:
        ConfigError: Mechanism, optimizer or sharding do not fit together.
        ModelError: A layer has no clipping rule.
    """
    mechanism_kind = mechanism_class(plan.mechanism)
    mechanism_kind.check_optimizer(settings.tables.kind)
    groups = settings.table_groups(model)
    timer = timer or PhaseTimer(device)
    # A layer without a rule should be an error before anything is sharded.
    rules = DenseRecorder(model, skip=tuple(embedding_collections(model).values()))
    rules.detach()
    if plan.unit == "user" and mechanism_kind.private:
        rules.check_rules_take_users()
    cuts = shard_model(
        model,
        sharding,
        # What the mechanism updates itself needs no state of FBGEMM's.
        optimizer=TableOptimizer() if mechanism_kind.takes_updates else settings.tables,
        secret=secret,
        batch_size=math.ceil(plan.expected_batch_size * records_per_unit / world_size()),
        device=device,
    )
    recorder = DenseRecorder(model, skip=tuple(cuts))
    mechanism = _mechanism_of(plan, settings.tables, groups, kept)
    if substitute is not None:
        mechanism = substitute(mechanism)
    group_of = {table: number for number, group in enumerate(groups) for table in group.tables}
    for cut in cuts:
        cut.group_of = group_of
    for shard in (s for cut in cuts for s in cut.shards):
        shard.group = group_of[shard.table]
        mine = groups[shard.group].momentum > 0 and not mechanism.takes_updates
        give_state(shard, momentum=mine)
        if plan.noise_grid is not None and has_own_state(shard):
            raise ConfigError(
                f"noise.grid does not go with momentum or half-precision tables (table "
                f"'{shard.table}'); remove it (noise_grid=None), or train float32 tables without "
                "momentum"
            )

    state = StepState()
    optimizer = PrivateOptimizer(
        dense=settings.rebuild(recorder.parameters),
        tables=groups,
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
        if isinstance(mechanism, SparseNoise):
            cut.kept = mechanism.kept
            cut.local.give_updates(mechanism.apply, mechanism.survivors)
        else:
            cut.local.own_updates()
        for shard in cut.shards:
            shard.noise_key = kernels.derive_key(secret, "tables", shard.table)
            mechanism.prepare(shard)
    sizes = {
        cut.table_id(c.name): (c.num_embeddings, c.embedding_dim)
        for cut in cuts
        for c in cut.configs
    }
    warn_if_dense(forecast_selection(plan, sizes, {}))
    watch_forwards(model, optimizer)
    if mechanism_kind.private and probe_first_forward:
        _probe_first_forward(model)
    private = PrivateModel(model, cuts, recorder, optimizer, plan, state)
    private.fixed = {n: t.detach().cpu().clone() for n, t in _fixed_tensors(model, recorder, cuts)}
    model.train()
    return private


def _mechanism_of(
    plan: PrivacyPlan,
    tables: TableOptimizer,
    groups: Sequence[TableGroup],
    kept: KeptRows | None,
) -> Mechanism:
    """The plan's mechanism, for the groups of tables."""
    kind = mechanism_class(plan.mechanism)
    if issubclass(kind, SparseNoise):
        return kind(
            [NoiseSchedule() for _ in groups],
            plan=plan,
            optimizers=[RowOptimizer(replace(tables, momentum=g.momentum)) for g in groups],
            kept=kept,
            rounds=plan.noise_rounds,
        )
    return kind(
        [MomentumSchedule(g.momentum) if g.momentum else NoiseSchedule() for g in groups],
        grid=plan.noise_grid,
        rounds=plan.noise_rounds,
    )


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
