"""What a hostile file may hold: a pickle that acts when it is read, and figures beyond belief."""

from __future__ import annotations

import pickle
from pathlib import Path


class _Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def planted_pickle(touched: Path) -> bytes:
    """A pickle that makes a file when it is loaded; it is loaded once here, to see that it does."""
    content = pickle.dumps(_Touch(touched))
    pickle.loads(content)
    touched.unlink()
    return content


DEEP = b"[" * 100_000 + b"]" * 100_000
"""JSON nested deeper than a parser's stack."""


def sparse(path: Path, size: int) -> None:
    """A file of so many bytes that takes no room."""
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        file.truncate(size)
