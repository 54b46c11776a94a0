"""How far a release is, for a person at a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dist_dp.distributed import rank

if TYPE_CHECKING:
    from rich.console import Console

Report = Callable[[int, int], None]
"""Called with the bytes of table values that this rank has written, and all it has to write."""


@contextmanager
def progress_callback(
    progress: bool | Report, console: Console | None = None
) -> Iterator[Report | None]:
    """What a release reports its progress to.

    Args:
        progress: A function, taken as it is; True for a bar, which rank 0 alone shows, and only
            on a terminal.
        console: Where to show it; by default the standard error output.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    if callable(progress):
        yield progress
        return
    console = console or Console(stderr=True)
    if not progress or rank() != 0 or not console.is_terminal:
        yield None
        return
    columns = (BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress("releasing", *columns, console=console, transient=True) as bar:
        task = bar.add_task("releasing", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
