"""Exact per-user gradient norms of embedding tables, on the rank that owns the users.

As in :mod:`dist_dp.clipping.table_norms`, with the user in the place of the example: equal rows of
different examples of one user add up *before* the norm is taken. All tables of a width are done in
one pass: their entries are sorted by (user, row), and only rows that a user reads more than once
need a sum.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dist_dp.clipping.table_norms import TableUse
from dist_dp.clipping.table_uses import Tables, uses_of
from dist_dp.clipping.user_groups import UserGroups
from dist_dp.lookup_calls import LookupCall


def collection_norms_of_users(
    tables: Tables, calls: Sequence[LookupCall], users: UserGroups, device: torch.device
) -> Tensor:
    """Σ over tables of the squared norms of users' gradients, float ``[units]``.

    Args:
        tables: The collection's tables.
        calls: Its forwards in this step, with their gradients.
        users: Whose the examples are.
        device: Of the result.
    """
    rows = {config.name: config.num_embeddings for config in tables.configs}
    by_width: dict[int, list[tuple[str, TableUse]]] = {}
    for call in calls:
        for name, use in uses_of(tables, call, set()):
            by_width.setdefault(use.delta.shape[1], []).append((name, use))
    total = torch.zeros(users.num_units, device=device)
    for uses in by_width.values():
        total += squared_norms_of_users(uses, rows, users)
    return total


def squared_norms_of_users(
    uses: Sequence[tuple[str, TableUse]], rows: dict[str, int], users: UserGroups
) -> Tensor:
    """Squared norms of users' gradients with respect to tables of one width, together.

    Args:
        uses: Every use of the tables in this step, with the table's name.
        rows: Rows of each table.
        users: Whose the examples are.

    Returns:
        float ``[units]``.

    Guarantee:
        The exact norm of the sum over all of a user's examples, repeated ids and shared tables
        included. What a user reads more than once is added up before it is squared, not recovered
        from products of pairs: examples that nearly cancel lose no more than a float32 sum does.
    """
    names = list(dict.fromkeys(name for name, _ in uses))
    first_row = dict(zip(names, [0, *_sums([rows[name] for name in names])], strict=False))
    height = sum(rows[name] for name in names)
    deltas = torch.cat([use.delta for _, use in uses])
    owners, keys, places, weights = [], [], [], []
    start = 0
    for name, use in uses:
        examples = use.examples
        owners.append(users.unit_of[examples])
        keys.append(owners[-1] * height + first_row[name] + use.rows)
        count = examples.numel()
        places.append(start + (examples if use.pooled else torch.arange(count).to(examples)))
        given = use.entry_weights
        weights.append(torch.ones(count).to(deltas) if given is None else given.to(deltas.dtype))
        start += use.delta.shape[0]
    owner, place, weight = torch.cat(owners), torch.cat(places), torch.cat(weights)
    squared = torch.zeros(users.num_units, dtype=deltas.dtype, device=deltas.device)
    ordered, order = torch.sort(torch.cat(keys))
    same = ordered[1:] == ordered[:-1]
    edge = same.new_zeros(1)
    follows, leads = torch.cat([edge, same]), torch.cat([same, edge])
    alone = order[~(follows | leads)]
    norms = torch.linalg.vector_norm(deltas, dim=1).square_()
    squared.index_add_(0, owner[alone], norms[place[alone]] * weight[alone].square())
    repeated = order[follows | leads]
    if repeated.numel():
        group = (~follows[follows | leads]).cumsum(0) - 1
        summed = deltas.new_zeros(int(group[-1]) + 1, deltas.shape[1])
        summed.index_add_(0, group, deltas[place[repeated]] * weight[repeated].unsqueeze(1))
        heads = order[leads & ~follows]
        squared.index_add_(0, owner[heads], summed.square().sum(1))
    return squared


def _sums(values: list[int]) -> list[int]:
    return [sum(values[: n + 1]) for n in range(len(values))]
