"""What TorchRec 1.8 and FBGEMM 1.8 get wrong about some placements, put right after sharding.

Each is a wrong model or a crash, found by comparing with the unsharded model; look here first when
their versions change. ``tests/dist_dp/test_sharding_kinds.py`` fails without any one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from dist_dp.table_shard import TableShard

_ROWS_SPLIT = ("row_wise", "table_row_wise", "grid")


def divide_means(sharded: Any, configs: list[Any], kinds: Mapping[str, str]) -> None:
    """Makes a sharded pooled collection divide what is to be a mean, and nothing else.

    A bag whose rows lie on several workers is summed there and divided when it is whole again.
    TorchRec forgets to do so for a grid, divides the bags of tables of other kinds too, and tells
    what to divide by feature, so that a feature in two tables is wrong in one of them. Here its
    division is off, and each output has a divisor of its own.

    Args:
        sharded: TorchRec's sharded collection, before its first forward.
        configs: The table configurations.
        kinds: Sharding kind by table name.
    """
    from torchrec.modules.embedding_modules import get_embedding_names_by_table

    feature_of = {
        output: feature
        for config, outputs in zip(configs, get_embedding_names_by_table(configs), strict=True)
        if config.pooling.name == "MEAN" and kinds[config.name] in _ROWS_SPLIT
        for output, feature in zip(outputs, config.feature_names, strict=True)
    }
    sharded._has_mean_pooling_callback = False
    if not feature_of:
        return
    send, look_up = sharded.input_dist, sharded.compute_and_output_dist

    def input_dist(context: Any, features: Any) -> Any:
        context.divisor = _divisor(sharded, features, feature_of)
        return send(context, features)

    def compute_and_output_dist(context: Any, arrived: Any) -> Any:
        awaitable = look_up(context, arrived)
        awaitable.callbacks.append(partial(_divide, divisor=context.divisor))
        return awaitable

    sharded.input_dist, sharded.compute_and_output_dist = input_dist, compute_and_output_dist


def _divisor(sharded: Any, features: Any, feature_of: Mapping[str, str]) -> Tensor:
    """Float ``[batch, columns of all outputs]``: bag lengths where a mean is due, else 1."""
    lengths = features.lengths().view(-1, features.stride()).clamp_min(1).float()
    place = {feature: i for i, feature in enumerate(features.keys())}
    ones = torch.ones_like(lengths[0])
    each = [
        lengths[place[feature_of[output]]] if output in feature_of else ones
        for output in sharded._embedding_names
    ]
    widths = torch.tensor(sharded._embedding_dims, device=lengths.device)
    columns = sum(sharded._embedding_dims)
    return torch.stack(each, dim=1).repeat_interleave(widths, dim=1, output_size=columns)


def _divide(output: Any, divisor: Tensor) -> Any:
    """The output with its columns divided."""
    from torchrec import KeyedTensor

    return KeyedTensor(
        keys=output.keys(),
        length_per_key=output.length_per_key(),
        values=output.values() / divisor,
    )


def work_without_rows(
    kernel: Any, shards: list[TableShard], feature_counts: list[int], *, pooled: bool
) -> None:
    """Makes a kernel on CPU cope with tables that have no row on this rank.

    A table of few rows over many workers leaves the last ones without any. No id can reach it
    there, but FBGEMM takes a kernel without any weight for one on a GPU, and tells the tables of a
    kernel apart by where their rows begin: a table without rows is merged into the next one, whose
    gradients then go to the wrong place, or read past the end if it is the last.

    Args:
        kernel: TorchRec's fused embedding kernel.
        shards: Its tables, in order.
        feature_counts: Features that read each of them.
        pooled: Whether it pools bags.
    """
    rows = [shard.weight.shape[0] for shard in shards]
    if 0 not in rows or shards[0].weight.device.type != "cpu":
        return
    if not any(rows):
        kernel.forward = _lookup_of_nothing(shards, feature_counts, pooled)
        return
    # As if they had one row: weights lie by offsets of their own, which this leaves alone.
    first = [0, *accumulate(max(1, count) for count in rows)]
    by_feature = [r for r, n in zip(first[:-1], feature_counts, strict=True) for _ in range(n)]
    kernel.emb_module.hash_size_cumsum.copy_(torch.tensor([*by_feature, first[-1]]))


def _lookup_of_nothing(
    shards: list[TableShard], feature_counts: list[int], pooled: bool
) -> Callable[[Any], Tensor]:
    """A forward that gives zeros, float ``[bags, columns of all features]`` or ``[0, dim]``.

    They require a gradient: the way back through the output distribution is a collective, and
    every rank takes part in it.
    """
    widths = [shard.weight.shape[1] for shard in shards]
    width = sum(w * n for w, n in zip(widths, feature_counts, strict=True)) if pooled else widths[0]
    like = shards[0].weight

    def forward(features: Any) -> Tensor:
        bags = features.stride() if pooled else 0
        return torch.zeros(bags, width, dtype=like.dtype, requires_grad=True)

    return forward
