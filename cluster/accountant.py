"""The central accountant: one detached Ray actor for each ledger, and a plain client for it.

The actor runs on the node where it was started: a ledger in a file is a file of that node, and one
on a server is reached with what the driver's environment says. Ray keeps what an actor is started
with, in clear, in the memory of the cluster's head (and in Redis, if it has one), so a password is
never among it: it is refused in the environment and in the URL, and the actor reads it from a file
of its node. It keeps nothing in memory that is
not in the ledger: when its process dies, Ray starts it again and it reads the ledger anew.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from pathlib import Path
from typing import Any

from dist_dp.accountant import READING, WRITING, Accountant
from dist_dp.cluster.live_metrics import LedgerMetrics
from dist_dp.errors import DistDpError, LedgerAwayError, LedgerError
from dist_dp.group_commit import GroupedLedger
from dist_dp.ledger import Ledger
from dist_dp.ledger_address import LedgerAddress, ledger_address

NAMESPACE = "dist-dp"
_NAME = "dist-dp-accountant"
_PAUSE_S = 0.2
_CALLS_AT_ONCE = 64


class AccountantActor:
    """What runs inside the actor: the methods of one `Ledger`, by name.

    Args:
        address: the ledger. It is opened at the first call, so that a damaged one is an error of
            that call and not of the actor's start.
        environment: the driver's ways to connect to a server (``PGPASSFILE`` and the like); no
            password.
    """

    def __init__(self, address: LedgerAddress, environment: dict[str, str]) -> None:
        os.environ.update(environment)
        self._address = address
        self._ledger: GroupedLedger | None = None
        self._opening = threading.Lock()
        self._metrics = LedgerMetrics()

    def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call one of the ledger's methods."""
        if method not in WRITING | READING:
            raise LedgerError(f"the accountant has no method {method!r}")
        with self._opening:
            if self._ledger is None:
                self._ledger = GroupedLedger(Ledger(self._address))
        return self._metrics.call(self._ledger, method, args, kwargs)

    def pid(self) -> int:
        """Return the process of the actor."""
        return os.getpid()


class AccountantClient(Accountant):
    """A plain, synchronous face of the central accountant, for the driver and for workers.

    It may be sent to workers. Errors of the ledger come out as they went in; a call that finds the
    accountant restarting is repeated with the same request id, so nothing is charged twice.

    Guarantee:
        What a call returned is on the ledger's disk. A call that fails may have been charged
        (the safe side), never the other way round.

    Args:
        ledger: the ledger that the accountant serves, as given to `start_accountant`. What it
            takes to connect is not kept.
        timeout_s: how long to wait for an answer, restarts included.
    """

    def __init__(self, ledger: Path | str | LedgerAddress, *, timeout_s: float = 120.0) -> None:
        self.ledger = ledger_address(ledger).public()
        self.timeout_s = timeout_s
        self._handle: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None}

    def pid(self) -> int:
        """Return the process of the accountant, on its node."""
        return int(self._ask("pid"))

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return self._ask("call", method, args, kwargs)

    def _ask(self, remote_method: str, *args: Any) -> Any:
        import ray
        from ray.exceptions import (
            ActorDiedError,
            ActorUnavailableError,
            GetTimeoutError,
            RayTaskError,
        )

        deadline = time.monotonic() + self.timeout_s
        while True:
            try:
                handle = self._find()
                reply = getattr(handle, remote_method).remote(*args)
                return ray.get(reply, timeout=max(0.0, deadline - time.monotonic()))
            except RayTaskError as error:
                if isinstance(error.cause, DistDpError):
                    raise error.cause from None
                raise
            except ActorUnavailableError as error:
                self._handle = None
                if time.monotonic() > deadline:
                    raise self._no_answer() from error
                time.sleep(_PAUSE_S)
            except GetTimeoutError as error:
                raise self._no_answer() from error
            except ActorDiedError as error:
                raise LedgerError(
                    f"the accountant of ledger {self.ledger} has ended for good (its node is "
                    "lost, or it was stopped); what it acknowledged is in the ledger: start the "
                    "run again"
                ) from error

    def _find(self) -> Any:
        import ray

        if self._handle is None:
            try:
                self._handle = ray.get_actor(_actor_name(self.ledger), NAMESPACE)
            except ValueError as error:
                raise LedgerError(
                    f"no accountant runs for ledger {self.ledger} in this cluster: start one "
                    "from the driver first"
                ) from error
        return self._handle

    def _no_answer(self) -> LedgerAwayError:
        return LedgerAwayError(
            f"the accountant of ledger {self.ledger} gave no answer in {self.timeout_s:g} s: "
            "see that its node is up and has memory left, then start the run again (the last "
            "lease may be charged)"
        )


def start_accountant(
    ledger: Path | str | LedgerAddress, *, timeout_s: float = 120.0
) -> AccountantClient:
    """Start the accountant of a ledger on this node, or find the one that runs already.

    There is at most one for a ledger in a cluster, whoever asks first; it outlives the job that
    started it. Ray must be initialised.

    A password must lie in a file of this node (``PGPASSFILE``, ``?passfile=``, ``~/.pgpass``).

    Args:
        ledger: a file on a local disk of this node, or the URL of a server.
        timeout_s: how long the client waits for an answer.

    Raises:
        LedgerError: the ledger cannot be opened, the accountant does not answer, or a password
            would have to be sent to it.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    address = ledger_address(ledger)
    _check_no_password(address)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    ray.remote(AccountantActor).options(
        name=_actor_name(address),
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        # Reservations that come while one is written share the next write.
        max_concurrency=_CALLS_AT_ONCE,
        max_restarts=-1,
        max_task_retries=-1,
        scheduling_strategy=here,
    ).remote(address, {} if address.is_file else _connecting())
    client = AccountantClient(address, timeout_s=timeout_s)
    client.datasets()  # A ledger that cannot be opened is an error now, not in mid-training.
    return client


def _check_no_password(address: LedgerAddress) -> None:
    """Refuses a password that Ray would keep where others can read it."""
    if address.is_file:
        return
    given = "$DIST_DP_LEDGER" if address.secrets else "$PGPASSWORD"
    if address.secrets or os.environ.get("PGPASSWORD"):
        raise LedgerError(
            f"the password of ledger {address} is in {given}, which a run under Ray would have to "
            "hand to its accountant, and Ray keeps that in clear: take it out, write it to a file "
            "of mode 0600 on this node, a line host:port:database:user:password, and name that in "
            "PGPASSFILE or ?passfile=… (or write ~/.pgpass)"
        )


def _connecting() -> dict[str, str]:
    """What the environment says about connecting to a server, and where witnesses are kept."""
    names = [k for k in os.environ if k.startswith("PG") or k == "XDG_DATA_HOME"]
    return {k: os.environ[k] for k in names if k != "PGPASSWORD"}


def _actor_name(address: LedgerAddress) -> str:
    """The same for whoever connects to a ledger, with whatever password."""
    return f"{_NAME}-{hashlib.sha256(os.fsencode(str(address))).hexdigest()[:16]}"
