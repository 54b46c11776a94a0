"""One entry of the ledger, and the hash that binds it to the one before.

A hash is SHA-256, in hex, over a canonical JSON of everything the entry says, its number and the
hash before it included. So the last hash stands for all entries: none can be altered, left out,
put in or put elsewhere without another last hash. Whoever can write the file can also compute
hashes; what they cannot do is give an altered ledger the last hash that somebody else noted down
(see `dist_dp.ledger_witness`, and the exports of `dist_dp.ledger_export`).
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dist_dp.errors import LedgerError

EntryKind = Literal[
    "dataset_registered",
    "fingerprint_added",
    "budget_set",
    "run_opened",
    "steps_reserved",
    "steps_settled",
    "model_released",
    "run_closed",
    "ledger_migrated",
    "ledger_adopted",
]

RESTORE = "restore the newest back-up (do not go on without what was charged)"


class LedgerDamageError(LedgerError):
    """What is in the ledger is not what was written to it."""


@dataclass(frozen=True)
class Position:
    """A point in a ledger's history; ``seq`` 0 is the beginning, before any entry.

    Attributes:
        ledger_id: the ledger, a random name given when it was made.
        seq: number of the last entry.
        hash: its hash; of the beginning, what the first entry is bound to.
    """

    ledger_id: str
    seq: int
    hash: str

    @classmethod
    def beginning(cls, ledger_id: str) -> Position:
        """Return the position before the first entry of a ledger."""
        first = hashlib.sha256(f"dist-dp ledger {ledger_id}".encode()).hexdigest()
        return cls(ledger_id, 0, first)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON's types."""
        return {"ledger_id": self.ledger_id, "seq": self.seq, "hash": self.hash}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Position:
        """Return what `to_json` gave.

        Raises:
            LedgerError: it is something else.
        """
        position = cls(*(values.get(key) for key in ("ledger_id", "seq", "hash")))  # type: ignore[arg-type]
        if not (
            isinstance(position.ledger_id, str)
            and type(position.seq) is int
            and position.seq >= 0
            and isinstance(position.hash, str)
        ):
            raise LedgerError(f"{dict(values)!r} is no position in a ledger")
        return position


@dataclass(frozen=True)
class Entry:
    """One line of the ledger, as it was written.

    ``dataset`` is empty where an entry is about the ledger as a whole. ``previous`` is the hash of
    the entry before, ``hash`` this one's.
    """

    seq: int
    at: str
    kind: EntryKind
    dataset: str
    run_id: str | None
    lease_id: str | None
    first_step: int | None
    steps: int | None
    request_id: str | None
    details: dict[str, Any]
    previous: str
    hash: str


def canonical(value: Any) -> str:
    """Return the one JSON text of a value: ASCII, keys sorted, no spaces.

    Raises:
        TypeError, ValueError: JSON has no word for it.
    """
    return json.dumps(value, allow_nan=False, sort_keys=True, separators=(",", ":"))


MAX_STEP = 2**31 - 1
"""The last number a step can have: noise and samples are keyed by 31 bits of it."""

_NUMBERS = ("first_step", "steps")
_OPTIONAL = ("run_id", "lease_id", "request_id", *_NUMBERS)


def whole_number(what: str, value: Any) -> int:
    """Return a number of steps, or of a step, as a plain ``int``.

    Raises:
        LedgerError: it is no whole number from 0 to `MAX_STEP`.
    """
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = -1
    if not 0 <= number <= MAX_STEP:
        raise LedgerError(f"{what} is {value!r}: give a whole number from 0 to {MAX_STEP}")
    return number


def check_writable(fields: Mapping[str, Any]) -> None:
    """Refuse an entry that a database would give back otherwise than it was written.

    Guarantee:
        What passes has the same hash when it is read. (``True`` or ``1.0`` would be read as 1, so
        that one such call would damage the ledger for everybody.)

    Raises:
        LedgerError: with the field.
    """
    for name, value in fields.items():
        if name == "details" or (value is None and name in _OPTIONAL):
            continue
        if name in _NUMBERS:
            if type(value) is not int or not 0 <= value <= MAX_STEP:
                raise LedgerError(
                    f"{name} {value!r} cannot be written to the ledger: give a whole number from 0 "
                    f"to {MAX_STEP}"
                )
        elif type(value) is not str or "\0" in value or not _is_unicode(value):
            raise LedgerError(
                f"{name} {value!r} cannot be written to the ledger: give a text of Unicode "
                "characters, without a zero character"
            )


def _is_unicode(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text)


def hash_of(fields: Mapping[str, Any]) -> str:
    """Return the hash of an entry from all its other fields, ``previous`` among them."""
    covered = {key: value for key, value in fields.items() if key != "hash"}
    return hashlib.sha256(canonical(covered).encode("ascii")).hexdigest()


def bound(position: Position, fields: Mapping[str, Any]) -> Entry:
    """Return the entry that follows a position and says ``fields``, with its hash."""
    whole = {"seq": position.seq + 1, **fields, "previous": position.hash}
    return Entry(**whole, hash=hash_of(whole))


def checked(entry: Entry) -> Entry:
    """Return an entry whose hash is that of what it says.

    Raises:
        LedgerDamageError: it is not.
    """
    try:
        found = hash_of(vars(entry))
    except (TypeError, ValueError) as error:
        raise LedgerDamageError(f"entry {entry.seq} cannot be read ({error}): {RESTORE}") from error
    if found != entry.hash:
        raise LedgerDamageError(
            f"entry {entry.seq} ({entry.kind}) is not what was written: it does not have its hash; "
            f"{RESTORE}"
        )
    return entry


def check_follows(position: Position, entry: Entry) -> Position:
    """Return the position after an entry that stands right after ``position``.

    Guarantee:
        If this succeeds for every entry from the beginning on, and the last position is one that
        was seen before, then the entries are those that were written until then, in their order.

    Raises:
        LedgerDamageError: entries are missing, out of order or altered.
    """
    expected = position.seq + 1
    if entry.seq != expected:
        raise LedgerDamageError(
            f"entry {expected} is missing (entry {entry.seq} comes after {position.seq}): {RESTORE}"
        )
    checked(entry)
    if entry.previous != position.hash:
        raise LedgerDamageError(
            f"entry {entry.seq} ({entry.kind}) is not bound to the entry before it: entries were "
            f"altered, exchanged or taken from another ledger; {RESTORE}"
        )
    return Position(position.ledger_id, entry.seq, entry.hash)
