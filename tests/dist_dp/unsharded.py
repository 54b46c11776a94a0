"""DP-SGD with lazy noise on an unsharded model, one example at a time: what placements must equal.

The model has every kind of lookup: two features on one table, one feature in two tables (two sums;
a sum and a mean), sum and mean pooling, weighted bags, two widths, sequences, three collections.
Rows are few, so that workers are left with one or none: in all tables of a kernel, in its first and
in its last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor, PoolingType

from dist_dp import kernels
from dist_dp.noise_schedule import NoiseSchedule
from dist_dp.optimizer import ROUNDING_MARGIN
from dist_dp.sampling import PoissonSampler
from dist_dp.user_records import UserRecords
from dist_dp.user_sampling import UserSampler
from tests.dist_dp.clicks import Clicks, random_bags
from tests.dist_dp.gradients import SECRET, _double_weights
from tests.dist_dp.models import DENSE, bags

RECORDS = 36
RATE = 0.3
EXPECTED = RATE * RECORDS
# The same records with users as units: up to 9 records each, of which 4 take part in a step.
USER_COUNTS = (9, 7, 5, 4, 3, 2, 2, 1, 1, 1, 1)
MOST_RECORDS, USER_RATE = 4, 0.5
USERS_EXPECTED = USER_RATE * len(USER_COUNTS)
CLIP, SIGMA = 1.45, 0.4
DIM = 16
LR, DECAY = 0.5, 0.1
LOSSES = nn.functional.binary_cross_entropy_with_logits
TABLES = {
    "pooled.a": (13, ["f0", "f1"]),
    "pooled.b": (9, ["f2"]),
    "pooled.c": (8, ["f3"]),
    "pooled.d": (13, ["f0", "f2"]),
    "weighted.v": (5, ["g2"]),
    "weighted.w": (7, ["g0", "g1"]),
    "weighted.x": (6, ["g3"]),
    "sequence.s": (6, ["h0", "h1"]),
}


class Everything(nn.Module):
    """Pooled, weighted and sequence collections under small dense layers."""

    def __init__(self) -> None:
        super().__init__()
        tables = {name.split(".")[1]: given for name, given in TABLES.items()}
        self.pooled = bags(
            {n: tables[n] for n in "abcd"}, DIM, dict.fromkeys("bc", PoolingType.MEAN)
        )
        self.weighted = bags({n: tables[n] for n in "vwx"}, DIM, weighted=True, wide=("v",))
        self.sequence = EmbeddingCollection(
            tables=[
                EmbeddingConfig(
                    name="s", num_embeddings=6, embedding_dim=DIM, feature_names=["h0", "h1"]
                )
            ],
            device=torch.device("cpu"),
        )
        self.bottom = nn.Sequential(nn.Linear(DENSE, 6), nn.ReLU())
        self.each = nn.Linear(DIM, 4)
        self.top = nn.Sequential(nn.Linear(11 * DIM + 6 + 4, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(
        self,
        dense: Tensor,
        pooled: KeyedJaggedTensor,
        weighted: KeyedJaggedTensor,
        history: KeyedJaggedTensor,
    ) -> Tensor:
        found = self.sequence(history)
        padded = [found[h].to_padded_dense(4).to(dense.dtype) for h in ("h0", "h1")]
        each = [
            self.pooled(pooled).values(),
            self.weighted(weighted).values(),
            self.bottom(dense),
            sum(torch.tanh(self.each(p)).sum(1) for p in padded),
        ]
        return self.top(torch.cat(each, 1)).squeeze(1)


def model() -> nn.Module:
    torch.manual_seed(31)
    return Everything()


def records() -> Clicks:
    g = torch.Generator().manual_seed(32)
    sparse = []
    for collection in ("pooled", "weighted", "sequence"):
        rows: dict[str, int] = {}
        for name, (count, features) in TABLES.items():
            if name.startswith(collection):
                # An id of a feature in two tables is a row of both.
                rows.update({f: min(count, rows.get(f, count)) for f in features})
        sparse.append(random_bags(rows, RECORDS, g, weighted=collection == "weighted"))
    labels = torch.randint(0, 2, (RECORDS,), generator=g).float()
    return Clicks(torch.randn(RECORDS, DENSE, generator=g), tuple(sparse), labels)


def users() -> UserRecords:
    """The users, each one's records scattered over the whole data set."""
    g = torch.Generator().manual_seed(33)
    keys = torch.repeat_interleave(torch.arange(len(USER_COUNTS)), torch.tensor(USER_COUNTS))
    return UserRecords(keys[torch.randperm(RECORDS, generator=g)])


def user_sampler() -> UserSampler:
    """Draws users and the records that take part."""
    return UserSampler(SECRET, users(), USER_RATE, MOST_RECORDS)


def drawn_users(step: int) -> list[list[int]]:
    """The records of each user that is drawn at a step, in the order of the users."""
    (part,) = user_sampler().parts(step, 0, 1)
    ends = np.cumsum(part.user_sizes)[:-1]
    return [records.tolist() for records in np.split(part.records, ends)]


def parameter_of(table: str) -> str:
    """The parameter's name in the unsharded model."""
    path, name = table.split(".")
    return f"{path}.{'embeddings' if path == 'sequence' else 'embedding_bags'}.{name}.weight"


@dataclass
class Run:
    """Where a run ended: parameters by name, and the norms of each step's records, in order."""

    state: dict[str, Tensor]
    norms: list[Tensor] = field(default_factory=list)


