"""Shards whose rows are more than a float32 weight, settled as `dist_dp.kernels.tables` does.

A row with a momentum moves by a 2x2 transition and a draw of two normals a coordinate; a
half-precision row is settled in its float32 value, which the weight and the rest of it, `low`, hold
together. All tables of a lookup, those without a state too, still take two calls.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.autograd.graph import increment_version

from dist_dp.kernels import checks, dispatch, native, native_states
from dist_dp.kernels.draws import derive_key
from dist_dp.kernels.graphs import outside_graphs
from dist_dp.kernels.native_states import Owed
from dist_dp.kernels.tables import ShardSet, Stale

LOW_DTYPES = {torch.bfloat16: torch.int16, torch.float16: torch.float32}
"""What is kept beside a half-precision weight: of bfloat16 the difference between the bit patterns
of the float32 value and the weight, of float16 the float32 value."""


def momentum_keys(key: bytes) -> tuple[bytes, bytes]:
    """The keys of z_1, which momentum and weight share, and of z_2, the weight's own."""
    first, second = (derive_key(key, "momentum", name) for name in ("1", "2"))
    return first, second


class StateTableSet(ShardSet):
    """Shards of any kind described once, to be settled many times by the compiled kernels.

    Args:
        weights: as for `TableSet`, with neighbouring columns.
        histories: likewise.
        keys: each table's key. A table with a momentum draws under `momentum_keys` of it.
        row_offsets: global number of each shard's first row.
        column_offsets: global number of each shard's first column.
        momenta: for each shard float32 [R, D], or None: it has no momentum.
        lows: for each half-precision shard a tensor [R, D] of its `LOW_DTYPES`, else None.

    Raises:
        TypeError, ValueError: as for `TableSet`; a momentum or `low` that does not fit its weight.
    """

    def __init__(
        self,
        weights: Sequence[torch.Tensor],
        histories: Sequence[torch.Tensor],
        keys: Sequence[bytes],
        row_offsets: Sequence[int],
        column_offsets: Sequence[int],
        momenta: Sequence[torch.Tensor | None],
        lows: Sequence[torch.Tensor | None],
    ) -> None:
        self._momenta = [
            None if m is None else _beside(m, w, "momenta", torch.float32)
            for m, w in zip(momenta, weights, strict=True)
        ]
        self._lows = [_low(low, w) for low, w in zip(lows, weights, strict=True)]
        pairs = [
            (key, None) if m is None else momentum_keys(checks.key(key))
            for key, m in zip(keys, self._momenta, strict=True)
        ]
        super().__init__(weights, histories, [k for k, _ in pairs], row_offsets, column_offsets)
        for weight in self._weights:
            _check_columns(weight, "weights")
        self._second_keys = [k for _, k in pairs]
        described = zip(self._momenta, self._lows, self._second_keys, strict=True)
        self._states = (native.State * len(self._weights))(
            *(native_states.state(*one) for one in described)
        )

    def _tensors(self) -> list[torch.Tensor]:
        return [*self._weights, *(t for t in (*self._momenta, *self._lows) if t is not None)]

    @outside_graphs
    @torch.no_grad()
    def settle(
        self,
        stale: Stale,
        *,
        to_step: int,
        owed: Sequence[Owed],
        rounds: int = 20,
        grid: float | None = None,
    ) -> None:
        """In place: the rows found make the moves they owe.

        A table without a state gets the same numbers as from `TableSet.settle`; the others those
        of `dist_dp.kernels.state_reference.move`, with z_1 and z_2 of `normal`.

        Args:
            stale: from `take_stale`.
            to_step: the step given there.
            owed: for each table and its k rows, float64: transition [k, 4] and factor [k, 3] with a
                momentum (see `state_reference.move`), else decay [k] and standard deviation [k].
            rounds: ChaCha rounds.
            grid: as for `settle_rows`, for the tables without a state.

        Raises:
            ValueError: a number is out of range, or a shape; nothing is settled then.
            RuntimeError: the compiled kernels do not serve this set (see `compiled`).

        Guarantee:
            With z_1 and z_2 standard normal, stored weights and momenta are the exact move of those
            before it, but for float64's rounding of the terms (2^-53 of each) and one rounding to
            float32; nothing is rounded to half precision before its noise is there.
        """
        end = checks.integer(to_step, "to_step", 0, checks.MAX_STEP)
        counts = stale.counts.tolist()
        if len(owed) != len(counts):
            raise ValueError(f"owed: {len(counts)} pairs expected, {len(owed)} given")
        given = [
            _owed(pair, m is not None, n)
            for pair, m, n in zip(owed, self._momenta, counts, strict=True)
        ]
        spacing = checks.spacing(grid, torch.float32)
        native_states.settle_tables(
            self._tables, self._states, stale.rows, stale.from_steps, stale.counts, end, given,
            checks.rounds(rounds), spacing, isa=self._isa(),
        )  # fmt: skip
        increment_version(self._weights)

    def _isa(self) -> str:
        return _isa_for(self._weights[0].device if self.compiled else None)


