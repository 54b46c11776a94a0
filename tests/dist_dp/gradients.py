"""One private step without noise, against autograd run on one example at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torchrec import KeyedJaggedTensor

from dist_dp.distributed import rank, world_size
from dist_dp.optimizer_settings import optimizer_settings
from dist_dp.plan import PrivacyPlan
from dist_dp.private_model import PrivateModel, build_private_model
from dist_dp.sharding import TableOptimizer
from dist_dp.sparse_settings import SparseSettings
from tests.dist_dp.clicks import PADDING
from tests.dist_dp.models import CASES

SECRET = bytes(range(32))
EXPECTED = 4.0
# So large that the step is all that is left of the weights: their rounding hides nothing.
RATE = 2.0**14


@dataclass
class Found:
    """Norms by example and clipped sums by parameter name of the unsharded model."""

    norms: Tensor
    sums: dict[str, Tensor]
    loss: float = 0.0


def brute_force(
    case: str, examples: list[int], clip: float | None = None, losses: Any = None
) -> tuple[Found, float]:
    """One example at a time through float64 autograd; half of them are clipped by default."""
    model, data = CASES[case]()
    model = model.double()
    losses = losses or nn.functional.binary_cross_entropy_with_logits
    grads: list[dict[str, Tensor]] = []
    for b in examples:
        one = data.select([b])
        sparse = tuple(_double_weights(k) for k in one.sparse)
        model.zero_grad()
        losses(model(one.dense.double(), *sparse), one.labels.double()).backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    norms = torch.stack([sum(g.square().sum() for g in gs.values()).sqrt() for gs in grads])
    middle = norms.sort().values[len(norms) // 2 - 1 :][:2]
    clip = clip or float(middle.mean())
    sums = {n: torch.zeros_like(p) for n, p in model.named_parameters() if p.requires_grad}
    for gs, norm in zip(grads, norms, strict=True):
        for name, g in gs.items():
            sums[name] += g * min(1.0, clip / float(norm))
    return Found(norms, {n: s.detach() for n, s in sums.items()}), clip


def _double_weights(features: Any) -> Any:
    from torchrec import KeyedJaggedTensor

    weights = features.weights_or_none()
    if weights is None:
        return features
    return KeyedJaggedTensor(
        keys=features.keys(),
        values=features.values(),
        lengths=features.lengths(),
        weights=weights.double(),
        stride=features.stride(),
    )


def build(
    model: nn.Module,
    *,
    kind: Any = "table_wise",
    clip: float = 1.0,
    sigma: float = 0.0,
    mechanism: str = "lazydp",
    optimizer: torch.optim.Optimizer | None = None,
    expected: float = EXPECTED,
    secret: bytes = SECRET,
    grid: float | None = None,
    clip_schedule: Any = None,
    noise_multiplier_schedule: Any = None,
    max_records_per_user: int | None = None,
    sparse: SparseSettings | None = None,
    table_optimizer: TableOptimizer | None = None,
    **options: Any,
) -> PrivateModel:
    """A private model with a small plan, for users if their records are bounded."""
    by_user = max_records_per_user is not None
    plan = PrivacyPlan(
        mechanism=mechanism,
        noise_multiplier=None if mechanism == "none" else sigma,
        max_grad_norm=clip,
        unit="user" if by_user else "record",
        num_records=None if by_user else 1000,
        num_users=1000 if by_user else None,
        max_records_per_user=max_records_per_user,
        expected_batch_size=expected,
        steps=100,
        delta=1e-4,
        noise_grid=grid,
        clip_schedule=clip_schedule,
        noise_multiplier_schedule=noise_multiplier_schedule,
        sparse=sparse,
    )
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=RATE)
    return build_private_model(
        model,
        plan,
        optimizer_settings(optimizer, table_optimizer),
        secret=secret,
        sharding=kind,
        **options,
    )


def unsharded_name(private: PrivateModel, table: str) -> str:
    """The parameter's name in the unsharded model."""
    cut = next(c for c in private.cuts if table.startswith(f"{c.path}."))
    kind = "embedding_bags" if cut.pooled else "embeddings"
    return f"{cut.path}.{kind}.{table.removeprefix(cut.path + '.')}.weight"


def pieces(private: PrivateModel) -> dict[tuple[str, int, int], Tensor]:
    """Local table pieces by (unsharded name, first row, first column), copied."""
    return {
        (unsharded_name(private, s.table), s.row_offset, s.column_offset): s.weight.clone()
        for s in private.shards
    }


def local_part(examples: list[list[int]]) -> tuple[list[int], int]:
    """This rank's examples and how many are real, padded to the longest rank's."""
    size = max(1, *(len(e) for e in examples))
    mine = examples[rank()]
    return mine + [PADDING] * (size - len(mine)), len(mine)


