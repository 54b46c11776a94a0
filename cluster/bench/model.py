"""One sharded collection under two dense models: a private one, and plain TorchRec."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from dist_dp.cluster.bench.settings import StepSettings


class ClickModel(nn.Module):
    """TorchRec's DLRM with one logit an example.

    Args:
        dlrm: The model.
    """

    def __init__(self, dlrm: nn.Module) -> None:
        super().__init__()
        self.dlrm: Any = dlrm

    def forward(self, dense: Tensor, sparse: Any) -> Tensor:
        """Logits, float ``[batch]``."""
        logits: Tensor = self.dlrm(dense, sparse)
        return logits.squeeze(1)


def build_models(settings: StepSettings) -> tuple[ClickModel, ClickModel]:
    """The model to be made private, with its tables on the meta device, and its plain twin.

    The twin has the same dense layers and no tables: :func:`share_tables` gives it the sharded
    ones.
    """
    from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
    from torchrec.models.dlrm import DLRM

    tables = [
        EmbeddingBagConfig(
            name=f"t{i}",
            num_embeddings=rows,
            embedding_dim=settings.dim,
            feature_names=[f"f{i}"],
            init_fn=_initialised_later,
        )
        for i, rows in enumerate(settings.rows)
    ]
    torch.manual_seed(0)
    model = ClickModel(
        DLRM(
            embedding_bag_collection=EmbeddingBagCollection(
                tables=tables, device=torch.device("meta")
            ),
            dense_in_features=settings.dense_features,
            dense_arch_layer_sizes=list(settings.bottom),
            over_arch_layer_sizes=list(settings.top),
        )
    )
    twin = copy.deepcopy(model)
    del twin.dlrm.sparse_arch.embedding_bag_collection
    return model, twin


def _initialised_later(weight: Tensor) -> Tensor:
    """Spares TorchRec's initialisation: the keyed one writes every row of a sharded table."""
    return weight


def share_tables(private: ClickModel, twin: ClickModel) -> Any:
    """Puts TorchRec's own sharded collection, past the graph cut, into the plain twin.

    Returns:
        The cut, to be set aside (``plain``) while the twin trains.
    """
    cut = private.dlrm.sparse_arch.embedding_bag_collection
    twin.dlrm.sparse_arch.embedding_bag_collection = cut.sharded
    return cut


def dense_parameters(twin: ClickModel) -> list[nn.Parameter]:
    """The twin's parameters outside the tables."""
    return [*twin.dlrm.dense_arch.parameters(), *twin.dlrm.over_arch.parameters()]
