"""Rows with a momentum or of half precision: every path against plain operations, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from dist_dp import kernels
from dist_dp.kernels import dispatch, native
from dist_dp.wide_rows import split
from tests.kernels.state_shards import (
    COLUMN_OFFSETS,
    COLUMNS,
    KEY,
    KINDS,
    OFFSETS,
    TO_STEP,
    Shard,
    by_definition,
    lists_are_right,
    lookups,
    owed,
    settle,
    settle_range,
    shards,
    table_set,
    wanted_of,
)

ISAS = native.isas() if native.available() else ()

pytestmark = pytest.mark.skipif(not ISAS, reason="no C++ compiler: there are no compiled kernels")


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("columns", [1, 16, COLUMNS, 130])
def test_lists(isa: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, isa)
    for number, rounds in ((1, 20), (3, 12)):
        with threads(number):
            assert lists_are_right(rounds, columns)


@pytest.mark.parametrize("isa", ISAS)
def test_ranges(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A range gets what its rows would get by list; settled rows in it stay as they are."""
    monkeypatch.setenv(dispatch.VARIABLE, isa)
    for number, shard in enumerate(shards(rows=2600)[:-1]):
        shard.history[::5] = TO_STEP
        wanted = shard.copy()
        rows = torch.arange(13, len(shard.weight) - 4)
        by_definition(wanted, rows[shard.history[rows] < TO_STEP], number)
        for wide in (1, 3):
            found = shard.copy()
            with threads(wide):
                settle_range(found, number, 13, len(shard.weight) - 4)
            found.history[rows] = TO_STEP
            assert found.equals(wanted)


@pytest.mark.parametrize("isa", ISAS)
def test_infinities_and_nan(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come out where they do by definition; which pattern a NaN has is not promised."""
    monkeypatch.setenv(dispatch.VARIABLE, isa)
    some = shards(rows=700)[:5]
    for shard in some:
        values = torch.tensor([torch.inf, -torch.inf, torch.nan]).repeat(len(shard.weight))
        column = values[: len(shard.weight)].unsqueeze(1)
        if shard.low is None:
            shard.weight[:, 1:2] = column
        else:
            shard.weight[:, 1:2], shard.low[:, 1:2] = split(column, shard.weight.dtype)
    ids = lookups(some)
    wanted = wanted_of(some, ids)
    settle(some, ids)
    for found, right in zip(some, wanted, strict=True):
        for a, b in ((found.weight, right.weight), (found.momentum, right.momentum)):
            if a is not None and b is not None:
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_one_rounding() -> None:
    """Stored numbers are within half a unit, and a little, of the exact move."""
    shard = Shard(torch.float32, True, 2000, 16, 3)
    before = shard.copy()
    settle([shard], [torch.arange(2000)])
    transition, noise = owed(True, before.history)
    keys = kernels.momentum_keys(KEY)
    z = [
        kernels.normal(
            key, torch.arange(2000) + OFFSETS[0], before.history, TO_STEP,
            column_offset=COLUMN_OFFSETS[0], num_columns=16,
        ).double()
        for key in keys
    ]  # fmt: skip
    assert before.momentum is not None and shard.momentum is not None
    w, m = before.weight.double(), before.momentum.double()
    (ww, wm, mw, mm), (a, b, c) = transition.T.unsqueeze(2), noise.T.unsqueeze(2)
    for found, exact, terms in (
        (shard.weight, ww * w + wm * m + b * z[0] + c * z[1], ww * w.abs() + wm.abs() * m.abs()),
        (shard.momentum, mw * w + mm * m + a * z[0], mw * w.abs() + mm * m.abs()),
    ):
        unit = torch.nextafter(exact.float().abs(), torch.tensor(torch.inf)).double()
        unit -= exact.float().abs().double()
        small = 2.0**-50 * (terms + 20.0 * noise.abs().sum(1, keepdim=True))
        assert bool(((found.double() - exact).abs() <= 0.5 * unit + small).all())


@pytest.mark.parametrize("isa", ISAS)
def test_the_threads_arithmetic_does_not_matter(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, isa)
    one = Shard(torch.bfloat16, True, 64, 16, 1)
    one.weight.fill_(1e-39)
    assert one.momentum is not None
    one.momentum.fill_(1e-39)
    other = one.copy()
    settle([one], [torch.arange(64)])
    try:
        if not torch.set_flush_denormal(True):
            pytest.skip("this processor cannot flush subnormal numbers")
        settle([other], [torch.arange(64)])
    finally:
        torch.set_flush_denormal(False)
    assert one.equals(other)


def test_nothing_is_written_where_a_number_is_wrong() -> None:
    for number, (dtype, moving) in enumerate(KINDS):
        some = [Shard(dtype, moving, 50, 16, number)]
        made, before = table_set(some), some[0].copy()
        stale = made.take_stale([torch.arange(50)], TO_STEP)
        for part in (0, 1):
            for value in (float("nan"), float("inf"), 1e39, -1.0):
                debt = tuple(t.clone() for t in owed(moving, stale.from_steps))
                debt[part][-1] = value
                if moving and part == 0 and value == -1.0:
                    continue  # a transition may turn signs
                with pytest.raises(ValueError, match="out of range"):
                    made.settle(stale, to_step=TO_STEP, owed=[debt])  # type: ignore[list-item]
        some[0].history.copy_(before.history)
        assert some[0].equals(before)


def test_wrong_arguments() -> None:
    one = Shard(torch.bfloat16, True, 50, 16, 1)
    made = table_set([one])
    stale = made.take_stale([torch.arange(50)], TO_STEP)
    good = owed(True, stale.from_steps)
    with pytest.raises(ValueError, match="1 pairs expected"):
        made.settle(stale, to_step=TO_STEP, owed=[])
    with pytest.raises(ValueError, match="shapes"):
        made.settle(stale, to_step=TO_STEP, owed=[owed(False, stale.from_steps)])
    with pytest.raises(ValueError, match="rounds"):
        made.settle(stale, to_step=TO_STEP, owed=[good], rounds=7)
    with pytest.raises(ValueError, match="out of range"):  # noise over no step
        made.settle(stale, to_step=int(stale.from_steps.min()), owed=[good])
    with pytest.raises(ValueError, match="has no state"):
        settle_range(Shard(torch.float32, False, 50, 16, 1), 0, 0, 50)
    with pytest.raises(ValueError, match="last_row"):
        settle_range(one, 0, 0, 51)
    assert one.momentum is not None and one.low is not None
    assert repr(made) == "StateTableSet(1 shards)" and made.compiled
    one.momentum = one.momentum[:, :8]
    with pytest.raises(ValueError, match="momenta: shape"):
        table_set([one])
    one.momentum = torch.zeros(50, 32)[:, ::2]
    with pytest.raises(ValueError, match="next to each other"):
        table_set([one])
    one.momentum = torch.zeros(50, 16, dtype=torch.float64)
    with pytest.raises(TypeError, match="momenta"):
        table_set([one])
    one.momentum, one.low = None, None
    with pytest.raises(ValueError, match="one for each half-precision weight"):
        table_set([one])
    one.low = torch.zeros(50, 16)
    with pytest.raises(TypeError, match="lows"):
        table_set([one])


def test_without_compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The set says that it is not served: the caller then moves rows in torch."""
    made = table_set(shards())
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    assert not made.compiled and not kernels.compiled_for(torch.device("cpu"))
    with pytest.raises(RuntimeError, match="not serve"):
        settle_range(shards()[0], 0, 0, 50)
