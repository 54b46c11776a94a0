"""Per-example norms of all tables of a collection, from the forwards of a step.

:mod:`dist_dp.clipping.table_norms` has the mathematics; here it is found out which outputs'
gradients belong to which table, and which tables can share one pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dist_dp.clipping.table_norms import TableUse, squared_norms, squared_norms_of_bags
from dist_dp.id_checks import is_among
from dist_dp.lookup_calls import LookupCall


@dataclass(frozen=True)
class Tables:
    """The tables of a collection.

    Attributes:
        configs: TorchRec's configuration of each.
        output_names: The keys of the outputs each has a part in, feature by feature.
        pooled: Whether bags are pooled.
        kept: The rows that are trained at all, by name of the table, int64, sorted; the others are
            frozen, so no gradient with respect to them counts. All are where none are named.
    """

    configs: Sequence[Any]
    output_names: Sequence[list[str]]
    pooled: bool
    kept: Mapping[str, Tensor] = field(default_factory=dict)


def collection_norms(
    tables: Tables, calls: Sequence[LookupCall], batch: int, device: torch.device
) -> Tensor:
    """Σ over tables of the squared per-example gradient norms, float ``[batch]``.

    Args:
        tables: The collection's tables.
        calls: Its forwards in this step, with their gradients.
        batch: Examples on this rank.
        device: Of the result.
    """
    total = torch.zeros(batch, device=device)
    alone = _used_once(tables, calls)
    for group in _by_width(alone):
        (call,) = calls
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
    done = {config.name for config, _ in alone}
    uses: dict[str, list[TableUse]] = {}
    for call in calls:
        for name, use in uses_of(tables, call, done):
            uses.setdefault(name, []).append(use)
    rows = {c.name: c.num_embeddings for c in tables.configs}
    for name, found in uses.items():
        total += squared_norms(found, rows[name], batch)
    return total


def _used_once(tables: Tables, calls: Sequence[LookupCall]) -> list[tuple[Any, list[str]]]:
    """Pooled tables with one feature in one forward: (configuration, output names)."""
    if not tables.pooled or len(calls) != 1:
        return []
    pairs = zip(tables.configs, tables.output_names, strict=True)
    return [
        (config, names)
        for config, names in pairs
        if len(names) == 1 and config.name not in tables.kept
    ]


def uses_of(tables: Tables, call: LookupCall, done: set[str]) -> Iterator[tuple[str, TableUse]]:
    """Every use of a table in a call, by the table's name, but of those that are done."""
    pooled_grads: dict[str, Tensor] = {}
    if tables.pooled:
        grad = call.pieces[""].leaf.grad
        if grad is None:
            return
        parts = grad.split(list(call.dims.values()), dim=1)
        pooled_grads = dict(zip(call.dims, parts, strict=True))
    for config, names in zip(tables.configs, tables.output_names, strict=True):
        if config.name in done:
            continue
        for feature, key in zip(config.feature_names, names, strict=True):
            delta = pooled_grads[key] if tables.pooled else call.pieces[key].leaf.grad
            if delta is None:
                continue
            bag = call.features[feature]
            mean = tables.pooled and config.pooling.name == "MEAN"
            rows = bag.values().to(torch.int64)
            weights = _entry_weights(bag, mean) if tables.pooled else None
            if config.name in tables.kept:
                counts = is_among(rows, tables.kept[config.name]).to(delta.dtype)
                weights = counts if weights is None else weights * counts
            yield (
                config.name,
                TableUse(
                    rows=rows,
                    lengths=bag.lengths().to(torch.int64),
                    entry_weights=weights,
                    delta=delta,
                    pooled=tables.pooled,
                ),
            )


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
