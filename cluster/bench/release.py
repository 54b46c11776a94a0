"""What a release costs: ``python -m dist_dp.cluster.bench.release``.

A release settles every row, hashes it and writes it. Beside it, in turns: settling alone, and
writing as many bytes to the same disk. Files are on the disk (fsync) before a clock is stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from dist_dp.accountant import LocalAccountant
from dist_dp.cluster.bench.clicks import HashedClicks
from dist_dp.cluster.bench.model import build_models
from dist_dp.cluster.bench.settings import StepSettings
from dist_dp.distributed import ensure_process_group
from dist_dp.engine import PrivacyEngine
from dist_dp.ledger import Ledger
from dist_dp.plan import PrivacyPlan

_PIECE = 8 << 20


class Steps:
    """A private model, and steps that leave most of its rows unsettled.

    Args:
        settings: Model and batch, as for ``dist-dp bench step``.
        home: Folder for the ledger.
    """

    def __init__(self, settings: StepSettings, home: Path) -> None:
        ensure_process_group()
        clicks = HashedClicks(
            settings.rows,
            pooling=1,
            exponent=0.0,
            records=settings.records,
            dense_features=settings.dense_features,
        )
        plan = PrivacyPlan(
            num_records=settings.records,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            expected_batch_size=settings.batch,
            steps=100,
            delta=0.1 / settings.records,
        )
        module, _ = build_models(settings)
        self.engine = PrivacyEngine(
            dataset="bench",
            accountant=LocalAccountant(Ledger(home / "ledger.sqlite")),
            sharding="table_wise",
        )
        self._model, self._optimizer, loader = self.engine.make_private_from_plan(
            plan,
            module=module,
            optimizer=torch.optim.SGD(module.parameters(), lr=0.01),
            data_loader=clicks,
            fingerprint="bench",
        )
        self._batches = iter(loader)

    def take(self) -> None:
        """One step."""
        batch = next(self._batches)
        logits = self._model(batch.dense_features, batch.sparse_features)
        torch.nn.functional.binary_cross_entropy_with_logits(logits, batch.labels).backward()
        self._optimizer.step()


def write_plainly(path: Path, size: int) -> None:
    """As many bytes as fast as the disk takes them."""
    piece = memoryview(os.urandom(_PIECE))
    with open(path, "wb", buffering=0) as file:
        for begin in range(0, size, _PIECE):
            file.write(piece[: min(_PIECE, size - begin)])
        os.fsync(file.fileno())


def timed(action: Callable[[], object]) -> float:
    """Seconds that it takes."""
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", type=int, default=4)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    settings = StepSettings(rows=(given.rows,) * given.tables, dim=given.dim, batch=given.batch)
    size = 4 * given.tables * given.rows * given.dim
    found: dict[str, list[float]] = {"settle": [], "write": [], "release": []}
    with tempfile.TemporaryDirectory(prefix="dist-dp-bench-", dir=given.folder) as name:
        home = Path(name)
        steps = Steps(settings, home)
        for number in range(given.rounds + 1):
            steps.take()
            seconds = {"settle": timed(steps.engine.parts.settle)}
            seconds["write"] = timed(lambda: write_plainly(home / "plain", size))
            (home / "plain").unlink()
            steps.take()
            released = home / f"model-{number}"
            seconds["release"] = timed(partial(steps.engine.release, released))
            shutil.rmtree(released)
            if number:  # the first is for warming up
                for what, took in seconds.items():
                    found[what].append(took)
    print(f"{size / 1e9:.2f} GB of tables\n\n| | s | GB/s |\n| --- | --- | --- |")
    for what, times in found.items():
        middle = statistics.median(times)
        print(
            f"| {what} | {middle:.2f} ({min(times):.2f}-{max(times):.2f}) "
            f"| {size / 1e9 / middle:.2f} |"
        )
    slower = statistics.median(
        release / max(settle, write) for settle, write, release in zip(*found.values(), strict=True)
    )
    print(f"\na release takes {slower:.2f} times the slower of the two")
    if given.json:
        given.json.write_text(json.dumps({"bytes": size, "seconds": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
