"""What TorchRec 1.8 and FBGEMM 1.8 get wrong about some placements, put right after sharding.

Each is a wrong model or a crash, found by comparing with the unsharded model; look here first when
their versions change. ``tests/dist_dp/test_sharding_kinds.py`` fails without any one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from dist_dp.errors import ConfigError
from dist_dp.table_shard import TableShard

_ROWS_SPLIT = ("row_wise", "table_row_wise", "grid")


def divide_means(sharded: Any, configs: list[Any], kinds: Mapping[str, str]) -> None:
    """Makes a sharded pooled collection divide what is to be a mean, and nothing else.

    A bag whose rows lie on several workers is summed there and divided when it is whole again.
    TorchRec forgets to do so for a grid, and divides the bags of all other tables too unless it
    has them in its list of sums.

    Args:
        sharded: TorchRec's sharded collection, before its first forward.
        configs: The table configurations.
        kinds: Sharding kind by table name.

    Raises:
        ConfigError: A feature is read from a table that is divided and from one that is not.
    """
    apart = [c.pooling.name == "MEAN" and kinds[c.name] in _ROWS_SPLIT for c in configs]
    features: dict[bool, dict[str, str]] = {True: {}, False: {}}
    for config, divided in zip(configs, apart, strict=True):
        features[divided].update(dict.fromkeys(config.feature_names, config.name))
    for name in features[True].keys() & features[False].keys():
        raise ConfigError(
            f"feature '{name}' is read from the tables '{features[True][name]}' and "
            f"'{features[False][name]}', which TorchRec cannot pool apart when one is a mean over "
            "split rows; shard the mean table_wise or column_wise"
        )
    lists = sharded._pooling_type_to_rs_features
    lists.clear()
    lists["SUM"], lists["MEAN"] = list(features[False]), list(features[True])
    sharded._has_mean_pooling_callback = any(apart)


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
