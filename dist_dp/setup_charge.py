"""Charges what a run does once before its steps (step 0), such as a private choice of rows."""

from __future__ import annotations

import hashlib
from typing import Any

from dist_dp.kernels import derive_key

_DIGITS = 32


def charge_setup(accountant: Any, run_id: str, secret: bytes) -> float:
    """Charges a run's setup before it is begun; rank 0 calls it, before every attempt at it.

    Guarantee:
        When this returns the ledger holds, on disk, a charge of the run's setup made for this
        secret; a further call with the same secret charges nothing. That is sound as the setup's
        noise is keyed by the secret: made again from the same records it gives the same result,
        bit for bit, and nothing new is seen. With another secret (a run that was begun anew, from
        before its first checkpoint) it is another draw, and is charged again. The secret cannot be
        found from what the ledger holds.

    Args:
        accountant: Of rank 0 (`dist_dp.accountant.Accountant`); the run is open.
        run_id: The run's account, opened with costs that have a setup.
        secret: The run's 32 secret bytes.

    Returns:
        ε that the run is charged with by now, at its data set's δ.

    Raises:
        BudgetError: What is left of the budget does not cover the setup: do not begin.
        LedgerError: The ledger cannot be used, or the run is unknown or closed.
    """
    costs = accountant.run_costs(run_id)
    if costs is not None and costs.setup:
        key = derive_key(secret, "setup", run_id)
        request = f"setup-{hashlib.blake2b(key, digest_size=_DIGITS // 2).hexdigest()}"
        lease = accountant.reserve(run_id, 0, 1, request_id=request)
        if any(open_one.lease_id == lease.lease_id for open_one in accountant.open_leases(run_id)):
            accountant.settle(lease.lease_id, 1)  # it begins, so it is not given back any more
    return float(accountant.run_epsilon(run_id))
