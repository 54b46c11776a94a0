"""Lazy noise has the law of eager noise: what is read, whenever it is read, and what is released.

Many short runs with different keys, under a falling learning rate, a noise multiplier that
changes with the step, and strong weight decay. Each coordinate of a run gives one draw of six
readings: row 0 at two training lookups and at the end, row 1 at an evaluation and at the end, row 2
(never looked up) at the end. The gradient of a step depends on what the step read, so a wrong
reading also spoils what comes after.

The readings are jointly normal with a known mean and covariance. `law_p_values` tests a sample
against them (means, variances, correlations between rows and between times, whole margins) and
against a sample of eager runs. The level is 1e-3 for all tests of one sample together
(Bonferroni); keys are fixed, so the outcome is too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from dist_dp import kernels
from dist_dp.mechanisms import DPSGD, LazyDP, Mechanism, Read
from dist_dp.noise_schedule import NoiseSchedule
from dist_dp.table_shard import TableShard

LEVEL = 1e-3
STEPS = 9
COLUMNS = 64
RUNS = 160
RATES = [0.9 * 0.7**t for t in range(STEPS)]
DECAY = 0.25
SIGMAS = [1.3, 1.3, 0.4, 0.4, 0.9, 2.0, 2.0, 0.7, 0.5]
CLIP, EXPECTED = 0.8, 2.0
START = (0.5, -1.0, 2.0)
TRAINED = {3: 0, 8: 0}  # step to the row its batch looks up
EVALUATED = {4: 1}  # after this many steps, row 1 is read
FEEDBACK = 0.6  # the gradient is 1 + FEEDBACK * (value read)
READINGS = (
    *("row 0 before step 3", "row 0 before step 8", "row 0"),
    *("row 1 at step 4", "row 1", "row 2"),
)
Samples = NDArray[np.float64]
Make = Callable[[NoiseSchedule], Mechanism]


def one_run(make: Make, key: bytes) -> Tensor:
    """The six readings of every column, float64 ``[COLUMNS, 6]``."""
    schedule = NoiseSchedule()
    mechanism = make(schedule)
    weight = torch.tensor(START).unsqueeze(1).repeat(1, COLUMNS).contiguous()
    shard = TableShard("t", 3, COLUMNS, 0, 0, weight, False, "table_wise", noise_key=key)
    read: dict[str, Tensor] = {}

    def look_up(row: int) -> Tensor:
        rows = torch.tensor([row])
        mechanism.before_lookup([(shard, rows)])
        value = shard.weight[row].clone()
        getattr(mechanism, "after_lookup", lambda *_: None)(shard, rows)
        return value

    for step in range(1, STEPS + 1):
        gradient = torch.zeros(COLUMNS)
        if step in TRAINED:
            value = look_up(TRAINED[step])
            read[f"row 0 before step {step}"] = value
            gradient = 1.0 + FEEDBACK * value
        schedule.advance(RATES[step - 1], SIGMAS[step - 1], CLIP, EXPECTED, DECAY)
        if step in TRAINED:
            rate = schedule.gradient_learning_rate(step)
            shard.weight[TRAINED[step]] -= rate * gradient / EXPECTED
        mechanism.after_update([shard])
        if step in EVALUATED:
            read[f"row 1 at step {step}"] = look_up(EVALUATED[step])
    mechanism.settle(shard)
    for row in range(3):
        read[f"row {row}"] = shard.weight[row].clone()
    return torch.stack([read[name] for name in READINGS], dim=1).double()


def runs(make: Make, family: str, count: int = RUNS) -> Samples:
    """Independent readings, ``[count * COLUMNS, 6]``, one key a run."""
    keys = [kernels.derive_key(bytes(32), family, str(i)) for i in range(count)]
    return torch.cat([one_run(make, key) for key in keys]).numpy()


def exact_law() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and covariance of the readings, from DP-SGD's recursion step by step.

    A row is a linear form in (1, Z_1, ..., Z_steps of row 0, ... of row 1, ... of row 2).
    """
    forms = np.zeros((3, 1 + 3 * STEPS))
    forms[:, 0] = START
    read = {}
    for step in range(1, STEPS + 1):
        rate = RATES[step - 1]
        gradient = np.zeros_like(forms)
        if step in TRAINED:
            row = TRAINED[step]
            read[f"row 0 before step {step}"] = forms[row].copy()
            gradient[row] = FEEDBACK * forms[row]
            gradient[row, 0] += 1.0
        noise = np.zeros_like(forms)
        for row in range(3):
            noise[row, 1 + row * STEPS + step - 1] = SIGMAS[step - 1] * CLIP
        forms = (1 - rate * DECAY) * forms - rate / EXPECTED * (gradient + noise)
        if step in EVALUATED:
            read[f"row 1 at step {step}"] = forms[EVALUATED[step]].copy()
    for row in range(3):
        read[f"row {row}"] = forms[row]
    table = np.stack([read[name] for name in READINGS])
    return table[:, 0], table[:, 1:] @ table[:, 1:].T


