"""Builds the contenders: tables, models, ledger, loaders, and the middle of a run."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from dist_dp.account import open_account
from dist_dp.accountant import LocalAccountant
from dist_dp.cluster.bench.clicks import HashedClicks
from dist_dp.cluster.bench.contenders import (
    LEARNING_RATE,
    Contender,
    FreeLeases,
    PlainStep,
    PrivateStep,
    Updates,
)
from dist_dp.cluster.bench.model import build_models, share_tables
from dist_dp.cluster.bench.settings import SKEWS, StepSettings
from dist_dp.distributed import rank
from dist_dp.engine import PrivacyEngine
from dist_dp.leases import StepLeases
from dist_dp.ledger import Ledger
from dist_dp.loader import PoissonLoader, as_source
from dist_dp.look_ahead import LookAhead
from dist_dp.mechanisms import MECHANISMS, Mechanism, SparseNoise
from dist_dp.mechanisms.comparison import COMPARISONS
from dist_dp.noise_schedule import NoiseSchedule
from dist_dp.plan import PrivacyPlan
from dist_dp.row_optimizers import RowOptimizer
from dist_dp.sampling import PoissonSampler
from dist_dp.sharding import ShardingKind, TableOptimizer
from dist_dp.sparse_settings import ADAPTIVE, CHOOSES_ONCE, SPARSE_MECHANISMS, SparseSettings
from dist_dp.step_state import StepState
from dist_dp.timing import PhaseTimer

NOISE_MULTIPLIER = 1.0
MAX_GRAD_NORM = 1.0
PLANNED_STEPS = 100_000
"""Steps that the benchmark's plan has ahead of it; it takes a few of them."""


@dataclass
class Field:
    """All contenders, on one set of tables.

    Attributes:
        contenders: In the order of the settings; ``none`` first.
        engine: Holds the model that the private ones share.
    """

    contenders: list[Contender]
    engine: PrivacyEngine

    def close(self) -> None:
        """Ends all batches."""
        for contender in self.contenders:
            contender.close()


def line_up(settings: StepSettings, folder: Path) -> Field:
    """Builds tables, models, ledger and contenders; every rank calls it.

    Args:
        settings: What to measure.
        folder: Temporary folder for the ledger; used by rank 0.

    Returns:
        The contenders. The k-th step of each draws the same batch.
    """
    clicks = HashedClicks(
        settings.rows,
        pooling=settings.pooling,
        exponent=SKEWS[settings.skew],
        records=settings.records,
        dense_features=settings.dense_features,
    )
    plan = PrivacyPlan(
        mechanism="lazydp",
        noise_multiplier=NOISE_MULTIPLIER,
        max_grad_norm=MAX_GRAD_NORM,
        num_records=settings.records,
        expected_batch_size=settings.batch,
        steps=settings.at_step + PLANNED_STEPS,
        delta=0.1 / settings.records,
    )
    books = _Books(folder / "ledger.sqlite", plan)
    model, twin = build_models(settings)
    engine = PrivacyEngine(
        dataset="bench",
        sharding=cast(ShardingKind, settings.kind),
        accountant=books.accountant,
        run_id="bench",
    )
    engine.make_private_from_plan(
        plan,
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, foreach=True),
        data_loader=clicks,
        budget=books.budget,
        stop_at_budget=True,
    )
    _time_dense_update(engine)
    cut = share_tables(model, twin)
    sampler = PoissonSampler(engine.secret, plan.num_units, plan.sample_rate)

    def loader(leases: StepLeases, state: StepState, timer: PhaseTimer) -> PoissonLoader:
        source = as_source(clicks)
        return PoissonLoader(source, sampler, leases, state, plan.steps, timer, settings.at_step)

    contenders: list[Contender] = []
    for name in settings.mechanisms:
        if name == "none":
            state = StepState()
            plain = loader(FreeLeases(), state, PhaseTimer())
            contenders.append(PlainStep(twin, cut, plain, state))
            continue
        mine = _sparse_plan(plan, name, settings) if name in SPARSE_MECHANISMS else plan
        mechanism = _mechanism(name, mine, engine, clicks, settings)
        _prepare(mechanism, engine, settings)
        leases = StepLeases(books.accountant, books.open(name), plan.steps, lease_steps(settings))
        batches = loader(leases, engine.parts.state, engine.timer)
        contenders.append(PrivateStep(name, mechanism, engine, batches, mine))
        if name == "lazydp" and settings.look_ahead:
            contenders[-1].activate()
            LookAhead(model, engine.parts.optimizer, batches)
    if any(name in SPARSE_MECHANISMS for name in settings.mechanisms):
        updates = Updates(cut)
        for contender in contenders:
            contender.updates = updates
    return Field(contenders, engine)


