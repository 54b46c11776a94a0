"""Where a ledger is: a file, or a PostgreSQL database; and how to say so without its password."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dist_dp.errors import LedgerError

if TYPE_CHECKING:
    import sqlalchemy as sa

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/")
_POSTGRESQL = ("postgresql", "postgresql+psycopg")
# What tells one database from another; everything else in a URL is about how to connect.
_PLACE = ("host", "hostaddr", "port", "dbname", "service")
_ENVIRONMENT = "DIST_DP_LEDGER"
INSTEAD_OF_A_PASSWORD = "name a file in PGPASSFILE or ?passfile=… (or write ~/.pgpass)"


@dataclass(frozen=True)
class LedgerAddress:
    """A ledger's place; its text is fit for logs, reports and file names.

    Attributes:
        text: the file's absolute path, or the database's URL with host, port and name alone: the
            same for whoever connects to it.
        url: for a database, all of the URL; never shown.
    """

    text: str
    url: sa.URL | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        return self.text

    @property
    def is_file(self) -> bool:
        """Whether it is a file of this machine."""
        return self.url is None

    @property
    def path(self) -> Path:
        """The file.

        Raises:
            LedgerError: the ledger is a database.
        """
        if self.url is not None:
            raise LedgerError(f"the ledger {self} is a database, not a file")
        return Path(self.text)

    @property
    def secrets(self) -> tuple[str, ...]:
        """What must never be shown."""
        if self.url is None:
            return ()
        given = [
            self.url.password,
            *_values(self.url, "password"),
            *_values(self.url, "sslpassword"),
        ]
        return tuple(str(item) for item in given if item)

    def public(self) -> LedgerAddress:
        """Return the address without the way to connect: enough to name the ledger."""
        return replace(self, url=_read(self.text)) if self.url is not None else self


def ledger_address(
    given: str | Path | LedgerAddress, *, password_allowed: bool = False
) -> LedgerAddress:
    """Return the address that a path or a ``postgresql://`` URL means.

    Args:
        given: as it stands in a configuration, an option or a call.
        password_allowed: accept a password in a URL: files, command lines and programs are read
            by others, so that only the environment may hold one.

    Raises:
        LedgerError: it is neither, or holds a password where none may be.
    """
    if isinstance(given, LedgerAddress):
        return given
    text = str(given)
    scheme = _SCHEME.match(text)
    if scheme is None:
        return LedgerAddress(str(Path(text).expanduser().resolve()))
    if scheme[1] not in _POSTGRESQL or not text.startswith(f"{scheme[1]}://"):
        raise LedgerError(
            f"a ledger cannot be at a '{scheme[1]}:' address: give a path, or a text such as "
            "postgresql://host/database"
        )
    url = _read(text)
    address = LedgerAddress(_public_text(url), url)
    if address.secrets and not password_allowed:
        raise LedgerError(
            f"the address of ledger {address} holds a password, which others could read: take it "
            f"out, and {INSTEAD_OF_A_PASSWORD}"
        )
    return address


def default_ledger() -> LedgerAddress:
    """Where the ledger lives unless told otherwise.

    ``$DIST_DP_LEDGER``, or ``dist-dp/ledger.sqlite`` in the user's data folder: one place for
    all runs, so that runs which name the same data set share its budget wherever they start.

    Raises:
        LedgerError: the variable holds something else than a path or a PostgreSQL URL.
    """
    given = os.environ.get(_ENVIRONMENT)
    if given:
        return ledger_address(given, password_allowed=True)
    return ledger_address(data_folder() / "ledger.sqlite")


def data_folder() -> Path:
    """Return our folder among the user's data."""
    home = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(home) / "dist-dp"


def _read(text: str) -> sa.URL:
    import sqlalchemy as sa

    try:
        url = sa.make_url(text)
    except (sa.exc.ArgumentError, ValueError):
        url = None
    if url is None or set("@[]") & set(url.host or ""):
        # Without the cause, nor the text: both could hold a part of the password.
        raise LedgerError(
            "the ledger's address is no URL that can be read: write postgresql://host:port/database"
            ", with special characters as %XX"
        )
    if not (url.database or _values(url, "dbname") or _values(url, "service")):
        raise LedgerError(
            f"the ledger's address {_public_text(url)} names no database: add it, as in "
            "postgresql://host/database"
        )
    return url.set(drivername="postgresql+psycopg")


def _values(url: sa.URL, key: str) -> list[str]:
    found = url.query.get(key, ())
    return [found] if isinstance(found, str) else list(found)


def _public_text(url: sa.URL) -> str:
    host = url.host or ""
    place = host.lower() if ":" not in host else f"[{host.lower()}]"
    port = f":{url.port}" if url.port and url.port != 5432 else ""
    query = "&".join(f"{key}={value}" for key in _PLACE for value in _values(url, key))
    return f"postgresql://{place}{port}/{url.database or ''}" + (f"?{query}" if query else "")
