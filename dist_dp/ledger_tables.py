"""The ledger's tables, and one transaction on them; the same for every kind of database."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Sequence
from typing import Any, cast

import sqlalchemy as sa

from dist_dp.errors import LedgerError
from dist_dp.ledger_entry import (
    RESTORE,
    Entry,
    EntryKind,
    LedgerDamageError,
    Position,
    bound,
    canonical,
    check_follows,
    check_writable,
    checked,
)
from dist_dp.limits import parse_json

SCHEMA_VERSION = 2
_AT_A_TIME = 500

metadata = sa.MetaData()
meta = sa.Table(
    "ledger_meta",
    metadata,
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)
datasets = sa.Table("datasets", metadata, sa.Column("name", sa.Text, primary_key=True))
runs = sa.Table(
    "runs",
    metadata,
    sa.Column("run_id", sa.Text, primary_key=True),
    sa.Column("dataset", sa.ForeignKey("datasets.name"), nullable=False),
)
_Number = sa.BigInteger().with_variant(sa.Integer, "sqlite")
entries = sa.Table(
    "entries",
    metadata,
    sa.Column("seq", _Number, primary_key=True, autoincrement=False),
    sa.Column("at", sa.Text, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("dataset", sa.ForeignKey("datasets.name"), nullable=False, index=True),
    sa.Column("run_id", sa.ForeignKey("runs.run_id")),
    sa.Column("lease_id", sa.Text),
    sa.Column("first_step", _Number),
    sa.Column("steps", _Number),
    sa.Column("request_id", sa.Text, unique=True),
    sa.Column("details", sa.Text, nullable=False),
    sa.Column("previous", sa.Text, nullable=False),
    sa.Column("hash", sa.Text, nullable=False),
    # A lease is granted once and settled once.
    sa.Index("one_entry_of_a_kind_per_lease", "kind", "lease_id", unique=True),
)
APPEND_ONLY = (datasets, runs, entries)


class Transaction:
    """Reading and appending within one transaction.

    Every entry that is read is checked against its hash, so that none is served that is not as
    it was written.

    Args:
        connection: with a transaction begun, which in a writing one excludes every other writer.
        ledger_id: the ledger's name for itself.
    """

    def __init__(self, connection: sa.Connection, ledger_id: str) -> None:
        self._connection = connection
        self.head = Position.beginning(ledger_id)
        self.appended: list[Entry] = []
        self._rows: list[dict[str, Any]] = []
        self._requests: dict[str, Entry | None] = {}

    def follow(self, known: Position) -> Iterator[Entry]:
        """Yield the entries after a known position; afterwards `head` is the last of all.

        Raises:
            LedgerDamageError: the known position is gone, or an entry is not as it was written.
        """
        query = sa.select(entries).where(entries.c.seq >= known.seq).order_by(entries.c.seq)
        if known.seq == 0:  # all of them: not into memory at once
            query = query.execution_options(stream_results=True, yield_per=_AT_A_TIME)
        rows = iter(self._connection.execute(query))
        if known.seq > 0:
            first = next(rows, None)
            if first is None:
                raise LedgerDamageError(
                    f"it lost entries while in use (entry {known.seq} is gone): it was replaced by "
                    f"an older copy; {RESTORE} and start again"
                )
            if checked(_entry(first)).hash != known.hash:
                raise LedgerDamageError(
                    f"entry {known.seq} is another one than before: it was replaced while in use; "
                    "put the right one back and start again"
                )
        self.head = known
        for row in rows:
            entry = _entry(row)
            self.head = check_follows(self.head, entry)
            yield entry

    def contains(self, position: Position) -> bool:
        """Whether the entries lead through a position of this ledger."""
        if position.seq == 0:
            return position == Position.beginning(self.head.ledger_id)
        query = sa.select(entries.c.hash).where(entries.c.seq == position.seq)
        found = self._connection.execute(query).scalar()
        return found == position.hash and position.ledger_id == self.head.ledger_id

    def entries(self, dataset: str | None = None) -> Iterator[Entry]:
        """Yield the entries of a data set, or all, in order."""
        query = sa.select(entries).order_by(entries.c.seq)
        if dataset is not None:
            query = query.where(entries.c.dataset == dataset)
        query = query.execution_options(stream_results=True, yield_per=_AT_A_TIME)
        for row in self._connection.execute(query):
            yield checked(_entry(row))

    def look_up_requests(self, request_ids: Sequence[str]) -> None:
        """Find the entries of several requests in few queries; `by_request` needs none then."""
        wanted = [request_id for request_id in request_ids if request_id not in self._requests]
        for start in range(0, len(wanted), _AT_A_TIME):
            some = wanted[start : start + _AT_A_TIME]
            self._requests.update(dict.fromkeys(some))
            query = sa.select(entries).where(entries.c.request_id.in_(some))
            for row in self._connection.execute(query):
                entry = checked(_entry(row))
                self._requests[str(entry.request_id)] = entry

    def by_request(self, request_id: str | None) -> Entry | None:
        """Return the entry that an earlier call with the same request wrote, if any."""
        if request_id is None:
            return None
        self.look_up_requests([request_id])
        return self._requests[request_id]

    def repeated(self, request_id: str | None, kind: EntryKind, **asked: Any) -> Entry | None:
        """Return the entry of an earlier call with the same request, which asked for the same.

        Guarantee:
            A call is passed over as a repetition only where all that it asks for is in the ledger.

        Args:
            request_id: of the call.
            kind: of its entry.
            asked: what the entry's fields, or else its details, say then.

        Raises:
            LedgerError: the request was another one.
        """
        entry = self.by_request(request_id)
        if entry is not None:
            said = {**vars(entry), **entry.details}
            if entry.kind != kind or any(said.get(key) != asked[key] for key in asked):
                raise LedgerError(
                    f"request {request_id!r} was made before with other arguments (entry "
                    f"{entry.seq}, {entry.kind}): use a new request_id"
                )
        return entry

    def by_lease(self, lease_id: str, kind: EntryKind) -> Entry | None:
        """Return the entry that granted or settled a lease, if any."""
        for entry in self.appended:
            if entry.lease_id == lease_id and entry.kind == kind:
                return entry
        query = sa.select(entries).where(entries.c.lease_id == lease_id, entries.c.kind == kind)
        row = self._connection.execute(query).one_or_none()
        return None if row is None else checked(_entry(row))

    def append(
        self,
        kind: EntryKind,
        dataset: str = "",
        *,
        run_id: str | None = None,
        lease_id: str | None = None,
        first_step: int | None = None,
        steps: int | None = None,
        request_id: str | None = None,
        details: dict[str, Any],
    ) -> Entry:
        """Append one entry, bound to the one before; durable when the transaction has ended.

        Raises:
            LedgerError: a field has a type that would not be read as it was written.
        """
        text = canonical(details)
        fields: dict[str, Any] = {
            "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
            "kind": kind,
            "dataset": dataset,
            "run_id": run_id,
            "lease_id": lease_id,
            "first_step": first_step,
            "steps": steps,
            "request_id": request_id,
            "details": json.loads(text),
        }
        check_writable(fields)
        if kind not in ("steps_reserved", "steps_settled"):
            # A run without noise may name a data set before anyone registers it.
            known = sa.select(datasets).where(datasets.c.name == dataset)
            if self._connection.execute(known).first() is None:
                self._connection.execute(datasets.insert().values(name=dataset))
        if kind == "run_opened":
            self._connection.execute(runs.insert().values(run_id=run_id, dataset=dataset))
        entry = bound(self.head, fields)
        self._rows.append({**vars(entry), "details": text})
        self.head = Position(self.head.ledger_id, entry.seq, entry.hash)
        self.appended.append(entry)
        if request_id is not None:
            self._requests[request_id] = entry
        return entry

    def flush(self) -> None:
        """Send what was appended to the database; the transaction's end makes it durable."""
        if self._rows:
            self._connection.execute(entries.insert(), self._rows)
            self._rows = []


def read_meta(connection: sa.Connection) -> dict[str, str]:
    """Return what the ledger says about itself: `schema_version` and `ledger_id`."""
    return {str(key): str(value) for key, value in connection.execute(sa.select(meta))}


def write_meta(connection: sa.Connection, ledger_id: str) -> None:
    """Give a new ledger its version and its name."""
    values = {"schema_version": str(SCHEMA_VERSION), "ledger_id": ledger_id}
    connection.execute(meta.insert(), [{"key": k, "value": v} for k, v in values.items()])


def _entry(row: sa.Row[Any]) -> Entry:
    values = dict(row._mapping)
    try:
        details = parse_json(values.pop("details"))
    except (TypeError, ValueError) as error:
        raise LedgerDamageError(
            f"entry {values['seq']} cannot be read ({error}): {RESTORE}"
        ) from error
    return Entry(**values, details=cast("dict[str, Any]", details))
