"""The private runs of ``test_sharding_kinds``: one world, many placements."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from dist_dp.leases import StepLeases
from dist_dp.loader import PoissonLoader, as_source
from dist_dp.look_ahead import LookAhead
from dist_dp.private_model import PrivateModel
from dist_dp.sampling import PoissonSampler
from dist_dp.schedules import ScheduleConfig
from tests.dist_dp import gradients, unsharded
from tests.dist_dp.gradients import SECRET, build, pieces
from tests.dist_dp.placement import OpenHanded

STEPS = 4
# Two of these have no form for sequences, so the sequence table takes another kind beside them.
KINDS: dict[str, Any] = {
    "data_parallel": "data_parallel",
    "table_wise": "table_wise",
    "row_wise": "row_wise",
    "column_wise": "column_wise",
    "table_row_wise": {t: "table_row_wise" for t in "abcdvwx"} | {"s": "column_wise"},
    "grid": {t: "grid" for t in "abcdvwx"} | {"s": "row_wise"},
    "mixed": {
        "a": "table_wise", "b": "grid", "c": "column_wise", "d": "row_wise",
        "v": "row_wise", "w": "column_wise", "x": "table_row_wise", "s": "data_parallel",
    },
    "mixed too": {
        "a": "column_wise", "b": "row_wise", "c": "data_parallel", "d": "table_wise",
        "v": "grid", "w": "table_wise", "x": "row_wise", "s": "table_wise",
    },
}  # fmt: skip


def loader_of(private: PrivateModel, steps: int, **options: Any) -> PoissonLoader:
    """A private loader over :func:`unsharded.records`."""
    leases = StepLeases(OpenHanded(), "run", steps)
    sampler: Any = PoissonSampler(SECRET, unsharded.RECORDS, unsharded.RATE)
    if private.plan.unit == "user":
        sampler = unsharded.user_sampler()
    return PoissonLoader(
        as_source(unsharded.records()), sampler, leases, private.state, steps, **options
    )


def one_group(whole: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of :func:`unsharded.reference`."""
    return torch.optim.SGD(whole.parameters(), lr=unsharded.LR, weight_decay=unsharded.DECAY)


def features_of(batch: Any) -> dict[str, Any]:
    """What each collection of the model gets."""
    return dict(zip(("pooled", "weighted", "sequence"), batch.inputs[1:], strict=True))


def private_run(
    kind: Any,
    *,
    mechanism: str = "lazydp",
    zero: bool = False,
    fault: str | None = None,
    sigma: float = unsharded.SIGMA,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = one_group,
    micro_batch_size: int | None = None,
    clip_schedule: ScheduleConfig | None = None,
    noise_multiplier_schedule: ScheduleConfig | None = None,
    look_ahead: bool = False,
    by_user: bool = False,
    **sparse: Any,
) -> dict[str, Any]:
    """Final pieces and dense weights, norms by step, and the kinds of the shards."""
    whole = unsharded.model()
    private = build(
        whole,
        kind=kind,
        clip=unsharded.CLIP,
        sigma=sigma,
        mechanism=mechanism,
        optimizer=optimizer(whole),
        expected=unsharded.USERS_EXPECTED if by_user else unsharded.EXPECTED,
        max_records_per_user=unsharded.MOST_RECORDS if by_user else None,
        clip_schedule=clip_schedule,
        noise_multiplier_schedule=noise_multiplier_schedule,
        **sparse,
    )
    fall = torch.optim.lr_scheduler.ExponentialLR(private.optimizer, 0.8)
    norms, real = [], []
    loader = loader_of(private, STEPS, micro_batch_size=micro_batch_size)
    if look_ahead:
        LookAhead(whole, private.optimizer, loader, features_of)
    with FAULTS[fault](private) if fault else nullcontext():
        for batch in loader:
            real.append(private.state.batch_size)
            loss = unsharded.LOSSES(whole(*batch.inputs), batch.labels) * (0.0 if zero else 1.0)
            loss.backward()
            private.optimizer.step()
            private.optimizer.zero_grad()
            if private.optimizer.is_accumulating:
                continue
            fall.step()
            norms.append(private.optimizer.last_stats.norms.clone())
        private.settle()
    return {
        "pieces": pieces(private),
        "dense": {n: p.detach().clone() for n, p in private.recorder.parameters.items()},
        "norms": norms,
        "real": real,
        "steps": private.mechanism.schedule.step,
        "kinds": {s.table: s.kind for s in private.shards},
        "history": {
            (s.table, s.row_offset, s.column_offset): s.last_step.clone()
            for s in private.shards
            if s.has_history
        },
    }


