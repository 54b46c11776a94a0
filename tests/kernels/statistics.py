"""Statistical checks of a noise generator, shared by the tests of the real one and of faulty ones.

A check gives p-values: for each thing it looks at, the probability that a correct generator with
a fresh key strays at least as far. `rejected` keeps those below the check's share of `LEVEL`. The
keys are fixed, so the same generator always gets the same verdict.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from dist_dp.kernels import chacha, reference
from tests.kernels.exact import WORST_NORMAL, Float64Array, exact_normals, ulps
from tests.kernels.sample import FAR, SECRET, SIDE, Place, Sample, Sums, flipped

LEVEL = 1e-6
"""The probability that all checks together reject a correct generator with a fresh key."""

PValues = dict[str, float]
Float32Array = NDArray[np.float32]


def two_sided(score: float) -> float:
    """Of a standard normal."""
    return float(2 * stats.norm.sf(abs(score)))


def two_tailed(below: float, above: float) -> float:
    """From the probabilities of a value at most, and at least, as large."""
    return min(1.0, 2 * float(min(below, above)))


def chi_square(scores: Float64Array | torch.Tensor, lost: int = 0) -> float:
    """Of standard normals, `lost` of them determined by the others."""
    value, freedom = float((scores**2).sum()), len(scores) - lost
    return two_tailed(stats.chi2.cdf(value, freedom), stats.chi2.sf(value, freedom))


def fit(counts: NDArray[np.int64], expected: Float64Array) -> float:
    """Pearson's test of counts whose total is known."""
    return chi_square((counts - expected) / np.sqrt(expected), lost=1)


def moment(order: int) -> float:
    """Of a standard normal."""
    return float(math.prod(range(1, order, 2))) if order % 2 == 0 else 0.0


def moments(sample: Sample) -> PValues:
    """The first six of all draws, the first four of each place, two of each row and column."""
    sums = sample.sums
    found = {}
    for order in range(1, 7):
        variance = moment(2 * order) - moment(order) ** 2
        error = float(sums.powers[order - 1].sum()) - moment(order) * sums.draws
        found[f"moment {order}"] = two_sided(error / math.sqrt(variance * sums.draws))
        if order <= 4:
            each = sums.draws // len(sample.places)
            scores = (sums.powers[order - 1] - moment(order) * each) / math.sqrt(variance * each)
            found[f"moment {order} of the places"] = chi_square(scores)
    for axis in ("rows", "columns"):
        # (z^2 - 1)^2 has mean 2 and variance 60 - 4
        for power, mean, variance in ((1, 1.0, 2.0), (2, 2.0, 56.0)):
            squares = sums.products[axis, power].diagonal()
            each = sums.draws // len(squares)
            scores = (squares - mean * each) / math.sqrt(variance * each)
            found[f"squares of the {axis}, power {power}"] = chi_square(scores)
    return found


def distribution(sample: Sample) -> PValues:
    """Kolmogorov and Smirnov's distance, Pearson's over 4096 cells, and both signs' tails.

    The distance is taken at the ends of bins with less than 10^-4 of the draws each. There the
    counts are exact; the largest anywhere can only be larger, so the level holds.
    """
    sums = sample.sums
    half = len(sums.bins) // 2
    below, above = sums.bins[half:], sums.bins[:half]
    largest = int(np.float32(16.0).view(np.uint32)) >> Sums.SHIFT
    found = {
        "all below 16 and finite": float(not below[largest:].any() and not above[largest:].any())
    }
    edges = (np.arange(largest + 1, dtype=np.uint32) << Sums.SHIFT).view(np.float32)
    survival = stats.norm.sf(edges.astype(np.float64))
    counts = np.concatenate([below[:largest][::-1], above[:largest]])
    upper_ends = np.concatenate([survival[:-1][::-1], 1.0 - survival[1:]])
    distance = float(np.abs(np.cumsum(counts) / sums.draws - upper_ends).max())
    found["Kolmogorov and Smirnov"] = float(stats.kstwobign.sf(distance * math.sqrt(sums.draws)))
    masses = survival[:-1] - survival[1:]
    masses = np.concatenate([masses[::-1], masses])
    cells = np.minimum((upper_ends * 4096).astype(np.int64), 4095)
    in_cell = np.bincount(cells, counts)
    found["Pearson"] = fit(in_cell.astype(np.int64), np.bincount(cells, masses) * sums.draws)
    for bound in (3.0, 3.5, 4.0, 4.5, 5.0, 5.5):
        first = int(np.float32(bound).view(np.uint32)) >> Sums.SHIFT
        expected = sums.draws * float(stats.norm.sf(bound))
        for sign, side in (("-", below), ("+", above)):
            count = int(side[first:].sum())
            found[f"beyond {sign}{bound}"] = two_tailed(
                stats.poisson.cdf(count, expected), stats.poisson.sf(count - 1, expected)
            )
    return found


