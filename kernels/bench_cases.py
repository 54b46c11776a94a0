"""What the benchmark measures: rows of its table, and the targets set for them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from dist_dp.kernels import draws, native, updates
from dist_dp.kernels.request import Update

_KEY = draws.derive_key(bytes(32), "noise", "bench")
_TO_STEP = 100
_TABLES = ((16, False), (64, False), (128, False), (128, True))
"""Columns, and whether row lists are in ascending order."""
_PARTS = 8  # row lists of one table: no list follows itself, so none is still in a cache
_GRID = 2.0**-20


@dataclass(frozen=True)
class Sizes:
    """How many float32 numbers to work on: in memory, in the L2 cache, and in a table."""

    large: int = 1 << 24
    small: int = 1 << 18
    table: int = 1 << 28


QUICK = Sizes(large=1 << 14, small=1 << 12, table=1 << 18)


@dataclass(frozen=True, eq=False)
class Case:
    """One row of the table.

    Attributes:
        name: what runs.
        isa: with which instructions.
        rounds: ChaCha rounds, or None where there are none.
        threads: how many may run.
        numbers: normals made, or weights read and written, by one call.
        run: does it once; the argument counts the repetitions.
        weights: whether speed is told in bytes of weights, read and written.
        calls: how many make one measurement.
        limits: what this cannot be faster than.
    """

    name: str
    isa: str
    rounds: int | None
    threads: int
    numbers: int
    run: Callable[[int], None]
    weights: bool = False
    calls: int = 1
    limits: tuple[Case, ...] = ()

    def measure(self, repetition: int) -> float:
        """Numbers per second."""
        torch.set_num_threads(self.threads)
        begin = time.perf_counter()
        for _ in range(self.calls):
            self.run(repetition)
        return self.numbers * self.calls / (time.perf_counter() - begin)


@dataclass(frozen=True, eq=False)
class Target:
    """How many times as fast as the slowest of some others a case should be."""

    name: str
    wanted: float
    case: Case
    against: tuple[Case, ...]


@dataclass
class Suite:
    """Cases, the torch case that normals are compared with, and targets."""

    torch_normal: dict[Case, Case] = field(default_factory=dict)
    cases: list[Case] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)

    def add(self, case: Case, torch_normal: Case | None = None) -> Case:
        """Take a case in."""
        self.cases.append(case)
        if torch_normal is not None:
            self.torch_normal[case] = torch_normal
        return case


def on_cpu(sizes: Sizes, isa: str) -> Suite:
    """Everything on the CPU.

    Args:
        sizes: how much.
        isa: the instructions that users get here; the generator is measured with all others too.
    """
    suite = Suite()
    generators: dict[tuple[int, int], Case] = {}
    headline = None
    for name, size in (("memory", sizes.large), ("L2", sizes.small)):
        output = torch.empty(size)
        calls = max(1, sizes.large // size // 4)
        base = suite.add(_torch_normal(f"torch normal_, in {name}", output, calls))
        suite.torch_normal[base] = base
        headline = headline or base
        for used, rounds in itertools.product(native.isas(), (8, 12, 20)):
            for threads in (1, 2) if (used, name) == (isa, "memory") and rounds > 8 else (1,):
                label = f"normals, in {name}"
                case = suite.add(_generator(label, output, used, rounds, threads, calls), base)
                if (used, name) == (isa, "memory"):
                    generators[rounds, threads] = case
    assert headline is not None
    if isa == "avx512":
        for rounds, wanted in ((12, 4.0), (20, 3.0)):
            title = f"normals with AVX-512, {rounds} rounds, against torch normal_"
            suite.targets.append(Target(title, wanted, generators[rounds, 1], (headline,)))
    suite.targets.append(_scaling("normals, 20 rounds", generators[20, 1], generators[20, 2]))
    _add_updates(suite, sizes, isa, headline, generators)
    return suite


def _scaling(name: str, one: Case, two: Case) -> Target:
    return Target(f"{name}: two threads against one", 1.8, two, (one,))


def _torch_normal(name: str, output: torch.Tensor, calls: int) -> Case:
    generator = torch.Generator().manual_seed(1)

    def run(_: int) -> None:
        output.normal_(generator=generator)

    return Case(name, "torch", None, 1, output.numel(), run, calls=calls)


def _generator(
    name: str, output: torch.Tensor, isa: str, rounds: int, threads: int, calls: int
) -> Case:
    table = output.view(-1, 128)
    rows = torch.arange(table.shape[0])
    steps = torch.zeros(1, dtype=torch.int64).expand(table.shape[0])

    def run(_: int) -> None:
        native.fill(table, _KEY, rows, steps, 1, 0, rounds, isa=isa, threads=threads)

    return Case(name, isa, rounds, threads, output.numel(), run, calls=calls)


def _add_updates(
    suite: Suite,
    sizes: Sizes,
    isa: str,
    torch_normal: Case,
    generators: dict[tuple[int, int], Case],
) -> None:
    """Settle, decay and copy, by list and over the whole table."""
    memory, other = torch.rand(sizes.table), torch.rand(sizes.table)
    turn = itertools.count()
    for threads in (1, 2):
        for name, number in (("list", sizes.table // _PARTS), ("table", sizes.table)):
            suite.add(_copy(f"copy as many bytes as a {name}", memory, other, number, threads))
    settled: dict[tuple[str, int, int], Case] = {}
    for dimension, ordered in _TABLES:
        table = Table(memory, dimension, ordered)
        for threads, whole in itertools.product((1, 2), (False,) if ordered else (False, True)):
            listed = "ascending row list" if ordered else "row list"
            what = f"{'whole table' if whole else listed}, dim {dimension}"
            decayed = suite.add(table.decayed(f"decay, {what}", whole, isa, threads, next(turn)))
            for rounds in (12, 20):
                limits = (generators[rounds, threads], decayed)
                case = table.settled(
                    f"settle, {what}", whole, isa, rounds, threads, next(turn), limits
                )
                settled[what, rounds, threads] = suite.add(case, torch_normal)
            if threads == 1:
                extra = table.unchecked(f"settle without checks, {what}", whole, isa, next(turn))
                suite.add(extra, torch_normal)
                if dimension == 128 and not (whole or ordered):
                    case = table.settled(
                        f"settle on a grid, {what}", whole, isa, 20, 1, next(turn), (), _GRID
                    )
                    suite.add(case, torch_normal)
    for what in ("row list, dim 128", "ascending row list, dim 128", "whole table, dim 128"):
        for rounds in (12, 20):
            case = settled[what, rounds, 1]
            title = f"settle, {what}, {rounds} rounds, against normals and decay"
            suite.targets.append(Target(title, 0.8, case, case.limits))
        one, two = (settled[what, 20, threads] for threads in (1, 2))
        suite.targets.append(_scaling(f"settle, {what}, 20 rounds", one, two))


def _copy(name: str, source: torch.Tensor, target: torch.Tensor, number: int, threads: int) -> Case:
    def run(_: int) -> None:
        target[:number].copy_(source[:number])

    return Case(name, "torch", None, threads, number, run, weights=True)


class Table:
    """A table on any device, with lists of rows to settle in it.

    Each row has steps and factors of its own, as in training. Lists hold random rows in random
    order, or `ordered` in ascending order.
    """

    def __init__(self, memory: torch.Tensor, dimension: int, ordered: bool = False) -> None:
        self.weight = memory.view(-1, dimension)
        number, device = self.weight.shape[0], memory.device
        lists = torch.randperm(number, device=device).chunk(_PARTS)
        self.lists = [rows.sort().values if ordered else rows for rows in lists]
        self.from_steps = torch.randint(0, _TO_STEP, (number,), device=device)
        self.decay = torch.rand(number, dtype=torch.float64, device=device) * 0.1 + 0.9
        self.scale = torch.rand(number, dtype=torch.float64, device=device) * 0.1 + 0.01
        self.nothing = torch.zeros_like(self.scale)

    def numbers(self, whole: bool) -> int:
        """Weights touched by one call."""
        rows = self.weight.shape[0] if whole else self.lists[0].numel()
        return rows * self.weight.shape[1]

    def settled(
        self,
        name: str,
        whole: bool,
        isa: str,
        rounds: int,
        threads: int,
        turn: int,
        limits: tuple[Case, ...] = (),
        grid: float | None = None,
    ) -> Case:
        """What users call, checks included."""

        def run(repetition: int) -> None:
            if whole:
                updates.settle_range(
                    self.weight, key=_KEY, from_steps=self.from_steps, to_step=_TO_STEP,
                    decay=self.decay, scale=self.scale, rounds=rounds, grid=grid,
                )  # fmt: skip
                return
            rows = self._list(turn, repetition)
            part = slice(0, rows.numel())
            updates.settle_rows(
                self.weight, rows, key=_KEY, from_steps=self.from_steps[part], to_step=_TO_STEP,
                decay=self.decay[part], scale=self.scale[part], rounds=rounds, grid=grid,
            )  # fmt: skip

        return Case(
            name, isa, rounds, threads, self.numbers(whole), run, weights=True, limits=limits
        )

    def unchecked(self, name: str, whole: bool, isa: str, turn: int) -> Case:
        """The compiled code alone, with 20 rounds."""

        def run(repetition: int) -> None:
            update = self._update(whole, turn, repetition, self.scale)
            native.settle(update, isa=isa, threads=1)

        return Case(name, isa, 20, 1, self.numbers(whole), run, weights=True)

    def decayed(self, name: str, whole: bool, isa: str, threads: int, turn: int) -> Case:
        """The same rows read, multiplied and written by the same code, without noise."""

        def run(repetition: int) -> None:
            update = self._update(whole, turn, repetition, self.nothing)
            native.settle(update, isa=isa, threads=threads)

        return Case(name, isa, None, threads, self.numbers(whole), run, weights=True)

    def _list(self, turn: int, repetition: int) -> torch.Tensor:
        return self.lists[(3 * turn + repetition) % _PARTS]

    def _update(self, whole: bool, turn: int, repetition: int, scale: torch.Tensor) -> Update:
        rows = None if whole else self._list(turn, repetition)
        count = self.weight.shape[0] if rows is None else rows.numel()
        return Update(
            weight=self.weight, rows=rows, first_row=0, count=count, key=_KEY, row_offset=0,
            column_offset=0, from_steps=self.from_steps[:count], to_step=_TO_STEP,
            decay=self.decay[:count], scale=scale[:count], rounds=20, stochastic=False, grid=0.0,
        )  # fmt: skip


def repetitions(suite: Suite, number: int) -> Iterator[tuple[int, Case, float]]:
    """Measure every case `number` times, in turns, after one turn that does not count.

    Yields:
        The repetition, from 0; the case; numbers per second.
    """
    threads = torch.get_num_threads()
    try:
        for repetition in range(-1, number):
            for case in suite.cases:
                speed = case.measure(repetition)
                if repetition >= 0:
                    yield repetition, case, speed
    finally:
        torch.set_num_threads(threads)
