"""An accountant that waits for a ledger which is away for a while: locked, restarting, cut off."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from dist_dp.accountant import Accountant
from dist_dp.errors import LedgerAwayError

PATIENCE_S = 120.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0
_SAY_AFTER_S = 5.0


class PatientAccountant(Accountant):
    """Asks again, with longer and longer pauses, while the ledger is away.

    Only for what passes with time (`LedgerAwayError`): a refusal, damage or a ledger that was
    rolled back is an error at once.

    Guarantee:
        A call is carried out once however often it is sent, for it keeps its request id. A call
        that ends with an error may have been charged (the safe side), never the other way round.

    Args:
        accountant: the one to ask.
        say: told once, in one line, when a call has waited for five seconds; from another thread.
        patience_s: how long a call is sent again; the try that is under way then is the last.
    """

    def __init__(
        self,
        accountant: Accountant,
        say: Callable[[str], None] = lambda text: None,
        *,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._accountant = accountant
        self._say = say
        self._patience_s = patience_s

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        pause, end = _FIRST_PAUSE_S, time.monotonic() + self._patience_s
        word = f"no answer from the ledger to '{method}': asking for {self._patience_s:.0f} s"
        timer = threading.Timer(_SAY_AFTER_S, self._say, [word])
        timer.daemon = True
        timer.start()
        try:
            while True:
                try:
                    return self._accountant._call(method, *args, **kwargs)
                except LedgerAwayError:
                    if time.monotonic() > end:
                        raise
                time.sleep(pause)
                pause = min(_LONGEST_PAUSE_S, 2 * pause)
        finally:
            timer.cancel()
