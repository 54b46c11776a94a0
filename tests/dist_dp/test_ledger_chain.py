"""The chain of hashes: what was altered, left out or put elsewhere is found, wherever it was."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dist_dp.errors import LedgerError
from dist_dp.ledger import Ledger
from dist_dp.ledger_entry import LedgerDamageError, Position
from tests.dist_dp.ledgers import EVENT, append_raw, filled, without_triggers


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A closed ledger with eight entries."""
    ledger = filled(tmp_path / "ledger.db")
    ledger.close()
    return ledger.path


def test_an_entry_is_bound_to_the_one_before(path: Path) -> None:
    """Computed here by the book, without the ledger's own functions."""
    entries = Ledger(path).history()
    with sqlite3.connect(path) as raw:
        about = dict(raw.execute("SELECT key, value FROM ledger_meta").fetchall())
    previous = hashlib.sha256(f"dist-dp ledger {about['ledger_id']}".encode()).hexdigest()
    for number, entry in enumerate(entries, start=1):
        said = {key: value for key, value in vars(entry).items() if key != "hash"}
        text = json.dumps(said, sort_keys=True, separators=(",", ":"))
        assert (entry.seq, entry.previous) == (number, previous)
        assert entry.hash == hashlib.sha256(text.encode()).hexdigest()
        previous = entry.hash
    assert Ledger(path).position() == Position(about["ledger_id"], len(entries), previous)


def _exchange(raw: sqlite3.Connection) -> None:
    for old, new in ((6, 99), (7, 6), (99, 7)):
        raw.execute("UPDATE entries SET seq = ? WHERE seq = ?", [new, old])


ALTERATIONS: dict[str, tuple[str | Callable[[sqlite3.Connection], None], str]] = {
    "fewer steps": ("UPDATE entries SET steps = 1 WHERE seq = 6", r"entry 6 .*not what was"),
    "other budget": (
        "UPDATE entries SET details = replace(details, '50.0', '5000.0') WHERE seq = 1",
        "entry 1 .*not what was",
    ),
    "other time": ("UPDATE entries SET at = '' WHERE seq = 8", "entry 8 .*not what was"),
    "other run": ("UPDATE entries SET run_id = NULL WHERE seq = 5", "entry 5 .*not what was"),
    "other request": ("UPDATE entries SET request_id = 'x' WHERE seq = 7", "entry 7 .*not what"),
    "no sense": ("UPDATE entries SET details = '{' WHERE seq = 7", "entry 7 cannot be read"),
    "no number": ("UPDATE entries SET details = '{\"x\":NaN}' WHERE seq = 7", "entry 7 cannot be"),
    "one taken out": ("DELETE FROM entries WHERE seq = 6", "entry 6 is missing"),
    "first taken out": ("DELETE FROM entries WHERE seq = 1", "entry 1 is missing"),
    "last taken out": ("DELETE FROM entries WHERE seq = 8", "ends at entry 7, and entry 8 was"),
    "all taken out": ("DELETE FROM entries", "ends at entry 0, and entry 8 was seen"),
    "two exchanged": (_exchange, "entry 6 .*not what was"),
    "other ledger's name": (
        "UPDATE ledger_meta SET value = '00' WHERE key = 'ledger_id'",
        "entry 1 .*not bound",
    ),
    "no name": ("DELETE FROM ledger_meta WHERE key = 'ledger_id'", "has no name"),
}


@pytest.mark.parametrize("alteration", ALTERATIONS)
def test_an_altered_ledger_serves_nobody(path: Path, alteration: str) -> None:
    change, complaint = ALTERATIONS[alteration]
    raw = without_triggers(path)
    if isinstance(change, str):
        raw.execute(change)
    else:
        change(raw)
    raw.close()
    for _ in range(2):
        with pytest.raises(LedgerError, match=complaint) as caught:
            Ledger(path)
        assert "back-up" in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("seq", [3, 8])
def test_an_entry_with_a_hash_made_anew_is_found_too(path: Path, seq: int) -> None:
    """Whoever alters an entry and computes its hash: the next one is bound to the old hash."""
    from dist_dp.ledger_entry import bound, canonical

    entry = Ledger(path).history()[seq - 1]
    fields = {k: v for k, v in vars(entry).items() if k not in ("seq", "previous", "hash")}
    forged = bound(Position("", seq - 1, entry.previous), {**fields, "steps": 1})
    raw = without_triggers(path)
    raw.execute(
        "UPDATE entries SET steps = 1, details = ?, hash = ? WHERE seq = ?",
        [canonical(forged.details), forged.hash, seq],
    )
    raw.close()
    # Of the last entry only the witness knows.
    with pytest.raises(LedgerDamageError, match=r"entry 4 .*not bound|entry 8 is another one"):
        Ledger(path)


