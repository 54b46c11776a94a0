"""Where a ledger is, and that no password gets out."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from dist_dp.engine import PrivacyEngine
from dist_dp.errors import LedgerError
from dist_dp.ledger import Ledger
from dist_dp.ledger_address import default_ledger, ledger_address
from dist_dp.ledger_postgres import PostgresStore

SECRET = "hunter2%40x"
CLEAR = "hunter2@x"


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("postgresql://db/privacy", "postgresql://db/privacy"),
        ("postgresql://ann@DB:5432/privacy", "postgresql://db/privacy"),
        ("postgresql+psycopg://bob@db:6000/privacy", "postgresql://db:6000/privacy"),
        ("postgresql://db/privacy?sslmode=require&passfile=/x", "postgresql://db/privacy"),
        ("postgresql:///privacy?host=/run/pg", "postgresql:///privacy?host=/run/pg"),
        ("postgresql://?service=ledger", "postgresql:///?service=ledger"),
        ("postgresql://[::1]:6000/privacy", "postgresql://[::1]:6000/privacy"),
    ],
)
def test_a_database_has_one_name_for_everybody(given: str, text: str) -> None:
    address = ledger_address(given)
    assert str(address) == text and not address.is_file
    again = ledger_address(str(address))
    assert again == address and hash(again) == hash(address) and str(again) == text
    assert address.public() == address == pickle.loads(pickle.dumps(address))
    with pytest.raises(LedgerError, match="is a database, not a file"):
        _ = address.path


def test_a_path_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for given in ("x.db", Path("x.db"), tmp_path / "y" / ".." / "x.db", ledger_address("x.db")):
        address = ledger_address(given)
        assert address.is_file and address.path == tmp_path / "x.db"


@pytest.mark.parametrize(
    "given",
    ["mysql://db/x", "sqlite:///x.db", "https://db/x", Path("postgresql://db/privacy")],
)
def test_other_addresses_are_refused(given: str | Path) -> None:
    with pytest.raises(LedgerError, match=r"give a path, or a text such as postgresql://"):
        ledger_address(given)


def test_a_database_must_be_named() -> None:
    for given in ("postgresql://db", "postgresql://db/", "postgresql://"):
        with pytest.raises(LedgerError, match="names no database"):
            ledger_address(given)


@pytest.mark.parametrize(
    "given",
    [
        f"postgresql://ann:{SECRET}@db/privacy",
        f"postgresql://db/privacy?password={SECRET}",
        f"postgresql://db/privacy?sslkey=/k&sslpassword={SECRET}",
    ],
)
def test_a_password_is_for_the_environment_alone(
    given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for call in (
        ledger_address,
        Ledger,
        lambda text: PrivacyEngine(dataset="d", ledger=text),
    ):
        with pytest.raises(LedgerError, match="PGPASSFILE") as caught:
            call(given)
        assert "hunter2" not in str(caught.value)
    monkeypatch.setenv("DIST_DP_LEDGER", given)
    address = default_ledger()
    assert address.secrets == (CLEAR,)
    for shown in (str(address), repr(address), f"{address}", str(address.public().url)):
        assert "hunter2" not in shown
    assert CLEAR.encode() not in pickle.dumps(address.public())
    assert pickle.loads(pickle.dumps(address)).secrets == (CLEAR,)


def test_a_url_that_cannot_be_read_is_not_quoted() -> None:
    for given in (
        "postgresql://ann:hunter2@db:y/z",
        "postgresql://ann:hunter2@[db/z",
        "postgresql://ann:x@hunter2@db/z",
    ):
        with pytest.raises(LedgerError) as caught:
            ledger_address(given)
        assert "hunter2" not in str(caught.value)
        assert caught.value.__cause__ is None and caught.value.__context__ is None


def test_an_unreachable_server_is_an_error_without_a_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody listens there; and a libpq message that quotes the password is not passed on."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setenv(
        "DIST_DP_LEDGER", f"postgresql://ann:{SECRET}@127.0.0.1:9/x?connect_timeout=2"
    )
    with pytest.raises(LedgerError, match=r"127\.0\.0\.1:9/x.*see that the server runs") as caught:
        Ledger(default_ledger())
    assert "hunter2" not in str(caught.value) and caught.value.__cause__ is None
    store = object.__new__(PostgresStore)
    store.address = default_ledger()
    assert store._without_secrets(f"no {CLEAR}\n here") == "no *** here"


def test_where_it_is_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIST_DP_LEDGER", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_ledger().path == tmp_path / "dist-dp" / "ledger.sqlite"
    monkeypatch.setenv("DIST_DP_LEDGER", str(tmp_path / "mine"))
    assert default_ledger().path == tmp_path / "mine"
