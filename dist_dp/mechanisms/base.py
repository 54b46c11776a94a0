"""The interface of a noise mechanism for embedding tables."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar

from torch import Tensor

from dist_dp.errors import ConfigError
from dist_dp.noise_schedule import NoiseSchedule
from dist_dp.table_shard import TableShard


class Mechanism(ABC):
    """Decides when the noise (and weight decay) of each step reaches each row.

    The private step calls, in this order: ``before_lookup`` for the rows a lookup will read
    (evaluation and serving too), ``after_update`` once the clipped gradient of step t is in the
    tables and the schedule has advanced to t, and ``settle`` for every shard before anything is
    released.

    Args:
        schedule: The record of what each step's noise and decay are; shared by all shards.
        grid: Spacing of the grid that settled rows are put on; see :mod:`dist_dp.noise_grid`.
        rounds: ChaCha rounds of the noise.

    Attributes:
        name: Name in configurations.
        private: Whether the released model has a guarantee.
        table_optimizers: Fused table optimizers the mechanism is exact for.
    """

    name: ClassVar[str]
    private: ClassVar[bool]
    table_optimizers: ClassVar[frozenset[str]]

    def __init__(
        self, schedule: NoiseSchedule, *, grid: float | None = None, rounds: int = 20
    ) -> None:
        self.schedule = schedule
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
                f"mechanism '{cls.name}' cannot serve the table optimizer '{kind}': its merged "
                "noise is exact only where the update is linear in the noise. Use "
                f"{' or '.join(sorted(cls.table_optimizers))} for the tables (dense layers may "
                "use any optimizer), or mechanism 'none' without privacy."
            )

    @abstractmethod
    def before_lookup(self, shard: TableShard, rows: Tensor, *, training: bool = True) -> None:
        """Brings rows up to date before they are read.

        Args:
            shard: The shard.
            rows: int64, distinct local rows.
            training: Whether training records chose the rows.
        """

    @abstractmethod
    def after_update(self, shards: Iterable[TableShard]) -> None:
        """Called when the gradient of step ``schedule.step`` is in the tables."""

    @abstractmethod
    def settle(self, shard: TableShard) -> None:
        """Brings every row of a shard up to ``schedule.step``; nothing is released before."""