@outside_graphs
@torch.no_grad()
def settle_state_range(
    weight: torch.Tensor,
    momentum: torch.Tensor | None,
    low: torch.Tensor | None,
    *,
    key: bytes,
    row_offset: int = 0,
    column_offset: int = 0,
    from_steps: torch.Tensor,
    to_step: int,
    owed: Owed,
    first_row: int,
    last_row: int,
    rounds: int = 20,
) -> None:
    """Settle the local rows first_row .. last_row - 1 of a table with a state, without a copy.

    The same numbers as `StateTableSet.settle` on those rows. Rows whose from-step is `to_step`
    stay as they are.

    Args:
        weight: as for `StateTableSet`, and so are `momentum`, `low`, `key` and the offsets.
        momentum: float32 [R, D] or None.
        low: beside a half-precision weight.
        key: the table's key.
        row_offset: global number of the shard's first row.
        column_offset: global number of the shard's first column.
        from_steps: int32 or int64 [last_row - first_row].
        to_step: the step to settle to.
        owed: for each of those rows, as for `StateTableSet.settle`.
        first_row: first local row.
        last_row: one past the last local row.
        rounds: ChaCha rounds.

    Raises:
        TypeError, ValueError: an argument is out of range or does not fit; nothing is settled then.
        RuntimeError: the compiled kernels do not serve the weight's device.
    """
    shard = checks.table(weight)
    _check_columns(shard, "weight")
    if momentum is None and low is None:
        raise ValueError("weight: has no state; use settle_range")
    moving = None if momentum is None else _beside(momentum, shard, "momentum", torch.float32)
    rest = _low(low, shard)
    last = checks.integer(last_row, "last_row", 0, shard.shape[0])
    first = checks.integer(first_row, "first_row", 0, last)
    end = checks.integer(to_step, "to_step", 0, checks.MAX_STEP)
    offset = checks.integer(row_offset, "row_offset", 0, checks.MAX_ROWS - shard.shape[0])
    keys = (checks.key(key), None) if moving is None else momentum_keys(checks.key(key))
    native_states.settle_range(
        shard, native_states.state(moving, rest, keys[1]), keys[0], offset,
        checks.columns(column_offset, shard.shape[1])[0], first,
        checks.steps(from_steps, last - first, end), end,
        _owed(owed, moving is not None, last - first), checks.rounds(rounds),
        isa=_isa_for(shard.device),
    )  # fmt: skip
    increment_version(weight)


def compiled_for(device: torch.device) -> bool:
    """Whether the compiled kernels serve tables with a state on a device."""
    return device.type == "cpu" and dispatch.chosen_isa() is not None


def _isa_for(device: torch.device | None) -> str:
    isa = dispatch.chosen_isa() if device is not None and device.type == "cpu" else None
    if isa is None:
        raise RuntimeError("the compiled kernels do not serve these tables: move rows in torch")
    return isa


def _owed(pair: Owed, moving: bool, count: int) -> Owed:
    """What rows owe, with the shapes and memory that the kernels expect."""
    transition, noise = pair
    shapes = ((count, 4), (count, 3)) if moving else ((count,), (count,))
    if (tuple(transition.shape), tuple(noise.shape)) != shapes:
        raise ValueError(
            f"owed: shapes {shapes} expected, {tuple(transition.shape)} and {tuple(noise.shape)} "
            "given"
        )

    def plain(value: torch.Tensor) -> torch.Tensor:
        if value.device.type != "cpu":
            raise ValueError(f"owed: is on {value.device}, the weights are on the CPU")
        together = value.dim() == 1 or value.stride(1) == 1
        return value.to(torch.float64) if together else value.to(torch.float64).contiguous()

    return plain(transition), plain(noise)


def _check_columns(value: torch.Tensor, name: str) -> None:
    if value.shape[1] > 1 and value.stride(1) != 1:
        raise ValueError(f"{name}: columns next to each other in memory expected")


def _beside(
    value: torch.Tensor, weight: torch.Tensor, name: str, dtype: torch.dtype
) -> torch.Tensor:
    """A tensor that lies beside a weight."""
    given = checks.dense(value, name, (dtype,))
    if given.shape != weight.shape or given.device != weight.device:
        raise ValueError(f"{name}: shape and device of the weight expected")
    _check_columns(given, name)
    return given


def _low(value: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor | None:
    """What a weight lacks of its float32 value, if it is of half precision."""
    dtype = LOW_DTYPES.get(weight.dtype)
    if (value is None) != (dtype is None):
        raise ValueError(f"lows: one for each half-precision weight, none for {weight.dtype}")
    return None if value is None or dtype is None else _beside(value, weight, "lows", dtype)
