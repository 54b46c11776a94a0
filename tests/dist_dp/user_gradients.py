"""One private step on users without noise, against autograd run on one user at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from dist_dp.clipping import table_norms, user_tables
from dist_dp.clipping.user_groups import UserGroups
from dist_dp.distributed import rank
from dist_dp.optimizer import PrivateOptimizer
from tests.dist_dp.clicks import PADDING
from tests.dist_dp.gradients import EXPECTED, RATE, Found, _double_weights, build, pieces
from tests.dist_dp.models import CASES

Users = list[list[int]]
LOSSES = nn.functional.binary_cross_entropy_with_logits


def brute_force(case: str, users: Users, clip: float | None = None) -> tuple[Found, float]:
    """One user at a time through float64 autograd; half of them are clipped by default."""
    model, data = CASES[case]()
    model = model.double()
    grads: list[dict[str, Tensor]] = []
    for examples in users:
        own = data.select(examples)
        sparse = tuple(_double_weights(k) for k in own.sparse)
        model.zero_grad()
        LOSSES(model(own.dense.double(), *sparse), own.labels.double(), reduction="sum").backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    norms = torch.stack([sum(g.square().sum() for g in gs.values()).sqrt() for gs in grads])
    clip = clip or float(norms.sort().values[len(norms) // 2 - 1 :][:2].mean())
    sums = {n: torch.zeros_like(p) for n, p in model.named_parameters() if p.requires_grad}
    for gs, norm in zip(grads, norms, strict=True):
        for name, g in gs.items():
            sums[name] += g * min(1.0, clip / float(norm))
    return Found(norms, {n: s.detach() for n, s in sums.items()}), clip


def private_step(
    case: str,
    kind: Any,
    clip: float,
    users_by_rank: list[Users],
    fault: str | None = None,
) -> dict[str, Any]:
    """This rank's view of one private step: norms, dense sums, sums of its table pieces."""
    model, data = CASES[case]()
    private = build(model, kind=kind, clip=clip, max_records_per_user=9)
    size = max(1, *(sum(map(len, users)) for users in users_by_rank))
    mine = users_by_rank[rank()]
    numbers = [example for user in mine for example in user]
    real = len(numbers)
    batch = data.select(numbers + [PADDING] * (size - real))
    dense = {n: p.detach().clone() for n, p in private.recorder.parameters.items()}
    before = pieces(private)
    with FAULTS[fault]() if fault else nullcontext():
        sizes = torch.tensor([len(user) for user in mine], dtype=torch.int64)
        private.state.begin(1, real, size, users=UserGroups(sizes, size))
        LOSSES(model(*batch.inputs), batch.labels).backward()
        private.optimizer.step()
    after = pieces(private)
    stats = private.optimizer.last_stats
    assert stats is not None
    unit = EXPECTED / RATE
    parameters = private.recorder.parameters
    return {
        "norms": stats.norms,
        "clipped": stats.clipped,
        "dense": {n: (dense[n] - p.detach()) * unit for n, p in parameters.items()},
        "tables": {k: (before[k] - after[k]) * unit for k in before},
    }


def all_cases(work: list[tuple[Any, ...]]) -> dict[Any, dict[str, Any]]:
    """Runs ``(key, case, kind, clip, users by rank, fault)`` one after the other."""
    return {key: private_step(*arguments) for key, *arguments in work}


def vector(step: dict[str, Any]) -> Tensor:
    """The clipped sum over all parameters, float64, of a world of one."""
    parts = [*step["dense"].values(), *step["tables"].values()]
    return torch.cat([part.double().reshape(-1) for part in parts])


@contextmanager
def _clip_by_record() -> Iterator[None]:
    """Every record of a user clipped to C by itself."""
    with mock.patch.object(PrivateOptimizer, "_users_in_flight", lambda *_: None):
        yield


@contextmanager
def _rows_not_added() -> Iterator[None]:
    """Tables' norms of a user's records added up, as if they read different rows."""

    def naive(uses: Any, rows: dict[str, int], users: UserGroups) -> Tensor:
        result = torch.zeros(users.num_units)
        for name, use in uses:
            each = table_norms.squared_norms([use], rows[name], users.batch)
            result.index_add_(0, users.unit_of, each)
        return result

    with mock.patch.object(user_tables, "squared_norms_of_users", naive):
        yield


@contextmanager
def _spread_by_place() -> Iterator[None]:
    """The n-th user's factor given to the n-th example."""

    def spread(self: UserGroups, values: Tensor) -> Tensor:
        return torch.nn.functional.pad(values, (0, self.batch))[: self.batch]

    with mock.patch.object(UserGroups, "spread", spread):
        yield


@contextmanager
def _count_padding() -> Iterator[None]:
    """Padding as examples of the last user, in its norm."""
    made = UserGroups.__init__

    def wrong(self: UserGroups, sizes: Tensor, batch: int) -> None:
        sizes = sizes.clone()
        sizes[-1] += batch - int(sizes.sum())
        made(self, sizes, batch)

    with mock.patch.object(UserGroups, "__init__", wrong):
        yield


@contextmanager
def _gathered_twice() -> Iterator[None]:
    """What stands in for an absent example counted."""
    from dist_dp.clipping.user_groups import Bucket

    def gather(self: Bucket, record: Any) -> Any:
        return tuple(x[self.examples] for x in record[0]), record[1][self.examples]

    with mock.patch.object(Bucket, "gather", gather):
        yield


FAULTS: dict[str, Callable[[], Any]] = {
    "clipped by record": _clip_by_record,
    "rows not added": _rows_not_added,
    "spread by place": _spread_by_place,
    "padding counted": _count_padding,
    "absent counted": _gathered_twice,
}
