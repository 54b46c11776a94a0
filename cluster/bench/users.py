"""What it costs to clip users instead of records: ``python -m dist_dp.cluster.bench.users``.

One worker, one model, one stream of batches; only whose the records are differs: users of 1, 4 and
16 records each, in turns. With one record a user the step is that of records.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch

from dist_dp.clipping.user_groups import UserGroups
from dist_dp.cluster.bench.clicks import HashedClicks
from dist_dp.cluster.bench.model import build_models
from dist_dp.cluster.bench.settings import SKEWS, StepSettings
from dist_dp.distributed import ensure_process_group
from dist_dp.optimizer_settings import optimizer_settings
from dist_dp.plan import PrivacyPlan
from dist_dp.private_model import PrivateModel, build_private_model
from dist_dp.timing import PhaseTimer


def build(settings: StepSettings, timer: PhaseTimer) -> tuple[torch.nn.Module, PrivateModel]:
    """The model of ``dist-dp bench step``, private for users."""
    plan = PrivacyPlan(
        unit="user",
        num_users=settings.records,
        max_records_per_user=settings.batch,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=settings.batch,
        steps=100_000,
        delta=0.1 / settings.records,
    )
    ensure_process_group()
    model, _ = build_models(settings)
    optimizer = optimizer_settings(torch.optim.SGD(model.parameters(), lr=0.01))
    private = build_private_model(
        model, plan, optimizer, secret=bytes(32), timer=timer, sharding="table_wise"
    )
    return model, private


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--records", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--skew", choices=SKEWS, default="high")
    parser.add_argument("--rounds", type=int, default=8)
    given = parser.parse_args()
    settings = StepSettings(
        rows=(given.rows,) * 26, dim=given.dim, batch=given.batch, skew=given.skew
    )
    clicks = HashedClicks(
        settings.rows,
        pooling=1,
        exponent=SKEWS[given.skew],
        records=settings.records,
        dense_features=settings.dense_features,
    )
    timer = PhaseTimer()
    model, private = build(settings, timer)
    random = np.random.default_rng(0)
    found: dict[int, list[tuple[float, float]]] = {count: [] for count in given.records}
    step = 0
    for turn in range(given.rounds + 1):
        for count in given.records:
            step += 1
            numbers = random.integers(0, len(clicks), given.batch)
            batch = clicks.batch(numbers, padded_size=given.batch)
            sizes = torch.full((given.batch // count,), count, dtype=torch.int64)
            users = UserGroups(sizes, given.batch)
            timer.take()
            start = time.perf_counter()
            private.state.begin(step, int(sizes.sum()), given.batch, users=users)
            logits = model(batch.dense_features, batch.sparse_features)
            torch.nn.functional.binary_cross_entropy_with_logits(logits, batch.labels).backward()
            private.optimizer.step()
            seconds = time.perf_counter() - start
            if turn:  # the first is for warming up
                found[count].append((1e3 * seconds, timer.take()["clip"]))
    print("| records of a user | step, ms | clipping, ms |\n| --- | --- | --- |")
    for count, times in found.items():
        cells = [
            f"{statistics.median(x):.1f} ({min(x):.1f}-{max(x):.1f})"
            for x in zip(*times, strict=True)
        ]
        print(f"| {count} | {cells[0]} | {cells[1]} |")


if __name__ == "__main__":
    main()
