"""The graph cut at the embedding tables, and the watch on their lookups.

A sharded collection is wrapped so that in training its output is a *leaf* of the autograd graph:
the one backward of a step stops there, and row b of the leaf's gradient is example b's gradient
for all tables, on its home rank, with nothing sent yet. Once the clip factors are known, the
scaled gradient goes on through TorchRec: one all-to-all, one fused update.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dist_dp.clipping.table_norms import TableUse, squared_norms, squared_norms_of_bags
from dist_dp.errors import ConfigError, DataError, ModelError, ReleaseError
from dist_dp.repairs import divide_means, work_without_rows
from dist_dp.replicas import ReplicatedTables, sequence_lookup
from dist_dp.row_gradients import RowGradients, apply_to_state
from dist_dp.sharding import TableOptimizer, table_configs
from dist_dp.table_shard import TableShard
from dist_dp.timing import PhaseTimer

LookupWatch = Callable[[list[tuple[TableShard, Tensor]]], None]
"""Called with shards and the local rows, not distinct, that a lookup is about to read there."""


@dataclass
class _Piece:
    """One tensor of a collection's output: attached to the sharded graph, and cut from it."""

    attached: Tensor
    lengths: Tensor | None
    leaf: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.leaf = self.attached.detach().requires_grad_()

    def scaled(self, coefficients: Tensor) -> Tensor:
        """The leaf's gradient times each example's coefficient."""
        grad = self.leaf.grad
        if grad is None:
            return torch.zeros_like(self.leaf)
        if self.lengths is not None:
            coefficients = torch.repeat_interleave(
                coefficients, self.lengths, output_size=grad.shape[0]
            )
        return grad * coefficients.unsqueeze(1)


@dataclass
class _Call:
    """One forward of a collection.

    Attributes:
        features: What was looked up.
        pieces: The output's pieces by key ("" for all keys together).
        dims: Width of each key, in order; empty for a sequence.
        versions: Autograd's version counters of the shards' weights at the lookup.
    """

    features: Any
    pieces: dict[str, _Piece]
    dims: dict[str, int]
    versions: tuple[int, ...]


class _Return:
    """What goes back to the owners of a call's rows at its step's update, and the way there.

    The looked-up values are free by now: the memory kept is that of the gradients, float
    ``[batch, columns]``, and of the ids.
    """

    def __init__(self, call: _Call, coefficients: Tensor) -> None:
        pieces = call.pieces.values()
        self.edges = [torch.autograd.graph.get_gradient_edge(p.attached) for p in pieces]
        self.gradients = [piece.scaled(coefficients) for piece in pieces]
        self.versions = call.versions
        self._keys = list(call.pieces)
        self._dims = call.dims

    def take_rates(self, rates: dict[str, float]) -> None:
        """Multiplies the gradients by the learning rates, by name of the output."""
        for key, gradient in zip(self._keys, self.gradients, strict=True):
            by_key = [rates[key]] if key else [rates[name] for name in self._dims]
            if len(set(by_key)) == 1:
                gradient.mul_(by_key[0])
                continue
            widths = torch.tensor(list(self._dims.values()))
            gradient.mul_(torch.tensor(by_key).repeat_interleave(widths).to(gradient.device))


class _Distribution:
    """Ids on their way to the owners of their rows."""

    def __init__(self, features: Any, context: Any, sent: Any) -> None:
        self.context = context
        self._values = features.values()
        # Once the lengths are there the ids are sent: here, so that ranks agree on the order of
        # their collectives whichever thread waits for the ids.
        self._sent = sent.wait()
        self._local: Any = None

    def serves(self, features: Any) -> bool:
        """Whether these are the features that were sent: the same memory, unchanged."""
        values = features.values()
        same = values.data_ptr() == self._values.data_ptr() and values.shape == self._values.shape
        return bool(same)

    def wait(self) -> Any:
        """The ids that arrived here."""
        if self._local is None:
            self._local = self._sent.wait()
        return self._local


