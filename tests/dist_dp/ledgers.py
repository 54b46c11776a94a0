"""What tests of the ledger share: a data set, raw entries, ledgers of either kind."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

from dist_dp.accounting import GaussianEvent
from dist_dp.ledger import Ledger
from dist_dp.ledger_entry import Position, bound, canonical
from dist_dp.step_costs import StepCosts

DELTA = 1e-5
EVENT = GaussianEvent(4.0, 0.02)
VERSION_1 = Path(__file__).with_name("ledger_version_1.sql")
TRIGGERS = [f"{t}_no_{c}" for t in ("entries", "runs", "datasets") for c in ("update", "delete")]


def register(ledger: Ledger, epsilon: float, name: str = "clicks") -> None:
    ledger.register_dataset(
        name, fingerprint=f"sha of {name}", num_records=10_000, epsilon=epsilon, delta=DELTA
    )


def filled(address: Any, leases: int = 5, *, epsilon: float = 50.0) -> Ledger:
    """A ledger with a data set, an open run and some leases, the first of them settled."""
    ledger = Ledger(address)
    register(ledger, epsilon)
    ledger.open_run("a", "clicks", StepCosts.constant(EVENT, 10_000))
    for number in range(leases):
        lease = ledger.reserve("a", 1 + 10 * number, 10)
        if number == 0:
            ledger.settle(lease.lease_id, 7)
    return ledger


def append_raw(path: Path, kind: str, **fields: Any) -> None:
    """Append an entry that is bound to the last one as it should be, whatever it says."""
    values: dict[str, Any] = {
        "at": "", "kind": kind, "dataset": "clicks", "run_id": None, "lease_id": None,
        "first_step": None, "steps": None, "request_id": None, "details": {}, **fields,
    }  # fmt: skip
    with sqlite3.connect(path) as raw:
        last = raw.execute("SELECT seq, hash FROM entries ORDER BY seq DESC LIMIT 1").fetchone()
        entry = bound(Position("", *last), values)
        row = {**vars(entry), "details": canonical(entry.details)}
        if kind == "run_opened":
            raw.execute("INSERT INTO runs VALUES (?, ?)", [entry.run_id, entry.dataset])
        raw.execute(
            f"INSERT INTO entries ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})",
            list(row.values()),
        )


def without_triggers(path: Path) -> sqlite3.Connection:
    """A connection to the file that may change everything; it commits by itself."""
    raw = sqlite3.connect(path, isolation_level=None)
    for trigger in TRIGGERS:
        raw.execute(f"DROP TRIGGER IF EXISTS {trigger}")
    return raw


def version_1(path: Path) -> Path:
    """A ledger file as version 0.1 left it."""
    path.touch(0o600)
    with sqlite3.connect(path) as raw:
        raw.execute("PRAGMA journal_mode = WAL")
        raw.executescript(VERSION_1.read_text(encoding="utf-8"))
    raw.close()
    return path