def law_p_values(found: Samples, eager: Samples) -> dict[str, float]:
    """p-values of every comparison of a sample with the exact law and with eager runs."""
    with np.errstate(all="ignore"):  # a faulty sample may have no variance: its p-values are nan
        return _p_values(found, eager)


def _p_values(found: Samples, eager: Samples) -> dict[str, float]:
    mean, covariance = exact_law()
    p: dict[str, float] = {}
    n, m = len(found), len(eager)
    white = np.linalg.solve(np.linalg.cholesky(covariance), (found - mean).T).T
    for i, name in enumerate(READINGS):
        x, y, variance = found[:, i], eager[:, i], covariance[i, i]
        p[f"mean of {name}"] = _normal((x.mean() - mean[i]) / np.sqrt(variance / n))
        p[f"variance of {name}"] = _two_sided(stats.chi2(n - 1), (n - 1) * x.var(ddof=1) / variance)
        p[f"law of {name}"] = stats.kstest((x - mean[i]) / np.sqrt(variance), "norm").pvalue
        p[f"white {i}"] = stats.kstest(white[:, i], "norm").pvalue
        difference = (x.mean() - y.mean()) / np.sqrt(x.var() / n + y.var() / m)
        p[f"mean of {name}, eager"] = _normal(difference)
        p[f"variance of {name}, eager"] = _two_sided(
            stats.f(n - 1, m - 1), x.var(ddof=1) / y.var(ddof=1)
        )
        p[f"law of {name}, eager"] = stats.ks_2samp(x, y).pvalue
        for j in range(i):
            pair = f"{READINGS[j]} and {name}"
            # Fisher's z; exact covariances between different rows are 0.
            exact = covariance[i, j] / np.sqrt(covariance[i, i] * covariance[j, j])
            z, z_eager = (np.arctanh(np.corrcoef(s[:, i], s[:, j])[0, 1]) for s in (found, eager))
            p[f"correlation of {pair}"] = _normal((z - np.arctanh(exact)) * np.sqrt(n - 3))
            p[f"correlation of {pair}, eager"] = _normal(
                (z - z_eager) / np.sqrt(1 / (n - 3) + 1 / (m - 3))
            )
    return p


def _normal(z: float) -> float:
    return float(2 * stats.norm.sf(abs(z)))


def _two_sided(law: object, value: float) -> float:
    return float(2 * min(law.cdf(value), law.sf(value)))  # type: ignore[attr-defined]


def rejected(found: Samples, eager: Samples) -> dict[str, float]:
    """The comparisons that reject, at level 1e-3 in all."""
    p = law_p_values(found, eager)
    return {name: value for name, value in p.items() if not value > LEVEL / len(p)}


@pytest.fixture(scope="module")
def eager() -> Samples:
    return runs(DPSGD, "eager")


def test_lazy_runs_have_the_law_of_eager_runs(eager: Samples) -> None:
    assert not rejected(runs(LazyDP, "lazy"), eager)


def test_eager_runs_have_the_exact_law(eager: Samples) -> None:
    assert not rejected(eager, runs(DPSGD, "eager again"))


def test_rows_are_uncorrelated_and_times_are_not() -> None:
    """The exact law itself: what the correlations are tested against."""
    _, covariance = exact_law()
    assert np.allclose(covariance[:3, 3:], 0) and np.allclose(covariance[3:5, 5], 0)
    scale = np.sqrt(np.diag(covariance))
    correlation = covariance / np.outer(scale, scale)
    assert correlation[0, 1] > 0.1 and correlation[3, 4] > 0.1 and correlation[1, 2] > 0.1


