"""The training runs of ``dist-dp bench sparsity``: each by itself, or several processes at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from dist_dp.cluster.bench.sparsity_data import (
    COLLECTION,
    SparsityData,
    generate,
    read,
    write_counts,
)
from dist_dp.cluster.bench.sparsity_settings import EXPONENTIAL, Point, SparsitySettings
from dist_dp.cluster.bench.sparsity_training import Rates, Trained, train
from dist_dp.plan import Mechanism, PrivacyPlan
from dist_dp.public_counts import public_rows
from dist_dp.sampled_selection import SampledSelection, calibrated


@dataclass(frozen=True)
class Job:
    """One training run.

    Attributes:
        point: Mechanism and settings.
        noise_multiplier: σ; None for ``none``.
        rates: Learning rates.
        seed: Of weights, batches and noise.
    """

    point: Point
    noise_multiplier: float | None
    rates: Rates
    seed: int


class Runs:
    """Takes jobs on one data set.

    Args:
        settings: What is measured.
        folder: For the store of a real set and the public counts.
    """

    def __init__(self, settings: SparsitySettings, folder: Path) -> None:
        self.settings = settings
        self.data = load(settings, folder)
        self.counts = folder / f"public-counts-{os.getpid()}.parquet"
        write_counts(self.data, self.counts)

    def plan(self, point: Point, noise_multiplier: float | None) -> PrivacyPlan:
        """The plan of a point."""
        settings, records = self.settings, len(self.data.train)
        return PrivacyPlan(
            mechanism=cast(Mechanism, point.planned_as),
            noise_multiplier=noise_multiplier,
            max_grad_norm=settings.max_grad_norm,
            num_records=records,
            expected_batch_size=min(settings.batch, records),
            steps=settings.steps,
            delta=None if noise_multiplier is None else settings.delta(records),
            sparse=point.sparse(str(self.counts)),
        )

    def noise_multiplier(self, epsilon: float) -> float:
        """σ at which all steps together cost ε, whatever the mechanism: public counts are free."""
        plan = self.plan(Point("lazydp"), None)
        found = plan.calibrate(epsilon, self.settings.delta(len(self.data.train))).noise_multiplier
        assert found is not None
        return found

    def exponential_cost(self, point: Point, epsilon: float) -> SampledSelection:
        """A step with exponential selection, of which all together cost ε."""
        assert point.share is not None and point.selections is not None
        plan = self.plan(Point("lazydp"), None)
        return calibrated(
            epsilon,
            self.settings.delta(len(self.data.train)),
            plan.sample_rate,
            plan.steps,
            share=point.share,
            selections=point.selections,
        )

    def take(self, job: Job) -> Trained:
        """One run."""
        plan = self.plan(job.point, job.noise_multiplier)
        model, cost = self.settings.model, None
        if job.point.mechanism == EXPONENTIAL:
            assert job.point.share is not None and job.point.selections is not None
            assert job.noise_multiplier is not None
            cost = SampledSelection(
                job.noise_multiplier, job.point.share, job.point.selections, plan.sample_rate
            )
        kept = self._kept(plan)
        return train(self.data, model, plan, job.rates, seed=job.seed, kept=kept, cost=cost)

    def _kept(self, plan: PrivacyPlan) -> dict[str, Tensor] | None:
        if plan.sparse is None or plan.sparse.rows is None:
            return None
        sizes = {f"{COLLECTION}.{t}": n for t, n in self.data.schema.table_rows().items()}
        rows = plan.sparse.rows_to_choose(sizes)
        return public_rows(self.counts, sizes, rows)


def load(settings: SparsitySettings, folder: Path) -> SparsityData:
    """The records of the settings."""
    if settings.path is not None:
        cap = {} if settings.max_rows is None else {"max_num_embeddings": settings.max_rows}
        return read(settings.path, settings.format, folder / "store", cap)
    return generate(
        settings.records,
        settings.other_records,
        seed=settings.data_seed,
        cardinalities=settings.cardinalities,
    )


_RUNS: list[Runs] = []
"""Of a worker process."""


def _start(settings: SparsitySettings, folder: Path) -> None:
    torch.set_num_threads(1)
    _RUNS.append(Runs(settings, folder))


def _take(job: Job) -> Trained:
    return _RUNS[0].take(job)


class Pool:
    """Takes many jobs, in this process or in several others.

    Every process has the records and at most one model at a time: results do not depend on how
    many there are.

    Args:
        runs: For this process.
        folder: See :class:`Runs`.
        workers: Processes; 1 for this one.
    """

    def __init__(self, runs: Runs, folder: Path, workers: int = 1) -> None:
        self._runs = runs
        self._pool: Any = None
        if workers > 1:
            self._pool = ProcessPoolExecutor(
                workers,
                mp_context=get_context("spawn"),
                initializer=_start,
                initargs=(runs.settings, folder),
            )

    def take(self, jobs: Sequence[Job], done: Callable[[int, Trained], None]) -> None:
        """Takes all jobs.

        Args:
            jobs: What to run.
            done: Given the number of each, in order, and what it came to.
        """
        for number, trained in enumerate(self._results(jobs)):
            done(number, trained)

    def _results(self, jobs: Sequence[Job]) -> Iterator[Trained]:
        if self._pool is None:
            return (self._runs.take(job) for job in jobs)
        results: Iterator[Trained] = self._pool.map(_take, jobs)
        return results

    def close(self) -> None:
        """Ends the processes."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
