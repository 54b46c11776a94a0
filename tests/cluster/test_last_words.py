"""A process that is ended from within or without leaves a line; one that ends by itself none."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import os, signal
from dist_dp.cluster.last_words import LastWords
with LastWords() as words:
    words.are("not this")
    words.are("error: gone\\nfor good")
    {}
print("well")
"""


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("pass", ""),
        ("os._exit(1)", "error: gone for good\n"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "error: gone for good\n"),
        ("words.are(''); os._exit(1)", ""),
        ("raise SystemExit(1)", ""),
    ],
)
def test_what_is_said(end: str, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(end)], capture_output=True, text=True, timeout=60
    )
    assert done.stderr == said
    assert (done.stdout == "well\n") == (end == "pass")
