"""A ledger as a file of JSON lines, which anybody can check without the database.

The first line says which ledger it is, how many entries follow, and the hash of the last. Kept
elsewhere, an export is a witness of its own: `Ledger.check_contains` says whether a ledger still
leads through it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dist_dp.durable import sync_folder
from dist_dp.errors import DataError
from dist_dp.ledger import Ledger
from dist_dp.ledger_entry import (
    Entry,
    LedgerDamageError,
    Position,
    canonical,
    check_follows,
)
from dist_dp.ledger_state import LedgerState
from dist_dp.limits import open_regular, parse_json, read_lines

FORMAT, VERSION = "dist-dp-ledger", 2


def write_export(ledger: Ledger, out: Path) -> Position:
    """Write all entries of a ledger to a new file (mode 0600), whole or not at all.

    Returns:
        The position of the last entry in it.

    Raises:
        DataError: the file exists, or cannot be written.
        LedgerError: the ledger cannot be used.
    """
    if out.exists():
        raise DataError(f"'{out}' exists; choose another file, or remove it first")
    aside = out.with_name(f".{out.name}.{secrets.token_hex(8)}.new")
    try:
        descriptor = os.open(aside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with open(descriptor, "w", encoding="ascii") as file, ledger.reading() as (head, entries):
            about = {"format": FORMAT, "version": VERSION, **head.to_json()}
            file.write(f"{canonical(about)}\n")
            for entry in entries:
                file.write(f"{canonical(vars(entry))}\n")
            file.flush()
            os.fsync(descriptor)
        os.replace(aside, out)
        sync_folder(out.parent)
    except OSError as error:
        raise DataError(f"cannot write '{out}': {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
    return head


def verify_export(path: Path) -> tuple[Position, LedgerState]:
    """Check an exported file by itself: every hash, every link, and that nothing is missing.

    Guarantee:
        The file holds the entries that lead to the position returned, in their order.

    Returns:
        The position of its last entry, and what the entries add up to.

    Raises:
        LedgerDamageError: something in it is not as it was written.
        DataError: it cannot be read, or is something else.
    """
    try:
        with open(open_regular(path), encoding="utf-8") as file:
            lines = read_lines(file)
            head = _read_head(next(lines, ""), path)
            position, state = Position.beginning(head.ledger_id), LedgerState()
            for entry in _read_entries(lines):
                position = check_follows(position, entry)
                state.apply(entry)
    except LedgerDamageError as error:
        raise LedgerDamageError(f"the export '{path}' is damaged: {error}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read '{path}': {error}") from error
    if position != head:
        raise LedgerDamageError(
            f"the export '{path}' is damaged: its first line says that it ends with entry "
            f"{head.seq} ({head.hash[:12]}…), and it ends with entry {position.seq} "
            f"({position.hash[:12]}…); export it again, or take another copy"
        )
    return position, state


def _read_head(line: str, path: Path) -> Position:
    try:
        about = parse_json(line)
        known = about["format"] == FORMAT and about["version"] == VERSION
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise DataError(
            f"'{path}' is no export of a ledger that this version can read: make one with dist-dp "
            "budget export FILE"
        )
    return Position.from_json(about)


def _read_entries(lines: Iterator[str]) -> Iterator[Entry]:
    for number, line in enumerate(lines, start=2):
        try:
            values: dict[str, Any] = parse_json(line)
            entry = Entry(**values)
        except (ValueError, TypeError) as error:
            raise LedgerDamageError(f"line {number} is no entry ({error})") from error
        yield entry
