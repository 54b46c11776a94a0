"""Sampling of users with their records: Poisson over users, uniform windows, one rank a user.

The secret is fixed; each check states the level at which it would reject a correct sampler.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils.data import DataLoader

from dist_dp.errors import ConfigError
from dist_dp.sampling import PoissonSampler, SamplePart
from dist_dp.user_records import UserRecords, users_of
from dist_dp.user_sampling import UserSampler
from tests.dist_dp.test_loader import Numbers
from tests.dist_dp.test_sampling import LEVEL, SECRET, check_poisson

Q, MOST = 0.3, 4
# Users of 1 to 12 records, in an order that scatters each user's over the whole data set.
COUNTS = np.tile(np.arange(1, 13), 25)
KEYS = np.random.default_rng(1).permutation(np.repeat(np.arange(300) * 7919 % 300, COUNTS))


def sampler(most: int = MOST, q: float = Q) -> UserSampler:
    return UserSampler(SECRET, UserRecords(KEYS), q, most)


def owners(part: SamplePart) -> np.ndarray:
    """The user of each record of a part, as the part says."""
    assert part.user_sizes is not None and part.user_sizes.sum() == len(part.records)
    return np.repeat(np.arange(len(part.user_sizes)), part.user_sizes)


def test_users_are_poisson() -> None:
    """As records are: mean, variance, frequencies and independence, at level 1e-4 together."""
    made = sampler()
    hits = np.zeros((2000, 300), bool)
    for step in range(2000):
        (part,) = made.parts(step, 0, 1)
        hits[step, KEYS[part.records]] = True
    check_poisson(hits, Q)


def test_a_user_that_is_drawn_brings_all_its_records_up_to_the_bound() -> None:
    made = sampler()
    for step in range(50):
        (part,) = made.parts(step, 0, 1)
        keys = KEYS[part.records]
        assert len(set(part.records.tolist())) == len(part.records)
        for user in range(len(part.user_sizes)):
            (key,) = set(keys[owners(part) == user].tolist())
            there = int((key == KEYS).sum())
            assert part.user_sizes[user] == min(there, MOST)
        users = keys[np.unique(owners(part), return_index=True)[1]]
        assert len(set(users.tolist())) == len(users)
        assert part.padded_size == len(part.records)


def test_windows_are_uniform() -> None:
    """A user of 12 records gives each window as often: chi-square at level 1e-4 together."""
    made = UserSampler(SECRET, UserRecords(np.zeros(12, int)), 1.0, MOST)
    starts = np.zeros((2, 12))
    records = np.zeros(12)
    before = 0
    pairs = np.zeros((12, 12))
    for step in range(1, 6001):
        (part,) = made.parts(step, 0, 1)
        start = int(part.records[0])
        assert part.records.tolist() == [(start + i) % 12 for i in range(MOST)]
        starts[step % 2, start] += 1
        records[part.records] += 1
        pairs[before, start] += 1
        before = start
    assert records.sum() == 6000 * MOST
    for observed in (*starts, pairs.ravel()):
        assert stats.chisquare(observed).pvalue > LEVEL / 3


def test_windows_of_two_users_are_independent() -> None:
    """Chi-square of the joint start of two users at 5000 steps, at level 1e-4."""
    made = UserSampler(SECRET, UserRecords(np.repeat([0, 1], [6, 8])), 1.0, 2)
    joint = np.zeros((6, 8))
    for step in range(5000):
        (part,) = made.parts(step, 0, 1)
        joint[part.records[0], part.records[2] - 6] += 1
    assert stats.chisquare(joint.ravel()).pvalue > LEVEL


def test_planted_windows_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first records always; and a place that never wraps around."""
    wrong: list[Any] = [lambda *_: np.zeros(1), lambda *_: np.random.default_rng().random(1) * 0.7]
    for uniforms in wrong:
        monkeypatch.setattr("dist_dp.user_sampling.uniforms", uniforms)
        with pytest.raises(AssertionError):
            test_windows_are_uniform()