def far_tail(sample: Sample) -> PValues:
    """Pairs with u < 2^-12: their number, -log u exponential, and u no multiple of a small step.

    Uniforms of 24 or 32 bits end at |z| = 5.77 or 6.66; the few draws beyond would not show it,
    but far from that end already, u 2^24 or u 2^32 are whole numbers (or all odd halves).
    """
    energy = sample.sums.tail
    expected = sample.sums.draws / 2 * 2.0**-12
    found = {
        "number": two_sided((len(energy) - expected) / math.sqrt(expected)),
        "exponential": float(stats.kstest(energy - FAR, "expon").pvalue),
    }
    for bits in (24, 28, 31, 32):
        # float32 normals give u to about 10^-6 of itself: enough for a fraction behind 16 bits
        part = energy[energy > (bits - 16) * math.log(2.0)]
        fraction = np.exp(bits * math.log(2.0) - part) % 1.0
        found[f"fraction of 2^{bits} u"] = float(stats.kstest(fraction, "uniform").pvalue)
    return found


def pairs(sample: Sample) -> PValues:
    """Direction and length of Box and Muller's pairs: even, and independent of each other."""
    cells = sample.sums.cells
    expected = np.full(len(cells), cells.sum() / len(cells))
    by_sector = cells.reshape(Sums.SECTORS, Sums.RINGS)
    return {
        "together": fit(cells, expected),
        "direction": fit(by_sector.sum(1), expected[: Sums.SECTORS] * Sums.RINGS),
        "length": fit(by_sector.sum(0), expected[: Sums.RINGS] * Sums.SECTORS),
    }


def correlations(sample: Sample) -> PValues:
    """Of normals and of their squares: all pairs of places, of 128 rows, of 128 columns."""
    found = {}
    for (axis, power), matrix in sample.sums.products.items():
        size = len(matrix)
        first, second = np.triu_indices(size, 1)
        # a product has variance 1, one of squares less 1 has 4
        deviation = power * math.sqrt(sample.sums.draws / size)
        scores = matrix.numpy()[first, second] / deviation
        worst = int(np.abs(scores).argmax())
        names = list(sample.places) if axis == "places" else list(map(str, range(size)))
        label = f"{axis}, power {power}"
        pair = f"{names[first[worst]]} and {names[second[worst]]}"
        found[f"{label}: {pair}"] = min(1.0, two_sided(scores[worst]) * len(scores))
        found[f"{label}: all"] = chi_square(scores)
    return found


