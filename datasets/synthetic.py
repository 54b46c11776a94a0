"""Criteo-shaped click logs of any size, drawn from a known model.

A record's click probability is known, so the AUC of that probability on the generated records is
the best that any model can be expected to reach on them. The model is

    logit = bias + sum_j a_j * v_j * (log(1 + x_j) - mu) / s        (integers x_j, missing as 0)
                 + sum_f c_f * damp(rank) * u(f, rank)             (one token a column)
                 + sum_pairs d * sign(f, rank_f) * sign(g, rank_g)

with ranks from a bounded power law, u a fixed pseudo-random standard normal of (seed, column,
rank), and damp(rank) = 1/sqrt(1 + rank/100): most of the signal sits in tokens that occur often
enough to be learnt. Everything is drawn in blocks keyed by (seed, block number), so a longer log
begins with the shorter one, and neither memory nor results depend on the length.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
from numpy.typing import NDArray

from dist_dp.datasets.auc import ScoreHistogram
from dist_dp.datasets.convert import DEFAULT_SPLIT, write_store
from dist_dp.datasets.encode import Columns
from dist_dp.datasets.manifest import FileIdentity, Manifest
from dist_dp.datasets.readers.base import Reader
from dist_dp.datasets.readers.criteo import PUBLISHED_CARDINALITIES
from dist_dp.datasets.schema import DataSchema, DenseFeature, SparseFeature
from dist_dp.errors import ConfigError, DataError

BLOCK_ROWS = 65_536
DEFAULT_CARDINALITIES = tuple(min(n, 100_000) for n in PUBLISHED_CARDINALITIES)

# Integers are drawn as floor(exp(mean + deviation * normal)), missing with this probability.
_LOG_MEAN, _LOG_DEVIATION, _DENSE_MISSING = 1.5, 1.2, 0.1
_TOKEN_MISSING = 0.03
_DAMP_RANK = 100.0


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
    """

    dense: NDArray[np.int64]
    ranks: NDArray[np.int64]
    labels: NDArray[np.int64]
    probability: NDArray[np.float64]


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
        return SyntheticChunk(dense, ranks, labels, probability)

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
        return self._column_scale[column] * normal / np.sqrt(1.0 + ranks / _DAMP_RANK)

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
    import pyarrow.compute as pc

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


