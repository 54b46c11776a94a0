"""Wrong or extreme arguments: an error that names the argument, or the right result."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from dist_dp import kernels
from dist_dp.kernels import checks, native

KEY = kernels.derive_key(bytes(32), "noise", "table")


@pytest.fixture(params=["native", "reference"])
def checked_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of checking values refuse the same."""
    if request.param == "reference":
        monkeypatch.setenv("DIST_DP_KERNELS", "reference")
    elif not native.available():
        pytest.skip("no C++ compiler: there are no compiled kernels")


def settle(weight: torch.Tensor, **change: object) -> None:
    arguments: dict[str, object] = {
        "rows": torch.tensor([2, 0, 1]), "key": KEY, "to_step": 5,
        "from_steps": torch.zeros(3, dtype=torch.int32), "decay": torch.ones(3),
        "scale": torch.ones(3),
    }  # fmt: skip
    kernels.settle_rows(weight, **(arguments | change))  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore::dist_dp.kernels.SlowKernelsWarning")
@pytest.mark.usefixtures("checked_by")
@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, "rows: row 1 occurs", {"rows": torch.tensor([1, 0, 1])}),
        (ValueError, "rows: row 2 occurs", {"rows": torch.tensor([2, 2, 3])}),
        (IndexError, "rows: row 4", {"rows": torch.tensor([0, 4, 1])}),
        (IndexError, "rows: row -1", {"rows": torch.tensor([0, -1, 1], dtype=torch.int32)}),
        (IndexError, "rows: row 9223372036854775807", {"rows": torch.tensor([0, 2**63 - 1, 1])}),
        (IndexError, "rows: row -9223372036854775808", {"rows": torch.tensor([0, -(2**63), 1])}),
        (TypeError, "rows: dtype", {"rows": torch.tensor([0.0, 1.0, 2.0])}),
        (ValueError, "rows: one dim", {"rows": torch.tensor([[0, 1, 2]])}),
        (ValueError, "scale: nan", {"scale": torch.tensor([1.0, math.nan, 1.0])}),
        (ValueError, "scale: -1", {"scale": torch.tensor([1.0, -1.0, 1.0])}),
        (ValueError, "scale: not finite", {"scale": torch.tensor([1.0, math.inf, 1.0])}),
        (ValueError, "scale: not finite", {"scale": torch.full((3,), 3.5e38, dtype=torch.float64)}),
        (ValueError, "decay: nan", {"decay": torch.tensor([1.0, math.nan, 1.0])}),
        (ValueError, "decay: not finite", {"decay": torch.full((3,), 1e39, dtype=torch.float64)}),
        (ValueError, "decay: -0.5", {"decay": torch.tensor([1.0, -0.5, 1.0])}),
        (ValueError, "from_steps: step 6", {"from_steps": torch.tensor([0, 6, 0])}),
        (ValueError, "from_steps: step -1", {"from_steps": torch.tensor([0, 0, -1])}),
        (ValueError, "from_steps: noise", {"from_steps": torch.tensor([0, 5, 0])}),
        (ValueError, "grid", {"grid": 0.3}),
        (ValueError, "grid", {"grid": math.nan}),
        (ValueError, "grid", {"grid": -0.5}),
        (ValueError, "grid", {"grid": 2.0**-140}),
        (TypeError, "grid", {"grid": "fine"}),
        (ValueError, "rounding", {"rounding": "up"}),
        (ValueError, "rounds", {"rounds": 10}),
        (ValueError, "key", {"key": bytes(16)}),
    ],
)
def test_refused_before_the_first_write(
    error: type[Exception], message: str, change: dict[str, object]
) -> None:
    weight = torch.ones(4, 2)
    with pytest.raises(error, match=message):
        settle(weight, **change)
    assert torch.equal(weight, torch.ones(4, 2))


@pytest.mark.parametrize(
    "view",
    [
        torch.ones(1, 2).expand(4, 2),
        torch.ones(8).as_strided((4, 2), (1, 1)),
        torch.ones(8).as_strided((4, 2), (0, 1)),
        torch.ones(9).as_strided((4, 3), (2, 1)),
    ],
)
def test_overlapping_memory_is_refused(view: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="share memory"):
        settle(view)


def test_views_that_do_not_overlap_are_accepted() -> None:
    for view in (
        torch.zeros(4, 6)[:, ::3],
        torch.zeros(2, 4).t(),
        torch.zeros(4, 1),
        torch.zeros(20).as_strided((4, 2), (5, 2)),
        torch.zeros(8).as_strided((1, 2), (0, 1)).expand(1, 2),
    ):
        rows = torch.arange(view.shape[0])
        kernels.settle_rows(view, rows, key=KEY, from_steps=0, to_step=1, decay=1.0, scale=1.0)
        expected = kernels.normal(KEY, rows, 0, 1, num_columns=view.shape[1])
        assert torch.equal(view, expected)


def test_grid_needs_float32() -> None:
    with pytest.raises(TypeError, match="grid: goes with float32"):
        settle(torch.ones(4, 2, dtype=torch.bfloat16), grid=0.5)


def test_largest_factors_are_accepted() -> None:
    largest = torch.finfo(torch.float32).max
    weight = torch.zeros(4, 2)
    settle(weight, scale=torch.full((3,), largest), decay=torch.full((3,), largest).double())
    assert weight[3].eq(0).all() and weight[:3].abs().gt(1e30).all()


