"""The planted model of synthetic click logs: how features, tokens and clicks are drawn.

The logit of a click is

    logit = bias + sum_j a_j * (log(1 + x_j) - mu) / s          (integers x_j, missing as 0)
                 + sum_f c_f * damp(rank_f) * u(f, rank_f)      (one token a column)
                 + sum_(f, g) d * sign(f, rank_f) * sign(g, rank_g)

with ranks from a bounded power law, u a fixed pseudo-random number of (seed, column, rank) with
mean 0 and variance 1, and damp(rank) = 1 / sqrt(1 + rank / 100): most of the signal sits in the
integers and in tokens that occur often enough to be learnt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dist_dp.datasets.readers.criteo import PUBLISHED_CARDINALITIES
from dist_dp.errors import ConfigError

BLOCK_ROWS = 65_536
DEFAULT_CARDINALITIES = tuple(min(n, 100_000) for n in PUBLISHED_CARDINALITIES)

# Integers are drawn as floor(exp(mean + deviation * normal)), missing with this probability.
_LOG_MEAN, _LOG_DEVIATION, _DENSE_MISSING = 1.5, 1.2, 0.1
_TOKEN_MISSING = 0.03
_DAMP_RANK = 100.0
_USER_EXPONENT = 0.7


@dataclass(frozen=True)
class SyntheticSettings:
    """Everything a synthetic log depends on, except its length.

    Attributes:
        seed: Seed of records and truth, in [0, 2**64).
        num_dense: Integer columns.
        cardinalities: Possible tokens of each token column.
        zipf_exponent: Exponent s of the power law: rank k has probability close to k**-s.
        click_rate: Mean click probability.
        dense_signal: Standard deviation of the logit due to the integers.
        sparse_signal: The same for the tokens alone, before damping.
        interaction_signal: The same for pairs of token columns.
        num_interactions: Number of pairs; the columns with fewest tokens are paired.
        num_users: Users whose the records are, 0 for none. The number of records of a user is
            heavy-tailed; it tells nothing about clicks.
    """

    seed: int = 0
    num_dense: int = 13
    cardinalities: tuple[int, ...] = DEFAULT_CARDINALITIES
    zipf_exponent: float = 1.05
    click_rate: float = 0.25
    dense_signal: float = 1.2
    sparse_signal: float = 1.0
    interaction_signal: float = 0.25
    num_interactions: int = 4
    num_users: int = 0

    def __post_init__(self) -> None:
        """Checks ranges.

        Raises:
            ConfigError: A setting is impossible.
        """
        rules = {
            "seed must lie in [0, 2**64)": 0 <= self.seed < 2**64,
            "num_dense must not be negative": self.num_dense >= 0,
            "cardinalities must name at least one column, each in [1, 2**31)": bool(
                self.cardinalities
            )
            and all(1 <= n < 2**31 for n in self.cardinalities),
            "zipf_exponent must be positive": self.zipf_exponent > 0,
            "click_rate must lie in (0, 1)": 0 < self.click_rate < 1,
            "num_interactions must not be negative": self.num_interactions >= 0,
            "num_users must lie in [0, 2**31)": 0 <= self.num_users < 2**31,
        }
        for rule, kept in rules.items():
            if not kept:
                raise ConfigError(f"synthetic data: {rule}")


@dataclass(frozen=True)
class SyntheticChunk:
    """Up to BLOCK_ROWS generated records.

    Attributes:
        dense: int64 [n, num_dense], -1 where missing.
        ranks: int64 [n, columns], the rank of each token from 1, or 0 where missing.
        labels: int64 [n], 0 or 1.
        probability: float64 [n], the true click probability.
        users: int64 [n], the user of each record, from 1; None without users.
    """

    dense: NDArray[np.int64]
    ranks: NDArray[np.int64]
    labels: NDArray[np.int64]
    probability: NDArray[np.float64]
    users: NDArray[np.int64] | None = None


class Truth:
    """The planted model: token texts, effects and click probabilities."""

    def __init__(self, settings: SyntheticSettings) -> None:
        """Draws the coefficients and solves for the bias."""
        self.settings = settings
        generator = _generator(settings.seed, 2**63)
        direction = generator.standard_normal(settings.num_dense)
        norm = float(np.linalg.norm(direction)) or 1.0
        self._dense_weights = settings.dense_signal * direction / norm
        columns = len(settings.cardinalities)
        share = generator.uniform(0.5, 1.5, columns)
        self._column_scale = settings.sparse_signal * share / np.linalg.norm(share)
        order = np.argsort(settings.cardinalities, kind="stable")
        usable = [int(c) for c in order if settings.cardinalities[c] > 1]
        self.pairs = [
            (usable[2 * i], usable[2 * i + 1])
            for i in range(min(settings.num_interactions, len(usable) // 2))
        ]
        self.bias = 0.0
        dense, ranks = self._features(_generator(settings.seed, 2**63 + 1))
        logit = self.logit(dense, ranks)
        low, high = -50.0, 50.0
        for _ in range(60):
            middle = (low + high) / 2
            rate = float(_sigmoid(logit + middle).mean())
            low, high = (middle, high) if rate < settings.click_rate else (low, middle)
        self.bias = (low + high) / 2

    def _features(
        self, generator: np.random.Generator
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """One block of features, always of BLOCK_ROWS rows."""
        settings = self.settings
        normal = generator.standard_normal((BLOCK_ROWS, settings.num_dense))
        dense = np.exp(_LOG_MEAN + _LOG_DEVIATION * normal).astype(np.int64)
        dense[generator.random((BLOCK_ROWS, settings.num_dense)) < _DENSE_MISSING] = -1
        ranks = np.empty((len(settings.cardinalities), BLOCK_ROWS), dtype=np.int64)
        for column, cardinality in enumerate(settings.cardinalities):
            uniform = generator.random(BLOCK_ROWS)
            ranks[column] = _power_law(uniform, cardinality, settings.zipf_exponent)
            ranks[column, generator.random(BLOCK_ROWS) < _TOKEN_MISSING] = 0
        return dense, ranks.T

    def block(self, number: int) -> SyntheticChunk:
        """Block ``number`` of the log, with BLOCK_ROWS records."""
        generator = _generator(self.settings.seed, number)
        dense, ranks = self._features(generator)
        probability = _sigmoid(self.logit(dense, ranks))
        labels = (generator.random(BLOCK_ROWS) < probability).astype(np.int64)
        return SyntheticChunk(dense, ranks, labels, probability, self._users(number))

    def _users(self, number: int) -> NDArray[np.int64] | None:
        """The users of a block: the k-th has a share close to k**-0.7, drawn beside all else."""
        if self.settings.num_users == 0:
            return None
        uniform = _generator(self.settings.seed, 2**62 + number).random(BLOCK_ROWS)
        return _power_law(uniform, self.settings.num_users, _USER_EXPONENT)

    def logit(self, dense: NDArray[np.int64], ranks: NDArray[np.int64]) -> NDArray[np.float64]:
        """True logit of records, float64 [n]."""
        scaled = (np.log1p(np.maximum(dense, 0)) - _LOG_MEAN) / _LOG_DEVIATION
        result: NDArray[np.float64] = self.bias + scaled @ self._dense_weights
        for column in range(ranks.shape[1]):
            result += self._token_effect(column, ranks[:, column])
        if self.pairs:
            size = self.settings.interaction_signal / np.sqrt(len(self.pairs))
            for left, right in self.pairs:
                signs = self._hash(left, ranks[:, left]) ^ self._hash(right, ranks[:, right])
                result += size * (1.0 - 2.0 * (signs >> np.uint64(63)).astype(np.float64))
        return result

    def _hash(self, column: int, ranks: NDArray[np.int64]) -> NDArray[np.uint64]:
        start = _mix64(np.array([self.settings.seed ^ (column + 1) << 40], dtype=np.uint64))
        return _mix64(ranks.astype(np.uint64) + start)

    def _token_effect(self, column: int, ranks: NDArray[np.int64]) -> NDArray[np.float64]:
        bits = self._hash(column, ranks)
        # Sum of four 14-bit uniforms, standardised: close enough to a normal for an effect.
        total = np.zeros(len(bits))
        for shift in (0, 14, 28, 42):
            total += ((bits >> np.uint64(shift)) & np.uint64(0x3FFF)).astype(np.float64)
        normal = (total / 2**14 - 2.0) * np.sqrt(3.0)
        return np.asarray(self._column_scale[column] * normal / np.sqrt(1.0 + ranks / _DAMP_RANK))

    def tokens(self, column: int, ranks: NDArray[np.int64]) -> Any:
        """Texts of tokens: 8 hexadecimal digits, distinct by rank; null for a missing one."""
        key = np.uint32(_mix64(np.array([self.settings.seed + column], dtype=np.uint64))[0] >> 32)
        value = ranks.astype(np.uint32) ^ key
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):  # a bijection
            value = (value ^ (value >> np.uint32(shift))) * np.uint32(factor)
        text = _HEX[value.astype(">u4").view(np.uint8)]
        offsets = np.arange(0, 8 * len(ranks) + 1, 8, dtype=np.int32)
        array = pa.StringArray.from_buffers(
            len(ranks), pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(text))
        )
        return _with_nulls(array, ranks == 0)


_HEX = np.array([f"{i:02x}".encode() for i in range(256)]).view(np.uint8).reshape(256, 2)


def _with_nulls(array: Any, missing: NDArray[np.bool_]) -> Any:
    return pc.if_else(pa.array(missing), pa.scalar(None, array.type), array)


def _generator(seed: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array([seed, stream], dtype=np.uint64)))


def _sigmoid(logit: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(1.0 / (1.0 + np.exp(-logit)))


def _mix64(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijective finaliser of 64-bit integers (multiply and xor-shift)."""
    for shift, factor in ((33, 0xFF51AFD7ED558CCD), (33, 0xC4CEB9FE1A85EC53)):
        value = (value ^ (value >> np.uint64(shift))) * np.uint64(factor)
    return value ^ (value >> np.uint64(33))


def _power_law(
    uniform: NDArray[np.float64], cardinality: int, exponent: float
) -> NDArray[np.int64]:
    """Ranks in [1, cardinality] by inversion of the continuous density x**-exponent.

    P(rank = k) is the integral of the density from k to k + 1: Zipf's law in the tail, slightly
    flatter at the first ranks, at a cost that does not depend on the cardinality.
    """
    end = cardinality + 1.0
    if abs(exponent - 1) < 1e-9:
        value = end**uniform
    else:
        power = 1.0 - exponent
        value = (1.0 + uniform * (end**power - 1.0)) ** (1.0 / power)
    return np.clip(value.astype(np.int64), 1, cardinality)