def iter_chunks(settings: SyntheticSettings, num_records: int) -> Iterator[SyntheticChunk]:
    """Generates ``num_records`` records in chunks, in memory.

    Raises:
        ConfigError: ``num_records`` is not positive.
    """
    if num_records < 1:
        raise ConfigError(f"synthetic data: num_records is {num_records}; it must be positive")
    truth = Truth(settings)
    for number in range(-(-num_records // BLOCK_ROWS)):
        chunk = truth.block(number)
        left = num_records - number * BLOCK_ROWS
        if left < BLOCK_ROWS:
            chunk = SyntheticChunk(
                chunk.dense[:left],
                chunk.ranks[:left],
                chunk.labels[:left],
                chunk.probability[:left],
            )
        yield chunk


def criteo_like_schema(
    settings: SyntheticSettings, num_embeddings: int | None = None
) -> DataSchema:
    """Schema of a synthetic log: I1.. by log(1 + max(x, 0)), and hashed C1...

    Args:
        settings: Of the log.
        num_embeddings: Rows of every table; by default twice the column's cardinality, at
            least 64.
    """
    return DataSchema(
        label="label",
        dense=tuple(
            DenseFeature(name=f"I{j + 1}", transform="log1p", missing=0.0)
            for j in range(settings.num_dense)
        ),
        sparse=tuple(
            SparseFeature(name=f"C{f + 1}", num_embeddings=num_embeddings or max(64, 2 * n))
            for f, n in enumerate(settings.cardinalities)
        ),
    )


def _table(truth: Truth, chunk: SyntheticChunk) -> dict[str, Any]:
    """Source columns of a chunk, in the order of the Criteo layout."""
    columns = {"label": pa.array(chunk.labels)}
    for j in range(chunk.dense.shape[1]):
        values = chunk.dense[:, j]
        columns[f"I{j + 1}"] = pa.array(values, mask=values < 0)
    for f in range(chunk.ranks.shape[1]):
        columns[f"C{f + 1}"] = truth.tokens(f, chunk.ranks[:, f])
    return columns


def write_criteo_like(
    path: str | Path,
    num_records: int,
    *,
    seed: int,
    num_dense: int = 13,
    cardinalities: Sequence[int] = DEFAULT_CARDINALITIES,
    zipf_exponent: float = 1.05,
    **settings: Any,
) -> dict[str, Any]:
    """Writes a synthetic log as TSV (Criteo's layout with the default columns), and its truth.

    Args:
        path: File to write; ``PATH.truth.json`` is written beside it.
        num_records: Lines.
        seed: Seed of records and truth.
        num_dense: Integer columns.
        cardinalities: Possible tokens of each token column.
        zipf_exponent: Exponent of the power law of the tokens.
        **settings: Further fields of :class:`SyntheticSettings`.

    Returns:
        The content of the truth file: ``settings``, ``num_records``, ``bias``, ``click_rate``
        (of the labels drawn), and of the true probability on these records ``best_auc``,
        ``best_log_loss`` and ``best_normalized_entropy``.

    Raises:
        ConfigError: Impossible settings.
        DataError: The file cannot be written; nothing is left behind.
    """
    chosen = SyntheticSettings(
        seed=seed,
        num_dense=num_dense,
        cardinalities=tuple(cardinalities),
        zipf_exponent=zipf_exponent,
        **settings,
    )
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    options = pacsv.WriteOptions(include_header=False, delimiter="\t", quoting_style="none")
    truth = Truth(chosen)
    scores = ScoreHistogram()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as stream:
            for chunk in iter_chunks(chosen, num_records):
                pacsv.write_csv(pa.table(_table(truth, chunk)), stream, options)
                scores.add(chunk.probability, chunk.labels)
        summary = _summary(truth, scores, num_records)
        truth_path = path.with_name(path.name + ".truth.json")
        truth_path.write_text(json.dumps(summary, indent=2) + "\n")
        partial.rename(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        partial.unlink(missing_ok=True)
    return summary


def _summary(truth: Truth, scores: ScoreHistogram, num_records: int) -> dict[str, Any]:
    return {
        "settings": {**asdict(truth.settings), "cardinalities": [*truth.settings.cardinalities]},
        "num_records": num_records,
        "bias": truth.bias,
        "click_rate": scores.click_rate(),
        "best_auc": scores.auc(),
        "best_log_loss": scores.log_loss(),
        "best_normalized_entropy": scores.normalized_entropy(),
    }


class SyntheticReader(Reader):
    """Yields the same record batches as reading the TSV would, without writing it.

    Only the split may differ from that of the TSV: there it hashes lines, here stored values.

    Attributes:
        truth_summary: As :func:`write_criteo_like` returns it; complete once all is read.
    """

    format = "synthetic"

    def __init__(
        self,
        settings: SyntheticSettings,
        num_records: int,
        schema: DataSchema | None = None,
        split_seed: int = 0,
    ) -> None:
        """Prepares; nothing is generated yet."""
        schema = schema or criteo_like_schema(settings)
        super().__init__(Path("synthetic"), schema, [], split_seed=split_seed)
        self.settings = settings
        self.num_records = num_records
        self.truth_summary: dict[str, Any] = {}

    @property
    def total_bytes(self) -> int:
        """Records, for the progress bar."""
        return self.num_records

    def identity(self) -> tuple[FileIdentity, ...]:
        """Hash of the settings in place of a file."""
        import hashlib

        text = json.dumps([asdict(self.settings), self.num_records], sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        return (
            FileIdentity(
                name="synthetic", size=self.num_records, mtime_ns=0, sampled_sha256=digest
            ),
        )

    def batches(self) -> Iterator[Any]:
        """Yields record batches of the stored form."""
        truth = Truth(self.settings)
        scores = ScoreHistogram()
        for chunk in iter_chunks(self.settings, self.num_records):
            first = self.bytes_read
            yield self._encode(
                Columns(_table(truth, chunk), len(chunk.labels)),
                lambda row, first=first: f"synthetic record {first + row}",  # type: ignore[misc]
            )
            self.bytes_read += len(chunk.labels)
            scores.add(chunk.probability, chunk.labels)
        self.truth_summary = _summary(truth, scores, self.num_records)


def write_synthetic_store(
    destination: str | Path,
    num_records: int,
    *,
    settings: SyntheticSettings | None = None,
    schema: DataSchema | None = None,
    split: Mapping[str, float] | None = DEFAULT_SPLIT,
    split_seed: int = 0,
    progress: bool = False,
    overwrite: bool = False,
) -> Manifest:
    """Generates records straight into a store (see :func:`dist_dp.datasets.store.convert`).

    ``truth.json`` in the store's folder holds what :func:`write_criteo_like` returns.
    """
    reader = SyntheticReader(settings or SyntheticSettings(), num_records, schema, split_seed)
    manifest = write_store(reader, destination, split=split, progress=progress, overwrite=overwrite)
    if reader.truth_summary:
        text = json.dumps(reader.truth_summary, indent=2) + "\n"
        (Path(destination) / "truth.json").write_text(text)
    return manifest
