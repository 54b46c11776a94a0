"""The interface of a noise mechanism for embedding tables."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import ClassVar

from torch import Tensor

from dist_dp.errors import ConfigError
from dist_dp.momentum_schedule import MomentumSchedule
from dist_dp.noise_schedule import NoiseSchedule
from dist_dp.table_shard import TableShard

Schedule = NoiseSchedule | MomentumSchedule
"""The record of steps of an optimizer group: of plain SGD, or of SGD with momentum."""

Read = tuple[TableShard, Tensor]
"""A shard, and the local rows a lookup reads there: int32 or int64, any order, repeats allowed."""


class Mechanism(ABC):
    """Decides when the noise (and weight decay) of each step reaches each row.

    The private step calls, in this order: ``before_lookup`` for the rows a lookup will read
    (evaluation and serving too), ``after_update`` once the clipped gradient of step t is in the
    tables and the schedule has advanced to t, and ``settle`` for every shard before anything is
    released.

    Args:
        schedules: The record of what each step's noise and decay are, one for each optimizer group
            of tables; they advance together.
        grid: Spacing of the grid that settled rows are put on; see :mod:`dist_dp.noise_grid`.
        rounds: ChaCha rounds of the noise.

    Attributes:
        name: Name in configurations.
        private: Whether the released model has a guarantee.
        table_optimizers: Table optimizers the mechanism is exact for.
        takes_updates: Whether it updates the tables itself, instead of FBGEMM's fused update; see
            :mod:`dist_dp.mechanisms.sparse`.
        why_these_optimizers: Said where another table optimizer is refused.
        other_ways: Said there, too.
    """

    name: ClassVar[str]
    private: ClassVar[bool]
    table_optimizers: ClassVar[frozenset[str]]
    takes_updates: ClassVar[bool] = False
    why_these_optimizers: ClassVar[str] = (
        "its merged noise is exact only where the update is linear in the noise"
    )
    other_ways: ClassVar[str] = (
        ", or a mechanism with noise on few rows, after which any optimizer may follow: 'adafest', "
        "'fest' or 'adafest+'"
    )

    def __init__(
        self,
        schedules: Schedule | Sequence[Schedule],
        *,
        grid: float | None = None,
        rounds: int = 20,
    ) -> None:
        self.schedules: list[Schedule] = (
            list(schedules) if isinstance(schedules, Sequence) else [schedules]
        )
        self.grid = grid
        self.rounds = rounds

    @classmethod
    def check_optimizer(cls, kind: str) -> None:
        """Refuses a table optimizer the mechanism cannot serve.

        Raises:
            ConfigError: With the pairs that work.
        """
        if kind not in cls.table_optimizers:
            raise ConfigError(
                f"mechanism '{cls.name}' cannot serve the table optimizer '{kind}': "
                f"{cls.why_these_optimizers}. Use {' or '.join(sorted(cls.table_optimizers))} for "
                f"the tables (dense layers may use any optimizer){cls.other_ways}."
            )

    @property
    def schedule(self) -> Schedule:
        """The first group's schedule; its ``step`` is every group's."""
        return self.schedules[0]

    def schedule_of(self, shard: TableShard) -> NoiseSchedule:
        """The schedule of the group of a shard without momentum.

        Raises:
            TypeError: The group has momentum: its rows are settled by
                :mod:`dist_dp.mechanisms.row_states`.
        """
        schedule = self.schedules[shard.group]
        if not isinstance(schedule, NoiseSchedule):
            raise TypeError(f"table '{shard.table}' has momentum: no decay and scale alone")
        return schedule

    @abstractmethod
    def before_lookup(self, reads: Sequence[Read], *, training: bool = True) -> None:
        """Brings rows up to date before they are read.

        Args:
            reads: Shards and the local rows a lookup is about to read there, as the lookup has
                them: not distinct, in any order. All are in range.
            training: Whether training records chose the rows.
        """

    @abstractmethod
    def after_update(self, shards: Iterable[TableShard]) -> None:
        """Called when the gradient of step ``schedule.step`` is in the tables."""

    @abstractmethod
    def settle(self, shard: TableShard, first_row: int = 0, last_row: int | None = None) -> None:
        """Brings a range of a shard's rows up to ``schedule.step``; nothing is released before.

        Args:
            shard: The shard.
            first_row: First local row.
            last_row: One past the last local row; by default the shard's end.
        """

    def prepare(self, shard: TableShard) -> None:  # noqa: B027 (most mechanisms keep nothing)
        """Allocates what the mechanism keeps beside a shard's weights."""

    def is_settled(
        self, shard: TableShard, first_row: int = 0, last_row: int | None = None
    ) -> bool:
        """Whether no row of a range owes noise."""
        return True
