"""Files of one owner, and changes of names that survive a power cut."""

from __future__ import annotations

import os
from pathlib import Path


def for_the_owner(path: str, flags: int) -> int:
    """An opener for ``open``: what it makes only its owner may read, whatever the umask."""
    return os.open(path, flags, 0o600)


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