def blocks(sample: Sample) -> PValues:
    """No four neighbouring normals occur twice, whichever single bit of a coordinate differs.

    Four are two pairs of words, so by chance this happens once in 10^20.
    """
    generator = sample.generator
    base = Place(generator.derive_key(SECRET, "noise", "table"))
    found = dict(sample.places)
    for bit in range(256):
        key = generator.derive_key(flipped(SECRET, bit), "noise", "table")
        found[f"secret with bit {bit} flipped"] = replace(base, key=key)
        found[f"key with bit {bit} flipped"] = replace(base, key=flipped(base.key, bit))
    found |= {f"row {1 << bit}": replace(base, first_row=1 << bit) for bit in range(48)}
    steps = [*combinations(range(24), 2), *((0, 1 << bit) for bit in range(31))]
    steps += [(1 << bit, 2**31 - 1) for bit in range(31)]
    found |= {f"steps {s} to {t}": replace(base, from_step=s, to_step=t) for s, t in steps}
    # the base is drawn with all the columns there can be
    others = [
        place for name, place in found.items()
        if name != "steps 3 to 7" and not name.startswith("column")
    ]  # fmt: skip
    drawn = [place.draw(generator, 0, 1, SIDE).ravel() for place in others]
    drawn.append(base.draw(generator, 0, 1, 16 * 2**13).ravel())
    together = torch.cat(drawn).numpy().view(np.uint64).reshape(-1, 2)
    distinct = len(np.unique(together.view([("", np.uint64)] * 2)))
    return {f"{distinct} of {len(together)} distinct": float(distinct == len(together))}


def key_bits(sample: Sample) -> PValues:
    """Derived keys: every bit even and no two alike, and one bit of the secret changes half."""
    derive = sample.generator.derive_key
    names = 4096
    keys = [derive(SECRET, "noise", f"table {i}") for i in range(names)]
    signs = np.unpackbits(np.frombuffer(b"".join(keys), np.uint8)).reshape(names, 256) * 2.0 - 1.0
    scores = (signs.T @ signs)[np.triu_indices(256, 1)] / math.sqrt(names)
    biases = signs.sum(0) / math.sqrt(names)
    others = [derive(flipped(SECRET, bit), "noise", "table 0") for bit in range(256)]
    changed = sum((int.from_bytes(keys[0]) ^ int.from_bytes(other)).bit_count() for other in others)
    return {
        "bias": chi_square(biases),
        "correlation": chi_square(scores),
        "largest": min(1.0, two_sided(float(np.abs(scores).max())) * len(scores)),
        "secret": two_sided((changed - 2**15) / 2**7),
    }


def scattered(sample: Sample) -> tuple[Float32Array, dict[str, Any]]:
    """Normals float32 [512, 256] all over the coordinates' ranges, and their coordinates."""
    random = np.random.default_rng(1)
    where: dict[str, Any] = {
        "rows": random.integers(0, 2**48, 512),
        "from_steps": random.integers(0, 2**30, 512),
        "to_step": 2**30 + 5,
    }
    drawn = sample.generator.normal(
        sample.generator.derive_key(SECRET, "noise", "table"),
        torch.from_numpy(where["rows"]), torch.from_numpy(where["from_steps"]), where["to_step"],
        column_offset=16 * 4321, num_columns=256,
    )  # fmt: skip
    return drawn.numpy(), where


def definition(sample: Sample) -> PValues:
    """The bits of the NumPy reference."""
    drawn, where = scattered(sample)
    key = sample.generator.derive_key(SECRET, "noise", "table")
    expected = reference.normals(key, **where, column_offset=16 * 4321, num_columns=256, rounds=20)
    return {"equal bits": float(np.array_equal(drawn, expected))}


def accuracy(sample: Sample) -> PValues:
    """Within `WORST_NORMAL` units of the transform in float64 of the same random words."""
    drawn, where = scattered(sample)
    key = sample.generator.derive_key(SECRET, "noise", "table")
    words, extra = (
        chacha.blocks(
            key, reference.inputs(**where, first_block=4321, num_blocks=16, domain=domain)
        )
        for domain in (reference.NORMAL, reference.TAIL)
    )
    exact = exact_normals(words, extra).reshape(drawn.shape)
    return {"units in the last place": float(ulps(drawn, exact).max() <= WORST_NORMAL)}


CHECKS: dict[str, Callable[[Sample], PValues]] = {
    check.__name__: check
    for check in (
        moments, distribution, far_tail, pairs, correlations, blocks, key_bits, definition,
        accuracy,
    )
}  # fmt: skip


def rejected(name: str, sample: Sample) -> PValues:
    """The p-values of a check that are below its share of `LEVEL`."""
    found = CHECKS[name](sample)
    bound = LEVEL / len(CHECKS) / len(found)
    return {label: p for label, p in found.items() if not p >= bound}