def _sparse_plan(plan: PrivacyPlan, name: str, settings: StepSettings) -> PrivacyPlan:
    """The plan with noise on few rows."""
    sparse: dict[str, Any] = {}
    if name in ADAPTIVE:
        sparse |= {"false_positives": settings.false_positives}
    if name in CHOOSES_ONCE:
        sparse |= {"rows": settings.kept_rows, "frequencies": "the generator's"}
    changes = {"mechanism": name, "sparse": SparseSettings(**sparse)}
    return PrivacyPlan(**{**plan.model_dump(), **changes})


def _mechanism(
    name: str,
    plan: PrivacyPlan,
    engine: PrivacyEngine,
    clicks: HashedClicks,
    settings: StepSettings,
) -> Mechanism:
    schedule = _schedule(plan, settings.at_step)
    kinds: dict[str, type[Mechanism]] = {**MECHANISMS, **COMPARISONS}
    kind = kinds[name]
    if not issubclass(kind, SparseNoise):
        return kind(schedule, rounds=plan.noise_rounds)
    kept = None
    if kind.chooses_once:
        tables = sorted(
            {s.table for s in engine.parts.shards}, key=lambda t: int(t.split(".t")[-1])
        )
        kept = {
            table: torch.from_numpy(clicks.most_popular(number, settings.kept_rows))
            for number, table in enumerate(tables)
        }
    return kind(
        schedule,
        plan=plan,
        optimizers=[RowOptimizer(TableOptimizer())],
        kept=kept,
        rounds=plan.noise_rounds,
    )


class _Books:
    """A ledger for the benchmark alone: each mechanism has a data set and an account of its own.

    Args:
        path: The ledger; rank 0 makes it.
        plan: What a step costs.
    """

    def __init__(self, path: Path, plan: PrivacyPlan) -> None:
        self.accountant = LocalAccountant(Ledger(path)) if rank() == 0 else None
        self.budget = (1e4, 0.1 / plan.num_units)
        self._path = path
        self._plan = plan

    def open(self, mechanism: str) -> str:
        """Opens a mechanism's account; every rank calls it. Returns the account's name."""
        name = f"bench-{mechanism}"
        open_account(
            self.accountant,
            self._path,
            self._plan,
            dataset=name,
            run_id=name,
            budget=self.budget,
            fingerprint=None,
            stop_at_budget=True,
            resumed_at=None,
        )
        return name


def lease_steps(settings: StepSettings) -> int:
    """Steps of a lease here: a turn's, so that every turn takes one and gives its time.

    Results spread that time over the steps a run leases (``LEASE_STEPS``).
    """
    return settings.warmup + settings.steps


def _schedule(plan: PrivacyPlan, steps: int) -> NoiseSchedule:
    """A schedule with some steps behind it."""
    schedule = NoiseSchedule()
    for _ in range(steps):
        schedule.advance(
            learning_rate=LEARNING_RATE,
            noise_multiplier=NOISE_MULTIPLIER,
            max_grad_norm=MAX_GRAD_NORM,
            expected_batch_size=plan.expected_batch_size,
        )
    return schedule


def _prepare(mechanism: Mechanism, engine: PrivacyEngine, settings: StepSettings) -> None:
    """Makes the state a mechanism keeps, resident and as in the middle of a run."""
    for shard in engine.parts.shards:
        mechanism.prepare(shard)
        if mechanism.name == "lazydp":
            # Shards of the same rows have the same history.
            generator = torch.Generator().manual_seed(shard.row_offset)
            shard.last_step.random_(0, max(1, settings.at_step), generator=generator)


def _time_dense_update(engine: PrivacyEngine) -> None:
    """Lets the timer tell the dense layers' update from the tables'."""
    dense = engine.parts.optimizer.dense
    assert dense is not None
    running = ExitStack()

    def before(*_args: Any) -> None:
        running.enter_context(engine.timer.phase("dense_update"))

    def after(*_args: Any) -> None:
        running.close()

    dense.register_step_pre_hook(before)
    dense.register_step_post_hook(after)
