"""Many draws of a noise generator in one pass, reduced to what the statistical checks need."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Protocol

import numpy as np
import torch

from tests.kernels.exact import Float64Array

SECRET = bytes(range(32))
SIDE = 128
"""Rows and columns that are drawn together at a place."""

FAR = 12 * math.log(2.0)
"""Pairs with r^2 / 2 = -log u above this have u below 2^-12: the tail that takes 32 more bits."""

TAN_22 = math.tan(math.pi / 8)


class Generator(Protocol):
    """What is checked: `dist_dp.kernels`, or a module like it."""

    def derive_key(self, secret: bytes, stream: str, name: str) -> bytes: ...

    def normal(
        self,
        key: bytes,
        rows: torch.Tensor,
        from_steps: torch.Tensor | int,
        to_step: int,
        *,
        column_offset: int = 0,
        num_columns: int,
        rounds: int = 20,
    ) -> torch.Tensor: ...


@dataclass(frozen=True)
class Place:
    """Where noise is drawn. No two different places may have anything in common."""

    key: bytes
    from_step: int = 3
    to_step: int = 7
    first_row: int = 0
    first_column: int = 0
    rounds: int = 20

    def draw(self, generator: Generator, first: int, rows: int, columns: int) -> torch.Tensor:
        """Float32 [rows, columns] from row `first` of the place on."""
        start = self.first_row + first
        return generator.normal(
            self.key, torch.arange(start, start + rows), self.from_step, self.to_step,
            column_offset=self.first_column, num_columns=columns, rounds=self.rounds,
        )  # fmt: skip


def flipped(value: bytes, bit: int) -> bytes:
    return (int.from_bytes(value, "little") ^ 1 << bit).to_bytes(len(value), "little")


def places(generator: Generator) -> dict[str, Place]:
    """96 places, each near to another in one coordinate, with 16384 rows of its own."""
    base = Place(generator.derive_key(SECRET, "noise", "table"))
    found = {
        f"steps {s} to {t}": replace(base, from_step=s, to_step=t)
        for s, t in [*combinations(range(9), 2), (0, 2**30), (2**30, 2**31 - 1), (0, 2**31 - 1)]
    }
    found |= {f"row {r}": replace(base, first_row=r) for r in [2**k for k in range(14, 47, 2)]}
    found |= {f"column {c}": replace(base, first_column=c) for c in [SIDE << k for k in range(10)]}
    found |= {
        f"stream {s!r}, table {t!r}": replace(base, key=generator.derive_key(SECRET, s, t))
        for s, t in [
            *(("noise", t) for t in ("tablf", "Table", "table ", "tabl", "", "table/1")),
            *(("sampling", "table"), ("nois", "etable"), ("", "noisetable"), ("table", "noise")),
        ]
    }
    for bit in (0, 31, 63, 64, 127, 128, 191, 192, 255):
        secret = flipped(SECRET, bit)
        key = generator.derive_key(secret, "noise", "table")
        found[f"secret with bit {bit} flipped"] = replace(base, key=key)
        found[f"key with bit {bit} flipped"] = replace(base, key=flipped(base.key, bit))
    return found | {f"{n} rounds": replace(base, rounds=n) for n in (12, 8)}


class Sums:
    """What one pass over all places adds up.

    Attributes:
        draws: How many normals were drawn.
        powers: Sums of the powers 1 to 6 at each place, float64 [6, places].
        bins: Counts of the normals by the upper 20 bits of their patterns.
        cells: Counts of the pairs by direction and length, int64 [SECTORS * RINGS].
        products: Scalar products between all pairs along an axis, of the normals (1) and of their
            squares less 1 (2).
        tail: -log u of the pairs beyond `FAR`.
    """

    SHIFT = 12  # leaves a sign, an exponent and 11 bits: a bin holds less than 1e-4 of the draws
    SECTORS = 16
    RINGS = 16

    def __init__(self, generator: Generator, places: list[Place], tiles: int) -> None:
        count = len(places)
        self.draws = tiles * count * SIDE * SIDE
        self.powers = torch.zeros(6, count, dtype=torch.float64)
        self.bins = np.zeros(2**32 >> self.SHIFT, np.int64)
        self.cells = np.zeros(self.SECTORS * self.RINGS, np.int64)
        self.products = {
            (axis, power): torch.zeros(size, size, dtype=torch.float64)
            for axis, size in (("places", count), ("rows", SIDE), ("columns", SIDE))
            for power in (1, 2)
        }
        tails = []
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # more of them spend their time waiting, on arrays this small
        try:
            for tile in range(tiles):
                drawn = [place.draw(generator, tile * SIDE, SIDE, SIDE) for place in places]
                tails.append(self._add(torch.stack(drawn)))
        finally:
            torch.set_num_threads(threads)
        self.tail = np.concatenate(tails)

    def _add(self, z: torch.Tensor) -> Float64Array:
        """Add a tile [place, row, column]; return -log u of its far pairs."""
        flat = z.flatten(1)
        square = flat * flat
        cube = square * flat
        fourth, fifth, sixth = square * square, cube * square, cube * cube
        for total, power in zip(
            self.powers, (flat, square, cube, fourth, fifth, sixth), strict=True
        ):
            total += power.sum(1)
        patterns = z.numpy().view(np.uint32).ravel() >> self.SHIFT
        self.bins += np.bincount(patterns.astype(np.int64), minlength=len(self.bins))

        a, b = (z[..., first::2].contiguous() for first in (0, 1))
        energy = a.square().add_(b.square()).mul_(0.5)
        is_far = energy > FAR
        tail = (a[is_far].double().square() + b[is_far].double().square()) / 2
        sector = torch.signbit(a).byte() + 2 * torch.signbit(b).byte()
        a.abs_(), b.abs_()
        sector += 4 * (a < b).byte()
        sector += 8 * (torch.minimum(a, b) > torch.maximum(a, b).mul_(TAN_22)).byte()
        ring = energy.neg_().exp_().mul_(self.RINGS - 1e-6).byte()
        cells = sector.mul_(self.RINGS).add_(ring).ravel().numpy()
        self.cells += np.bincount(cells, minlength=len(self.cells))

        for number, values in ((1, z), (2, square.sub_(1.0).view(z.shape))):
            for axis, name in enumerate(("places", "rows", "columns")):
                matrix = values.movedim(axis, 0).reshape(z.shape[axis], -1)
                self.products[name, number] += matrix @ matrix.T
        return tail.numpy()


class Sample:
    """A generator, and the sums over a number of its draws, made when first asked for.

    Args:
        generator: What is checked.
        tiles: Squares of 128 rows and columns drawn at each place; 64 make 10^8 draws.
    """

    def __init__(self, generator: Generator, tiles: int) -> None:
        self.generator = generator
        self.tiles = tiles
        self.places = places(generator)

    @functools.cached_property
    def sums(self) -> Sums:
        return Sums(self.generator, list(self.places.values()), self.tiles)
