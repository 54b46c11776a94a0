"""Lazy noise under momentum has the law of eager noise: weights and momenta, read at any time.

As tests/dist_dp/test_distribution.py, with two states a row. Each coordinate of a run gives one
draw of the readings below; the gradient of a step depends on the weight that the step read. The
readings are jointly normal with a covariance worked out from the recursion, one draw a step. A
sample is compared with it (after whitening: whole margins, variances, correlations) and with eager
runs. The level is 1e-3 for all comparisons of a sample together (Bonferroni); keys are fixed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from dist_dp import kernels
from dist_dp.mechanisms import DPSGD, LazyDP, Mechanism
from dist_dp.mechanisms.row_states import give_state
from dist_dp.momentum_schedule import MomentumSchedule
from dist_dp.row_gradients import apply_to_state
from dist_dp.table_shard import TableShard

LEVEL = 1e-3
STEPS = 9
COLUMNS = 64
RUNS = 120
MOMENTUM = 0.8
RATES = [0.05, 0.4, 0.4, 0.3, 0.2, 0.1, 0.05, 0.3, 0.02]
DECAY = 0.25
SIGMA, CLIP, EXPECTED = 1.3, 0.8, 2.0
START = (0.5, -1.0, 2.0)
TRAINED = {3: 0, 8: 0}  # step to the row its batch looks up
EVALUATED = {1: 1, 4: 1, 5: 1}  # after this many steps, row 1 is read: gaps of 1, 3, 1 steps
FEEDBACK = 0.6  # the gradient is 1 + FEEDBACK * (weight read)
READINGS = (
    *("w0 before 3", "w0 before 8", "m0 before 8", "w0"),
    *("w1 at 1", "w1 at 4", "w1 at 5", "w1", "m1"),
    *("w2", "m2"),
)
Samples = NDArray[np.float64]
Make = Callable[[MomentumSchedule], Mechanism]


def one_run(make: Make, schedule: MomentumSchedule, key: bytes) -> Tensor:
    """The readings of every column, float64 ``[COLUMNS, readings]``."""
    mechanism = make(schedule)
    weight = torch.tensor(START).unsqueeze(1).repeat(1, COLUMNS).contiguous()
    shard = TableShard("t", 3, COLUMNS, 0, 0, weight, False, "table_wise", noise_key=key)
    give_state(shard, momentum=True)
    assert shard.momentum is not None
    read: dict[str, Tensor] = {}

    def look_up(row: int, when: str) -> None:
        mechanism.before_lookup([(shard, torch.tensor([row]))])
        read[f"w{row} {when}"] = shard.weight[row].clone()
        read[f"m{row} {when}"] = shard.momentum[row].clone()

    for step in range(1, STEPS + 1):
        if step in TRAINED:
            look_up(TRAINED[step], f"before {step}")
        schedule.advance(RATES[step - 1], SIGMA, CLIP, EXPECTED, DECAY)
        if step in TRAINED:
            row = TRAINED[step]
            gradient = (1.0 + FEEDBACK * read[f"w{row} before {step}"]) / EXPECTED
            rate = schedule.gradient_learning_rate(step)
            apply_to_state(shard, torch.tensor([row]), rate * gradient.unsqueeze(0))
        mechanism.after_update([shard])
        if step in EVALUATED:
            look_up(EVALUATED[step], f"at {step}")
    mechanism.settle(shard)
    for row in range(3):
        read[f"w{row}"], read[f"m{row}"] = shard.weight[row], shard.momentum[row]
    return torch.stack([read[name] for name in READINGS], dim=1).double()


def runs(
    make: Make,
    family: str,
    count: int = RUNS,
    schedule: type[MomentumSchedule] = MomentumSchedule,
) -> Samples:
    """Independent readings, ``[count * COLUMNS, readings]``, one key a run."""
    keys = [kernels.derive_key(bytes(32), family, str(i)) for i in range(count)]
    return torch.cat([one_run(make, schedule(MOMENTUM), key) for key in keys]).numpy()


def exact_law() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and covariance of the readings, from SGD with momentum, step by step.

    A state is a linear form in (1, Z_1, ..., Z_steps of row 0, ... of row 1, ... of row 2).
    """
    weight, momentum = np.zeros((2, 3, 1 + 3 * STEPS))
    weight[:, 0] = START
    read = {}

    def note(row: int, when: str) -> None:
        read[f"w{row} {when}".strip()] = weight[row].copy()
        read[f"m{row} {when}".strip()] = momentum[row].copy()

    for step in range(1, STEPS + 1):
        gradient = np.zeros_like(weight)
        if step in TRAINED:
            row = TRAINED[step]
            note(row, f"before {step}")
            gradient[row] = FEEDBACK * weight[row]
            gradient[row, 0] += 1.0
        for row in range(3):
            gradient[row, row * STEPS + step] += SIGMA * CLIP
        momentum = MOMENTUM * momentum + gradient / EXPECTED + DECAY * weight
        weight = weight - RATES[step - 1] * momentum
        if step in EVALUATED:
            note(EVALUATED[step], f"at {step}")
    for row in range(3):
        note(row, "")
    table = np.stack([read[name] for name in READINGS])
    return table[:, 0], table[:, 1:] @ table[:, 1:].T


