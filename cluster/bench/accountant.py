"""What charging costs: leases a second, in process and through the accountant on Ray.

A job asks for many steps at a time and ahead of their use, so what counts is how many such leases
the accountant grants a second, to all jobs together, and how long a step waits for its own.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

from dist_dp.cluster.accountant import AccountantClient, start_accountant
from dist_dp.cluster.config import ClusterConfig
from dist_dp.cluster.ray_session import ray_session
from dist_dp.events import GaussianEvent
from dist_dp.group_commit import GroupedLedger
from dist_dp.leases import StepLeases
from dist_dp.ledger import Ledger, Reservation
from dist_dp.step_costs import StepCosts

EVENT = GaussianEvent(1.0, 1e-3)
DELTA = 1e-7
LEASE_STEPS = 50
STEP_S = 0.05
"""A step that is short for a recommender; charging should take at most 1 % of it."""
THREADS, BATCH = 64, 256


def run(say: Callable[[str], None], *, rounds: int = 3, seconds: float = 1.0) -> dict[str, Any]:
    """Measures, and returns what goes to the JSON file.

    Args:
        say: Told what is going on.
        rounds: Times that each way is measured, in turns.
        seconds: How long each time.
    """
    say("starting Ray")
    with (
        tempfile.TemporaryDirectory(prefix="dist-dp-bench-") as name,
        ray_session(ClusterConfig(num_workers=1)),
    ):
        ledger = Ledger(Path(name) / "own.sqlite")
        # Another file: it is never charged behind the accountant's back, as no job's is.
        central = start_accountant(Path(name) / "central.sqlite")
        for opened in (ledger, central):
            opened.register_dataset(
                "clicks", fingerprint="bench", num_records=10**6, epsilon=1e3, delta=DELTA
            )
            for number in range(THREADS):
                costs = StepCosts.constant(EVENT, 10**6)
                opened.open_run(f"run-{number}", "clicks", costs, {"planned": 10**6})
        grouped, first = GroupedLedger(ledger), _Steps()
        ways: dict[str, Callable[[], int]] = {
            "one caller": lambda: _one(ledger.reserve, first),
            f"{THREADS} threads, sharing writes": lambda: _threads(grouped.reserve, first),
            f"{BATCH} reservations in a call": lambda: _many(ledger, first),
            "Ray, one caller": lambda: _one(central.reserve, first),
            f"Ray, {THREADS} threads": lambda: _threads(central.reserve, first),
        }
        rates: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(rounds + 1):
            for way, once in ways.items():
                say(f"round {number} of {rounds}: {way}")
                begin, leases = time.perf_counter(), 0
                while time.perf_counter() - begin < seconds:
                    leases += once()
                if number:  # the first composes what the others find composed
                    rates[way].append(leases / (time.perf_counter() - begin))
        say("steps that are charged ahead")
        waits = _step_waits(central)
        return {
            "command": "dist-dp bench accountant",
            "lease_steps": LEASE_STEPS,
            "results": [
                {
                    "way": way,
                    "leases_per_second": median(found),
                    "low": min(found),
                    "high": max(found),
                    "steps_per_second": LEASE_STEPS * median(found),
                }
                for way, found in rates.items()
            ],
            "runs": THREADS,
            "step_seconds": STEP_S,
            "wait_share_of_step": sum(waits) / (len(waits) * STEP_S),
            "longest_wait_ms": 1e3 * max(waits),
        }


class _Steps:
    """First steps of leases, by run: each begins where the one before ended."""

    def __init__(self) -> None:
        self._next: dict[int, int] = {}

    def __call__(self, run: int) -> int:
        first = self._next.get(run, 1)
        self._next[run] = first + LEASE_STEPS
        return first


def _one(reserve: Callable[..., Any], first: _Steps) -> int:
    for _ in range(20):
        reserve("run-0", first(0), LEASE_STEPS)
    return 20


def _threads(reserve: Callable[..., Any], first: _Steps) -> int:
    def client(number: int) -> None:
        for _ in range(5):
            reserve(f"run-{number}", first(number), LEASE_STEPS)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(client, range(THREADS)))
    return 5 * THREADS


def _many(ledger: Ledger, first: _Steps) -> int:
    ledger.reserve_many(
        [Reservation(f"run-{n % 8}", first(n % 8), LEASE_STEPS) for n in range(BATCH)]
    )
    return BATCH


def _step_waits(accountant: AccountantClient, steps: int = 200) -> list[float]:
    """Seconds that each of so many steps of ``STEP_S`` waited for its charge, from Ray's actor.

    The wait for the first lease of all, before any step, is left out.
    """
    accountant.open_run("steps", "clicks", StepCosts.constant(EVENT, 10**5), {"planned": 10**5})
    leases = StepLeases(accountant, "steps", 10**5, LEASE_STEPS)
    waits = []
    for step in range(1, steps + 1):
        begin = time.perf_counter()
        if not leases.cover(step):
            raise RuntimeError(leases.refusal)
        waits.append(time.perf_counter() - begin)
        time.sleep(STEP_S)
    leases.close(steps)
    return waits[1:]


def show(result: dict[str, Any]) -> None:
    """Prints the figures."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for column in ("leases/s", "low–high", f"steps/s ({result['lease_steps']} a lease)"):
        table.add_column(column, justify="right")
    for row in result["results"]:
        spread = f"{row['low']:,.0f}–{row['high']:,.0f}"
        table.add_row(
            row["way"],
            f"{row['leases_per_second']:,.0f}",
            spread,
            f"{row['steps_per_second']:,.0f}",
        )
    console = Console(width=120)
    console.print(table)
    console.print(
        f"a step of {1e3 * result['step_seconds']:g} ms waits for its charge "
        f"{100 * result['wait_share_of_step']:.3f} % of its time, at most "
        f"{result['longest_wait_ms']:.1f} ms once"
    )
