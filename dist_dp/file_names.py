"""Names that become files: they stay inside their folder, whoever wrote them.

Manifests name files, and tables name folders. A name with ``..`` in it, an absolute one, or a link
that leads away would make us read or write somewhere else.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

MAX_NAME_BYTES = 255
"""What file systems take."""


def why_no_name(name: object) -> str | None:
    """Why something cannot be the name of one file or folder; None if it can.

    Args:
        name: As it was read.
    """
    if not isinstance(name, str) or not name:
        return "is no name"
    if name in (".", ".."):
        return "leads out of its folder"
    if "/" in name:
        return "is a path, not a name"
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in name):
        return "holds a control character"
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        return "is no text"
    return f"is longer than {MAX_NAME_BYTES} bytes" if size > MAX_NAME_BYTES else None


def why_no_path(name: object) -> str | None:
    """Why something cannot be a relative path below a folder, such as ``tables/a/b``; or None.

    Args:
        name: As it was read: names with slashes between them, and nothing else.
    """
    if not isinstance(name, str) or not name:
        return "is no name"
    if PurePosixPath(name).is_absolute():
        return "is an absolute path"
    return next((why for part in name.split("/") if (why := why_no_name(part))), None)


def why_not_inside(folder: Path, name: object) -> str | None:
    """Why a name leads out of a folder, links followed; None if it stays below it.

    Args:
        folder: The folder.
        name: As it was read.
    """
    why = why_no_path(name)
    if why is not None:
        return why
    path = folder / str(name)
    if not path.resolve().is_relative_to(folder.resolve()):
        return "is a link that leads out of its folder"
    return None


def safe_name(text: str) -> str:
    """A file name that reminds of a text: letters, digits, dots and dashes, not too long."""
    kept = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in text)
    return "-".join(part for part in kept.split("-") if part)[:80] or "run"
