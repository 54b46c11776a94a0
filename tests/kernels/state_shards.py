"""Shards with a momentum or of half precision, and what settling them must give; for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_dp import kernels
from dist_dp.kernels import reference, state_reference
from dist_dp.kernels.native_states import Owed
from dist_dp.wide_rows import join, split

KEY = bytes(range(9, 41))
TO_STEP = 9
COLUMNS = 37
KINDS = [
    (torch.float32, True),
    (torch.bfloat16, False),
    (torch.bfloat16, True),
    (torch.float16, False),
    (torch.float16, True),
    (torch.float32, False),
]
"""Of weights, and whether there is a momentum; the last kind is the plain one."""
SPECIAL = (0.0, -0.0, 1e-40, -1e-45, 6e-8, -3e-5, 65504.0, -65519.0, 65520.0, 3e38, -3.4e38)
OFFSETS = [2**33 - 100, 0, 7, 2**40, 1, 3]
COLUMN_OFFSETS = [5, 0, 16, 3, 40, 31]


class Shard:
    """A weight and its state, in memory with gaps between rows."""

    def __init__(self, dtype: torch.dtype, moving: bool, rows: int, columns: int, seed: int):
        g = torch.Generator().manual_seed(seed)
        values = torch.randn(rows, columns, generator=g)
        values[:, 0] = torch.tensor(SPECIAL).repeat(rows)[:rows]
        weight, low = (values, None) if dtype == torch.float32 else split(values, dtype)
        self.weight, self.low = apart(weight), None if low is None else apart(low)
        self.momentum = apart(torch.randn(rows, columns, generator=g)) if moving else None
        self.history = torch.randint(0, TO_STEP, (rows,), generator=g, dtype=torch.int32)

    def copy(self) -> Shard:
        made = Shard.__new__(Shard)
        made.weight, made.history = apart(self.weight), self.history.clone()
        made.low = None if self.low is None else apart(self.low)
        made.momentum = None if self.momentum is None else apart(self.momentum)
        return made

    def bits(self) -> list[Tensor]:
        """All that is stored, as integers."""
        kinds = {4: torch.int32, 2: torch.int16}
        stored = (t for t in (self.weight, self.momentum, self.low, self.history) if t is not None)
        return [t.contiguous().view(kinds[t.element_size()]) for t in stored]

    def equals(self, other: Shard) -> bool:
        return all(torch.equal(a, b) for a, b in zip(self.bits(), other.bits(), strict=True))


def apart(values: Tensor) -> Tensor:
    wide = torch.zeros(values.shape[0], values.shape[1] + 3, dtype=values.dtype)
    wide[:, : values.shape[1]] = values
    return wide[:, : values.shape[1]]


def shards(rows: int = 1100, columns: int = COLUMNS) -> list[Shard]:
    return [Shard(*kind, rows - 100 * i, columns, i) for i, kind in enumerate(KINDS)]


def owed(moving: bool, from_steps: Tensor) -> Owed:
    """Some move for each from-step: for a third of them no noise, for another no z_2."""
    steps = from_steps.double()
    quiet = steps % 3 == 0
    if not moving:
        return 1.0 - steps / 100, torch.where(quiet, 0.0, 0.1 + steps / 7)
    transition = torch.stack([1 - steps / 90, -steps / 9, steps / 50, 0.9**steps], dim=1)
    noise = torch.stack([0.3 + steps, 0.2 - steps / 7, 0.1 * steps], dim=1)
    noise[quiet] = 0
    noise[steps % 3 == 1, 2] = 0
    # one of the rows as `MomentumSchedule` gives them, views of one array
    both = torch.cat([transition, noise], dim=1)
    return both[:, :4], both[:, 4:]


def by_definition(shard: Shard, rows: Tensor, number: int, rounds: int = 20) -> None:
    """The moves of rows in plain operations on float32 values, with the reference's normals."""
    steps = shard.history[rows]
    plain = shard.low is None and shard.momentum is None
    if plain:
        decay, scale = owed(False, steps)
        kernels.settle_rows(
            shard.weight, rows, key=KEY, row_offset=OFFSETS[number],
            column_offset=COLUMN_OFFSETS[number], from_steps=steps, to_step=TO_STEP,
            decay=decay, scale=scale, rounds=rounds,
        )  # fmt: skip
        shard.history[rows] = TO_STEP
        return
    transition, noise = owed(shard.momentum is not None, steps)
    moving = shard.momentum is not None
    keys = kernels.momentum_keys(KEY) if moving else (KEY, KEY)
    places = (rows + OFFSETS[number]).numpy(), steps.numpy().astype("int64")
    first, second = (
        torch.from_numpy(
            reference.normals(
                key, *places, TO_STEP, COLUMN_OFFSETS[number], shard.weight.shape[1], rounds
            )
        )
        for key in keys
    )
    weight = shard.weight[rows]
    values = weight if shard.low is None else join(weight, shard.low[rows])
    momentum = None if shard.momentum is None else shard.momentum[rows]
    state_reference.move(values, momentum, transition, noise, first, second)
    if shard.low is None:
        shard.weight[rows] = values
    else:
        shard.weight[rows], shard.low[rows] = split(values, shard.weight.dtype)
    if shard.momentum is not None and momentum is not None:
        shard.momentum[rows] = momentum
    shard.history[rows] = TO_STEP


