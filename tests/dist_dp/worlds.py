"""Worlds of processes for tests: start one, run many cases in it, collect what each rank returns.

Importing torchrec costs seconds a process, so a test module starts one world and asserts on parts
of what it returned.
"""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

TIMEOUT = timedelta(seconds=120)


def run_world(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Runs ``function(*args)`` on every rank of a gloo world; results by rank.

    A world of one runs in this process.
    """
    import torch.multiprocessing as mp

    if world_size == 1:
        from dist_dp.distributed import ensure_process_group

        ensure_process_group()
        return [function(*args)]
    with tempfile.TemporaryDirectory(prefix="world-") as folder:
        arguments = (world_size, folder, function, args)
        mp.start_processes(_rank, args=arguments, nprocs=world_size, start_method="spawn")
        return [
            pickle.loads((Path(folder) / f"result-{r}").read_bytes()) for r in range(world_size)
        ]


def _rank(
    rank: int, world_size: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    import warnings

    import torch
    import torch.distributed as dist

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
    try:
        result = function(*args)
        (Path(folder) / f"result-{rank}").write_bytes(pickle.dumps(result))
        dist.barrier()
    finally:
        dist.destroy_process_group()
