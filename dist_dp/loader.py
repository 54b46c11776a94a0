"""The private loader: Poisson batches, charged before they are drawn, padded to one size."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from dist_dp.distributed import rank, world_size
from dist_dp.errors import ConfigError, DataError
from dist_dp.leases import StepLeases
from dist_dp.sampling import PoissonSampler
from dist_dp.step_state import StepState
from dist_dp.timing import PhaseTimer

Indices = npt.NDArray[np.int64]


class BatchSource(Protocol):
    """Random access to records: what Poisson sampling needs and a stream cannot give."""

    def __len__(self) -> int:
        """Number of records."""

    def fetch(self, indices: Indices, padded_size: int) -> Any:
        """The records of ``indices``, then padding up to ``padded_size`` examples."""


class StoreSource:
    """A data set of :mod:`dist_dp.datasets`; padding has empty bags and touches no row."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        """Number of records."""
        return len(self._dataset)

    def fetch(self, indices: Indices, padded_size: int) -> Any:
        """See :class:`BatchSource`."""
        return self._dataset.batch(indices, padded_size=padded_size)


class DataLoaderSource:
    """The data set and collate function of a torch DataLoader.

    Padding repeats the first record; its gradient is multiplied by zero.

    Args:
        loader: A DataLoader over a map-style data set.

    Raises:
        ConfigError: The loader streams (IterableDataset): a pass over a stream, shuffled or not,
            is not Poisson sampling and may not be accounted as if it were. Or it has a sampler
            that selects or weighs records, which Poisson sampling would not heed.
    """

    def __init__(self, loader: torch.utils.data.DataLoader[Any]) -> None:
        if isinstance(loader.dataset, torch.utils.data.IterableDataset):
            raise ConfigError(
                "data_loader streams its data set (IterableDataset); Poisson sampling needs "
                "random access. Give a DataLoader over a map-style data set, or convert the data "
                "with dist_dp.datasets."
            )
        _refuse_selection(loader)
        self._dataset: Any = loader.dataset
        self._collate: Callable[[Any], Any] = loader.collate_fn

    def __len__(self) -> int:
        """Number of records."""
        return len(self._dataset)

    def fetch(self, indices: Indices, padded_size: int) -> Any:
        """See :class:`BatchSource`."""
        padding = [0] * (padded_size - len(indices))
        return self._collate([self._dataset[int(i)] for i in [*indices.tolist(), *padding]])


def _refuse_selection(loader: torch.utils.data.DataLoader[Any]) -> None:
    """Lets only those samplers pass that would visit every record once."""
    from torch.utils.data import RandomSampler, SequentialSampler

    # With a batch_sampler of the user's, DataLoader has no batch_size.
    chosen: Any = loader.sampler
    if loader.batch_sampler is not None and loader.batch_size is None:
        chosen = loader.batch_sampler
    elif type(chosen) in (SequentialSampler, RandomSampler):
        records = len(loader.dataset)  # type: ignore[arg-type]
        if len(chosen) == records and not getattr(chosen, "replacement", False):
            return
    raise ConfigError(
        f"data_loader has a {type(chosen).__name__} of its own, but batches are drawn by Poisson "
        "sampling from all records of the data set. Select records with torch.utils.data.Subset "
        "and leave the sampler out (a distributed one too: every rank draws from its own range)."
    )


def as_source(data: Any) -> BatchSource:
    """Wraps a torch DataLoader or a data set with ``batch(indices, padded_size=…)``."""
    if isinstance(data, torch.utils.data.DataLoader):
        return DataLoaderSource(data)
    if hasattr(data, "batch"):
        return StoreSource(data)
    raise ConfigError(
        f"data_loader is a {type(data).__name__}; give a torch DataLoader over a map-style data "
        "set, or a data set opened with dist_dp.datasets"
    )


class PoissonLoader:
    """Iterates over the planned steps of a private run.

    Each batch goes to exactly one ``optimizer.step()``. Iteration ends after the planned steps,
    when :meth:`stop` was called, or when the budget is used up (``leases.refusal`` says why).

    Guarantee:
        Every record is in each batch independently with the plan's sample rate (Poisson), over
        this rank's own range of records; ranks are independent, so it is Poisson overall. Empty
        batches are steps like others: they are noised and charged.

    Args:
        source: The records.
        sampler: Draws the sample of each step.
        leases: Charges steps.
        state: Shared with the optimizer.
        steps: Planned steps.
        timer: Where to note the time of phases.
        done: Steps finished before, by a run that is resumed.
    """

    def __init__(
        self,
        source: BatchSource,
        sampler: PoissonSampler,
        leases: StepLeases,
        state: StepState,
        steps: int,
        timer: PhaseTimer | None = None,
        done: int = 0,
    ) -> None:
        if len(source) == 0:
            raise DataError("the training data set is empty")
        self.source = source
        self.leases = leases
        self.steps = steps
        self.timer = timer or PhaseTimer()
        self._sampler = sampler
        self._state = state
        self._stopped = False
        self._done = done

    def __len__(self) -> int:
        """Planned steps."""
        return self.steps

    @property
    def steps_drawn(self) -> int:
        """Steps whose batch was drawn so far."""
        return self._done

    def stop(self) -> None:
        """Ends the iteration before the next batch; call it on every rank."""
        self._stopped = True

    def _read(self, step: int) -> tuple[int, int, Any]:
        start = time.perf_counter()
        indices, padded = self._sampler.local(step, rank(), world_size())
        sampled = time.perf_counter()
        batch = self.source.fetch(indices, padded)
        # In a thread of its own, beside the step before: not part of the critical path.
        self.timer.note("sampling", sampled - start)
        self.timer.note("fetch", time.perf_counter() - sampled)
        return len(indices), padded, batch

    def __iter__(self) -> Iterator[Any]:
        """Yields the batches of the steps that are left."""
        ahead: Future[tuple[int, int, Any]] | None = None
        with ThreadPoolExecutor(1, thread_name_prefix="private-loader") as pool:
            try:
                while self._done < self.steps and not self._stopped:
                    step = self._done + 1
                    with self.timer.phase("ledger"):
                        covered = self.leases.cover(step)
                    if not covered:
                        break
                    with self.timer.phase("data"):
                        reading = ahead or pool.submit(self._read, step)
                        count, padded, batch = reading.result()
                        # Reading one batch ahead hides the data's latency; a batch read and
                        # never yielded has no effect on anything that is kept.
                        ahead = pool.submit(self._read, step + 1) if step < self.steps else None
                    self._state.begin(step, count, padded)
                    self._done = step
                    yield batch
            finally:
                if ahead is not None:
                    ahead.cancel()
                self.leases.close(self._done)