class NoFlush(LazyDP):
    """Releases rows as they lie."""

    def settle(self, shard: TableShard, first_row: int = 0, last_row: int | None = None) -> None:
        pass


class _Scaled(LazyDP):
    """Draws with a wrong standard deviation."""

    def scale(self, from_steps: Tensor, step: int) -> Tensor:
        raise NotImplementedError

    def before_lookup(self, reads: Sequence[Read], *, training: bool = True) -> None:
        ((shard, rows),) = reads
        step = self.schedule.step
        stale = rows[shard.last_step[rows] < step]
        if not stale.numel():
            return
        steps = shard.last_step[stale]
        decay, _ = self.schedule.decay_and_scale(steps, step)
        kernels.settle_rows(
            shard.weight,
            stale,
            key=shard.noise_key,
            from_steps=steps,
            to_step=step,
            decay=decay,
            scale=self.scale(steps, step),
        )
        shard.last_step[stale] = step

    def settle(self, shard: TableShard, first_row: int = 0, last_row: int | None = None) -> None:
        self.before_lookup([(shard, torch.arange(shard.weight.shape[0]))])


class CurrentRate(_Scaled):
    """LazyDP's released code: the current learning rate for all waiting steps."""

    def scale(self, from_steps: Tensor, step: int) -> Tensor:
        waiting = (step - from_steps).double()
        return RATES[step - 1] * SIGMAS[step - 1] * CLIP / EXPECTED * waiting.sqrt()


class SquaredVariance(_Scaled):
    """Variance k² for k waiting steps: one draw multiplied by their number."""

    def scale(self, from_steps: Tensor, step: int) -> Tensor:
        _, scale = self.schedule.decay_and_scale(from_steps, step)
        return scale * (step - from_steps).double().sqrt()


class SettledAfterReading(LazyDP):
    """The noise comes when the row has been read."""

    def before_lookup(self, reads: Sequence[Read], *, training: bool = True) -> None:
        pass

    def after_lookup(self, shard: TableShard, rows: Tensor) -> None:
        super().before_lookup([(shard, rows)])


class _Drawn(LazyDP):
    """Right decay and deviation, wrong normals."""

    def normals(self, shard: TableShard, rows: Tensor) -> Tensor:
        raise NotImplementedError

    def before_lookup(self, reads: Sequence[Read], *, training: bool = True) -> None:
        ((shard, rows),) = reads
        step = self.schedule.step
        decay, scale = self.schedule.decay_and_scale(shard.last_step[rows], step)
        noise = scale.unsqueeze(1) * self.normals(shard, rows)
        shard.weight[rows] = (decay.unsqueeze(1) * shard.weight[rows] + noise).float()
        shard.last_step[rows] = step

    def settle(self, shard: TableShard, first_row: int = 0, last_row: int | None = None) -> None:
        self.before_lookup([(shard, torch.arange(3))])


class SharedNoise(_Drawn):
    """Row 1 draws row 2's noise."""

    def normals(self, shard: TableShard, rows: Tensor) -> Tensor:
        source = torch.where(rows == 1, 2, rows)
        step = self.schedule.step
        return kernels.normal(shard.noise_key, source, step - 1, step, num_columns=COLUMNS)


class SameNoiseAgain(_Drawn):
    """Noise keyed by the row alone, not by its steps."""

    def normals(self, shard: TableShard, rows: Tensor) -> Tensor:
        return kernels.normal(shard.noise_key, rows, 0, 1, num_columns=COLUMNS)


# Each fault, and a comparison that must see it.
FAULTS: dict[type[Mechanism], str] = {
    NoFlush: "variance of row 2",
    CurrentRate: "variance of row 2",
    SquaredVariance: "variance of row 2",
    SharedNoise: "correlation of row 1 and row 2",
    SettledAfterReading: "variance of row 0 before step 3",
    SameNoiseAgain: "correlation of row 0 before step 3 and row 0 before step 8",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(fault: type[Mechanism], eager: Samples) -> None:
    assert FAULTS[fault] in rejected(runs(fault, fault.__name__, RUNS // 4), eager)


def test_the_faults_are_no_wider_than_they_say(eager: Samples) -> None:
    """Sharing noise between rows leaves every single row's law as it is."""
    wrong = rejected(runs(SharedNoise, "shared", RUNS // 4), eager)
    assert not [name for name in wrong if name.startswith(("mean", "variance", "law"))]
