"""Random models and their data, by case name: what the gradient tests run through."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    KeyedJaggedTensor,
    PoolingType,
)
from torchrec.models.dlrm import DLRM, DLRM_DCN

from tests.dist_dp.clicks import Clicks, random_bags

DENSE = 5
BATCH = 9


def bags(
    rows: dict[str, tuple[int, list[str]]],
    dim: int,
    pooling: dict[str, PoolingType] | None = None,
    weighted: bool = False,
    device: str = "cpu",
    wide: Sequence[str] = (),
) -> EmbeddingBagCollection:
    """A pooled collection; ``rows`` is table name to (rows, features); ``wide`` doubles dim."""
    pooling = pooling or {}
    tables = [
        EmbeddingBagConfig(
            name=name,
            num_embeddings=count,
            embedding_dim=dim * (1 + (name in wide)),
            feature_names=features,
            pooling=pooling.get(name, PoolingType.SUM),
        )
        for name, (count, features) in rows.items()
    ]
    return EmbeddingBagCollection(tables=tables, is_weighted=weighted, device=torch.device(device))


class Mixed(nn.Module):
    """Pooled and sequence tables with shared features; Linear on 2-D and 3-D, LayerNorm, PReLU."""

    def __init__(self, rows_a: int, rows_b: int, dim: int, width: int, weighted: bool) -> None:
        super().__init__()
        mean = PoolingType.SUM if weighted else PoolingType.MEAN
        self.pooled = bags(
            {"a": (rows_a, ["f0", "f1"]), "b": (rows_b, ["f2"])}, dim, {"b": mean}, weighted
        )
        self.sequence = EmbeddingCollection(
            tables=[
                EmbeddingConfig(
                    name="s", num_embeddings=6, embedding_dim=dim, feature_names=["h0", "h1"]
                )
            ],
            device=torch.device("cpu"),
        )
        self.bottom = nn.Sequential(nn.Linear(DENSE, width), nn.ReLU(), nn.LayerNorm(width))
        self.each = nn.Linear(dim, 3)
        self.top = nn.Sequential(
            nn.Linear(3 * dim + width + 3, 12), nn.PReLU(), nn.Linear(12, 1, bias=False)
        )

    def forward(
        self, dense: Tensor, sparse: KeyedJaggedTensor, history: KeyedJaggedTensor
    ) -> Tensor:
        pooled = self.pooled(sparse).values()
        found = self.sequence(history)
        # TorchRec gives float32 whatever the table's dtype; the reference runs in float64.
        padded = [found[h].to_padded_dense(4).to(dense.dtype) for h in ("h0", "h1")]
        summed = sum(torch.tanh(self.each(p)).sum(1) for p in padded)
        return self.top(torch.cat([pooled, self.bottom(dense), summed], 1)).squeeze(1)


class Oddities(nn.Module):
    """A layer called twice, a frozen layer, Conv1d, attention, in-place activations."""

    def __init__(self) -> None:
        super().__init__()
        self.pooled = bags(
            {"a": (7, ["f0"]), "b": (11, ["f1"]), "c": (5, ["f2"])}, 8, {"c": PoolingType.MEAN}
        )
        self.bottom = nn.Sequential(nn.Linear(DENSE, 8), nn.ReLU(inplace=True))
        self.frozen = nn.Linear(8, 8)
        self.frozen.requires_grad_(False)
        self.twice = nn.Linear(8, 8)
        self.half_frozen = nn.Linear(8, 8)
        self.half_frozen.weight.requires_grad_(False)
        self.conv = nn.Conv1d(4, 3, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8, bias=False)
        self.top = nn.Linear(4 * 8 + 3 * 8, 1)

    def forward(self, dense: Tensor, sparse: KeyedJaggedTensor) -> Tensor:
        x = self.frozen(self.bottom(dense))
        x = torch.tanh(self.twice(torch.tanh(self.twice(x))))
        x = self.half_frozen(x)
        tokens = torch.stack([x, *self.pooled(sparse).to_dict().values()], dim=1)
        attended, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        tokens = self.norm(tokens + attended)
        mixed = torch.tanh(self.conv(tokens))
        return self.top(torch.cat([tokens.flatten(1), mixed.flatten(1)], 1)).squeeze(1)


class Flat(nn.Module):
    """TorchRec's model with its output as one number an example."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, dense: Tensor, sparse: KeyedJaggedTensor) -> Tensor:
        return self.model(dense, sparse).squeeze(1)


def _mixed(seed: int, weighted: bool) -> tuple[nn.Module, Clicks]:
    g = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    rows_a, rows_b, width = (int(torch.randint(4, 12, (), generator=g)) for _ in range(3))
    dim = 8 * (1 + seed % 2)
    model = Mixed(rows_a, rows_b, dim, width, weighted)
    sparse = random_bags({"f0": rows_a, "f1": rows_a, "f2": rows_b}, BATCH, g, weighted=weighted)
    return model, _clicks(g, sparse, random_bags({"h0": 6, "h1": 6}, BATCH, g))


def _clicks(g: torch.Generator, *sparse: KeyedJaggedTensor) -> Clicks:
    dense = torch.randn(BATCH, DENSE, generator=g)
    return Clicks(dense, sparse, torch.randint(0, 2, (BATCH,), generator=g).float())


def _three_tables(g: torch.Generator, one_each: bool) -> KeyedJaggedTensor:
    return random_bags({"f0": 7, "f1": 11, "f2": 5}, BATCH, g, one_each=one_each)


def _odd() -> tuple[nn.Module, Clicks]:
    torch.manual_seed(5)
    g = torch.Generator().manual_seed(5)
    return Oddities(), _clicks(g, _three_tables(g, one_each=False))


def _dlrm(crossed: bool) -> tuple[nn.Module, Clicks]:
    torch.manual_seed(6)
    g = torch.Generator().manual_seed(6)
    tables = bags({"a": (7, ["f0"]), "b": (11, ["f1"]), "c": (5, ["f2"])}, 8)
    common = {
        "embedding_bag_collection": tables,
        "dense_in_features": DENSE,
        "dense_arch_layer_sizes": [12, 8],
        "over_arch_layer_sizes": [10, 1],
    }
    model = DLRM_DCN(dcn_num_layers=2, dcn_low_rank_dim=4, **common) if crossed else DLRM(**common)
    return Flat(model), _clicks(g, _three_tables(g, one_each=not crossed))


CASES: dict[str, Callable[[], tuple[nn.Module, Clicks]]] = {
    "mixed-sum-mean-1": lambda: _mixed(1, weighted=False),
    "mixed-sum-mean-2": lambda: _mixed(2, weighted=False),
    "mixed-weighted-3": lambda: _mixed(3, weighted=True),
    "oddities": _odd,
    "dlrm": lambda: _dlrm(crossed=False),
    "dlrm-dcn": lambda: _dlrm(crossed=True),
}