def table_set(some: list[Shard]) -> kernels.StateTableSet:
    return kernels.StateTableSet(
        [s.weight for s in some],
        [s.history for s in some],
        [KEY] * len(some),
        OFFSETS[: len(some)],
        COLUMN_OFFSETS[: len(some)],
        [s.momentum for s in some],
        [s.low for s in some],
    )


def lookups(some: list[Shard]) -> list[Tensor]:
    """Rows in any order with repeats; one shard is not read."""
    g = torch.Generator().manual_seed(5)
    read = [torch.randint(0, len(s.weight), (len(s.weight),), generator=g) for s in some]
    return [*read[:2], read[2][:0], *read[3:]]


def settle(some: list[Shard], ids: list[Tensor], rounds: int = 20) -> None:
    made = table_set(some)
    stale = made.take_stale(ids, TO_STEP)
    steps = stale.from_steps.split(stale.counts.tolist())
    debts = [owed(s.momentum is not None, f) for s, f in zip(some, steps, strict=True)]
    made.settle(stale, to_step=TO_STEP, owed=debts, rounds=rounds)


def settle_range(shard: Shard, number: int, first: int, last: int) -> None:
    steps = shard.history[first:last]
    kernels.settle_state_range(
        shard.weight, shard.momentum, shard.low, key=KEY, row_offset=OFFSETS[number],
        column_offset=COLUMN_OFFSETS[number], from_steps=steps, to_step=TO_STEP,
        owed=owed(shard.momentum is not None, steps), first_row=first, last_row=last,
    )  # fmt: skip


def wanted_of(some: list[Shard], ids: list[Tensor], rounds: int = 20) -> list[Shard]:
    made = [s.copy() for s in some]
    for number, (shard, rows) in enumerate(zip(made, ids, strict=True)):
        by_definition(shard, torch.unique(rows), number, rounds)
    return made


def lists_are_right(rounds: int = 20, columns: int = COLUMNS) -> bool:
    some = shards(columns=columns)
    ids = lookups(some)
    wanted = wanted_of(some, ids, rounds)
    settle(some, ids, rounds)
    return all(a.equals(b) for a, b in zip(some, wanted, strict=True))


def ranges_are_right() -> bool:
    right = True
    for number, shard in enumerate(shards(rows=900)[:-1]):
        shard.history[::4] = TO_STEP
        wanted, rows = shard.copy(), torch.arange(len(shard.weight))
        by_definition(wanted, rows[shard.history < TO_STEP], number)
        # of settled rows `owed` says something else than "stay"
        settle_range(shard, number, 0, len(rows))
        shard.history[:] = TO_STEP
        right = right and shard.equals(wanted)
    return right
