"""The private loader: Poisson batches, charged before they are drawn, padded to one size."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from dist_dp.clipping.user_groups import UserGroups
from dist_dp.distributed import rank, world_size
from dist_dp.errors import ConfigError, DataError
from dist_dp.leases import StepLeases
from dist_dp.sampling import SamplePart
from dist_dp.step_state import StepState
from dist_dp.timing import PhaseTimer

Indices = npt.NDArray[np.int64]


class BatchSource(Protocol):
    """Random access to records: what Poisson sampling needs and a stream cannot give."""

    def __len__(self) -> int:
        """Number of records."""

    def fetch(self, indices: Indices, padded_size: int) -> Any:
        """The records of ``indices``, then padding up to ``padded_size`` examples."""


class StepSampler(Protocol):
    """Draws a step's sample: :class:`~dist_dp.sampling.PoissonSampler` or ``UserSampler``."""

    def parts(
        self, step: int, rank: int, world_size: int, most: int | None = None
    ) -> list[SamplePart]:
        """This rank's part of the sample, cut into as many parts on every rank."""


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


@dataclass(frozen=True)
class _Part:
    """A step's batch, or one of its micro-batches: the first ``num_real`` of ``size`` count."""

    number: int
    is_last: bool
    num_real: int
    size: int
    users: UserGroups | None
    batch: Any


class PoissonLoader:
    """Iterates over the planned steps of a private run.

    Each batch goes to exactly one ``optimizer.step()``. Iteration ends after the planned steps,
    when :meth:`stop` was called, or when the budget is used up (``leases.refusal`` says why).

    With ``micro_batch_size`` the Poisson batch of a step comes in parts, one after another, as
    many on every rank; the optimizer clips and adds them up, and takes the step with the last one
    (``optimizer.is_accumulating`` is true before). A step costs the ledger the same either way.

    Guarantee:
        Every unit (record or user) is in each batch independently with the plan's sample rate
        (Poisson), over this rank's own range of units; ranks are independent, so it is Poisson
        overall. The records of a user that is drawn come together, and the optimizer is told how
        many each user has. Empty batches are steps like others: they are noised and charged.

    Args:
        source: The records.
        sampler: Draws the sample of each step.
        leases: Charges steps.
        state: Shared with the optimizer.
        steps: Planned steps.
        timer: Where to note the time of phases.
        done: Steps finished before, by a run that is resumed.
        micro_batch_size: Most examples that a rank gets at a time; by default the whole batch.
    """

    def __init__(
        self,
        source: BatchSource,
        sampler: StepSampler,
        leases: StepLeases,
        state: StepState,
        steps: int,
        timer: PhaseTimer | None = None,
        done: int = 0,
        micro_batch_size: int | None = None,
    ) -> None:
        if len(source) == 0:
            raise DataError("the training data set is empty")
        if micro_batch_size is not None and micro_batch_size < 1:
            raise ConfigError(f"micro_batch_size is {micro_batch_size}; give at least 1, or None")
        self.source = source
        self.leases = leases
        self.steps = steps
        self.timer = timer or PhaseTimer()
        self._sampler = sampler
        self._state = state
        self._stopped = False
        self._done = done
        self._micro_batch_size = micro_batch_size
        self._ahead: Future[_Part] | None = None
        # The sample of one step, for the thread that reads.
        self._sample: tuple[int, list[SamplePart]] = (0, [])

    def __len__(self) -> int:
        """Planned steps; micro-batches are not counted."""
        return self.steps

    @property
    def steps_drawn(self) -> int:
        """Steps whose batch was drawn so far."""
        return self._done

    def peek(self) -> Any | None:
        """The (micro-)batch that comes next, None if this is the last; waits until it is read.

        It is charged when the iteration gives it, not before: nothing computed from it may leave.
        """
        return None if self._ahead is None or self._stopped else self._ahead.result().batch

    def stop(self) -> None:
        """Ends the iteration before the next step's batch; call it on every rank."""
        self._stopped = True

    def _read(self, step: int, number: int) -> _Part:
        """One part of a step's batch."""
        start = time.perf_counter()
        if self._sample[0] != step:
            limit = self._micro_batch_size
            self._sample = (step, self._sampler.parts(step, rank(), world_size(), limit))
        parts = self._sample[1]
        mine = parts[number]
        users = None
        if mine.user_sizes is not None:
            users = UserGroups(torch.from_numpy(mine.user_sizes), mine.padded_size)
        sampled = time.perf_counter()
        batch = self.source.fetch(mine.records, mine.padded_size)
        # In a thread of its own, beside the step before: not part of the critical path.
        self.timer.note("sampling", sampled - start)
        self.timer.note("fetch", time.perf_counter() - sampled)
        is_last = number == len(parts) - 1
        return _Part(number, is_last, len(mine.records), mine.padded_size, users, batch)

    def __iter__(self) -> Iterator[Any]:
        """Yields the batches of the steps that are left."""
        with ThreadPoolExecutor(1, thread_name_prefix="private-loader") as pool:
            try:
                step, number = self._done + 1, 0
                while number > 0 or (step <= self.steps and not self._stopped):
                    if number == 0:
                        with self.timer.phase("ledger"):
                            covered = self.leases.cover(step)
                        if not covered:
                            break
                    with self.timer.phase("data"):
                        part = (self._ahead or pool.submit(self._read, step, number)).result()
                        following = (step + 1, 0) if part.is_last else (step, number + 1)
                        # Reading one batch ahead hides the data's latency; a batch read and
                        # never yielded has no effect on anything that is kept.
                        more = following[0] <= self.steps
                        self._ahead = pool.submit(self._read, *following) if more else None
                    self._state.begin(
                        step,
                        part.num_real,
                        part.size,
                        part=number,
                        is_last=part.is_last,
                        users=part.users,
                    )
                    self._done = step
                    yield part.batch
                    step, number = following
            finally:
                if self._ahead is not None:
                    self._ahead.cancel()
                    self._ahead = None
                self.leases.close(self._done)