def private_step(
    case: str,
    kind: Any,
    clip: float,
    examples: list[list[int]],
    *,
    reduction: str = "mean",
    fault: str | None = None,
    reordered: bool = False,
) -> dict[str, Any]:
    """This rank's view of one private step: norms, dense sums, sums of its table pieces.

    ``reordered``: another batch is looked up before, with the features in reverse order.
    """
    model, data = CASES[case]()
    private = build(model, kind=kind, clip=clip, loss_reduction=reduction)
    numbers, real = local_part(examples)
    batch = data.select(numbers)
    if reordered:
        model.eval()
        model(batch.dense, *(reverse(features) for features in batch.sparse))
        model.train()
    dense = {n: p.detach().clone() for n, p in private.recorder.parameters.items()}
    before = pieces(private)
    with FAULTS[fault]() if fault else mock.patch.dict({}):
        private.state.begin(1, real, len(numbers))
        logits = model(*batch.inputs)
        losses = nn.functional.binary_cross_entropy_with_logits
        losses(logits, batch.labels, reduction=reduction).backward()
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


def reverse(features: KeyedJaggedTensor) -> KeyedJaggedTensor:
    """The same bags, the last key first."""
    return features.permute(list(range(len(features.keys())))[::-1])


def all_cases(worlds: list[tuple[Any, ...]]) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Runs ``(case, kind, clip, examples, reduction, fault)`` one after the other."""
    return {
        key: private_step(case, kind, clip, examples, reduction=reduction, fault=fault)
        for key, case, kind, clip, examples, reduction, fault in worlds
    }


def errors(ranks: list[dict[str, Any]], wanted: Found) -> dict[str, float]:
    """Relative errors of norms and of each parameter's clipped sum, over all ranks."""
    norms = torch.cat([r["norms"] for r in ranks]).double()
    found = {"norms": _relative(norms, wanted.norms)}
    sums: dict[str, Tensor] = {}
    for r in ranks:
        for name, value in r["dense"].items():
            found[name] = max(found.get(name, 0.0), _relative(value, wanted.sums[name]))
        for (name, row, column), value in r["tables"].items():
            whole = sums.setdefault(name, torch.full_like(wanted.sums[name], float("nan")))
            whole[row : row + value.shape[0], column : column + value.shape[1]] = value.double()
    for name, value in sums.items():
        found[name] = _relative(value, wanted.sums[name])
    missing = set(wanted.sums) - set(found)
    assert not missing, missing
    return found


def _relative(found: Tensor, wanted: Tensor) -> float:
    if found.shape != wanted.shape:
        return float("inf")
    error = (found.double() - wanted).norm() / wanted.norm()
    return float("inf") if bool(error.isnan()) else float(error)


@contextmanager
def _ignore_repeats() -> Iterator[None]:
    """Norms as if every id of a bag were another row."""

    def naive(uses: list[Any], num_rows: int, batch: int) -> Tensor:
        total = torch.zeros(batch)
        for use in uses:
            each = use.contributions(use.examples).square().sum(1)
            total.index_add_(0, use.examples, each)
        return total

    def ones(ids: Tensor, lengths: Tensor, weights: Tensor | None = None) -> Tensor:
        each = torch.ones(ids.numel()) if weights is None else weights.square()
        bags = torch.repeat_interleave(torch.arange(lengths.numel()), lengths)
        return torch.zeros(lengths.numel()).index_add_(0, bags, each)

    with (
        mock.patch("dist_dp.clipping.table_uses.squared_norms", naive),
        mock.patch("dist_dp.clipping.table_norms.kernels.bag_repeats", ones),
    ):
        yield


@contextmanager
def _gradient_division() -> Iterator[None]:
    """TorchRec's default: sharded gradients divided by the world size."""
    from torchrec.distributed.comm_ops import set_gradient_division

    set_gradient_division(True)
    try:
        yield
    finally:
        set_gradient_division(False)


@contextmanager
def _average_dense() -> Iterator[None]:
    """What DistributedDataParallel would do to the dense sums."""
    from dist_dp.distributed import all_reduce_sum

    with mock.patch(
        "dist_dp.optimizer.all_reduce_sum", lambda x: all_reduce_sum(x).div_(world_size())
    ):
        yield


@contextmanager
def _average_replicas() -> Iterator[None]:
    from dist_dp.distributed import all_reduce_sum

    with mock.patch(
        "dist_dp.replicas.all_reduce_sum", lambda x: all_reduce_sum(x).div_(world_size())
    ):
        yield


@contextmanager
def _forget_bias() -> Iterator[None]:
    """Linear's norm without its bias."""
    from dist_dp.clipping import dense_rules

    with mock.patch.object(dense_rules, "_trained", lambda layer, name: False):
        yield


@contextmanager
def _count_padding() -> Iterator[None]:
    """Padding examples with a clip factor."""
    from dist_dp.step_state import StepState

    def begin(self: StepState, step: int, num_real: int, padded_size: int) -> None:
        self.is_real = torch.ones(padded_size, dtype=torch.bool)

    with mock.patch.object(StepState, "begin", begin):
        yield


FAULTS: dict[str, Callable[[], Any]] = {
    "repeats ignored": _ignore_repeats,
    "gradient division": _gradient_division,
    "dense averaged": _average_dense,
    "replicas averaged": _average_replicas,
    "bias forgotten": _forget_bias,
    "padding counted": _count_padding,
}
