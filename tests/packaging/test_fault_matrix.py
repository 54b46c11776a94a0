"""The matrix of docs/faults.md names tests that exist, and the five moments of a loss."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")


def rows() -> list[list[str]]:
    """Cells of the matrix, the fault repeated where the table leaves it out."""
    table = TEXT.partition("## The matrix")[2].partition("\n## ")[0]
    found: list[list[str]] = []
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("|") and len(cells) == 6 and not set(cells[1]) <= {"-"}:
            found.append([cells[0] or found[-1][0], *cells[1:]])
    return found[1:]


def test_every_row_names_a_test_that_exists() -> None:
    files = dict(re.findall(r"^- ([A-Z]): `(tests/\S+\.py)`", TEXT, flags=re.MULTILINE))
    assert len(rows()) > 20
    for fault, moment, outcome, counted, model, tests in rows():
        where = f"{fault}, {moment}"
        assert outcome and counted and model, where
        named = [part for part in tests.split(";") if part]
        assert named, where
        for part in named:
            file, *names = re.findall(r"[A-Z](?= `)|(?<=`)\w+(?=`)", part)
            assert names, where
            source = (ROOT / files[file]).read_text(encoding="utf-8")
            missing = [name for name in names if f"def test_{name}(" not in source]
            assert missing == [], (where, file)


def test_workers_and_the_accountant_are_lost_at_every_moment() -> None:
    wanted = (
        "before the charge",
        "after the charge",
        "mid-update",
        "mid-checkpoint",
        "mid-release",
    )
    for fault in ("worker killed", "worker hung", "accountant killed"):
        moments = " ".join(moment for named, moment, *_ in rows() if named == fault)
        assert [moment for moment in wanted if moment not in moments] == [], fault
