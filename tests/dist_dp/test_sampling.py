"""Poisson sampling: sizes, frequencies, independence, and the split over ranks.

The secret is fixed; each check states the level at which it would reject a correct sampler.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from dist_dp.errors import ConfigError
from dist_dp.sampling import PoissonSampler

SECRET = bytes(range(32))
LEVEL = 1e-4


def drawn(sampler: PoissonSampler, steps: int) -> np.ndarray:
    """Which record was drawn at which step: bool [steps, records]."""
    hits = np.zeros((steps, sampler.num_records), bool)
    for step in range(steps):
        hits[step, sampler.sample(step + 1)] = True
    return hits


def check_poisson(hits: np.ndarray, q: float) -> None:
    """Reject at level 1e-4 together: size mean and variance, frequencies, independence."""
    steps, records = hits.shape
    sizes = hits.sum(1)
    p_values = {}
    mean, variance = records * q, records * q * (1 - q)
    p_values["mean"] = 2 * stats.norm.sf(abs(sizes.mean() - mean) / math.sqrt(variance / steps))
    spread = float(((sizes - mean) ** 2).sum() / variance)
    p_values["variance"] = 2 * min(stats.chi2.cdf(spread, steps), stats.chi2.sf(spread, steps))
    counts = hits.sum(0)
    chi = float(((counts - steps * q) ** 2).sum() / (steps * q * (1 - q)))
    p_values["frequency"] = 2 * min(stats.chi2.cdf(chi, records), stats.chi2.sf(chi, records))
    centred = hits - q
    pairs = {
        "neighbours": (centred[:, 1:], centred[:, :-1]),
        "second neighbours": (centred[:, 2:], centred[:, :-2]),
        "steps": (centred[1:], centred[:-1]),
    }
    for name, (a, b) in pairs.items():
        score = float((a * b).sum()) / (q * (1 - q) * math.sqrt(a.size))
        p_values[name] = 2 * stats.norm.sf(abs(score))
    assert min(p_values.values()) > LEVEL / len(p_values), p_values


@pytest.mark.parametrize("q", [0.02, 0.3, 0.9])
def test_samples_are_poisson(q: float) -> None:
    check_poisson(drawn(PoissonSampler(SECRET, 1000, q), 2000), q)


def test_planted_faults_are_rejected() -> None:
    random = np.random.default_rng(7)
    q, steps, records = 0.1, 2000, 1000
    fixed_size = np.zeros((steps, records), bool)
    shuffled = np.zeros((steps, records), bool)
    replacement = np.zeros((steps, records), bool)
    for step in range(steps):
        fixed_size[step, random.choice(records, 100, replace=False)] = True
        if step % 10 == 0:
            order = random.permutation(records)
        shuffled[step, order[step % 10 * 100 :][:100]] = True
        replacement[step, random.integers(0, records, 100)] = True
    blocks = np.repeat(random.random((steps, records // 2)) < q, 2, axis=1)
    rate = random.random((steps, records)) < q * 1.02
    for hits in (fixed_size, shuffled, replacement, blocks, rate):
        with pytest.raises(AssertionError):
            check_poisson(hits, q)


def test_gaps_are_geometric() -> None:
    """Chi-square of the first gap and of a later one, at level 1e-4 each."""
    q = 0.2
    sampler = PoissonSampler(SECRET, 200, q)
    samples = [sampler.sample(step) for step in range(4000)]
    for gaps in (
        np.array([s[0] for s in samples]),
        np.array([s[3] - s[2] - 1 for s in samples]),
    ):
        counts = np.bincount(np.minimum(gaps, 15), minlength=16)
        expected = q * (1 - q) ** np.arange(16)
        expected[15] = (1 - q) ** 15
        assert stats.chisquare(counts, expected * len(gaps)).pvalue > LEVEL


def test_tiny_rate_over_many_records() -> None:
    """Size is Poisson(2) for 2e9 records at 1e-9: chi-square at level 1e-4."""
    sampler = PoissonSampler(SECRET, 2_000_000_000, 1e-9)
    samples = [sampler.sample(step) for step in range(1500)]
    sizes = np.array([len(s) for s in samples])
    assert sizes.min() == 0
    counts = np.bincount(np.minimum(sizes, 7), minlength=8)
    expected = stats.poisson.pmf(np.arange(8), 2.0)
    expected[7] = stats.poisson.sf(6, 2.0)
    assert stats.chisquare(counts, expected * len(sizes)).pvalue > LEVEL
    where = np.concatenate(samples) / 2e9
    assert stats.kstest(where, "uniform").pvalue > LEVEL


def test_rate_near_one() -> None:
    """The records left out are Poisson too: counts and places, at level 1e-4 each."""
    sampler = PoissonSampler(SECRET, 100_000, 1 - 1e-4)
    left_out = [np.setdiff1d(np.arange(100_000), sampler.sample(step)) for step in range(60)]
    total = sum(len(x) for x in left_out)
    assert 2 * min(stats.poisson.cdf(total, 600), stats.poisson.sf(total - 1, 600)) > LEVEL
    assert stats.kstest(np.concatenate(left_out) / 1e5, "uniform").pvalue > LEVEL


def test_all_records() -> None:
    assert np.array_equal(PoissonSampler(SECRET, 5, 1.0).sample(1), np.arange(5))


def test_sorted_unique_and_reproducible() -> None:
    sampler = PoissonSampler(SECRET, 5000, 0.1)
    sample = sampler.sample(9)
    assert sample.dtype == np.int64
    assert (np.diff(sample) > 0).all() and sample[0] >= 0 and sample[-1] < 5000
    assert np.array_equal(sample, PoissonSampler(SECRET, 5000, 0.1).sample(9))
    assert not np.array_equal(sample, sampler.sample(10))
    assert not np.array_equal(sample, PoissonSampler(bytes(32), 5000, 0.1).sample(9))
    assert sampler.expected_batch_size == 500.0


def test_one_record_more_leaves_the_others() -> None:
    short = PoissonSampler(SECRET, 4999, 0.1)
    longer = PoissonSampler(SECRET, 5000, 0.1)
    for step in range(50):
        sample = longer.sample(step)
        assert np.array_equal(short.sample(step), sample[sample < 4999])


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 50])
def test_ranks_share_one_sample(world_size: int) -> None:
    sampler = PoissonSampler(SECRET, 31, 0.2)
    for step in range(30):
        parts = [sampler.local(step, rank, world_size) for rank in range(world_size)]
        assert np.array_equal(np.concatenate([p for p, _ in parts]), sampler.sample(step))
        assert {size for _, size in parts} == {max(1, *(len(p) for p, _ in parts))}
        for rank, (part, _) in enumerate(parts):
            owned = range(31 * rank // world_size, 31 * (rank + 1) // world_size)
            assert all(int(i) in owned for i in part)


def test_empty_sample() -> None:
    part, padded_size = PoissonSampler(SECRET, 10, 1e-12).local(1, 0, 2)
    assert len(part) == 0 and padded_size == 1


def test_a_second_block_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = PoissonSampler(SECRET, 3000, 0.2)
    whole = sampler.sample(1)
    monkeypatch.setattr("dist_dp.sampling.math.ceil", lambda _: 1)
    assert np.array_equal(sampler.sample(1), whole)


def test_refusals() -> None:
    for records, q, name in (
        (0, 0.1, "num_records"),
        (10, 0.0, "sample_rate"),
        (10, 1.5, "sample_rate"),
        (10, math.nan, "sample_rate"),
    ):
        with pytest.raises(ConfigError, match=name):
            PoissonSampler(SECRET, records, q)
    with pytest.raises(ValueError, match="secret"):
        PoissonSampler(b"", 10, 0.1)
    with pytest.raises(ValueError, match="rank"):
        PoissonSampler(SECRET, 10, 0.1).local(1, 2, 2)
