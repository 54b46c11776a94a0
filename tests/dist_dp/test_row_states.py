"""Tables of every kind in one lookup: compiled kernels and PyTorch code give the same bits."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from dist_dp.kernels import dispatch, native
from dist_dp.mechanisms import DPSGD, LazyDP, Mechanism
from dist_dp.mechanisms.base import Schedule
from dist_dp.mechanisms.none import NoMechanism
from dist_dp.mechanisms.row_states import give_state
from dist_dp.momentum_schedule import MomentumSchedule
from dist_dp.noise_schedule import NoiseSchedule
from dist_dp.row_gradients import apply_to_state
from dist_dp.table_shard import TableShard

PATHS = native.isas() if native.available() else ()
SETTINGS = [(0.5, 1.2, 0.8, 3.0, 0.1), (0.1, 0.7, 0.8, 3.0, 0.0), (0.4, 1.0, 1.0, 3.0, 0.2)]
KINDS = [
    (torch.float32, 0),
    (torch.float32, 1),
    (torch.bfloat16, 0),
    (torch.bfloat16, 1),
    (torch.float16, 0),
    (torch.float16, 1),
]
"""Of weights, and the optimizer group: the second has momentum."""


def make_shards(kinds: Sequence[tuple[torch.dtype, int]]) -> list[TableShard]:
    g = torch.Generator().manual_seed(2)
    made = []
    for number, (dtype, group) in enumerate(kinds):
        weight = torch.randn(60 + number, 21, generator=g).to(dtype)
        shard = TableShard(
            f"t{number}", 500, 40, 7 * number, number, weight, False, "grid",
            group=group, noise_key=bytes([number]) * 32,
        )  # fmt: skip
        give_state(shard, momentum=group == 1)
        made.append(shard)
    return made


def state_after_steps(
    kind: type[Mechanism], schedules: list[Schedule], shards: list[TableShard]
) -> dict[str, Tensor]:
    """A few steps with lookups and gradients, and a release."""
    mechanism = kind(schedules)
    g = torch.Generator().manual_seed(4)
    for shard in shards:
        mechanism.prepare(shard)
    for step in range(9):
        rows = [torch.randint(0, len(s.weight), (30,), generator=g) for s in shards]
        mechanism.before_lookup(list(zip(shards, rows, strict=True)))
        for schedule in schedules:
            schedule.advance(*SETTINGS[step % 3])
        for shard, read in zip(shards, rows, strict=True):
            distinct = torch.unique(read)
            gradient = 0.1 * torch.randn(len(distinct), 21, generator=g)
            apply_to_state(shard, distinct, gradient)
        mechanism.after_update(shards)
    assert not any(s.settling for s in shards)
    for shard in shards:
        mechanism.settle(shard, 5, 40)
        mechanism.settle(shard)
        assert mechanism.is_settled(shard)
    return {f"{s.table} {name}": t.clone() for s in shards for name, t in s.state_tensors().items()}


@pytest.mark.filterwarnings("ignore::dist_dp.kernels.SlowKernelsWarning")
@pytest.mark.skipif(not PATHS, reason="no C++ compiler: there are no compiled kernels")
@pytest.mark.parametrize("kind", [LazyDP, DPSGD, NoMechanism])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("momentum", [False, True])
def test_every_path(
    kind: type[Mechanism], groups: int, momentum: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One group of plain SGD or of momentum, or both, with plain tables among them."""

    def run() -> dict[str, Tensor]:
        if groups == 2:
            return state_after_steps(kind, [NoiseSchedule(), MomentumSchedule(0.8)], shards())
        schedule: Schedule = MomentumSchedule(0.8) if momentum else NoiseSchedule()
        return state_after_steps(kind, [schedule], shards())

    def shards() -> list[TableShard]:
        made = make_shards(KINDS if groups == 2 else [k for k in KINDS if k[1] == int(momentum)])
        if groups == 1:
            for shard in made:
                shard.group = 0
        return made

    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    wanted = run()
    for path in PATHS:
        monkeypatch.setenv(dispatch.VARIABLE, path)
        found = run()
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert torch.equal(found[name], tensor), (path, name)


def test_eager_tables_keep_no_history() -> None:
    """DP-SGD moves all rows at every step: 4 bytes a row for nothing."""
    shards = make_shards(KINDS)
    state_after_steps(DPSGD, [NoiseSchedule(), MomentumSchedule(0.8)], shards)
    assert not any(s.has_history for s in shards)
