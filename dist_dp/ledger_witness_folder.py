"""Witnesses of ledgers on servers, in the user's data folder: one on every machine that saw one."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets

from dist_dp.durable import sync_folder
from dist_dp.errors import LedgerError
from dist_dp.ledger_address import LedgerAddress, data_folder
from dist_dp.ledger_entry import LedgerDamageError
from dist_dp.ledger_witness import Witness
from dist_dp.limits import read_whole


class WitnessFolder:
    """What this machine knows of ledgers on servers.

    A witness is named by its ledger, so that it is found wherever the database moves to. Another
    file says which ledger was seen at an address, so that one that was made anew is noticed.

    Args:
        address: the ledger's.
    """

    def __init__(self, address: LedgerAddress) -> None:
        self.folder = data_folder() / "witnesses"
        place = hashlib.sha256(str(address).encode()).hexdigest()[:32]
        self.address_file = self.folder / f"at-{place}"

    def witness(self, ledger_id: str) -> Witness:
        """Return the witness of a ledger.

        Raises:
            LedgerDamageError: it is no ledger's name.
        """
        if not re.fullmatch("[0-9a-f]{32}", ledger_id):
            raise LedgerDamageError(f"{ledger_id!r} is no ledger's name: restore it from a back-up")
        return Witness(self.folder / ledger_id)

    def expected(self, otherwise: str | None = None) -> str | None:
        """Return the ledger that was seen at the address; if none, it is ``otherwise`` from now on.

        Raises:
            LedgerError: the file cannot be read or written.
        """
        try:
            return read_whole(self.address_file, most=4096).decode("ascii").strip()
        except FileNotFoundError:
            if otherwise is not None:
                self.expect(otherwise)
            return otherwise
        except (OSError, ValueError) as error:
            raise self._unusable(error) from error

    def expect(self, ledger_id: str) -> None:
        """Note which ledger is at the address.

        Raises:
            LedgerError: the file cannot be written.
        """
        aside = self.folder / f".{self.address_file.name}.{secrets.token_hex(8)}.new"
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(aside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            with open(descriptor, "w", encoding="ascii") as file:
                file.write(f"{ledger_id}\n")
                file.flush()
                os.fsync(descriptor)
            os.replace(aside, self.address_file)
            sync_folder(self.folder)
        except OSError as error:
            raise self._unusable(error) from error
        finally:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)

    def _unusable(self, error: Exception) -> LedgerError:
        return LedgerError(
            f"{self.address_file}, which says what ledger was seen at an address, cannot be used "
            f"({error}): make it and its folder readable and writable for this user"
        )