class CutEmbeddings(nn.Module):
    """A sharded TorchRec collection, cut from the dense model in training.

    Args:
        sharded: TorchRec's sharded module.
        collection: The unsharded module it came from (for its configuration).
        path: Path of the collection in the model.
        kinds: Sharding kind by table name.
        optimizer: The fused optimizer of the tables.
    """

    def __init__(
        self,
        sharded: nn.Module,
        collection: nn.Module,
        path: str,
        kinds: dict[str, str],
        optimizer: TableOptimizer,
    ) -> None:
        super().__init__()
        from torchrec.modules.embedding_modules import get_embedding_names_by_table

        self.sharded: Any = sharded
        self.path = path
        self.configs = table_configs(collection)
        self.pooled = hasattr(collection, "embedding_bag_configs")
        self.weighted = bool(self.pooled and collection.is_weighted())  # type: ignore[operator]
        self.output_names: list[list[str]] = get_embedding_names_by_table(self.configs)
        self.shards: list[TableShard] = []
        self.fused: list[Any] = []
        self.replicas: list[ReplicatedTables] = []
        self.owned: list[RowGradients] = []
        # FBGEMM binds the learning rate at the lookup. SGD is linear in the gradient, so there it
        # stays 1 and the gradient carries the rate of the step; else it is set at the lookup.
        self.linear = optimizer.kind == "sgd"
        self.learning_rate: Callable[[], float] = lambda: 0.0
        self._bound_rate = 1.0
        # Optimizer group by unique table name; groups may differ in learning rate.
        self.group_of: dict[str, int] = {}
        # Set by benchmarks, for TorchRec's own step on the same tables; nothing private runs then.
        self.plain = False
        self.timer = PhaseTimer()
        self._watches: list[LookupWatch] = []
        self._reads_of: dict[nn.Module, Callable[[Any], list[tuple[TableShard, Tensor]]]] = {}
        self._ahead: _Distribution | None = None
        self._calls: list[_Call] = []
        self._held: list[_Return] = []
        self._kernels: list[tuple[Any, list[TableShard], list[int], ReplicatedTables | None]] = []
        if self.pooled:
            divide_means(sharded, self.configs, kinds)
        self._find_shards(kinds)

    def embedding_bag_configs(self) -> list[Any]:
        """The table configurations, as the unsharded pooled collection gives them."""
        return self.configs

    def embedding_configs(self) -> list[Any]:
        """The table configurations, as the unsharded sequence collection gives them."""
        return self.configs

    def table_id(self, name: str) -> str:
        """Unique name of one of the collection's tables."""
        return f"{self.path}.{name}"

    def _find_shards(self, kinds: dict[str, str]) -> None:
        from torch.nn.parallel import DistributedDataParallel

        lookups: Any = self.sharded._lookups
        for i, wrapped in enumerate(lookups):
            lookup = wrapped
            if isinstance(lookup, DistributedDataParallel):
                # DDP would average the gradients of replicas behind our back.
                lookup = lookups[i] = wrapped.module
            for kernel in lookup._emb_modules:
                self._adopt_kernel(kernel, kinds)

    def _adopt_kernel(self, kernel: Any, kinds: dict[str, str]) -> None:
        dims = {c.name: c.embedding_dim for c in self.configs}
        shards: list[TableShard] = []
        feature_counts: list[int] = []
        weights = kernel.split_embedding_weights()
        for config, weight in zip(kernel._config.embedding_tables, weights, strict=True):
            offsets = config.local_metadata.shard_offsets if config.local_metadata else [0, 0]
            kind = kinds[config.name]
            shards.append(
                TableShard(
                    table=self.table_id(config.name),
                    num_rows=config.num_embeddings,
                    dim=dims[config.name],
                    row_offset=offsets[0],
                    column_offset=offsets[1],
                    weight=weight.detach().view(config.local_rows, config.local_cols),
                    replicated=kind == "data_parallel",
                    kind=kind,
                )
            )
            feature_counts.append(len(config.feature_names))
        self.shards.extend(shards)
        work_without_rows(kernel, shards, feature_counts, pooled=self.pooled)
        replicas: ReplicatedTables | None = None
        if hasattr(kernel.emb_module, "set_learning_rate"):
            self.fused.append(kernel.emb_module)
        else:
            replicas = ReplicatedTables(kernel, shards)
            self.replicas.append(replicas)
            if not self.pooled and shards[0].weight.device.type == "cpu":
                kernel.forward = sequence_lookup(kernel, shards, feature_counts)

        self._kernels.append((kernel, shards, feature_counts, replicas))

        def reads_of(features: Any) -> list[tuple[TableShard, Tensor]]:
            bounds, values = features.offset_per_key(), features.values()
            ends = list(itertools.accumulate(feature_counts, initial=0))
            return [
                (shard, values[bounds[start] : bounds[end]])
                for shard, start, end in zip(shards, ends, ends[1:], strict=False)
            ]

        self._reads_of[kernel] = reads_of

        def before(_module: nn.Module, args: tuple[Any, ...]) -> None:
            if self.plain:
                return
            reads = reads_of(args[0])
            for index, (shard, rows) in enumerate(reads):
                if shard.replicated:
                    rows = shard.rows_of_all_ranks(rows)
                    reads[index] = (shard, rows)
                if replicas is not None and self.training and torch.is_grad_enabled():
                    replicas.note(index, rows)
            for watch in self._watches:
                watch(reads)

        kernel.register_forward_pre_hook(before)

    def own_updates(self) -> None:
        """Takes the update away from kernels with shards whose state is more than a weight.

        Their gradients come out by row and go into the momentum, or the float32 value of a
        half-precision weight (:mod:`dist_dp.row_gradients`). Called once, when the shards' state
        is allocated.
        """
        for kernel, shards, feature_counts, replicas in self._kernels:
            if all(s.momentum is None and s.low is None for s in shards):
                continue
            if replicas is not None:
                self.replicas.remove(replicas)
            self.owned.append(
                RowGradients(
                    kernel,
                    shards,
                    feature_counts,
                    pooled=self.pooled,
                    apply=apply_to_state,
                    replicas=replicas,
                )
            )

    def watch_lookups(self, watch: LookupWatch) -> None:
        """Calls ``watch`` before every lookup, on the rank that owns the rows."""
        self._watches.append(watch)

    def forward(self, features: Any) -> Any:
        """Looks up; in training the result is a leaf of the graph.

        Args:
            features: KeyedJaggedTensor with the features of the collection.

        Returns:
            KeyedTensor (pooled) or dict of JaggedTensor (sequence), as TorchRec returns.

        Raises:
            DataError: An id lies outside its table.
            ModelError: The id weights are themselves trained.
        """
        if self.pooled and not self.weighted and features.weights_or_none() is not None:
            # The unsharded collection ignores them, the sharded one would not.
            features = _without_weights(features)
        self._check(features)
        self._bound_rate = 1.0 if self.linear else self.learning_rate()
        for fused in self.fused:
            fused.set_learning_rate(self._bound_rate)
        cutting = self.training and torch.is_grad_enabled()
        # Outside training nothing may flow back: the fused update would take it unclipped.
        with torch.set_grad_enabled(cutting):
            output = self._in_order(self._look_up(features))
        if not cutting:
            return output
        if self.pooled:
            return self._cut_pooled(features, output)
        return self._cut_sequence(features, output)

    def _look_up(self, features: Any) -> Any:
        """TorchRec's own forward, taken apart so that communication is seen for what it is."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or not ahead.serves(features):
            ahead = self._distribute(features)
        with self.timer.phase("communication"):
            local = ahead.wait()
        output = self.sharded.compute_and_output_dist(ahead.context, local)
        with self.timer.phase("communication"):
            return output.wait()

    def _distribute(self, features: Any) -> _Distribution:
        context = self.sharded.create_context()
        with self.timer.phase("communication"):
            return _Distribution(features, context, self.sharded.input_dist(context, features))

    def look_ahead(self, features: Any) -> None:
        """Starts sending the next batch's ids to their owners; the next forward uses them.

        A collective: every rank calls it at the same point of a step.
        """
        if self.pooled and not self.weighted and features.weights_or_none() is not None:
            features = _without_weights(features)
        self._check(features)
        self._ahead = self._distribute(features)

    def rows_ahead(self) -> list[list[tuple[TableShard, Tensor]]]:
        """What the lookups of the batch ahead will read here, kernel by kernel, replicas left out.

        Waits for the ids to arrive.
        """
        if self._ahead is None:
            return []
        found = []
        for lookup, features in zip(self.sharded._lookups, self._ahead.wait(), strict=True):
            parts = features.split(lookup._feature_splits)
            for kernel, part in zip(lookup._emb_modules, parts, strict=True):
                reads = self._reads_of[kernel](part)
                found.append([(shard, rows) for shard, rows in reads if not shard.replicated])
        return found

    def _in_order(self, output: Any) -> Any:
        """The output with its keys in the order of the unsharded collection.

        TorchRec orders them by placement; a model that takes ``values()`` whole would see its
        features change places with the sharding, and in the released model once more.
        """
        from torchrec import KeyedTensor

        names = [name for names in self.output_names for name in names]
        if not self.pooled:
            return {name: output[name] for name in names}
        if output.keys() == names:
            return output
        dims = dict(zip(output.keys(), output.length_per_key(), strict=True))
        parts = output.to_dict()
        return KeyedTensor(
            keys=names,
            length_per_key=[dims[name] for name in names],
            values=torch.cat([parts[name] for name in names], dim=1),
        )

    def _check(self, features: Any) -> None:
        rows = {name: c.num_embeddings for c in self.configs for name in c.feature_names}
        ids, bounds = features.values(), features.offset_per_key()
        sizes = torch.tensor(bounds).diff()
        limits = torch.tensor(
            [rows.get(name, torch.iinfo(torch.int64).max) for name in features.keys()]  # noqa: SIM118 - not a dict
        )
        limit = torch.repeat_interleave(limits, sizes, output_size=bounds[-1]).to(ids.device)
        outside = (ids < 0) | (ids >= limit)
        if bool(outside.any()):
            place = int(outside.nonzero()[0])
            name = features.keys()[
                int(torch.searchsorted(torch.tensor(bounds), place, right=True)) - 1
            ]
            table = next(c.name for c in self.configs if name in c.feature_names)
            raise DataError(
                f"feature '{name}' holds the id {int(ids[place])}, outside table '{table}' of "
                f"{rows[name]} rows; hash the ids, or enlarge the table"
            )
        weights = features.weights_or_none()
        if weights is not None and weights.requires_grad:
            raise ModelError(
                f"collection '{self.path}' got id weights that are themselves trained; they have "
                "no clipping rule. Detach them, or use unweighted bags."
            )

    def _cut_pooled(self, features: Any, output: Any) -> Any:
        from torchrec import KeyedTensor

        piece = _Piece(output.values(), lengths=None)
        keys, dims = output.keys(), output.length_per_key()
        widths = dict(zip(keys, dims, strict=True))
        self._calls.append(_Call(features, {"": piece}, widths, self._versions()))
        return KeyedTensor(keys=keys, length_per_key=dims, values=piece.leaf)

    def _cut_sequence(self, features: Any, output: Any) -> Any:
        from torchrec import JaggedTensor

        pieces: dict[str, _Piece] = {}
        result: dict[str, Any] = {}
        for key, jagged in output.items():
            pieces[key] = _Piece(jagged.values(), lengths=jagged.lengths().to(torch.int64))
            result[key] = JaggedTensor(
                values=pieces[key].leaf,
                lengths=jagged.lengths(),
                weights=jagged.weights_or_none(),
            )
        self._calls.append(_Call(features, pieces, {}, self._versions()))
        return result

    def _versions(self) -> tuple[int, ...]:
        return tuple(shard.weight._version for shard in self.shards)

    @property
    def batch(self) -> int | None:
        """Examples of the recorded forward on this rank, None before any."""
        return self._calls[0].features.stride() if self._calls else None

    def _uses(self, call: _Call, done: set[str]) -> Iterator[tuple[str, TableUse]]:
        """Every use of a table in a call, but of those that are done."""
        pooled_grads: dict[str, Tensor] = {}
        if self.pooled:
            grad = call.pieces[""].leaf.grad
            if grad is None:
                return
            parts = grad.split(list(call.dims.values()), dim=1)
            pooled_grads = dict(zip(call.dims, parts, strict=True))
        for config, names in zip(self.configs, self.output_names, strict=True):
            if self.table_id(config.name) in done:
                continue
            for feature, key in zip(config.feature_names, names, strict=True):
                delta = pooled_grads[key] if self.pooled else call.pieces[key].leaf.grad
                if delta is None:
                    continue
                bag = call.features[feature]
                mean = self.pooled and config.pooling.name == "MEAN"
                yield (
                    self.table_id(config.name),
                    TableUse(
                        rows=bag.values().to(torch.int64),
                        lengths=bag.lengths().to(torch.int64),
                        entry_weights=_entry_weights(bag, mean) if self.pooled else None,
                        delta=delta,
                        pooled=self.pooled,
                    ),
                )

    def squared_norms(self, batch: int, device: torch.device) -> Tensor:
        """Σ over tables of the squared per-example gradient norms, float ``[batch]``."""
        total = torch.zeros(batch, device=device)
        alone = self._tables_used_once()
        for group in _by_width(alone):
            (call,) = self._calls
            grad = call.pieces[""].leaf.grad
            if grad is None:
                continue
            keys = [names[0] for _, names in group]
            total += squared_norms_of_bags(
                call.features,
                [config.feature_names[0] for config, _ in group],
                _columns(grad, call.dims, keys),
                torch.tensor([c.pooling.name == "MEAN" for c, _ in group], device=device),
            )
        uses: dict[str, list[TableUse]] = {}
        for call in self._calls:
            for table, use in self._uses(call, {self.table_id(c.name) for c, _ in alone}):
                uses.setdefault(table, []).append(use)
        rows = {self.table_id(c.name): c.num_embeddings for c in self.configs}
        for table, found in uses.items():
            total += squared_norms(found, rows[table], batch)
        return total

    def _tables_used_once(self) -> list[tuple[Any, list[str]]]:
        """Pooled tables with one feature in one forward: (configuration, output names)."""
        if not self.pooled or len(self._calls) != 1:
            return []
        tables = zip(self.configs, self.output_names, strict=True)
        return [(config, names) for config, names in tables if len(names) == 1]

    def backward(self, coefficients: Tensor, rates: Sequence[float]) -> None:
        """Sends the scaled gradient on and updates the tables.

        Every rank must call this once a step: it communicates.

        Args:
            coefficients: float ``[batch]``: clip factor of each example divided by the expected
                batch size; 0 for padding.
            rates: Step size of the update, by group of tables.

        Raises:
            ConfigError: The learning rate of an Adagrad changed between forward and step.
        """
        if not self.linear and rates[0] != self._bound_rate:
            raise ConfigError(
                f"the tables' learning rate changed from {self._bound_rate:g} to "
                f"{rates[0]:g} between forward and optimizer.step(); call the learning-rate "
                "scheduler after optimizer.step()"
            )
        by_name = self._rates_by_name(rates)
        one_rate = set(by_name.values()).pop() if len(set(by_name.values())) == 1 else None
        if one_rate is not None:
            # One rate for all goes with the coefficients: no pass over the gradient of its own.
            coefficients = coefficients * one_rate
        for returns, has_rate in (
            (self._held, False),
            (self._returns(coefficients), one_rate is not None),
        ):
            for back in returns:
                if not has_rate:
                    back.take_rates(by_name)
                self._send(back)
        self._held = []
        for replica in self.replicas:
            # The gradient that reaches replicas carries the rate as well.
            replica.apply()
        for owned in self.owned:
            owned.apply()

    def _send(self, back: _Return) -> None:
        """Takes a scaled gradient back to the rows' owners, where it updates them.

        Every lookup of the step is made by now, so none can see an update. Since this one other
        rows were settled, and updates of this step may have been made: nothing that the way back
        reads, which is ids and gradients, so autograd's guard against that is set aside.
        """
        weights = tuple(shard.weight for shard in self.shards)
        if weights:
            torch._C._autograd._unsafe_set_version_counter(weights, back.versions)
        torch.autograd.backward(back.edges, back.gradients)

    def hold(self, coefficients: Tensor) -> None:
        """Keeps a micro-batch's scaled gradient for its step's :meth:`backward`; sends nothing.

        Args:
            coefficients: As for :meth:`backward`.
        """
        self._held += self._returns(coefficients)

    def _returns(self, coefficients: Tensor) -> list[_Return]:
        """What the calls at hand send back; they are forgotten."""
        calls, self._calls = self._calls, []
        return [_Return(call, coefficients) for call in calls]

    def _rates_by_name(self, rates: Sequence[float]) -> dict[str, float]:
        """What each output's gradient is scaled by; 1 where the kernels have the rate."""
        return {
            name: rates[self.group_of.get(self.table_id(config.name), 0)] if self.linear else 1.0
            for config, names in zip(self.configs, self.output_names, strict=True)
            for name in names
        }

    @property
    def has_gradients(self) -> bool:
        """Whether a backward reached a recorded forward."""
        pieces = (p for call in self._calls for p in call.pieces.values())
        return any(p.leaf.grad is not None for p in pieces)

    def check_no_stray_gradients(self) -> None:
        """Refuses gradients that reached a table past the cut.

        Raises:
            ModelError: A table has a gradient of its own before the clipped one is sent.
        """
        for name, parameter in self.named_parameters():
            if parameter.grad is not None:
                raise ModelError(
                    f"table parameter '{self.path}.{name}' got a gradient outside its lookup (a "
                    "penalty on the weights in the loss?). It would not be clipped: use "
                    "weight_decay of the optimizer instead."
                )

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: rows between two reads lack the noise that waits for them.

        Raises:
            ReleaseError: Always, naming the way out.
        """
        raise ReleaseError(
            f"state_dict() would hold the tables of '{self.path}' as they are in memory: rows "
            "between two reads lack noise. To publish the model use engine.release(folder); to go "
            "on with the run later, dist_dp.checkpoint.save_checkpoint."
        )

    def clear(self) -> None:
        """Forgets the forward at hand without updating anything; what is held is kept."""
        self._calls.clear()
        if self._held:
            # Rows noted by the forward that is dropped stay noted: their gradient is zero.
            return
        for replica in self.replicas:
            replica.clear()
        for owned in self.owned:
            owned.clear()


def _by_width(tables: list[tuple[Any, list[str]]]) -> list[list[tuple[Any, list[str]]]]:
    """Tables with the same number of columns together, in order."""
    groups: dict[int, list[tuple[Any, list[str]]]] = {}
    for config, names in tables:
        groups.setdefault(config.embedding_dim, []).append((config, names))
    return list(groups.values())


def _columns(values: Tensor, dims: dict[str, int], keys: list[str]) -> Tensor:
    """The columns of some keys of one width, float ``[batch, keys, width]``."""
    if keys == list(dims):
        return values.view(values.shape[0], len(keys), -1)
    parts = dict(zip(dims, values.split(list(dims.values()), dim=1), strict=True))
    return torch.stack([parts[key] for key in keys], dim=1)


def _without_weights(features: Any) -> Any:
    from torchrec import KeyedJaggedTensor

    return KeyedJaggedTensor(
        keys=features.keys(),
        values=features.values(),
        lengths=features.lengths(),
        stride=features.stride(),
    )


def _entry_weights(bag: Any, mean: bool) -> Tensor | None:
    """Weight of each id in its bag's pooled output, float ``[entries]``; None for all ones."""
    weights: Tensor | None = bag.weights_or_none()
    if not mean:
        return weights
    lengths = bag.lengths().to(torch.int64)
    each = torch.repeat_interleave(
        1.0 / lengths.clamp_min(1), lengths, output_size=bag.values().numel()
    )
    return each if weights is None else each * weights
