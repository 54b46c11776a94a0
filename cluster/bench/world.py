"""The processes of a benchmark: one in place, or several over gloo on this machine."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from dist_dp.cluster.bench.settings import StepSettings
from dist_dp.errors import DistDpError
from dist_dp.limits import read_json

TIMEOUT = timedelta(minutes=30)


def run_step(
    settings: StepSettings, say: Callable[[str], None], *, apart: bool = False
) -> dict[str, Any]:
    """Measures, and returns what goes to the JSON file.

    Args:
        settings: What to measure.
        say: Told what is going on.
        apart: Measure in a process of its own even with one worker, so that its memory is given
            back to the last byte; it tells its progress on standard error.

    Raises:
        DistDpError: A worker failed.
    """
    with tempfile.TemporaryDirectory(prefix="dist-dp-bench-") as name:
        folder = Path(name)
        if settings.workers == 1 and not apart:
            return _measure(settings, folder, say)
        return _spawned(settings, folder)


def _spawned(settings: StepSettings, folder: Path) -> dict[str, Any]:
    import torch.multiprocessing as mp

    try:
        mp.start_processes(
            _rank, args=(settings, str(folder)), nprocs=settings.workers, start_method="spawn"
        )
    except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
        known = sorted(folder.glob("error-*"))
        text = known[0].read_text(encoding="utf-8") if known else str(error)
        raise DistDpError(text) from error
    result: dict[str, Any] = read_json(folder / "result.json")
    return result


def _rank(rank: int, settings: StepSettings, folder_name: str) -> None:
    """One worker; rank 0 reports on standard error and leaves the result in the folder."""
    import torch.distributed as dist

    folder = Path(folder_name)
    store = dist.FileStore(str(folder / "store"), settings.workers)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=settings.workers, timeout=TIMEOUT
    )
    try:
        result = _measure(settings, folder, to_stderr if rank == 0 else _silent)
        if rank == 0:
            (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
        dist.barrier()
    except DistDpError as error:
        (folder / f"error-{rank}").write_text(str(error), encoding="utf-8")
        raise
    finally:
        dist.destroy_process_group()


def _measure(settings: StepSettings, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    import torch

    from dist_dp.cluster import quiet
    from dist_dp.cluster.bench.field import line_up
    from dist_dp.cluster.bench.release_cost import release_costs
    from dist_dp.cluster.bench.results import machine, summarise, threads
    from dist_dp.cluster.bench.rounds import measure

    quiet.apply(verbose=False)
    torch.set_num_threads(threads(settings.workers))
    began = time.perf_counter()
    say(f"making {settings.table_bytes / 1e9:.1f} GB of tables")
    field = line_up(settings, folder)
    ready = time.perf_counter()
    try:
        measured = measure(field.contenders, settings, say)
        costs = release_costs(field, settings, say) if settings.release else {}
    finally:
        field.close()
    return {
        "command": "dist-dp bench step",
        "settings": settings.as_dict(),
        "machine": machine(settings),
        "results": summarise(measured, settings, costs),
        "seconds_to_make_tables": ready - began,
        "seconds": time.perf_counter() - began,
    }


def to_stderr(text: str) -> None:
    """One line of progress."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
    else:
        print(text, file=sys.stderr, flush=True)


def _silent(_text: str) -> None:
    pass
