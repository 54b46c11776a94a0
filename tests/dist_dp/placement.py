"""Short private runs whose end must not depend on where tables lie; run in a world."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dist_dp.leases import StepLeases
from dist_dp.ledger import Lease
from dist_dp.loader import PoissonLoader, as_source
from dist_dp.look_ahead import LookAhead
from dist_dp.private_model import PrivateModel
from dist_dp.sampling import PoissonSampler
from tests.dist_dp.clicks import Clicks, random_bags
from tests.dist_dp.gradients import SECRET, build, pieces
from tests.dist_dp.models import DENSE, Mixed, bags

RECORDS = 40
STEPS = 6
RATE = 0.5
LOSSES = nn.functional.binary_cross_entropy_with_logits


class OpenHanded:
    """An accountant that allows everything and remembers what it was asked."""

    def __init__(self, most: int = 10**6) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.left = most

    def reserve(self, run_id: str, first_step: int, steps: int) -> Lease:
        from dist_dp.errors import BudgetError

        self.calls.append(("reserve", first_step, steps))
        if steps > self.left:
            raise BudgetError("the budget of data set 'clicks' is used up")
        self.left -= steps
        return Lease(f"lease-{first_step}", first_step, steps, 1.0, 0.5)

    def settle(self, lease_id: str, used_steps: int) -> None:
        self.calls.append(("settle", lease_id, used_steps))

    def open_leases(self, run_id: str) -> list[Lease]:
        return []

    def run_epsilon(self, run_id: str) -> float:
        return 0.5

    def charged_to(self, run_id: str) -> int:
        return 0

    def run_steps(self, run_id: str) -> int:
        return 10**6


def records() -> Clicks:
    """A fixed data set for the model ``Mixed`` of :func:`model`."""
    g = torch.Generator().manual_seed(11)
    sparse = random_bags({"f0": 13, "f1": 13, "f2": 9}, RECORDS, g)
    history = random_bags({"h0": 6, "h1": 6}, RECORDS, g)
    labels = torch.randint(0, 2, (RECORDS,), generator=g).float()
    return Clicks(torch.randn(RECORDS, DENSE, generator=g), (sparse, history), labels)


def model(meta: bool) -> nn.Module:
    torch.manual_seed(12)
    whole = Mixed(13, 9, 8, 6, weighted=False)
    if meta:
        # Initialised by key and row, wherever they lie.
        whole.pooled = bags({"a": (13, ["f0", "f1"]), "b": (9, ["f2"])}, 8, device="meta")
    return whole


def features_of(batch: Any) -> dict[str, Any]:
    """What each collection of the model gets."""
    return dict(zip(("pooled", "sequence"), batch.inputs[1:], strict=True))


def loader_of(private: PrivateModel, data: Any, steps: int, **options: Any) -> PoissonLoader:
    """A private loader with an open-handed accountant."""
    leases = StepLeases(OpenHanded(), "run", steps, **options)
    sampler = PoissonSampler(SECRET, len(data), 0.3)
    return PoissonLoader(as_source(data), sampler, leases, private.state, steps)


def private_run(
    kind: Any,
    mechanism: str,
    zero: bool,
    meta: bool = False,
    grid: float | None = None,
    look_ahead: bool = False,
    momentum: float = 0.0,
    prepare: Callable[[Any], None] | None = None,
) -> dict[str, Any]:
    """Final table pieces and dense weights, and what an evaluation in the middle saw."""
    whole, data = model(meta), records()
    if prepare is not None:
        prepare(whole)
    optimizer = torch.optim.SGD(whole.parameters(), lr=RATE, weight_decay=0.1, momentum=momentum)
    private = build(
        whole,
        kind=kind,
        clip=0.5,
        sigma=0.8,
        mechanism=mechanism,
        optimizer=optimizer,
        expected=0.3 * RECORDS,
        grid=grid,
    )
    decay = torch.optim.lr_scheduler.ExponentialLR(private.optimizer, 0.8)
    seen: Tensor | None = None
    loader = loader_of(private, data, STEPS)
    if look_ahead:
        LookAhead(whole, private.optimizer, loader, features_of)
    for batch in loader:
        private.optimizer.zero_grad()
        loss = LOSSES(whole(*batch.inputs), batch.labels) * (0.0 if zero else 1.0)
        loss.backward()
        private.optimizer.step()
        decay.step()
        if private.mechanism.schedule.step == 3:
            whole.eval()
            # Without no_grad, as users forget: nothing may flow back.
            seen = whole(*data.select([1, 5, 7, 20]).inputs).detach()
            whole.train()
    kept = [s.last_step for s in private.shards if s.has_history]
    unsettled = sum(int((last_step < STEPS).sum()) for last_step in kept)
    private.settle()
    return {
        "pieces": pieces(private),
        "dense": {n: p.detach().clone() for n, p in private.recorder.parameters.items()},
        "seen": seen,
        "states": {
            (s.table, s.row_offset, s.column_offset, name): tensor.clone()
            for s in private.shards
            for name, tensor in s.state_tensors().items()
        },
        "unsettled": unsettled,
        "kinds": sorted({s.kind for s in private.shards}),
    }


def all_runs(kinds: list[Any], eager: list[Any]) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Lazy runs with and without gradients for each kind, and eager ones for some."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, kind in kinds:
        for zero in (False, True):
            found["lazydp", name, zero] = private_run(kind, "lazydp", zero)
    for name, kind in eager:
        for zero in (False, True):
            found["dpsgd", name, zero] = private_run(kind, "dpsgd", zero)
    for name, kind in kinds[:2]:
        found["meta", name, False] = private_run(kind, "lazydp", zero=False, meta=True)
    return found


def grid_runs(kinds: dict[str, Any], grid: float) -> dict[tuple[str, bool], dict[Any, Tensor]]:
    """Final pieces of lazy runs on a grid, by (name of the kind, gradients are zero)."""
    return {
        (name, zero): private_run(kind, "lazydp", zero, grid=grid)["pieces"]
        for name, kind in kinds.items()
        for zero in (True, False)
    }
