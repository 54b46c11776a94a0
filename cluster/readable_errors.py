"""How a command tells what went wrong: one message and an exit status, no traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import typer

Command = TypeVar("Command", bound=Callable[..., Any])


def readable_errors(command: Command) -> Command:
    """Our errors as one message and exit status 1; Ctrl-C as 130."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        from dist_dp.errors import DistDpError

        try:
            return command(*args, **kwargs)
        except DistDpError as error:
            if kwargs.get("verbose"):
                raise
            _say(f"error: {error}")
            raise typer.Exit(1) from None
        except OSError as error:
            # A full disk, a missing permission: the system's own words name place and reason.
            if kwargs.get("verbose"):
                raise
            _say(f"error: {error}")
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            _say("aborted; what was leased and not settled stays charged in the ledger")
            raise typer.Exit(130) from None

    return wrapped  # type: ignore[return-value]


def _say(text: str) -> None:
    print(text, file=sys.stderr)