def rejected(found: Samples, eager: Samples) -> dict[str, float]:
    """The comparisons that reject, at level 1e-3 in all."""
    with np.errstate(all="ignore"):  # a faulty sample may have no variance: its p-values are nan
        p = p_values(found, eager)
    return {name: value for name, value in p.items() if not value > LEVEL / len(p)}


def p_values(found: Samples, eager: Samples) -> dict[str, float]:
    """p-values of the comparisons with the exact law and with eager runs."""
    mean, covariance = exact_law()
    p: dict[str, float] = {}
    n, m = len(found), len(eager)
    white = np.linalg.solve(np.linalg.cholesky(covariance), (found - mean).T).T
    for i, name in enumerate(READINGS):
        x, y, variance = found[:, i], eager[:, i], covariance[i, i]
        p[f"mean of {name}"] = _normal((x.mean() - mean[i]) / np.sqrt(variance / n))
        p[f"variance of {name}"] = _two_sided(stats.chi2(n - 1), (n - 1) * x.var(ddof=1) / variance)
        p[f"law of {name}"] = stats.kstest((x - mean[i]) / np.sqrt(variance), "norm").pvalue
        p[f"law of {name}, eager"] = stats.ks_2samp(x, y).pvalue
        p[f"white law of {name}"] = stats.kstest(white[:, i], "norm").pvalue
        p[f"white variance of {name}"] = _two_sided(stats.chi2(n), (white[:, i] ** 2).sum())
        for j in range(i):
            pair = f"{READINGS[j]} and {name}"
            z = np.arctanh(np.corrcoef(white[:, i], white[:, j])[0, 1])
            p[f"white correlation of {pair}"] = _normal(z * np.sqrt(n - 3))
            z, z_eager = (np.arctanh(np.corrcoef(s[:, i], s[:, j])[0, 1]) for s in (found, eager))
            p[f"correlation of {pair}, eager"] = _normal(
                (z - z_eager) / np.sqrt(1 / (n - 3) + 1 / (m - 3))
            )
    return p


def _normal(z: float) -> float:
    return float(2 * stats.norm.sf(abs(z)))


def _two_sided(law: object, value: float) -> float:
    return float(2 * min(law.cdf(value), law.sf(value)))  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def eager() -> Samples:
    return runs(DPSGD, "eager momentum")


def test_lazy_runs_have_the_law_of_eager_runs(eager: Samples) -> None:
    assert not rejected(runs(LazyDP, "lazy momentum"), eager)


def test_eager_runs_have_the_exact_law(eager: Samples) -> None:
    assert not rejected(eager, runs(DPSGD, "eager momentum again", RUNS // 4))


class NotPropagated(MomentumSchedule):
    """The momentum of a row waits with it, however many steps pass."""

    def propagate(self, from_steps: Tensor, to_step: int) -> tuple[Tensor, Tensor]:
        phi, chol = super().propagate(from_steps, to_step)
        phi[:, 1], phi[:, 3] = -RATES[to_step - 1] * MOMENTUM, MOMENTUM
        return phi, chol


class IndependentDraws(MomentumSchedule):
    """Right variances of weight and momentum, from draws that have nothing in common."""

    def propagate(self, from_steps: Tensor, to_step: int) -> tuple[Tensor, Tensor]:
        phi, chol = super().propagate(from_steps, to_step)
        chol[:, 2] = torch.hypot(chol[:, 1], chol[:, 2])
        chol[:, 1] = 0
        return phi, chol


class FirstStepOfTwoDraws(MomentumSchedule):
    """The same, for gaps of one step alone, where the covariance has rank one."""

    def propagate(self, from_steps: Tensor, to_step: int) -> tuple[Tensor, Tensor]:
        phi, chol = super().propagate(from_steps, to_step)
        single = from_steps == to_step - 1
        chol[single, 2] = chol[single, 1].abs()
        chol[single, 1] = 0
        return phi, chol


class GradientAsItIs(MomentumSchedule):
    """The gradient goes into the momentum undivided, and the transition shrinks it."""

    def gradient_learning_rate(self, step: int) -> float:
        return 1.0


class WeightAlone(MomentumSchedule):
    """Noise for the weight, none for the momentum."""

    def propagate(self, from_steps: Tensor, to_step: int) -> tuple[Tensor, Tensor]:
        phi, chol = super().propagate(from_steps, to_step)
        chol[:, 0] = 0
        return phi, chol


# Each fault, and a comparison that must see it.
FAULTS: dict[type[MomentumSchedule], str] = {
    NotPropagated: "white variance of w1 at 4",
    IndependentDraws: "white variance of w1 at 4",
    FirstStepOfTwoDraws: "white variance of w1 at 4",
    GradientAsItIs: "mean of w0 before 8",
    WeightAlone: "variance of m2",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(fault: type[MomentumSchedule], eager: Samples) -> None:
    found = rejected(runs(LazyDP, fault.__name__, RUNS // 4, fault), eager)
    assert FAULTS[fault] in found, found
