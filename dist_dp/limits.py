"""How much is read from a file before it is believed; and the one way JSON is read.

A file may be cut off, of somebody else, or made to hurt: ten gigabytes of JSON, brackets a hundred
thousand deep, a pipe that never ends. What is read whole is measured first, against limits far
above what this package writes. Nothing here runs or builds anything but numbers, texts, lists and
dictionaries.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

MAX_JSON_BYTES = 64 << 20
"""Manifests, summaries, descriptions: some hundred bytes for each file or table they name."""
MAX_INDEX_BYTES = 256 << 20
"""A checkpoint's index: about 150 bytes for each chunk of 32 MiB, so enough for 50 TB of tables."""
MAX_CONFIG_BYTES = 1 << 20
"""A configuration is written by hand, or by this package from one."""
MAX_CONFIG_VALUES = 100_000
"""Values in a configuration once its aliases are followed, which can double them at each line."""
MAX_METRICS_BYTES = 2 << 30
"""``metrics.csv``: 200 bytes a step."""
MAX_TRAIL_BYTES = 1 << 30
"""A run's trail: 16 bytes a step, so 67 million steps."""
MAX_LINE_BYTES = 16 << 20
"""A line of an exported ledger holds one entry; a long schedule's events take some kilobytes."""

MAX_COUNT_BYTES = 8 << 30
"""A file of public row counts, and what it unpacks to."""
MAX_COUNT_ROWS = 1 << 28
"""Its lines, each of which takes 16 bytes of memory."""


def open_regular(path: Path, flags: int = os.O_RDONLY) -> int:
    """A descriptor of a regular file; nobody waits for whoever writes to a pipe.

    Args:
        path: The file; links are followed.
        flags: How it is opened.

    Raises:
        OSError: It cannot be opened.
        ValueError: It is no regular file.
    """
    # Without the flag, opening a pipe waits for somebody at its other end.
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    kind = os.fstat(descriptor).st_mode
    if stat.S_ISREG(kind):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise ValueError("it is no regular file")


def read_whole(path: Path, most: int = MAX_JSON_BYTES) -> bytes:
    """The content of a file that is not too large.

    Args:
        path: A regular file: a pipe or a device could keep the reader for ever.
        most: Limit in bytes.

    Raises:
        OSError: It cannot be read.
        ValueError: It is larger, or no regular file.
    """
    descriptor = open_regular(path)
    with open(descriptor, "rb") as file:
        size = os.fstat(descriptor).st_size
        if size > most:
            raise ValueError(f"it has {size:,} bytes, at most {most:,} are read")
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it grew beyond {most:,} bytes while it was read")
    return content


def read_json(path: Path, most: int = MAX_JSON_BYTES) -> Any:
    """The value in a JSON file.

    Args:
        path: The file.
        most: Limit in bytes.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no JSON, too large, or nested too deeply.
    """
    return parse_json(read_whole(path, most))


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: It is no JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_lines(file: IO[str], most: int = MAX_LINE_BYTES) -> Iterator[str]:
    """The lines of a text file.

    Raises:
        ValueError: One is longer than ``most`` characters.
    """
    while line := file.readline(most + 1):
        if len(line) > most:
            raise ValueError(f"a line is longer than {most:,} characters")
        yield line
