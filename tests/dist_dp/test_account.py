"""An account belongs to the run that opened it, not to every run of its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dist_dp.account import open_account
from dist_dp.accountant import LocalAccountant
from dist_dp.errors import LedgerError
from dist_dp.ledger import Ledger
from dist_dp.plan import PrivacyPlan


def opened(path: Path, owner: str, *, restarted: bool) -> Any:
    plan = PrivacyPlan(
        mechanism="lazydp", num_records=1000, expected_batch_size=10, steps=100,
        noise_multiplier=1.0, max_grad_norm=1.0, delta=1e-5,
    )  # fmt: skip
    return open_account(
        LocalAccountant(Ledger(path)),
        path,
        plan,
        dataset="clicks",
        run_id="run",
        budget=(50.0, 1e-5),
        fingerprint=None,
        stop_at_budget=True,
        resumed_at=None,
        restarted=restarted,
        owner=owner,
    )


def test_a_restarted_run_takes_over_its_own_account_alone(tmp_path: Path) -> None:
    """One of the same name would give back what another one uses, and draw on its charge."""
    path = tmp_path / "ledger.sqlite"
    accountant = opened(path, "one", restarted=False)
    lease = accountant.reserve("run", 1, 10)
    with pytest.raises(LedgerError, match="in the ledger already"):
        opened(path, "other", restarted=True)
    assert accountant.open_leases("run") == [lease]
    again = opened(path, "one", restarted=True)
    assert again.open_leases("run") == [lease] and again.run_owner("run") == "one"


def test_the_owner_is_kept_and_may_be_unsaid(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    accountant = opened(path, "", restarted=False)
    assert Ledger(path).run_owner("run") == ""
    accountant.open_run("plain", "clicks", None, {"non_private": True})
    assert Ledger(path).run_owner("plain") == ""
    with pytest.raises(LedgerError):
        accountant.run_owner("nobody")
