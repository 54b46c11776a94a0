"""How near the transform comes to real arithmetic: errors in units of float32's last place.

Measured over every word outside the extended tail: lengths 2.2401 (at u = 0.707, where 1 - near
loses a bit), directions 1.3389; lengths of the tail, where words were sampled, 0.88. In relative
terms it is 2.895 and 1.839 times 2^-24, so a normal, rounded once more, is within 5.24. The worst
product found is off by 4.61, and 99.9 % of the normals by less than 2.26. One slow test takes every
word, in C++; the others those around the worst ones, the seams of the transform, and random ones.
"""

from __future__ import annotations

import math
import os
import shlex
import shutil
import subprocess
from fractions import Fraction
from pathlib import Path

import mpmath
import numpy as np
import pytest
from numpy.typing import NDArray

from dist_dp.kernels import box_muller, portable
from tests.kernels.exact import WORST_NORMAL, exact_directions, exact_lengths, exact_normals, ulps

UInt32Array = NDArray[np.uint32]

WORST_LENGTH = 2.2401
WORST_DIRECTION = 1.3389

BAD_LENGTHS = (0xB4F00EBE, 0xB2D06F40, 0x9B1072BE)
BAD_DIRECTIONS = (0xA27CAA, 0xA2FDC4, 0xB27D04, 0xB217978)
# ends, both ends of the tail, the middle, where the exponent changes
LENGTH_SEAMS = (0, 2**20, 2**31, 2**32 - 1, *(2**k for k in range(21, 31)), 0xB504F333, 0x5A827999)
OCTANTS = tuple(k << 29 for k in range(9))


