"""Random examples of a schema: they show how a model behaves without touching private records."""

from __future__ import annotations

import torch

from dist_dp.datasets.batch import ClickBatch
from dist_dp.datasets.schema import DataSchema


def random_batch(schema: DataSchema, size: int, seed: int = 0) -> ClickBatch:
    """Generates examples with every feature filled.

    Args:
        schema: The schema.
        size: Number of examples.
        seed: Seed of the generator.

    Returns:
        The batch; bags of ragged features hold two ids.
    """
    from torchrec import KeyedJaggedTensor

    generator = torch.Generator().manual_seed(seed)
    values, lengths = [], []
    for feature in schema.sparse:
        count = 2 if feature.ragged else 1
        lengths.append(torch.full((size,), count, dtype=torch.int32))
        values.append(
            torch.randint(0, feature.num_embeddings, (size * count,), generator=generator)
        )
    ids = torch.cat(values)
    weighted = any(f.weight_column for f in schema.sparse)
    return ClickBatch(
        dense_features=torch.randn(size, len(schema.dense), generator=generator),
        sparse_features=KeyedJaggedTensor(
            keys=[f.name for f in schema.sparse],
            values=ids,
            lengths=torch.cat(lengths),
            weights=torch.ones(len(ids)) if weighted else None,
        ),
        labels=torch.randint(0, 2, (size,), generator=generator).float(),
        is_real=torch.ones(size, dtype=torch.bool),
    )
