"""The owner's side of a sharded collection: its shards on this rank, watched and updated."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dist_dp.repairs import work_without_rows
from dist_dp.replicas import ReplicatedTables, sequence_lookup
from dist_dp.row_gradients import Apply, RowGradients, apply_to_state
from dist_dp.table_shard import TableShard

Reads = list[tuple[TableShard, Tensor]]
"""Shards and the local rows, not distinct, that one lookup reads there."""

LookupWatch = Callable[[Reads], None]
"""Called with what a lookup is about to read."""


@dataclass
class Kernel:
    """One of TorchRec's embedding kernels: several tables, read by one lookup.

    Attributes:
        module: TorchRec's kernel.
        shards: Its tables, in order.
        feature_counts: Features that read each of them.
        replicas: What updates them, if they are replicated and their state is a weight alone.
    """

    module: Any
    shards: list[TableShard]
    feature_counts: list[int]
    replicas: ReplicatedTables | None = None

    def reads(self, features: Any) -> Reads:
        """What a lookup of these features (a KeyedJaggedTensor of shard-local ids) reads."""
        return [(shard, rows) for shard, rows, _ in self.spans(features)]

    def spans(self, features: Any) -> list[tuple[TableShard, Tensor, slice]]:
        """As :meth:`reads`, with the place of each shard's rows among the features' ids."""
        bounds, values = features.offset_per_key(), features.values()
        ends = list(itertools.accumulate(self.feature_counts, initial=0))
        spans = [slice(bounds[start], bounds[end]) for start, end in itertools.pairwise(ends)]
        return [(s, values[span], span) for s, span in zip(self.shards, spans, strict=True)]


class LocalTables:
    """The shards of one collection on this rank.

    Args:
        sharded: TorchRec's sharded module.
        configs: The table configurations.
        table_id: From a table's name to its unique name.
        kinds: Sharding kind by table name.
        pooled: Whether bags are pooled.
        training: Whether a lookup made now belongs to a step.

    Attributes:
        shards: All of them.
        kernels: TorchRec's kernels, which hold the shards.
        fused: FBGEMM modules whose backward updates the rows.
        replicas: Replicated tables, updated with a sum over ranks.
        owned: Kernels whose update is taken from FBGEMM.
        plain: Set by benchmarks, for TorchRec's own step on the same tables: no lookup is watched.
    """

    def __init__(
        self,
        sharded: Any,
        configs: Sequence[Any],
        table_id: Callable[[str], str],
        kinds: Mapping[str, str],
        *,
        pooled: bool,
        training: Callable[[], bool],
    ) -> None:
        self.shards: list[TableShard] = []
        self.kernels: list[Kernel] = []
        self.fused: list[Any] = []
        self.replicas: list[ReplicatedTables] = []
        self.owned: list[RowGradients] = []
        self.plain = False
        self._sharded = sharded
        self._dims = {c.name: c.embedding_dim for c in configs}
        self._table_id = table_id
        self._kinds = kinds
        self._pooled = pooled
        self._training = training
        self._watches: list[LookupWatch] = []
        self._find()

    def _find(self) -> None:
        from torch.nn.parallel import DistributedDataParallel

        lookups: Any = self._sharded._lookups
        for i, wrapped in enumerate(lookups):
            lookup = wrapped
            if isinstance(lookup, DistributedDataParallel):
                # DDP would average the gradients of replicas behind our back.
                lookup = lookups[i] = wrapped.module
            for module in lookup._emb_modules:
                self._adopt(module)

    def _adopt(self, module: Any) -> None:
        kernel = Kernel(module, *self._shards_of(module))
        shards, counts = kernel.shards, kernel.feature_counts
        work_without_rows(module, shards, counts, pooled=self._pooled)
        if hasattr(module.emb_module, "set_learning_rate"):
            self.fused.append(module.emb_module)
        else:
            kernel.replicas = ReplicatedTables(module, shards)
            self.replicas.append(kernel.replicas)
            if not self._pooled and shards[0].weight.device.type == "cpu":
                module.forward = sequence_lookup(module, shards, counts)
        self.kernels.append(kernel)
        self.shards.extend(shards)

        def before(_module: nn.Module, args: tuple[Any, ...]) -> None:
            if not self.plain:
                self._announce(kernel, args[0])

        module.register_forward_pre_hook(before)

    def _shards_of(self, module: Any) -> tuple[list[TableShard], list[int]]:
        """A kernel's tables, and how many features read each."""
        shards: list[TableShard] = []
        feature_counts: list[int] = []
        weights = module.split_embedding_weights()
        for config, weight in zip(module._config.embedding_tables, weights, strict=True):
            offsets = config.local_metadata.shard_offsets if config.local_metadata else [0, 0]
            kind = self._kinds[config.name]
            shards.append(
                TableShard(
                    table=self._table_id(config.name),
                    num_rows=config.num_embeddings,
                    dim=self._dims[config.name],
                    row_offset=offsets[0],
                    column_offset=offsets[1],
                    weight=weight.detach().view(config.local_rows, config.local_cols),
                    replicated=kind == "data_parallel",
                    kind=kind,
                )
            )
            feature_counts.append(len(config.feature_names))
        return shards, feature_counts

    def _announce(self, kernel: Kernel, features: Any) -> None:
        """Tells what a lookup is about to read; replicas say what any rank is about to."""
        reads = kernel.reads(features)
        for index, (shard, rows) in enumerate(reads):
            if shard.replicated:
                rows = shard.rows_of_all_ranks(rows)
                reads[index] = (shard, rows)
            if kernel.replicas is not None and self._training():
                kernel.replicas.note(index, rows)
        for watch in self._watches:
            watch(reads)

    def watch_lookups(self, watch: LookupWatch) -> None:
        """Calls ``watch`` before every lookup, on the rank that owns the rows."""
        self._watches.append(watch)

    def reads_of(self, arrived: Any) -> list[Reads]:
        """What the lookups of ids that arrived will read here, kernel by kernel, but no replicas.

        Args:
            arrived: One KeyedJaggedTensor for each lookup of the sharded collection.
        """
        return [
            [(shard, rows) for shard, rows in kernel.reads(part) if not shard.replicated]
            for kernel, part in self._parts_of(arrived)
        ]

    def weighted_reads_of(self, arrived: Any) -> list[tuple[TableShard, Tensor, Tensor]]:
        """Shards, local rows and weights of ids that arrived with weights, replicas too.

        What arrived for a replicated table is this rank's own.

        Args:
            arrived: One KeyedJaggedTensor for each lookup of the sharded collection.
        """
        return [
            (shard, rows, part.weights()[span])
            for kernel, part in self._parts_of(arrived)
            for shard, rows, span in kernel.spans(part)
        ]

    def _parts_of(self, arrived: Any) -> Iterator[tuple[Kernel, Any]]:
        """Each kernel, and what of ids that arrived is for it."""
        kernel_of = {kernel.module: kernel for kernel in self.kernels}
        for lookup, features in zip(self._sharded._lookups, arrived, strict=True):
            parts = features.split(lookup._feature_splits)
            for module, part in zip(lookup._emb_modules, parts, strict=True):
                yield kernel_of[module], part

    def own_updates(self) -> None:
        """Takes the update away from kernels with shards whose state is more than a weight.

        Their gradients come out by row and go into the momentum, or the float32 value of a
        half-precision weight (:mod:`dist_dp.row_gradients`). Called once, when the shards' state
        is allocated.
        """
        for kernel in self.kernels:
            if any(s.momentum is not None or s.low is not None for s in kernel.shards):
                self.own_update(kernel)

    def give_updates(self, apply: Apply, only: Callable[[TableShard], Tensor]) -> None:
        """Takes the update of every kernel away from FBGEMM and gives it to a mechanism.

        Args:
            apply: Called once a step for every shard.
            only: The local rows, sorted, whose gradient it wants in the step in flight.
        """
        for kernel in self.kernels:
            self.own_update(kernel, apply, always=True, only=only)

    def own_update(
        self,
        kernel: Kernel,
        apply: Apply = apply_to_state,
        *,
        always: bool = False,
        only: Callable[[TableShard], Tensor] | None = None,
    ) -> None:
        """Takes the update away from one kernel."""
        if kernel.replicas is not None:
            self.replicas.remove(kernel.replicas)
        self.owned.append(
            RowGradients(
                kernel.module,
                kernel.shards,
                kernel.feature_counts,
                pooled=self._pooled,
                apply=apply,
                always=always,
                only=only,
                replicas=kernel.replicas,
            )
        )

    def finish_update(self) -> None:
        """Updates what FBGEMM's backward did not; a collective where tables are replicated.

        The gradients that reached those tables carry the learning rate.
        """
        for replica in self.replicas:
            replica.apply()
        for owned in self.owned:
            owned.apply()

    def clear(self) -> None:
        """Forgets a forward's rows and gradients without updating anything."""
        for replica in self.replicas:
            replica.clear()
        for owned in self.owned:
            owned.clear()