def near(centres: tuple[int, ...], count: int) -> UInt32Array:
    """`count` words around each centre, those below 0 or above 2^32 - 1 left out."""
    around = np.arange(-(count // 2), count - count // 2)
    words = (np.array(centres)[:, None] + around).ravel()
    return words[(words >= 0) & (words < 2**32)].astype(np.uint32)


def random_words(seed: int, *shape: int) -> UInt32Array:
    return np.random.default_rng(seed).integers(0, 2**32, shape, dtype=np.uint32)


def length_errors(words: UInt32Array, extra: UInt32Array) -> NDArray[np.float64]:
    return ulps(box_muller.lengths(words, extra), exact_lengths(words, extra))


def test_lengths() -> None:
    words = np.concatenate(
        [near(LENGTH_SEAMS, 2**16), near(BAD_LENGTHS, 2**18), random_words(1, 2**21)]
    )
    worst = length_errors(words, random_words(2, len(words))).max()
    assert WORST_LENGTH - 1e-4 < worst <= WORST_LENGTH


def test_lengths_of_the_tail() -> None:
    """All 2^20 words below the edge with random extensions, and every depth down to u = 2^-64."""
    words = np.arange(box_muller.TAIL_BELOW, dtype=np.uint32)
    assert length_errors(words, random_words(3, len(words))).max() < 0.9
    deep = np.exp2(np.linspace(0, 52, 2**20)).astype(np.uint64)
    deep[0] = 0
    upper, lower = (deep >> np.uint64(32)).astype(np.uint32), deep.astype(np.uint32)
    assert length_errors(upper, lower).max() < 0.9


def test_directions() -> None:
    words = np.concatenate(
        [near(OCTANTS, 2**16), near(BAD_DIRECTIONS, 2**18), random_words(4, 2**21)]
    )
    pairs = zip(box_muller.directions(words), exact_directions(words), strict=True)
    worst = max(ulps(made, exact).max() for made, exact in pairs)
    assert WORST_DIRECTION - 1e-4 < worst <= WORST_DIRECTION


def test_normals() -> None:
    words, extra = random_words(5, 16, 2**17), random_words(6, 16, 2**17)
    words[0::4, :2000] >>= 12  # into the tail
    errors = ulps(box_muller.normals(words, extra), exact_normals(words, extra))
    assert errors.max() < 4.0
    assert np.quantile(errors, 0.999) < 2.26


def test_products_of_the_worst() -> None:
    """Lengths around the worst ones times directions around the worst ones."""
    words, angles = near(BAD_LENGTHS, 64), near(BAD_DIRECTIONS, 2**14)
    length, exact_length = box_muller.lengths(words, words), exact_lengths(words, words)
    worst = max(
        ulps(length[:, None] * side, exact_length[:, None] * exact_side).max()
        for side, exact_side in zip(
            box_muller.directions(angles), exact_directions(angles), strict=True
        )
    )
    assert 4.6 < worst < 4.7 < WORST_NORMAL


def test_the_measure_itself() -> None:
    """The float64 transform against 40 digits, and an error of one unit is seen as one."""
    words, extra = random_words(7, 600), random_words(8, 600)
    words[:300] >>= random_words(9, 300) & np.uint32(31)
    first, second = exact_directions(words)
    with mpmath.workdps(40):
        for i, word in enumerate(words.tolist()):
            if word < 2**20:
                u = mpmath.ldexp(word << 32 | int(extra[i]) | 1, -64)
            elif word < 2**31:
                u = mpmath.ldexp(word | 1, -32)
            else:
                u = 1 - mpmath.ldexp((2**32 - 1 - word) | 1, -32)
            length = exact_lengths(words[i : i + 1], extra[i : i + 1])[0]
            assert abs(length / mpmath.sqrt(-2 * mpmath.log(u)) - 1) < 1e-14
            quarter = (word << 2 | 2) & 0xFFFFFFFF
            angle = mpmath.pi / 4 * mpmath.ldexp(quarter - (quarter >> 31 << 32), -31)
            sides = [mpmath.cos(angle), mpmath.sin(angle)]
            sign = -1 if word >> 31 else 1
            for value, exact in zip(
                (first[i], second[i]), sides[:: -1 if word >> 30 & 1 else 1], strict=True
            ):
                assert abs(value / (sign * exact) - 1) < 1e-14
    one = np.array([1.0, 1.75, 9.0], np.float32)
    assert ulps(np.nextafter(one, np.float32(10)), one.astype(np.float64)).tolist() == [1, 1, 1]


def test_ends() -> None:
    """|z| reaches 9.4193 = sqrt(-2 log 2^-64): mass 2^-64 of a pair is lost. Nothing is NaN."""
    words = np.concatenate([near(LENGTH_SEAMS, 2**10), random_words(10, 2**16)])
    lengths = box_muller.lengths(words, random_words(11, len(words)))
    largest = np.float32(box_muller.LARGEST_NORMAL)
    zero = np.zeros(1, np.uint32)
    assert box_muller.lengths(zero, zero)[0] == largest == np.float32(9.41928)
    assert math.exp(-(box_muller.LARGEST_NORMAL**2) / 2) == pytest.approx(2.0**-64, rel=1e-12)
    assert lengths.min() == box_muller.lengths(~zero, zero)[0]
    assert lengths.min() == pytest.approx(math.sqrt(2 * 2.0**-32), rel=1e-6)
    assert lengths.max() <= largest


def test_symmetry() -> None:
    """The first bit negates both normals, complementing the last 30 negates the sine alone."""
    words = np.concatenate([near(OCTANTS, 2**10), random_words(12, 2**16)])
    first, second = box_muller.directions(words)
    negated = box_muller.directions(words ^ np.uint32(2**31))
    assert np.array_equal(negated[0], -first) and np.array_equal(negated[1], -second)
    mirrored = box_muller.directions(words ^ np.uint32(2**30 - 1))
    exchange = (words & np.uint32(2**30)) != 0
    assert np.array_equal(mirrored[0], np.where(exchange, -first, first))
    assert np.array_equal(mirrored[1], np.where(exchange, second, -second))
    exchanged = box_muller.directions(words ^ np.uint32(2**30))
    assert np.array_equal(exchanged[0], second) and np.array_equal(exchanged[1], first)


def test_wide_normals() -> None:
    """Against 40 digits, also with u next to 0 and to 1, where rounding u itself counts most."""
    words = random_words(13, 16, 500)
    words[1::4, :200] >>= random_words(14, 4, 200) & np.uint32(31)
    words[1::4, 200:260] |= ~(random_words(15, 4, 60) >> (random_words(16, 4, 60) & np.uint32(31)))
    made = box_muller.wide_normals(words)
    with mpmath.workdps(40):
        for block in range(words.shape[1]):
            for pair in range(4):
                low, high, lower, upper = words[4 * pair : 4 * pair + 4, block].tolist()
                u = mpmath.ldexp(2 * (high << 32 | low) + 1, -65)
                length = mpmath.sqrt(-2 * mpmath.log(u))
                place = ((upper & 0x3FFFFFFF) << 32 | lower) * 4 + 2
                angle = mpmath.pi / 2 * mpmath.ldexp(place - (place >> 63 << 64), -64)
                sides = [mpmath.cos(angle), mpmath.sin(angle)]
                sign = -1 if upper >> 31 else 1
                for k, side in enumerate(sides[:: -1 if upper >> 30 & 1 else 1]):
                    error = abs(mpmath.mpf(float(made[block, 2 * pair + k])) - sign * length * side)
                    # rounding u, 2^-53 at most, moves the length by that over u times the length
                    allowed = abs(side) * (
                        length * mpmath.ldexp(1, -51) + mpmath.ldexp(1, -53) / (u * length)
                    )
                    assert error < allowed


def nearest(value: Fraction) -> np.float32:
    """The float32 nearest to a number, even in a tie."""
    guess = np.float32(float(value))
    around = (
        np.nextafter(guess, np.float32(-np.inf)),
        guess,
        np.nextafter(guess, np.float32(np.inf)),
    )
    return min(around, key=lambda x: (abs(Fraction(float(x)) - value), int(x.view(np.uint32)) & 1))


def check_fma(a: NDArray[np.float32], b: NDArray[np.float32], c: NDArray[np.float32]) -> None:
    made = portable.fma(a, b, c)
    assert made.dtype == np.float32
    for x, y, z, result in zip(a.tolist(), b.tolist(), c.tolist(), made, strict=True):
        assert result == nearest(Fraction(x) * Fraction(y) + Fraction(z)), (x, y, z)


def test_fma_of_random_numbers() -> None:
    random = np.random.default_rng(17)

    def numbers(low: int, high: int) -> NDArray[np.float32]:
        signs = random.choice([-1.0, 1.0], 5000)
        mantissas = 1.0 + random.random(5000)
        return np.ldexp(signs * mantissas, random.integers(low, high, 5000)).astype(np.float32)

    check_fma(numbers(-12, 12), numbers(-12, 12), numbers(-45, 45))
    a, b = numbers(-2, 2), numbers(-2, 2)
    check_fma(a, b, -(a * b))  # only what rounding the product lost is left
    check_fma(a, b, np.zeros_like(a))


def test_fma_rounds_once() -> None:
    """The product lies half-way between two float32; an addend too small for float64 decides."""
    random = np.random.default_rng(18)
    factors = [2 * random.integers(1024, 4096, 60000) + 1 for _ in range(2)]
    product = factors[0] * factors[1]
    half_way = (product >= 2**24) & (product < 2**25)  # 25 bits and odd
    a, b = (x[half_way][:3000].astype(np.float32) for x in factors)
    assert len(a) == 3000
    twice = a.astype(np.float64) * b
    c = np.ldexp(random.choice([-1.0, 0.0, 1.0], 3000), random.integers(-60, -30, 3000))
    # rounding to float64 first and then to float32 goes wrong here, so the cases do test it
    wrong = (twice + c).astype(np.float32) != portable.fma(a, b, c.astype(np.float32))
    assert wrong.sum() > 500
    for scale in (1.0, -1.0):
        check_fma(np.float32(scale) * a, b, c.astype(np.float32))


@pytest.mark.slow
def test_every_word(tmp_path: Path) -> None:
    """The two maxima, over all words outside the extended tail; more than a minute of one core."""
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"there is no C++ compiler {compiler[0]} (CXX= names another)")
    here = Path(__file__).resolve()
    sources = here.parents[2] / "kernels" / "native"
    flags = ["-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno"]
    program = tmp_path / "every_word"
    subprocess.run(
        [*compiler, *flags, "-w", f"-I{sources}", here.with_name("every_word.cpp"), "-o", program],
        check=True,
    )
    running = {
        what: subprocess.Popen([program, what], stdout=subprocess.PIPE, text=True)
        for what in ("lengths", "directions")
    }
    worst = {what: float(process.communicate()[0]) for what, process in running.items()}
    assert worst["lengths"] == pytest.approx(WORST_LENGTH, abs=2e-4)
    assert worst["directions"] == pytest.approx(WORST_DIRECTION, abs=2e-4)