@pytest.mark.parametrize("most", [None, 4, 7, 50])
@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_ranks_share_one_sample(world: int, most: int | None) -> None:
    """Every user on one rank, in one part; as many parts of the same sizes on every rank."""
    made = sampler()
    (whole,) = made.parts(5, 0, 1)
    ranks = [made.parts(5, rank, world, most) for rank in range(world)]
    assert len({tuple(p.padded_size for p in parts) for parts in ranks}) == 1
    assert [p for parts in ranks for p in parts for p in p.records.tolist()] == (
        whole.records.tolist()
    )
    sizes = np.concatenate([p.user_sizes for parts in ranks for p in parts])
    assert sizes.tolist() == whole.user_sizes.tolist()
    seen: set[int] = set()
    for parts in ranks:
        for part in parts:
            users = set(KEYS[part.records].tolist())
            assert not users & seen
            seen |= users
            assert len(part.records) <= part.padded_size
            assert most is None or part.padded_size <= most
    for number in range(len(ranks[0])):
        fullest = max(len(parts[number].records) for parts in ranks)
        assert ranks[0][number].padded_size == max(1, fullest)


def test_an_empty_sample_is_one_part_of_padding() -> None:
    made = sampler(q=1e-9)
    for most in (None, 4):
        (part,) = made.parts(1, 1, 2, most)
        assert len(part.records) == 0 and part.padded_size == 1
        assert part.user_sizes is not None and len(part.user_sizes) == 0


def test_reproducible_by_secret_and_step() -> None:
    def records(secret: bytes, step: int) -> list[int]:
        made = UserSampler(secret, UserRecords(KEYS), Q, MOST)
        return made.parts(step, 0, 1)[0].records.tolist()  # type: ignore[no-any-return]

    assert records(SECRET, 9) == records(SECRET, 9)
    assert records(SECRET, 9) != records(SECRET, 10)
    assert records(SECRET, 9) != records(bytes(32), 9)


def test_one_user_more_leaves_the_others() -> None:
    longer = UserSampler(SECRET, UserRecords(np.append(KEYS, [1000] * 20)), Q, MOST)
    for step in range(30):
        (part,) = sampler().parts(step, 0, 1)
        (more,) = longer.parts(step, 0, 1)
        kept = more.records[more.records < len(KEYS)]
        assert kept.tolist() == part.records.tolist()


def test_records_have_parts_too() -> None:
    made = PoissonSampler(SECRET, 100, 0.4)
    parts = made.parts(3, 0, 1, 7)
    assert np.concatenate([p.records for p in parts]).tolist() == made.sample(3).tolist()
    assert max(p.padded_size for p in parts) <= 7 and all(p.user_sizes is None for p in parts)


@pytest.mark.parametrize(
    "keys",
    [
        np.array([3, -7, 3, 2**62, -7]),
        torch.tensor([3, 0, 3, 2**62, 0]),
        np.array([3, 0, 3, 2**64 - 1, 0], dtype=np.uint64),
    ],
)
def test_keys_of_any_kind(keys: Any) -> None:
    users = UserRecords(keys)
    assert (users.num_users, users.num_records) == (3, 5)
    every = np.arange(3)
    counts = users.counts(every)
    windows = np.split(users.windows(every, np.zeros(3, int), counts), np.cumsum(counts)[:-1])
    assert sorted(w.tolist() for w in windows) == [[0, 2], [1, 4], [3]]
    assert users.mean_records(1) == 1.0 and users.mean_records(5) == pytest.approx(5 / 3)


def test_refusals() -> None:
    for keys in (np.zeros((2, 2), int), np.zeros(3), np.zeros(0, int)):
        with pytest.raises(ConfigError, match=r"users: .*one integer for each"):
            UserRecords(keys)
    data = DataLoader(Numbers(50), batch_size=10)
    with pytest.raises(ConfigError, match=r"DataLoader does not say whose.*users="):
        users_of(data)
    with pytest.raises(ConfigError, match="3 numbers given for 50 records"):
        users_of(data, [1, 2, 3])
    assert users_of(data, np.arange(50) // 5).num_users == 10
    with pytest.raises(ConfigError, match="max_records_per_user: 0"):
        sampler(most=0)
    with pytest.raises(ConfigError, match="micro_batch_size 3 is below max_records_per_user 4"):
        sampler().parts(1, 0, 1, 3)
    with pytest.raises(ValueError, match="rank"):
        sampler().parts(1, 2, 2)
