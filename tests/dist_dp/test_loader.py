"""The private loader and its leases: charged first, then drawn, one step a batch."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from dist_dp.errors import ConfigError, DataError, DistDpError, LedgerError
from dist_dp.leases import StepLeases
from dist_dp.loader import DataLoaderSource, PoissonLoader, StoreSource, as_source
from dist_dp.sampling import PoissonSampler
from dist_dp.step_state import StepState
from tests.dist_dp.placement import OpenHanded, records

SECRET = bytes(range(32))


class Numbers(Dataset[int]):
    def __init__(self, count: int = 50) -> None:
        self.count = count
        self.log: list[Any] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        self.log.append(index)
        return index


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(5))


def loader(
    steps: int = 6, rate: float = 0.2, lease: int = 2, budget: int = 10**6, data: Any = None
) -> tuple[PoissonLoader, StepState, OpenHanded]:
    data = data or DataLoader(Numbers(), batch_size=10)
    accountant, state = OpenHanded(budget), StepState()
    source = as_source(data)
    leases = StepLeases(accountant, "run", steps, lease)
    sampler = PoissonSampler(SECRET, len(source), rate)
    return PoissonLoader(source, sampler, leases, state, steps), state, accountant


def test_batches_are_the_samples_padded() -> None:
    made, state, _ = loader()
    sampler = PoissonSampler(SECRET, 50, 0.2)
    assert len(made) == 6
    for step, batch in enumerate(made, start=1):
        wanted = sampler.sample(step)
        assert state.batch_size == len(wanted)
        assert batch[: len(wanted)].tolist() == wanted.tolist()
        assert state.take(len(batch)).sum() == len(wanted)
        state.finish()
    assert made.steps_drawn == 6


def test_an_empty_sample_is_a_step_of_padding() -> None:
    made, state, _ = loader(steps=20, rate=0.01)
    sizes = []
    for batch in made:
        sizes.append(state.batch_size)
        assert len(batch) == max(1, state.batch_size)
        assert int(state.take(len(batch)).sum()) == state.batch_size
        state.finish()
    assert len(sizes) == 20 and 0 in sizes


def test_a_store_pads_with_empty_bags() -> None:
    source = as_source(records())
    assert isinstance(source, StoreSource) and len(source) == 40
    batch = source.fetch(np.array([3, 7]), 4)
    assert len(batch) == 4
    for features in batch.sparse:
        assert int(features.lengths().view(len(features.keys()), 4)[:, 2:].sum()) == 0


def test_the_charge_comes_before_the_draw() -> None:
    numbers = Numbers()
    made, state, accountant = loader(data=DataLoader(numbers, batch_size=10))
    order: list[str] = []
    reserve = accountant.reserve

    def noting(*args: Any) -> Any:
        lease = reserve(*args)
        order.append(f"charge {args[1]}..{args[1] + args[2] - 1}")
        return lease

    accountant.reserve = noting  # type: ignore[method-assign]
    for step, batch in enumerate(made, start=1):
        order.append(f"draw {step}")
        state.take(len(batch))
        state.finish()
    # The next lease is asked for in the second step of two, before that is drawn or after.
    for first in (1, 3, 5):
        assert order.index(f"charge {first}..{first + 1}") < order.index(f"draw {first}")
    assert len(order) == 9
    assert [c for c in accountant.calls if c[0] == "settle"] == [
        ("settle", "lease-1", 2),
        ("settle", "lease-3", 2),
        ("settle", "lease-5", 2),
    ]


def test_what_never_began_is_given_back() -> None:
    made, state, accountant = loader(lease=5)
    for batch in made:
        state.take(len(batch))
        state.finish()
        if state.step == 2:
            made.stop()
    assert accountant.calls == [("reserve", 1, 5), ("settle", "lease-1", 2)]


@pytest.mark.parametrize("how", ["break", "error"])
def test_a_loop_that_ends_early_keeps_the_ledger_right(how: str) -> None:
    made, state, accountant = loader(lease=5)

    def train() -> None:
        for batch in made:
            state.take(len(batch))
            state.finish()
            if state.step == 3:
                if how == "break":
                    break
                raise KeyboardInterrupt

    if how == "break":
        train()
    else:
        with pytest.raises(KeyboardInterrupt) as error:
            train()
        del error
    gc.collect()
    # One for the next steps was under way.
    assert accountant.calls[-2:] == [("settle", "lease-1", 3), ("settle", "lease-6", 0)]
    # Going on starts where the first loop ended.
    steps = []
    for batch in made:
        steps.append(state.step)
        state.take(len(batch))
        state.finish()
    assert steps == [4, 5, 6]


def test_a_used_up_budget_ends_the_iteration() -> None:
    made, state, accountant = loader(budget=4)
    drawn = 0
    for batch in made:
        state.take(len(batch))
        state.finish()
        drawn += 1
    assert drawn == 4
    assert made.leases.refusal == "the budget of data set 'clicks' is used up"
    assert ("reserve", 5, 2) in accountant.calls and made.leases.epsilon_charged == 0.5


def test_other_errors_of_the_ledger_reach_the_user() -> None:
    made, _, accountant = loader()

    def broken(*_: Any) -> Any:
        raise LedgerError("the ledger is locked")

    accountant.reserve = broken  # type: ignore[method-assign]
    with pytest.raises(LedgerError, match="locked"):
        next(iter(made))


def test_one_step_a_batch() -> None:
    made, _, _ = loader()
    batches = iter(made)
    next(batches)
    with pytest.raises(DistDpError, match="drawn but never stepped"):
        next(batches)


def test_what_cannot_be_sampled() -> None:
    with pytest.raises(ConfigError, match=r"IterableDataset.*random access"):
        DataLoaderSource(DataLoader(Stream(), batch_size=2))
    with pytest.raises(ConfigError, match="data_loader is a list"):
        as_source([1, 2])
    with pytest.raises(DataError, match="empty"):
        PoissonLoader(
            as_source(DataLoader(Numbers(0))),
            PoissonSampler(SECRET, 1, 0.5),
            StepLeases(OpenHanded(), "run", 1),
            StepState(),
            1,
        )
    with pytest.raises(ValueError, match="accountant"):
        StepLeases(None, "run", 1)


DATA = Numbers()
SELECTIONS: dict[str, dict[str, Any]] = {
    "SubsetRandomSampler": {"sampler": SubsetRandomSampler(range(10))},
    "WeightedRandomSampler": {"sampler": WeightedRandomSampler([1.0] * 50, 50)},
    "DistributedSampler": {"sampler": DistributedSampler(DATA, num_replicas=2, rank=0)},
    "RandomSampler": {"sampler": RandomSampler(DATA, num_samples=10)},
    "RandomSampler with replacement": {"sampler": RandomSampler(DATA, replacement=True)},
    "SequentialSampler": {"sampler": SequentialSampler(range(10))},
    "BatchSampler": {"batch_sampler": BatchSampler(SequentialSampler(range(10)), 5, False)},
}


@pytest.mark.parametrize("case", SELECTIONS)
def test_a_selection_by_sampler_is_refused(case: str) -> None:
    with pytest.raises(ConfigError, match=rf"a {case.split()[0]} of its own.*data\.Subset"):
        as_source(DataLoader(DATA, **SELECTIONS[case]))


@pytest.mark.parametrize("options", [{}, {"shuffle": True}, {"sampler": RandomSampler(DATA)}])
def test_every_record_once_is_no_selection(options: dict[str, Any]) -> None:
    assert len(as_source(DataLoader(DATA, batch_size=10, **options))) == 50
    assert len(as_source(DataLoader(Subset(DATA, range(10)), batch_size=5))) == 10
