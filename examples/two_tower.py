"""Makes a hand-written TorchRec two-tower model private, in three lines.

Run it with ``python examples/two_tower.py``: one process, no Ray, data generated on the spot.
Items differ in popularity, and each user and each item has a hidden taste: a user clicks popular
items more often, and items of the same taste.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor

from dist_dp import PrivacyEngine, load_release

USERS, ITEMS, RECORDS = 200, 100, 40_000
Batch = tuple[KeyedJaggedTensor, KeyedJaggedTensor, Tensor]


class Clicks(Dataset[tuple[int, int, float]]):
    """(user, item, clicked) records with a planted truth."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        popularity = 1.5 * torch.randn(ITEMS, generator=generator)
        taste_of_user = torch.randn(USERS, 2, generator=generator)
        taste_of_item = torch.randn(ITEMS, 2, generator=generator)
        self.users = torch.randint(0, USERS, (RECORDS,), generator=generator)
        self.items = torch.randint(0, ITEMS, (RECORDS,), generator=generator)
        agreement = (taste_of_user[self.users] * taste_of_item[self.items]).sum(1)
        logit = popularity[self.items] + agreement
        self.clicks = (torch.rand(RECORDS, generator=generator) < torch.sigmoid(logit)).float()

    def __len__(self) -> int:
        return RECORDS

    def __getitem__(self, index: int) -> tuple[int, int, float]:
        return int(self.users[index]), int(self.items[index]), float(self.clicks[index])


def collate(records: list[tuple[int, int, float]]) -> Batch:
    """Records to the two towers' inputs and the labels."""
    users, items, clicks = zip(*records, strict=True)
    lengths = torch.ones(len(records), dtype=torch.int32)
    return (
        KeyedJaggedTensor(keys=["user"], values=torch.tensor(users), lengths=lengths),
        KeyedJaggedTensor(keys=["item"], values=torch.tensor(items), lengths=lengths),
        torch.tensor(clicks),
    )


class TwoTower(nn.Module):
    """A user tower and an item tower; the score is their dot product and the item's own."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.user_table = self._table("user", USERS, dim)
        self.item_table = self._table("item", ITEMS, dim)
        self.user_tower = nn.Linear(dim, dim)
        self.item_tower = nn.Linear(dim, dim)
        self.item_score = nn.Linear(dim, 1)

    @staticmethod
    def _table(name: str, rows: int, dim: int) -> EmbeddingBagCollection:
        config = EmbeddingBagConfig(
            name=name,
            num_embeddings=rows,
            embedding_dim=dim,
            feature_names=[name],
            init_fn=lambda weight: nn.init.normal_(weight, std=0.3),
        )
        return EmbeddingBagCollection(tables=[config], device=torch.device("cpu"))

    def forward(self, users: KeyedJaggedTensor, items: KeyedJaggedTensor) -> Tensor:
        """Scores, float ``[batch]``."""
        user = self.user_tower(self.user_table(users).values())
        features = self.item_table(items).values()
        agreement = (user * self.item_tower(features)).sum(1)
        return agreement + self.item_score(features).squeeze(1)


def main(folder: Path) -> None:
    """Trains, releases, loads the released model again."""
    torch.manual_seed(0)
    model: nn.Module = TwoTower()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    loader = DataLoader(Clicks(), batch_size=2048, collate_fn=collate)
    criterion = nn.BCEWithLogitsLoss()

    # The three lines. The loader becomes a Poisson sampler over the same data set.
    engine = PrivacyEngine(dataset="two-tower-example", ledger=folder / "ledger.sqlite")
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model, optimizer=optimizer, data_loader=loader, table_lr=10.0,
        target_epsilon=8.0, target_delta=1e-6, epochs=15, max_grad_norm=4.0,
    )  # fmt: skip

    for step, (users, items, clicks) in enumerate(loader, start=1):
        loss = criterion(model(users, items), clicks)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step}/{len(loader)}  loss {loss.item():.4f}")

    released = engine.release(folder / "model")
    print(engine.parts.plan.statement())

    fresh = load_release(released, TwoTower()).eval()
    users, items, clicks = collate([Clicks()[i] for i in range(5000)])
    with torch.no_grad():
        right = ((fresh(users, items) > 0) == (clicks > 0.5)).float().mean()
    print(f"the released model is right on {right:.1%} of 5,000 records")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(Path(scratch))
