"""Where the pieces of a table lie, for each kind of sharding that is asked for by name.

A *node* is a host: ``local_size`` workers with consecutive ranks. table_row_wise keeps a table
on one node and splits its rows there; grid gives every node a range of columns and splits its
rows among the node's workers, so row exchange stays inside a host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dist_dp.errors import ConfigError

COLUMN_MULTIPLE = 4
"""FBGEMM reads columns in groups of four."""

Generator = Callable[..., Any]
"""TorchRec's: what ``construct_module_sharding_plan`` calls for a table's ``ParameterSharding``."""


class TablePlacer:
    """Places tables one after another, each where least lies so far; largest first is best.

    Args:
        world_size: Number of workers.
        local_size: Workers of a node; divides ``world_size``.
        device_type: ``cpu`` or ``cuda``.
    """

    def __init__(self, world_size: int, local_size: int, device_type: str) -> None:
        self.world_size = world_size
        self.local_size = local_size
        self.num_nodes = world_size // local_size
        self._device_type = device_type
        self._load = [0] * world_size

    def place(self, config: Any, kind: str) -> Generator:
        """How one table is split.

        Args:
            config: Its TorchRec configuration.
            kind: Its sharding kind, not ``auto``.

        Raises:
            ConfigError: Its columns cannot be split that way.
        """
        from torchrec.distributed import sharding_plan as sp

        rows, columns = config.num_embeddings, config.embedding_dim
        made: Generator
        if kind == "data_parallel":
            made = sp.data_parallel()
            return made
        if kind == "table_wise":
            rank = min(range(self.world_size), key=self._load.__getitem__)
            self._load[rank] += rows * columns
            made = sp.table_wise(rank=rank, compute_kernel="fused")
            return made
        if kind == "row_wise":
            made = sp.row_wise(compute_kernel="fused")
            return made
        if kind == "column_wise":
            parts = max(2, self.world_size)
            _check_columns(config, kind, parts, "parts")
            ranks = [i % self.world_size for i in range(parts)]
            made = sp.column_wise(ranks=ranks, compute_kernel="fused")
            return made
        if kind == "table_row_wise":
            node = min(range(self.num_nodes), key=self._node_load)
            for rank in self._ranks(node):
                self._load[rank] += rows * columns // self.local_size
            return self._given("table_row_wise", self._rows_within(node, rows, 0, columns))
        _check_columns(config, kind, self.num_nodes, "nodes")
        width = columns // self.num_nodes
        pieces = [
            piece
            for node in range(self.num_nodes)
            for piece in self._rows_within(node, rows, node * width, width)
        ]
        return self._given("grid_shard", pieces)

    def _ranks(self, node: int) -> range:
        return range(node * self.local_size, (node + 1) * self.local_size)

    def _node_load(self, node: int) -> int:
        return sum(self._load[rank] for rank in self._ranks(node))

    def _rows_within(
        self, node: int, rows: int, first_column: int, columns: int
    ) -> list[tuple[int, list[int], list[int]]]:
        """Rank, offsets and sizes of each piece: equal blocks of rows, the last ones shorter.

        TorchRec sends id r to the worker r // block of the node, so the blocks must be these.
        """
        block = -(-rows // self.local_size)
        pieces = []
        for number, rank in enumerate(self._ranks(node)):
            first = min(rows, number * block)
            count = min(rows, first + block) - first
            pieces.append((rank, [first, first_column], [count, columns]))
        return pieces

    def _given(self, kind: str, pieces: list[tuple[int, list[int], list[int]]]) -> Generator:
        from torch.distributed._shard.sharding_spec import EnumerableShardingSpec, ShardMetadata
        from torchrec.distributed.types import ParameterSharding

        def device(rank: int) -> str:
            local = f":{rank % self.local_size}" if self._device_type == "cuda" else ""
            return f"rank:{rank}/{self._device_type}{local}"

        return as_planned(
            ParameterSharding(
                sharding_type=kind,
                compute_kernel="fused",
                ranks=[rank for rank, _, _ in pieces],
                sharding_spec=EnumerableShardingSpec(
                    [
                        ShardMetadata(
                            shard_offsets=offsets, shard_sizes=sizes, placement=device(rank)
                        )
                        for rank, offsets, sizes in pieces
                    ]
                ),
            )
        )


def as_planned(planned: Any) -> Generator:
    """A generator that hands back a ``ParameterSharding`` made before."""

    def generate(*_args: Any, **_kwargs: Any) -> Any:
        return planned

    return generate


def _check_columns(config: Any, kind: str, parts: int, what: str) -> None:
    multiple = COLUMN_MULTIPLE * parts
    if parts > 1 and config.embedding_dim % multiple:
        raise ConfigError(
            f"table '{config.name}': {kind} over {parts} {what} needs an embedding_dim that is a "
            f"multiple of {multiple}, not {config.embedding_dim}; choose another dim, or row_wise"
        )