@dataclass
class _Table:
    weight: Tensor
    key: bytes
    schedule: NoiseSchedule
    last_step: Tensor

    def settle(self, rows: Tensor) -> None:
        """Whole rows at global coordinates: there is no shard here."""
        step = self.schedule.step
        rows = rows[self.last_step[rows] < step]
        if rows.numel() == 0:
            return
        decay, scale = self.schedule.decay_and_scale(self.last_step[rows], step)
        kernels.settle_rows(
            self.weight,
            rows,
            key=self.key,
            from_steps=self.last_step[rows],
            to_step=step,
            decay=decay,
            scale=scale,
        )
        self.last_step[rows] = step


def reference(
    steps: int,
    *,
    zero: bool = False,
    sigma: float = SIGMA,
    rates: Mapping[str, tuple[float, float]] | None = None,
    gamma: float = 0.8,
    clip: Callable[[int], float] = lambda _: CLIP,
    noise: Callable[[int], float] = lambda _: 1.0,
    by_user: bool = False,
) -> Run:
    """The run.

    Args:
        steps: Steps to take.
        zero: Take every gradient for zero.
        sigma: Noise multiplier.
        rates: (learning rate, weight decay) by table or dense parameter where not (LR, DECAY).
        gamma: Factor of the learning rates after each step.
        clip: Clip norm by step.
        noise: Factor of ``sigma`` by step.
        by_user: Draw and clip users.
    """
    data = records()
    state = {n: p.detach().clone() for n, p in model().named_parameters()}
    names = {parameter_of(t): t for t in TABLES}
    tables = {
        n: _Table(
            state[n],
            kernels.derive_key(SECRET, "tables", t),
            NoiseSchedule(),
            torch.zeros(TABLES[t][0], dtype=torch.int32),
        )
        for n, t in names.items()
    }
    rates = rates or {}
    sampler = PoissonSampler(SECRET, RECORDS, RATE)
    expected = USERS_EXPECTED if by_user else EXPECTED
    exact = model().double()
    run = Run(state)
    for step in range(1, steps + 1):
        units = drawn_users(step) if by_user else [[r] for r in sampler.sample(step).tolist()]
        sample = [record for unit in units for record in unit]
        for name, table in tables.items():
            table.settle(_rows(names[name], data, sample))
        sums, norms = clipped(exact, state, [] if zero else units, clip(step))
        run.norms.append(norms)
        noised = _with_noise(
            {n: v for n, v in sums.items() if n not in tables},
            step,
            sigma * noise(step) * clip(step),
        )
        for n, value in state.items():
            lr, decay = rates.get(names.get(n, n), (LR, DECAY))
            lr *= gamma ** (step - 1)
            if n in tables:
                tables[n].schedule.advance(lr, sigma * noise(step), clip(step), expected, decay)
                value -= (lr / (1.0 - lr * decay) * sums[n] / expected).float()
            else:
                value -= lr * (noised[n] / expected + decay * value)
    for table in tables.values():
        table.settle(torch.arange(len(table.weight)))
    return run


def clipped(
    exact: nn.Module, state: Mapping[str, Tensor], units: list[list[int]], clip: float = CLIP
) -> tuple[dict[str, Tensor], Tensor]:
    """Clipped float64 sums by name, and norms by unit, of units' records at some weights."""
    data = records()
    exact.load_state_dict({n: p.double() for n, p in state.items()})
    sums = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in state.items()}
    norms = []
    for unit in units:
        grads: dict[str, Tensor] = {}
        for record in unit:
            for n, g in _gradient(exact, data.select([record])).items():
                grads[n] = grads[n] + g if n in grads else g
        norms.append(float(sum(g.square().sum() for g in grads.values()) ** 0.5))
        for n, g in grads.items():
            sums[n] += g * min(1.0, clip * ROUNDING_MARGIN / norms[-1])
    return sums, torch.tensor(norms, dtype=torch.float64)


def plain(
    steps: int,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    gamma: float = 0.8,
    by_user: bool = False,
) -> Run:
    """The run without noise, by PyTorch's own optimizer over all parameters."""
    whole, exact = model(), model().double()
    made = optimizer(whole)
    fall = torch.optim.lr_scheduler.ExponentialLR(made, gamma)
    sampler = PoissonSampler(SECRET, RECORDS, RATE)
    run = Run({n: p.detach() for n, p in whole.named_parameters()})
    for step in range(1, steps + 1):
        units = drawn_users(step) if by_user else [[r] for r in sampler.sample(step).tolist()]
        sums, norms = clipped(exact, run.state, units)
        run.norms.append(norms)
        for n, p in whole.named_parameters():
            p.grad = (sums[n] / (USERS_EXPECTED if by_user else EXPECTED)).float()
        made.step()
        fall.step()
    return run


def _with_noise(sums: dict[str, Tensor], step: int, deviation: float) -> dict[str, Tensor]:
    """Sums of dense gradients with one step's noise: one draw for all, back to back."""
    flat = torch.cat([v.reshape(-1) for v in sums.values()]).float()
    kernels.add_normal(
        flat,
        key=kernels.derive_key(SECRET, "dense", "parameters"),
        from_step=step - 1,
        to_step=step,
        scale=deviation,
    )
    parts = flat.split([v.numel() for v in sums.values()])
    return {n: p.view(v.shape) for (n, v), p in zip(sums.items(), parts, strict=True)}


def _rows(table: str, data: Clicks, sample: list[int]) -> Tensor:
    sparse = data.select(sample).sparse[
        ("pooled", "weighted", "sequence").index(table.split(".")[0])
    ]
    return torch.cat([sparse[f].values() for f in TABLES[table][1]]).unique()


def _gradient(exact: nn.Module, one: Clicks) -> dict[str, Tensor]:
    exact.zero_grad()
    sparse = tuple(_double_weights(k) for k in one.sparse)
    LOSSES(exact(one.dense.double(), *sparse), one.labels.double()).backward()
    return {n: p.grad.clone() for n, p in exact.named_parameters() if p.grad is not None}
