"""``make demo``: generate click logs, train on them privately, show the result."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from rich.console import Console

from dist_dp.cluster.config import parse_config
from dist_dp.cluster.console import print_summary, watched_fit
from dist_dp.cluster.run_folder import write_summary
from dist_dp.datasets.synthetic import write_criteo_like

EPOCHS, BATCH = 4, 1024


def run_demo(output: Path, *, records: int, workers: int, verbose: bool = False) -> None:
    """Runs the demo; every run has a data set of its own, so none is refused by the ledger.

    Args:
        output: Folder for data, ledger and runs.
        records: Records to generate.
        workers: Local Ray workers.
        verbose: Let libraries log.
    """
    console = Console(stderr=True)
    stamp = f"{datetime.now():%Y%m%d-%H%M%S}"
    data = output / "demo-data" / f"clicks-{stamp}.tsv"
    data.parent.mkdir(parents=True, exist_ok=True)
    console.print(f"generating {records:,} click records …")
    truth = write_criteo_like(data, records, seed=int(stamp.replace("-", "")))
    steps = max(1, round(EPOCHS * 0.8 * records / BATCH))
    config = parse_config(
        {
            "data": {"path": str(data), "format": "criteo", "max_num_embeddings": 10_000},
            "model": {"embedding_dim": 8, "dense_arch": [32, 8], "over_arch": [32, 1]},
            "privacy": {
                "epsilon": 8.0,
                "max_grad_norm": 5.0,
                "ledger": str(output / "ledger.sqlite"),
            },
            "train": {
                "steps": steps,
                "expected_batch_size": BATCH,
                "learning_rate": {"kind": "cosine", "base": 5.0, "total_steps": steps},
                "dense_learning_rate": {"kind": "cosine", "base": 0.003, "total_steps": steps},
                "dense_optimizer": "adam",
                "evaluate_every": 40,
            },
            "cluster": {"num_workers": workers},
            "output": {"folder": str(output), "name": f"demo-{stamp}"},
        }
    )
    summary, folder = watched_fit(config, verbose=verbose)
    summary["best_auc"] = truth["best_auc"]
    write_summary(folder, summary)
    from dist_dp.cluster.report import write_report

    write_report(folder)
    print_summary(summary, folder)