def test_damage_behind_an_open_ledger_is_found_at_the_next_call(path: Path) -> None:
    ledger = Ledger(path)
    without_triggers(path).execute("UPDATE entries SET steps = 1 WHERE seq = 8")
    for call in (lambda: ledger.spent("clicks"), lambda: ledger.reserve("a", 90, 1)):
        with pytest.raises(LedgerDamageError, match=r"entry 8 .*not what was written"):
            call()


def test_another_processs_forged_entry_is_found_at_the_next_call(path: Path) -> None:
    ledger = Ledger(path)
    append_raw(path, "budget_set", details={"epsilon": 1e3, "delta": 1e-5, "reason": ""})
    without_triggers(path).execute("UPDATE entries SET steps = 7 WHERE seq = 9")
    with pytest.raises(LedgerDamageError, match="entry 9"):
        ledger.reserve("a", 90, 1)


def test_an_entry_that_is_read_again_is_checked_again(path: Path) -> None:
    """The answer to a repeated request, and the history, while the ledger is open."""
    ledger = Ledger(path)
    lease = ledger.reserve("a", 60, 5, request_id="mine")
    ledger.reserve("a", 65, 5)
    assert ledger.reserve("a", 60, 5, request_id="mine") == lease
    without_triggers(path).execute("UPDATE entries SET steps = 50 WHERE request_id = 'mine'")
    for call in (
        lambda: ledger.reserve("a", 60, 5, request_id="mine"),
        lambda: ledger.history("clicks"),
    ):
        with pytest.raises(LedgerDamageError, match=r"entry 9 .*not what was written"):
            call()


def test_flipped_bytes_are_found_or_change_nothing(tmp_path: Path, path: Path) -> None:
    """At 150 places of the file: either nobody is served, or everything is as it was."""
    good, size = path.read_bytes(), path.stat().st_size
    right = Ledger(path).history(), Ledger(path).spent("clicks")
    rng = np.random.default_rng(4)
    entries_page = good.index(b"dataset_registered")
    places = [
        *rng.integers(0, size, 90),
        *rng.integers(max(0, entries_page - 3000), entries_page, 60),  # where the entries are
    ]
    refused = 0
    for number, place in enumerate(int(item) for item in places):
        copy = tmp_path / f"copy-{number}.db"
        flipped = bytearray(good)
        flipped[place] ^= 1 << int(rng.integers(0, 8))
        copy.write_bytes(flipped)
        shutil.copy(f"{path}.witness", f"{copy}.witness")
        try:
            ledger = Ledger(copy)
            assert (ledger.history(), ledger.spent("clicks")) == right, place
            ledger.close()
        except LedgerError:
            refused += 1
    assert refused > 50


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_a_truncated_file_is_refused(path: Path, part: float) -> None:
    with path.open("r+b") as file:
        file.truncate(int(path.stat().st_size * part))
    with pytest.raises(LedgerError, match="back-up"):
        Ledger(path)


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_write_ahead_log_that_lost_its_end_is_noticed(tmp_path: Path, damage: str) -> None:
    """SQLite takes what follows a bad frame for never written; the witness knows better."""
    ledger = filled(tmp_path / "ledger.db", 12)
    assert ledger.position().seq == 15
    log = Path(f"{ledger.path}-wal")
    whole, damaged = tmp_path / "whole", tmp_path / "damaged"
    for place in (whole, damaged):
        place.mkdir()
        for file in (ledger.path, log, Path(f"{ledger.path}.witness")):
            shutil.copy(file, place)
    assert Ledger(whole / "ledger.db").history() == ledger.history()
    copy = damaged / log.name
    if damage == "gone":
        copy.unlink()
    elif damage == "cut":
        copy.write_bytes(copy.read_bytes()[: copy.stat().st_size // 2])
    else:
        content = bytearray(copy.read_bytes())
        content[len(content) // 2] ^= 4
        copy.write_bytes(content)
    with pytest.raises(LedgerError, match="was seen"):
        Ledger(damaged / "ledger.db")


def test_what_is_refused_charges_nothing(path: Path) -> None:
    ledger = Ledger(path)
    before = ledger.position()
    for call in (
        lambda: ledger.reserve("nobody", 1, 1),
        lambda: ledger.settle("nothing", 1),
        lambda: ledger.close_run("a", "open"),
    ):
        with pytest.raises(LedgerError):
            call()
    assert ledger.position() == before
    assert ledger.spent("clicks").steps_by_event == {EVENT: 47}
