"""The graph cut at the embedding tables.

A sharded collection is wrapped so that in training its output is a *leaf* of the autograd graph:
the one backward of a step stops there, and row b of the leaf's gradient is example b's gradient
for all tables, on its home rank, with nothing sent yet. Once the clip factors are known, the
scaled gradient goes on through TorchRec: one all-to-all, one fused update.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from dist_dp.clipping.table_uses import Tables, collection_norms
from dist_dp.clipping.user_groups import UserGroups
from dist_dp.clipping.user_tables import collection_norms_of_users
from dist_dp.errors import ConfigError, ModelError, ReleaseError
from dist_dp.id_checks import FeatureOrder, check_features, without_weights
from dist_dp.id_distribution import IdDistribution
from dist_dp.local_tables import LocalTables, LookupWatch, Reads
from dist_dp.lookup_calls import LookupCall, Piece, WayBack
from dist_dp.repairs import divide_means
from dist_dp.sharding import TableOptimizer, table_configs
from dist_dp.table_shard import TableShard
from dist_dp.timing import PhaseTimer


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
        self._feature_order = FeatureOrder(
            [name for config in self.configs for name in config.feature_names], path
        )
        # FBGEMM binds the learning rate at the lookup. SGD is linear in the gradient, so there it
        # stays 1 and the gradient carries the rate of the step; else it is set at the lookup.
        self.linear = optimizer.kind == "sgd"
        self.learning_rate: Callable[[], float] = lambda: 0.0
        self._bound_rate = 1.0
        # Optimizer group by unique table name; groups may differ in learning rate.
        self.group_of: dict[str, int] = {}
        self.timer = PhaseTimer()
        self._ahead: IdDistribution | None = None
        # Rows that a mechanism trains at all, by unique table name; others count in no norm.
        self.kept: Mapping[str, Tensor] = {}
        self._calls: list[LookupCall] = []
        self._held: list[WayBack] = []
        if self.pooled:
            divide_means(sharded, self.configs, kinds)
        self.local = LocalTables(
            sharded,
            self.configs,
            self.table_id,
            kinds,
            pooled=self.pooled,
            training=lambda: self.training and torch.is_grad_enabled(),
        )

    @property
    def shards(self) -> list[TableShard]:
        """The tables' shards on this rank."""
        return self.local.shards

    @property
    def calls(self) -> list[LookupCall]:
        """The forwards recorded since the last update, with their gradients after a backward."""
        return self._calls

    def embedding_bag_configs(self) -> list[Any]:
        """The table configurations, as the unsharded pooled collection gives them."""
        return self.configs

    def embedding_configs(self) -> list[Any]:
        """The table configurations, as the unsharded sequence collection gives them."""
        return self.configs

    def table_id(self, name: str) -> str:
        """Unique name of one of the collection's tables."""
        return f"{self.path}.{name}"

    def watch_lookups(self, watch: LookupWatch) -> None:
        """Calls ``watch`` before every lookup, on the rank that owns the rows."""
        self.local.watch_lookups(watch)

    def forward(self, features: Any) -> Any:
        """Looks up; in training the result is a leaf of the graph.

        Args:
            features: KeyedJaggedTensor with the features of the collection.

        Returns:
            KeyedTensor (pooled) or dict of JaggedTensor (sequence), as TorchRec returns.

        Raises:
            DataError: An id lies outside its table, or a feature is missing.
            ModelError: The id weights are themselves trained.
        """
        features = self._checked(features)
        self._bound_rate = 1.0 if self.linear else self.learning_rate()
        for fused in self.local.fused:
            fused.set_learning_rate(self._bound_rate)
        cutting = self.training and torch.is_grad_enabled()
        # Outside training nothing may flow back: the fused update would take it unclipped.
        # What is saved for the way back is kept as it is: FBGEMM saves the weights, which settling
        # and other micro-batches' updates change before, but reads ids and gradients only.
        with torch.set_grad_enabled(cutting), saved_tensors_hooks(_itself, _itself):
            output = self._in_order(self._look_up(features))
        if not cutting:
            return output
        if self.pooled:
            return self._cut_pooled(features, output)
        return self._cut_sequence(features, output)

    def _checked(self, features: Any) -> Any:
        """What TorchRec may be given in place of these features."""
        if self.pooled and not self.weighted and features.weights_or_none() is not None:
            # The unsharded collection ignores them, the sharded one would not.
            features = without_weights(features)
        features = self._feature_order.apply(features)
        check_features(features, self.configs, self.path)
        return features

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

    def _distribute(self, features: Any) -> IdDistribution:
        with self.timer.phase("communication"):
            return IdDistribution(self.sharded, features)

    def look_ahead(self, features: Any) -> None:
        """Starts sending the next batch's ids to their owners; the next forward uses them.

        A collective: every rank calls it at the same point of a step.
        """
        self._ahead = self._distribute(self._checked(features))

    def reads_ahead(self) -> list[Reads]:
        """What the lookups of the batch ahead will read here, kernel by kernel, but no replicas.

        Waits for the ids to arrive.
        """
        return [] if self._ahead is None else self.local.reads_of(self._ahead.wait())

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

    def _cut_pooled(self, features: Any, output: Any) -> Any:
        from torchrec import KeyedTensor

        piece = Piece(output.values(), lengths=None)
        keys, dims = output.keys(), output.length_per_key()
        widths = dict(zip(keys, dims, strict=True))
        self._calls.append(LookupCall(features, {"": piece}, widths))
        return KeyedTensor(keys=keys, length_per_key=dims, values=piece.leaf)

    def _cut_sequence(self, features: Any, output: Any) -> Any:
        from torchrec import JaggedTensor

        pieces: dict[str, Piece] = {}
        result: dict[str, Any] = {}
        for key, jagged in output.items():
            pieces[key] = Piece(jagged.values(), lengths=jagged.lengths().to(torch.int64))
            result[key] = JaggedTensor(
                values=pieces[key].leaf,
                lengths=jagged.lengths(),
                weights=jagged.weights_or_none(),
            )
        self._calls.append(LookupCall(features, pieces, {}))
        return result

    @property
    def batch(self) -> int | None:
        """Examples of the recorded forward on this rank, None before any."""
        return self._calls[0].features.stride() if self._calls else None

    def squared_norms(self, batch: int, device: torch.device) -> Tensor:
        """Σ over tables of the squared per-example gradient norms, float ``[batch]``."""
        return collection_norms(self._tables(), self._calls, batch, device)

    def squared_norms_of_users(self, users: UserGroups, device: torch.device) -> Tensor:
        """Σ over tables of the squared norms of users' gradients, float ``[units]``."""
        return collection_norms_of_users(self._tables(), self._calls, users, device)

    def _tables(self) -> Tables:
        kept = {
            c.name: self.kept[self.table_id(c.name)]
            for c in self.configs
            if self.table_id(c.name) in self.kept
        }
        return Tables(self.configs, self.output_names, self.pooled, kept)

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
                # Every lookup of the step is made by now, so none can see an update.
                back.send()
        self._held = []
        self.local.finish_update()

    def hold(self, coefficients: Tensor) -> None:
        """Keeps a micro-batch's scaled gradient for its step's :meth:`backward`; sends nothing.

        Args:
            coefficients: As for :meth:`backward`.
        """
        self._held += self._returns(coefficients)

    def _returns(self, coefficients: Tensor) -> list[WayBack]:
        """What the calls at hand send back; they are forgotten."""
        calls, self._calls = self._calls, []
        return [WayBack(call, coefficients) for call in calls]

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
        self.local.clear()


def _itself(saved: Tensor) -> Tensor:
    """Keeps a saved tensor without autograd's guard against changes in place."""
    return saved
