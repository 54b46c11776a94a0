"""``dist-dp bench machine``: the rates of this machine, for the cost model.

The rates of one process come from :mod:`~dist_dp.cluster.bench.microbenchmarks` and
:mod:`~dist_dp.cluster.bench.table_benchmarks`. What a step costs
whatever its size is the time of a step with next to nothing in it: two examples, tables of 64 rows
by 4 columns, layers of width 4. Collectives are timed between two local processes. None of it is
a point that the model is to predict.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from dist_dp.cluster.bench.settings import DEFAULT_MECHANISMS, StepSettings
from dist_dp.cost_model import MachineRates
from dist_dp.limits import read_json
from dist_dp.step_counts import all_reduce

FEW, MANY = 2, 26
"""Numbers of tables of the next-to-empty step: two, to tell what a table adds."""
EMPTY_STEPS = 25
NUMBERS = 1 << 22
"""float32 numbers that each of the two processes puts into a collective."""

Say = Callable[[str], None]


def measure_machine(say: Say, *, threads: int, rounds: int, folder: Path) -> MachineRates:
    """Measures this machine, in under a minute.

    Args:
        say: Told what is going on.
        threads: Threads of one worker with the machine to itself.
        rounds: ChaCha rounds of the noise.
        folder: Where a release would be written; 128 MiB are written there and removed.
    """
    import torch

    from dist_dp import kernels
    from dist_dp.cluster import quiet
    from dist_dp.cluster.bench import microbenchmarks as micro
    from dist_dp.cluster.bench.table_benchmarks import table_rates
    from dist_dp.kernels.bench import processor

    quiet.apply(verbose=False)
    torch.set_num_threads(threads)
    say("matrix products and passes over activations")
    rates: dict[str, Any] = {
        "matmul_flops_per_second": micro.matmul_rate(),
        "small_matmul_flops_per_second": micro.small_matmul_rate(),
        "activation_bytes_per_second": micro.activation_rate(),
        "fresh_bytes_per_second": micro.fresh_rate(),
        "indexed_numbers_per_second": micro.indexed_rate(),
        **table_rates(rounds, say),
    }
    say("the disk")
    rates["disk_bytes_per_second"] = micro.disk_rate(folder)
    say("steps with next to nothing in them")
    few, many = (_empty_steps(empty_settings(n), say) for n in (FEW, MANY))
    a_table = {n: max(0.0, (many[n] - few[n]) / (MANY - FEW)) for n in DEFAULT_MECHANISMS}
    rates["table_seconds"] = a_table
    rates["step_seconds"] = {n: max(0.0, few[n] - FEW * a_table[n]) for n in DEFAULT_MECHANISMS}
    say("two processes")
    rates |= _two_processes(many["none"])
    return MachineRates(
        threads=threads,
        rounds=rounds,
        source=(
            f"measured by dist-dp bench machine: {processor()}, {threads} threads, torch "
            f"{torch.__version__}, kernels {kernels.implementation('cpu')}; collectives between "
            "two local processes over gloo"
        ),
        **rates,
    )


def empty_settings(tables: int, workers: int = 1) -> StepSettings:
    """A step with next to nothing in it."""
    return StepSettings(
        rows=(64,) * tables,
        dim=4,
        bottom=(4, 4, 4),
        top=(4, 4, 4, 4, 1),
        batch=2,
        records=1000,
        workers=workers,
        at_step=100,
        release=False,
    )


def _empty_steps(settings: StepSettings, say: Say) -> dict[str, float]:
    """Median seconds of a step by mechanism, the ledger aside; every rank calls it."""
    from dist_dp.cluster.bench.field import line_up

    del say
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="dist-dp-bench-") as name:
        field = line_up(settings, Path(name))
        try:
            for contender in field.contenders:
                contender.activate()
                samples = [contender.step() for _ in range(EMPTY_STEPS)]
                own = [s.seconds - 1e-3 * s.phases_ms.get("ledger", 0.0) for s in samples]
                found[contender.name] = median(own[EMPTY_STEPS // 5 :])
        finally:
            field.close()
    return found


def _two_processes(alone: float) -> dict[str, float]:
    """Rates of collectives, and what a step of several workers costs beyond its messages.

    Args:
        alone: Seconds of the next-to-empty step of one process.
    """
    import torch.multiprocessing as mp

    with tempfile.TemporaryDirectory(prefix="dist-dp-bench-") as folder:
        mp.start_processes(_rank, args=(folder,), nprocs=2, start_method="spawn")
        result: dict[str, float] = read_json(Path(folder) / "result.json")
    step = result.pop("empty_step_seconds")
    # rounds of that step: ids, lengths and sizes, partial sums, their gradient, dense gradients
    rounds = 3 + 2 + 1 + all_reduce(0.0, 2).rounds
    result["worker_seconds"] = max(0.0, step - alone - rounds * result["round_seconds"])
    return result


def _rank(rank: int, folder_name: str) -> None:
    """One of the two processes; rank 0 leaves the result in the folder."""
    import torch
    import torch.distributed as dist

    from dist_dp.cluster import quiet

    folder = Path(folder_name)
    quiet.apply(verbose=False)
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    try:
        result = _collectives()
        settings = replace(empty_settings(MANY, workers=2), mechanisms=("none",))
        result["empty_step_seconds"] = _empty_steps(settings, lambda _: None)["none"]
        if rank == 0:
            (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _collectives() -> dict[str, float]:
    """Bytes a second that a process sends in each collective, and the latency of a message."""
    import torch
    import torch.distributed as dist

    def seconds(run: Callable[[], object], repeats: int = 7) -> float:
        run()
        found = []
        for _ in range(repeats):
            dist.barrier()
            begin = time.perf_counter()
            run()
            found.append(time.perf_counter() - begin)
        return median(found)

    one, large = torch.zeros(2), torch.ones(NUMBERS)
    half = all_reduce(4.0 * NUMBERS, 2)
    latency = seconds(lambda: dist.all_to_all_single(torch.empty_like(one), one), repeats=100)
    exchange = seconds(lambda: dist.all_to_all_single(torch.empty_like(large), large))
    reduction = seconds(lambda: dist.all_reduce(large))
    gathering = seconds(lambda: dist.all_gather_into_tensor(torch.empty(2 * NUMBERS), large))
    return {
        "round_seconds": latency,
        "all_to_all_bytes_per_second": 4.0 * NUMBERS / 2 / exchange,
        "all_reduce_bytes_per_second": half.all_reduce_bytes / reduction,
        "all_gather_bytes_per_second": 4.0 * NUMBERS / gathering,
    }