def test_repeats_are_found_however_many_rows_there_are() -> None:
    """By a bit for each row of a small table, by hashing in a large one."""
    for num_rows in (500, 2**30):
        weight = torch.empty(1, 1).expand(num_rows, 1)  # never written
        rows = torch.randperm(500)
        update = kernels.updates.Update(
            weight=weight, rows=rows, first_row=0, count=500, key=KEY, row_offset=0,
            column_offset=0, from_steps=torch.zeros(1, dtype=torch.int64).expand(500), to_step=1,
            decay=torch.ones(1).expand(500), scale=torch.ones(1).expand(500), rounds=20,
            stochastic=False, grid=0.0,
        )  # fmt: skip
        if native.available():
            assert native.is_valid(update)
        checks.values(update)
        for first, second in ((0, 499), (17, 18), (499, 3)):
            wrong = rows.clone()
            wrong[first] = wrong[second]
            if native.available():
                assert not native.is_valid(replace(update, rows=wrong))
            with pytest.raises(ValueError, match="occurs more than once"):
                checks.values(replace(update, rows=wrong))


def test_nothing_to_do() -> None:
    none = torch.empty(0, dtype=torch.int64)
    for weight in (torch.ones(0, 3), torch.ones(4, 0), torch.ones(4, 3)):
        before = weight.clone()
        for options in ({}, {"grid": 0.25}):
            kernels.settle_rows(
                weight, none, key=KEY, from_steps=none, to_step=1, decay=1.0, scale=1.0, **options
            )
            if weight.numel() == 0:
                kernels.settle_range(
                    weight, key=KEY, from_steps=0, to_step=1, decay=1.0, scale=1.0, **options
                )
        assert torch.equal(weight, before)


def test_more_than_two_to_the_31_elements() -> None:
    """A table of 8.6 GB, of which only the pages touched take memory."""
    num_rows, columns = 2**25 + 100, 64
    assert num_rows * columns > 2**31
    weight = torch.empty(num_rows, columns)
    rows = torch.tensor([num_rows - 1, 2**25 + 1, 5, 2**24])
    weight[rows] = 0.0
    kernels.settle_rows(weight, rows, key=KEY, from_steps=0, to_step=1, decay=1.0, scale=1.0)
    expected = kernels.normal(KEY, rows, 0, 1, num_columns=columns)
    assert torch.equal(weight[rows], expected)
    first = num_rows - 50
    weight[first:] = 0.0
    kernels.settle_range(
        weight, key=KEY, from_steps=1, to_step=2, decay=1.0, scale=1.0, first_row=first
    )
    expected = kernels.normal(KEY, torch.arange(first, num_rows), 1, 2, num_columns=columns)
    assert torch.equal(weight[first:], expected)
    with pytest.raises(IndexError, match=f"row {num_rows} is outside"):
        kernels.settle_rows(
            weight, rows + 1, key=KEY, from_steps=0, to_step=1, decay=1.0, scale=1.0
        )


def freed(tensor: torch.Tensor) -> torch.Tensor:
    tensor.untyped_storage().resize_(0)
    return tensor


class Wrapper(torch.Tensor):
    """A tensor that keeps its numbers elsewhere, as DTensor does."""

    @staticmethod
    def __new__(cls, shape: tuple[int, ...]) -> Wrapper:
        made: Wrapper = torch.Tensor._make_wrapper_subclass(cls, shape)  # type: ignore[attr-defined]
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), options=None):  # type: ignore[no-untyped-def]
        raise AssertionError("not reached")


def test_tensors_without_ordinary_memory_are_refused() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode()
    for weight in (
        mode.from_tensor(torch.ones(4, 2)),
        Wrapper((4, 2)),
        torch.empty(4, 2, device="meta"),
        torch._efficientzerotensor((4, 2)),
        freed(torch.ones(4, 2)),
        torch.ones(4, 2, dtype=torch.complex64).conj().imag,
        torch.ones(4, 2).to_sparse(),
    ):
        with pytest.raises((TypeError, ValueError), match="weight"):
            settle(weight)
    for name, value in (
        ("rows", freed(torch.tensor([2, 0, 1]))),
        ("rows", mode.from_tensor(torch.tensor([2, 0, 1]))),
        ("from_steps", freed(torch.zeros(3, dtype=torch.int32))),
        ("decay", freed(torch.ones(3))),
        ("scale", torch._efficientzerotensor((3,))),
    ):
        weight = torch.ones(4, 2)
        with pytest.raises((TypeError, ValueError), match=name):
            settle(weight, **{name: value})
        assert torch.equal(weight, torch.ones(4, 2))


def test_add_normal_writes_nothing_when_it_refuses() -> None:
    for change in ({"scale": torch.ones(2)}, {"from_step": torch.tensor([0, 0])}, {"scale": -1.0}):
        tensor = torch.zeros(2053)
        with pytest.raises((TypeError, ValueError), match=next(iter(change))):
            kernels.add_normal(
                tensor, **({"key": KEY, "from_step": 0, "to_step": 1, "scale": 1.0} | change)
            )
        assert not tensor.any()


def test_subnormal_noise_over_no_step_is_refused_in_any_mode() -> None:
    weight, scale = torch.ones(4, 2), torch.full((3,), 1e-40)
    try:
        if not torch.set_flush_denormal(True):
            pytest.skip("this processor cannot flush subnormal numbers")
        with pytest.raises((ValueError, AssertionError)):
            settle(weight, from_steps=5, scale=scale)
    finally:
        torch.set_flush_denormal(False)
