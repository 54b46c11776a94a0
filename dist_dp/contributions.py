"""What each unit contributes to the selection of rows: its contribution map, clipped, at home.

A unit's map has a 1 for every (table, row) that its examples look up, over *all* tables, and is
scaled to a Euclidean norm of at most C₁ (arXiv 2311.08357, section 3.2). All of that is known on
the unit's home rank. What travels to the rows' owners is a batch of ids once more, each pair once
and with the unit's weight, by TorchRec's own exchange: so it works for every kind of sharding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dist_dp.id_checks import is_among

if TYPE_CHECKING:
    from dist_dp.clipping.user_groups import UserGroups
    from dist_dp.cut import CutEmbeddings

WEIGHT_UNIT = 2.0**-20
"""Weights are multiples of it, so that their float64 sums are exact in any order."""

KeptRows = Mapping[str, Tensor]
"""By unique table name: the global rows that may be trained, int64, sorted; others are frozen."""


@dataclass(frozen=True)
class _Entries:
    """The ids of one lookup.

    Attributes:
        features: KeyedJaggedTensor.
        tables: Unique names of the tables that read each of its keys.
        examples: int64 ``[ids]``: the example of each id.
        keys: int64 ``[ids]``: the feature of each id, as a number.
    """

    features: Any
    tables: list[list[str]]
    examples: Tensor
    keys: Tensor

    @classmethod
    def of(cls, cut: CutEmbeddings, features: Any) -> _Entries:
        stride = features.stride()
        lengths = features.lengths()
        bags = torch.repeat_interleave(
            torch.arange(lengths.numel(), device=lengths.device),
            lengths,
            output_size=features.values().numel(),
        )
        readers: dict[str, list[str]] = {}
        for config in cut.configs:
            for name in config.feature_names:
                readers.setdefault(name, []).append(cut.table_id(config.name))
        tables = [readers.get(key, []) for key in list(features.keys())]
        keys = torch.div(bags, stride, rounding_mode="floor")
        return cls(features, tables, bags - keys * stride, keys)


def contribution_maps(
    cuts: Sequence[CutEmbeddings],
    is_real: Tensor,
    users: UserGroups | None,
    max_contribution_norm: float,
    kept: KeptRows | None = None,
) -> list[list[Any]]:
    """The clipped contribution maps of the units in flight, for their rows' owners.

    Args:
        cuts: The cut collections, with the lookups of the batch in flight.
        is_real: bool ``[batch]``: padding contributes nothing.
        users: Whose the examples are; None if each is a unit.
        max_contribution_norm: C₁.
        kept: Rows that may survive at all; by default all.

    Returns:
        For each cut and lookup a KeyedJaggedTensor with the keys of the lookup: every (table, row)
        of a unit once, with the unit's weight.

    Guarantee:
        With one unit more or less, the sums of all weights by (table, row) differ by a vector of
        norm at most C₁: a unit's weight is C₁ over the norm of what it sends, at most 1, and
        rounded *down* to a multiple of 2^-20. (A feature that several tables read is sent once and
        counted in all of them; where that makes a row count twice, the norm counts it twice too.)
    """
    entries = [[_Entries.of(cut, call.features) for call in cut.calls] for cut in cuts]
    flat = [e for some in entries for e in some]
    if not flat:
        return [[] for _ in cuts]
    units = is_real.numel() if users is None else users.num_units
    first_row, height = _first_rows(cuts)
    pairs, sources = [], []
    start = 0
    ids_of_units = []
    for e in flat:
        unit = e.examples if users is None else users.unit_of[e.examples]
        ids_of_units.append(unit)
        values = e.features.values().to(torch.int64)
        real = is_real[e.examples]
        bounds = e.features.offset_per_key()
        for number, tables in enumerate(e.tables):
            ids = slice(bounds[number], bounds[number + 1])
            for table in tables:
                rows = values[ids]
                takes_part = real[ids]
                if kept is not None and table in kept:
                    takes_part = takes_part & is_among(rows, kept[table])
                places = torch.nonzero(takes_part).squeeze(1)
                pairs.append(unit[ids][places] * height + first_row[table] + rows[places])
                sources.append(places + (start + bounds[number]))
        start += values.numel()
    pair, source = torch.cat(pairs), torch.cat(sources)
    owner = torch.cat(ids_of_units)
    sent = torch.zeros(start, dtype=torch.bool, device=pair.device)
    ordered, order = torch.sort(pair, stable=True)
    begins = torch.ones_like(ordered, dtype=torch.bool)
    begins[1:] = ordered[1:] != ordered[:-1]
    sent[source[order[begins]]] = True
    # Each pair is sent once, but where a feature has several tables.
    once = max(len(tables) for e in flat for tables in e.tables) <= 1
    counted = ordered[begins] if once else pair[sent[source]]
    squares = _squared_sizes(counted, units, height, once)
    weights = (max_contribution_norm * squares.clamp_min(1).to(torch.float64).rsqrt()).clamp_max(1)
    weights = torch.floor(weights / WEIGHT_UNIT) * WEIGHT_UNIT
    result: list[list[Any]] = []
    start = 0
    for some in entries:
        lookups = []
        for e in some:
            count = e.examples.numel()
            mine = slice(start, start + count)
            lookups.append(_with_weights(e, sent[mine], weights[owner[mine]]))
            start += count
        result.append(lookups)
    return result


def _first_rows(cuts: Sequence[CutEmbeddings]) -> tuple[dict[str, int], int]:
    """Where each table begins if all are put below each other, and how many rows that makes."""
    first, height = {}, 0
    for cut in cuts:
        for config in cut.configs:
            first[cut.table_id(config.name)] = height
            height += config.num_embeddings
    return first, height


def _squared_sizes(pairs: Tensor, units: int, height: int, once: bool) -> Tensor:
    """Σ over (table, row) of the squared number of times that each unit sends it, ``[units]``."""
    if once:
        return torch.bincount(torch.div(pairs, height, rounding_mode="floor"), minlength=units)
    distinct, counts = torch.unique(pairs, return_counts=True)
    squares = torch.zeros(units, dtype=torch.int64, device=pairs.device)
    owners = torch.div(distinct, height, rounding_mode="floor")
    return squares.index_add_(0, owners, counts.square())


def _with_weights(entries: _Entries, sent: Tensor, weights: Tensor) -> Any:
    from torchrec import KeyedJaggedTensor

    features = entries.features
    stride = features.stride()
    bags = entries.keys * stride + entries.examples
    lengths = torch.bincount(bags[sent], minlength=len(entries.tables) * stride)
    return KeyedJaggedTensor(
        keys=features.keys(),
        values=features.values()[sent],
        weights=weights[sent].to(torch.float32),
        lengths=lengths.to(features.lengths().dtype),
        stride=stride,
    )
