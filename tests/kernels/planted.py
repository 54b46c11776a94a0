"""Faults planted in copies of the kernels' sources, and the libraries that come of them."""

from __future__ import annotations

import functools
import importlib.util
import os
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dist_dp.kernels import dispatch, native

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "kernels" / "native"
COMPILER = shlex.split(os.environ.get("CXX", "g++"))
QUICKLY = "-O1"


@dataclass(frozen=True)
class Fault:
    """One change of text, and the checks that must notice it."""

    file: str
    old: str
    new: str
    caught_by: tuple[str, ...]

    def plant(self, folder: Path) -> Path:
        """Change the copy in `folder`."""
        path = folder / self.file
        text = path.read_text(encoding="utf-8")
        assert text.count(self.old) == 1, f"{self.old!r} is not there once in {self.file}"
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")
        return path


def imported(path: Path) -> ModuleType:
    """A Python file as a module of its own."""
    spec = importlib.util.spec_from_file_location(f"copy_of_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SETUP: Any = imported(ROOT / "setup.py")


def compiled(folder: Path) -> Path:
    """`folder` with the unchanged sources compiled quickly: *.o and library.so."""
    if shutil.which(COMPILER[0]) is None:
        pytest.skip(f"there is no C++ compiler {COMPILER[0]} (CXX= names another)")
    SETUP.compile_library(folder / "library.so", folder, (QUICKLY,), SOURCES)
    return folder


def with_fault(fault: Fault, unchanged: Path, folder: Path) -> Path:
    """A library with a fault in it.

    Args:
        fault: in a source, or in a header of the paths: then that of the best one has it.
        unchanged: from `compiled`; what the fault does not reach is taken from there.
        folder: for what is made.
    """
    shutil.copytree(SOURCES, folder / "sources")
    fault.plant(folder / "sources")
    changed = fault.file
    if changed.endswith(".h"):
        library = native.library(unchanged / "library.so")
        assert library is not None
        changed = f"rows_{native.ISAS[library.dist_dp_best_isa()]}.cpp"
    parts = {part: str(unchanged / f"{part}.o") for part in SETUP.WITH_FLAGS}
    parts[changed] = str(folder / "changed.o")
    flags = [*SETUP.FLAGS, *SETUP.WITH_FLAGS[changed], QUICKLY]
    source = str(folder / "sources" / changed)
    subprocess.run([*COMPILER, *flags, "-c", source, "-o", parts[changed]], check=True)
    made = folder / "library.so"
    link = [*COMPILER, "-shared", "-pthread", *parts.values(), "-o", str(made)]
    subprocess.run(link, check=True)
    return made


def use(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts the face on top of another library, with the best instructions there are."""
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    monkeypatch.setattr(native, "library", functools.partial(native.library, library))
