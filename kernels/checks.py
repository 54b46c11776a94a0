"""Argument checks of the kernels' face. Each error names the argument."""

from __future__ import annotations

import math
import operator

import torch

from dist_dp.kernels.chacha import KEY_BYTES, ROUNDS
from dist_dp.kernels.request import Update, rounded_up

MAX_STEP = 2**31 - 1
MAX_ROWS = 2**48
MAX_COLUMNS = 16 * 2**13


def key(value: bytes, name: str = "key") -> bytes:
    """A key is 32 bytes."""
    if not isinstance(value, bytes):
        raise TypeError(f"{name}: bytes expected, {type(value).__name__} given")
    if len(value) != KEY_BYTES:
        raise ValueError(f"{name}: {KEY_BYTES} bytes expected, {len(value)} given")
    return value


def rounds(value: int) -> int:
    """20, 12 or 8."""
    if isinstance(value, bool) or not isinstance(value, int) or value not in ROUNDS:
        raise ValueError(f"rounds: one of {ROUNDS} expected, {value} given")
    return value


def integer(value: int, name: str, low: int, high: int) -> int:
    """An integer in [low, high]."""
    try:
        number = operator.index(value)
    except TypeError:
        kind = type(value).__name__
        raise TypeError(f"{name}: an integer expected, {kind} given") from None
    if not low <= number <= high:
        raise ValueError(f"{name}: {number} is outside [{low}, {high}]")
    return number


def columns(column_offset: int, num_columns: int) -> tuple[int, int]:
    """A range of columns whose blocks of 16 have 13-bit numbers."""
    offset = integer(column_offset, "column_offset", 0, MAX_COLUMNS)
    number = integer(num_columns, "num_columns", 0, MAX_COLUMNS)
    if offset + number > MAX_COLUMNS:
        raise ValueError(
            f"column_offset + num_columns: {offset + number} is above {MAX_COLUMNS}, "
            "the most columns a table can have"
        )
    return offset, number


def ordinary(value: torch.Tensor, name: str) -> None:
    """A tensor whose numbers lie in its memory: the kernels are handed addresses."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: a tensor expected, {type(value).__name__} given")
    kind = type(value)
    if kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise TypeError(f"{name}: {kind.__name__} is no ordinary tensor; pass its local tensor")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: a strided tensor expected, {value.layout} given")
    if value.is_meta or torch._is_functional_tensor(value) or value._is_zerotensor():
        raise TypeError(f"{name}: a tensor without memory of its own cannot be used here")
    if value.is_neg() or value.is_conj():
        raise ValueError(f"{name}: a lazily negated view; call resolve_neg() first")
    if value.numel():
        spans = ((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
        end = (value.storage_offset() + 1 + sum(spans)) * value.element_size()
        if end > value.untyped_storage().nbytes() or value.data_ptr() == 0:
            raise ValueError(f"{name}: its storage has been freed or is too small")


def single(value: object, name: str) -> None:
    """One number, not one for each row."""
    if isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: one number expected, a tensor given")


def integers(value: torch.Tensor, name: str) -> torch.Tensor:
    """A one-dimensional tensor of integers."""
    ordinary(value, name)
    if value.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: dtype int64 or int32 expected, {value.dtype} given")
    if value.dim() != 1:
        raise ValueError(f"{name}: one dimension expected, shape {tuple(value.shape)} given")
    return value.detach()


def rows(value: torch.Tensor, name: str, limit: int) -> torch.Tensor:
    """Row numbers int64 [n], each in [0, limit)."""
    numbers = integers(value, name).to(torch.int64)
    if numbers.numel():
        low, high = (int(x) for x in torch.aminmax(numbers))
        if low < 0 or high >= limit:
            raise IndexError(f"{name}: row {low if low < 0 else high} is outside [0, {limit})")
    return numbers


def unique(value: torch.Tensor, name: str) -> None:
    """No row twice: it would be settled twice, with the same noise."""
    if bool((value[1:] > value[:-1]).all()):
        return
    ordered = value.sort().values
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if repeated.numel():
        raise ValueError(
            f"{name}: row {int(repeated[0])} occurs more than once; pass each row once "
            "(torch.unique)"
        )


def steps(value: torch.Tensor | int, count: int, to_step: int) -> torch.Tensor:
    """The steps from which rows are settled, integers [count]; a single one must be in range."""
    if isinstance(value, torch.Tensor):
        numbers = integers(value, "from_steps")
        if numbers.numel() != count:
            raise ValueError(f"from_steps: {count} entries expected, {numbers.numel()} given")
        return numbers
    number = integer(value, "from_steps", 0, MAX_STEP)
    if number > to_step:
        raise ValueError(f"from_steps: step {number} is after to_step = {to_step}")
    return torch.tensor([number], dtype=torch.int64).expand(count)


def step_values(numbers: torch.Tensor, to_step: int) -> None:
    """Every step in [0, to_step]."""
    if numbers.numel():
        low, high = (int(x) for x in torch.aminmax(numbers))
        if low < 0 or high > to_step:
            wrong = low if low < 0 else high
            raise ValueError(f"from_steps: step {wrong} is outside [0, to_step = {to_step}]")


def factor(
    value: torch.Tensor | float, name: str, count: int, device: torch.device
) -> torch.Tensor:
    """Factors float32 or float64 [count] on `device`; their values are checked later."""
    if isinstance(value, torch.Tensor):
        ordinary(value, name)
        given = value.detach()
        if given.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name}: dtype float32 or float64 expected, {given.dtype} given")
        if given.shape != (count,):
            raise ValueError(f"{name}: shape ({count},) expected, {tuple(given.shape)} given")
        if given.device != device:
            raise ValueError(f"{name}: is on {given.device}, the weight is on {device}")
        return given
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: a number or tensor expected, {type(value).__name__} given")
    if not math.isfinite(value):
        raise ValueError(f"{name}: {value} is not a finite number")
    return torch.tensor([float(value)], dtype=torch.float64, device=device).expand(count)


def factor_values(given: torch.Tensor, name: str, as_float32: torch.Tensor) -> None:
    """Not negative, not NaN, and finite as float32."""
    if not bool((given >= 0).all()):  # NaN is caught here too
        wrong = given[~(given >= 0)][0].item()
        raise ValueError(f"{name}: {wrong} given; a number of at least 0 expected")
    if not bool(torch.isfinite(as_float32).all()):
        raise ValueError(f"{name}: not finite in float32")


def spacing(value: float | None, dtype: torch.dtype) -> float:
    """A grid's spacing: 0 for none, else a power of two that float32 weights can have."""
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"grid: a number or None expected, {type(value).__name__} given")
    if not (math.isfinite(value) and value > 0 and math.frexp(value)[0] == 0.5):
        raise ValueError(f"grid: {value} given; a power of two such as 2**-20 expected")
    if not 2.0**-100 <= value <= 2.0**100:
        raise ValueError(f"grid: {value} is outside [2^-100, 2^100]")
    if dtype != torch.float32:
        raise TypeError(f"grid: goes with float32 weights, {dtype} given")
    return float(value)


