"""``dist-dp bench sparsity``: how few coordinates a step may noise, and what that costs in AUC.

A coordinate is one number of a table that a step puts noise on: rows noised × columns. DP-SGD does
so to all of them, and so, later, does ``lazydp``. Dense layers are noised whole by every private
mechanism; they are counted apart. All mechanisms start from the same weights and draw the same
Poisson batches; a loss is counted from lazydp's AUC at the same ε and seed.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dist_dp.cluster.bench.sparsity_frontier import frontiers, result_of, worth_repeating
from dist_dp.cluster.bench.sparsity_runs import Job, Pool, Runs
from dist_dp.cluster.bench.sparsity_settings import (
    EXPONENTIAL,
    REFERENCE,
    Point,
    SparsitySettings,
    family,
)
from dist_dp.cluster.bench.sparsity_table import settings_text
from dist_dp.cluster.bench.sparsity_training import Rates, Trained

Say = Callable[[str], None]


@dataclass(frozen=True)
class _Place:
    """A point at an ε; None for ``none``."""

    point: Point
    epsilon: float | None


@dataclass(frozen=True)
class _Run:
    """One training run."""

    place: _Place
    rates: Rates
    seed: int


def run_sparsity(
    settings: SparsitySettings,
    say: Say,
    *,
    workers: int = 1,
    save: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Tunes, measures the grid, and measures the frontier again with other seeds.

    Args:
        settings: What to measure.
        say: Told what is going on.
        workers: Processes; results do not depend on it.
        save: Given the result so far after the first seed and each further one.

    Returns:
        What goes to the JSON file.

    Raises:
        ConfigError: A setting is impossible.
        DataError: The records cannot be read.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="dist-dp-sparsity-") as folder:
        runs = Runs(settings, Path(folder))
        pool = Pool(runs, Path(folder), workers)
        threads = torch.get_num_threads()
        # a step is many small operations: more threads only wait for each other
        torch.set_num_threads(1)
        try:
            measured = _Measurement(settings, runs, pool, say)
            for seeds in measured.all():
                result = measured.result(seeds, time.perf_counter() - start)
                save(result)
        finally:
            pool.close()
            torch.set_num_threads(threads)
        return result


class _Measurement:
    """The stages, and what they found."""

    def __init__(self, settings: SparsitySettings, runs: Runs, pool: Pool, say: Say) -> None:
        self._settings, self._runs, self._pool, self._say = settings, runs, pool, say
        self._sigma: dict[float | None, float | None] = {None: None}
        for epsilon in settings.epsilons:
            self._sigma[epsilon] = runs.noise_multiplier(epsilon)
            say(f"ε {epsilon:g}: noise multiplier {self._sigma[epsilon]:.4f}")
        self._sigma_of: dict[_Place, float] = {}
        self._tries: list[dict[str, Any]] = []
        self._best: dict[tuple[str, float | None], Rates] = {}
        self._found: dict[_Place, dict[int, Trained]] = {}
        self._done: dict[_Run, Trained] = {}
        self._frozen: dict[str, float] = {}

    def all(self) -> Iterator[int]:
        """All stages; yields how many seeds are done once there is a result."""
        self._tune()
        self._freeze()
        first, *others = self._settings.seeds
        self._measure([(place, first) for place in self._places()])
        again = [list(self._found)[number] for number in worth_repeating(self._rows())]
        yield 1
        for number, seed in enumerate(others, 2):
            self._measure([(place, seed) for place in again])
            yield number

    def result(self, seeds: int, seconds: float) -> dict[str, Any]:
        """What goes to the JSON file, with so many seeds done."""
        settings, rows = self._settings, self._rows()
        data = self._runs.data
        any_run = next(iter(next(iter(self._found.values())).values()))
        return {
            "command": "dist-dp bench sparsity",
            "data": {
                **data.about,
                "train_records": len(data.train),
                "public_records": len(data.public),
                "test_records": len(data.test),
                "table_rows": list(data.schema.table_rows().values()),
                "table_coordinates": any_run.table_coordinates,
                "dense_coordinates": any_run.dense_coordinates,
            },
            "settings": {
                "batch": min(settings.batch, len(data.train)),
                "steps": settings.steps,
                "max_grad_norm": settings.max_grad_norm,
                "delta": settings.delta(len(data.train)),
                "noise_multipliers": {f"{e:g}": s for e, s in self._sigma.items() if e is not None},
                "seeds": list(settings.seeds[:seeds]),
                "model": settings.model.model_dump(mode="json"),
            },
            "frozen_tables": self._frozen,
            "tries": self._tries,
            "results": rows,
            "frontiers": frontiers(rows, seeds),
            "seconds": seconds,
        }

    def _places(self) -> list[_Place]:
        """References first, then the grid at each ε."""
        settings = self._settings
        points = [
            Point(REFERENCE),
            *(p for p in settings.points if p.mechanism not in ("none", REFERENCE)),
        ]
        return [_Place(Point("none"), None)] + [
            _Place(p, epsilon) for epsilon in settings.epsilons for p in points
        ]

    def _tune(self) -> None:
        """Tries every mechanism's rates at each ε, as many for each; public records decide."""
        settings, seed = self._settings, self._settings.seeds[0]
        tried = [
            _Run(_Place(settings.tuned_at(name), epsilon), rates, seed)
            for name in settings.families
            for epsilon in ((None,) if name == "none" else settings.epsilons)
            for rates in settings.rates[name]
        ]
        best: dict[tuple[str, float | None], float] = {}
        for run, trained in zip(tried, self._take(tried, "rates"), strict=True):
            point, rates = run.place.point, run.rates
            key = family(point.mechanism), run.place.epsilon
            self._tries.append(
                {
                    "mechanism": key[0],
                    "epsilon": key[1],
                    "settings": point.described(),
                    "rates": asdict(rates),
                    "public_auc": trained.public_auc,
                }
            )
            # a rate at which training diverges may leave no AUC at all
            if key not in best or trained.public_auc > best[key] or math.isnan(best[key]):
                best[key], self._best[key] = trained.public_auc, rates

    def _freeze(self) -> None:
        """What dense layers alone reach: without it, a small loss would say nothing of tables."""
        seed = self._settings.seeds[0]
        places = [_Place(Point("none"), None)]
        places += [_Place(Point(REFERENCE), epsilon) for epsilon in self._settings.epsilons]
        runs = [_Run(p, Rates(0.0, self._rates_of(p).dense), seed) for p in places]
        for run, trained in zip(runs, self._take(runs, "frozen tables"), strict=True):
            epsilon = run.place.epsilon
            self._frozen["none" if epsilon is None else f"{epsilon:g}"] = trained.auc

    def _rates_of(self, place: _Place) -> Rates:
        return self._best[family(place.point.mechanism), place.epsilon]

    def _noise(self, place: _Place) -> float | None:
        """The noise multiplier; exponential selection has one by the number of selections."""
        point, epsilon = place.point, place.epsilon
        if point.mechanism != EXPONENTIAL or epsilon is None:
            return self._sigma[epsilon]
        if place not in self._sigma_of:
            self._sigma_of[place] = self._runs.exponential_cost(point, epsilon).noise_multiplier
        return self._sigma_of[place]

    def _measure(self, wanted: list[tuple[_Place, int]]) -> None:
        runs = [_Run(p, self._rates_of(p), seed) for p, seed in wanted]
        for run, trained in zip(runs, self._take(runs, "points"), strict=True):
            self._found.setdefault(run.place, {})[run.seed] = trained

    def _rows(self) -> list[dict[str, Any]]:
        return [
            result_of(
                place.point,
                place.epsilon,
                self._rates_of(place),
                by_seed,
                self._reference(place.epsilon),
            )
            for place, by_seed in self._found.items()
        ]

    def _reference(self, epsilon: float | None) -> Mapping[int, Trained]:
        return {} if epsilon is None else self._found[_Place(Point(REFERENCE), epsilon)]

    def _take(self, wanted: Sequence[_Run], stage: str) -> list[Trained]:
        """The runs' results; none is taken twice."""
        new = [run for run in dict.fromkeys(wanted) if run not in self._done]
        jobs = [Job(r.place.point, self._noise(r.place), r.rates, r.seed) for r in new]

        def done(number: int, trained: Trained) -> None:
            run = new[number]
            self._done[run] = trained
            epsilon = "" if run.place.epsilon is None else f" ε {run.place.epsilon:g}"
            self._say(
                f"{stage} {number + 1}/{len(new)}: {run.place.point.mechanism}{epsilon} "
                f"{settings_text(run.place.point.described())}, rates {run.rates.tables:g} and "
                f"{run.rates.dense:g}, seed {run.seed}: AUC {trained.auc:.4f}, "
                f"{trained.noised_rows:,.1f} rows a step, {trained.seconds:.0f} s"
            )

        self._pool.take(jobs, done)
        return [self._done[run] for run in wanted]
