"""Random examples of a schema: they show how a model behaves without touching private records."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dist_dp.datasets.batch import ClickBatch
from dist_dp.datasets.schema import DataSchema


def random_batch(schema: DataSchema, seeds: Sequence[int]) -> ClickBatch:
    """Generates one example for each seed; a seed always gives the same example.

    Args:
        schema: The schema.
        seeds: A seed for each example.

    Returns:
        The batch; bags of ragged features hold one to three ids.
    """
    from torchrec import KeyedJaggedTensor

    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    dense = [torch.randn(len(schema.dense), generator=g) for g in generators]
    labels = [torch.randint(0, 2, (), generator=g) for g in generators]
    values, lengths = [], []
    for feature in schema.sparse:
        for g in generators:
            count = int(torch.randint(1, 4, (), generator=g)) if feature.ragged else 1
            lengths.append(count)
            values.append(torch.randint(0, feature.num_embeddings, (count,), generator=g))
    ids = torch.cat(values)
    weighted = any(f.weight_column for f in schema.sparse)
    return ClickBatch(
        dense_features=torch.stack(dense),
        sparse_features=KeyedJaggedTensor(
            keys=[f.name for f in schema.sparse],
            values=ids,
            lengths=torch.tensor(lengths, dtype=torch.int32),
            weights=torch.ones(len(ids)) if weighted else None,
        ),
        labels=torch.stack(labels).float(),
        is_real=torch.ones(len(seeds), dtype=torch.bool),
    )