def together(ranks: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Tables put together from all ranks' pieces, and rank 0's dense weights."""
    state: dict[str, Tensor] = dict(ranks[0]["dense"])
    like = dict(unsharded.model().named_parameters())
    for rank in ranks:
        for (name, row, column), piece in rank["pieces"].items():
            empty = torch.full(like[name].shape, float("nan"))
            table = state.setdefault(name, empty)
            table[row : row + piece.shape[0], column : column + piece.shape[1]] = piece
    return state


def all_runs(local_size: int | None, faults: list[tuple[str, str, bool]]) -> dict[Any, Any]:
    """Every kind, with gradients and without; eager noise for two of them; the faults asked for.

    Args:
        local_size: Ranks of a host; None leaves LOCAL_WORLD_SIZE unset.
        faults: (fault, kind, gradients are zero).
    """
    if local_size is not None:
        os.environ["LOCAL_WORLD_SIZE"] = str(local_size)
    found: dict[Any, Any] = {}
    for name, kind in KINDS.items():
        for zero in (False, True):
            found["lazydp", name, zero] = private_run(kind, zero=zero)
    for name in ("table_row_wise", "grid"):
        found["dpsgd", name, False] = private_run(KINDS[name], mechanism="dpsgd")
    for fault, name, zero in faults:
        found[fault, name, zero] = private_run(KINDS[name], zero=zero, fault=fault)
    return found


@contextmanager
def _misplaced(private: PrivateModel, attribute: str) -> Iterator[None]:
    """Noise as if every piece were its table's first."""
    kept = [(s, getattr(s, attribute)) for s in private.shards]
    for shard, _ in kept:
        setattr(shard, attribute, 0)
    try:
        yield
    finally:
        for shard, value in kept:
            setattr(shard, attribute, value)


@contextmanager
def _divided(private: PrivateModel) -> Iterator[None]:
    with gradients.FAULTS["gradient division"]():
        yield


@contextmanager
def _half_watched(private: PrivateModel) -> Iterator[None]:
    """The second half of each lookup's rows is read unsettled."""
    settle = private.mechanism.before_lookup

    def before(reads: Any, *, training: bool = True) -> None:
        settle([(s, rows[: rows.numel() // 2]) for s, rows in reads], training=training)

    private.mechanism.before_lookup = before
    yield


@contextmanager
def _first_rate(private: PrivateModel) -> Iterator[None]:
    proper = type(private.optimizer)._table_rates
    with mock.patch.object(
        type(private.optimizer), "_table_rates", lambda o: [proper(o)[0]] * len(proper(o))
    ):
        yield


@contextmanager
def _first_schedule(private: PrivateModel) -> Iterator[None]:
    """Every row owes what the first group's rows owe."""
    first = private.mechanism.schedule
    private.mechanism.schedule_of = lambda _: first
    yield


FAULTS: dict[str, Callable[[PrivateModel], Any]] = {
    "row offset ignored": lambda p: _misplaced(p, "row_offset"),
    "column offset ignored": lambda p: _misplaced(p, "column_offset"),
    "gradient division": _divided,
    "rows left out": _half_watched,
    "one rate for all": _first_rate,
    "one schedule for all": _first_schedule,
}