def rounding(value: str) -> bool:
    """Whether half precision is rounded at random."""
    if value not in ("stochastic", "nearest"):
        raise ValueError(f"rounding: 'stochastic' or 'nearest' expected, {value!r} given")
    return value == "stochastic"


def table(value: torch.Tensor, name: str = "weight") -> torch.Tensor:
    """A matrix that can be written in place: float32, bfloat16 or float16."""
    dense(value, name, (torch.float32, torch.bfloat16, torch.float16))
    if value.dim() != 2:
        raise ValueError(f"{name}: two dimensions expected, shape {tuple(value.shape)} given")
    if value.shape[0] > MAX_ROWS:
        raise ValueError(f"{name}: {value.shape[0]} rows given, at most 2^48 can be numbered")
    return value.detach()


def dense(
    value: torch.Tensor, name: str, dtypes: tuple[torch.dtype, ...] = (torch.float32,)
) -> torch.Tensor:
    """A tensor no two elements of which share memory."""
    ordinary(value, name)
    if value.dtype not in dtypes:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name}: dtype {wanted} expected, {value.dtype} given")
    if _overlaps(value):
        raise ValueError(
            f"{name}: elements of this view share memory (expanded or overlapping strides), so it "
            "cannot be updated in place; clone it first"
        )
    return value.detach()


def _overlaps(value: torch.Tensor) -> bool:
    """Whether two elements may share memory: strides must grow past what they step over."""
    reach = 1
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size > 1:
            if stride < reach:
                return value.numel() > 1
            reach = stride * (size - 1) + reach
    return False


def noisy_steps(from_steps: torch.Tensor, to_step: int, scale: torch.Tensor | None = None) -> None:
    """Noise belongs to an interval of at least one step."""
    empty = from_steps == to_step
    if scale is not None:
        empty = empty & (scale.to(from_steps.device) > 0)
    if bool(empty.any()):
        raise ValueError(
            f"from_steps: noise asked for over no step at all (from and to are both {to_step})"
        )


def values(update: Update) -> None:
    """Check the numbers in an update's columns, with a message for the first fault."""
    if update.rows is not None:
        rows(update.rows, "rows", update.weight.shape[0])
        unique(update.rows, "rows")
    step_values(update.from_steps, update.to_step)
    factor_values(update.decay, "decay", update.decay.to(torch.float32))
    factor_values(update.scale, "scale", rounded_up(update.scale))
    noisy_steps(update.from_steps, update.to_step, update.scale)
