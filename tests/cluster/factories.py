"""Models of a user, found by workers as ``tests.cluster.factories:NAME``."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from dist_dp.cluster.models import embedding_bags
from dist_dp.datasets.schema import DataSchema


class Additive(nn.Module):
    """A linear layer on the pooled embeddings and the dense features."""

    def __init__(self, schema: DataSchema, dim: int = 8) -> None:
        super().__init__()
        self.tables = embedding_bags(schema, dim)
        self.score = nn.Linear(len(schema.sparse) * dim + len(schema.dense), 1)

    def forward(self, dense: Tensor, sparse: object) -> Tensor:
        logits: Tensor = self.score(torch.cat([self.tables(sparse).values(), dense], dim=1))
        return logits


class Mixing(Additive):
    """Every logit is relative to the batch."""

    def forward(self, dense: Tensor, sparse: object) -> Tensor:
        logits = super().forward(dense, sparse)
        return logits - logits.mean()


def additive(schema: DataSchema, dim: int = 8) -> nn.Module:
    return Additive(schema, dim)


def unmasked(schema: DataSchema) -> nn.Module:
    """On a worker whose files would be open to everybody."""
    os.umask(0)
    return Additive(schema)


def mixing(schema: DataSchema) -> nn.Module:
    return Mixing(schema)


def broken(schema: DataSchema) -> nn.Module:
    raise RuntimeError("the colour of this model\nis not known")


def no_module(schema: DataSchema) -> object:
    return {"a": "dictionary"}


def placed(schema: DataSchema, folder: str) -> nn.Module:
    """Notes in which session each worker runs: every node of a local cluster has its own."""
    from dist_dp.distributed import rank

    (Path(folder) / f"rank-{rank()}.txt").write_text(str(os.getsid(0)))
    return Additive(schema)
