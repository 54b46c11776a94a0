"""Faults planted in copies of the kernels for rows with a state are caught by their tests."""

from __future__ import annotations

import functools
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from dist_dp.kernels import dispatch, native
from tests.kernels.state_shards import lists_are_right, ranges_are_right
from tests.kernels.test_planted_faults import COMPILER, QUICKLY, SOURCES, Fault, imported

SETUP: Any = imported(Path(__file__).resolve().parents[2] / "setup.py")

FAULTS = {
    "z_2 is z_1": Fault(
        "state_rows.h", "make_normals(second, input", "make_normals(key, input", ("lists", "ranges")
    ),
    "z_2 left out": Fault(
        "state_rows.h", "two = two || move[i].c != 0;", "two = false;", ("lists", "ranges")
    ),
    "the momentum gets no noise": Fault(
        "states.h", "(move.mw * w + move.mm * m) + move.a * z);\n    }\n    return;",
        "(move.mw * w + move.mm * m));\n    }\n    return;", ("lists", "ranges"),
    ),
    "the weight moves before the momentum": Fault(
        "states.h", "const double w = weight[i], m = momentum[i], z = first[i], own = second[i];",
        "const double m = momentum[i], z = first[i], own = second[i];\n"
        "    const double w = (move.ww * weight[i] + move.wm * m);", ("lists", "ranges"),
    ),
    "float32 arithmetic": Fault(
        "states.h", "weight[i] = static_cast<float>(move.ww * weight[i] + move.b * first[i]);",
        "weight[i] = static_cast<float>(move.ww) * weight[i] "
        "+ static_cast<float>(move.b) * first[i];", ("lists", "ranges"),
    ),
    "bfloat16 rounded before it is stored": Fault(
        "states.h", "s.low[i] = static_cast<int16_t>(static_cast<uint16_t>(bits - (high << 16)));",
        "s.low[i] = 0;", ("lists", "ranges"),
    ),
    "float16 read from its weight": Fault(
        "states.h", "copy(s.weight.value, kind == kFloat16 ? p.low : p.weight, p.count, 4);",
        "if (kind == kFloat16) {\n      copy(s.weight.half, p.weight, p.count, 2);\n"
        "      widen_float16(s.weight);\n    } else {\n"
        "      copy(s.weight.value, p.weight, p.count, 4);\n    }", ("lists", "ranges"),
    ),
    "all rows have the first one's move": Fault(
        "states.h", "state.noise + entry * state.noise_stride", "state.noise", ("lists", "ranges")
    ),
    "a quiet row is not moved": Fault(
        "states.h", "    carry(move, s.weight.value,", "    if (false) carry(move, s.weight.value,",
        ("lists", "ranges"),
    ),
    "settled rows move": Fault(
        "rows.h", "if (from_ != static_cast<uint32_t>(job_.to_step)) move_quietly",
        "move_quietly", ("ranges",),
    ),
    "columns before the block's first one": Fault(
        "state_rows.h", "copy(mine[0], first + piece.skip,", "copy(mine[0], first,",
        ("lists", "ranges"),
    ),
    "momentum of another row": Fault(
        "states.h", "s.momentum + local * s.momentum_stride + column;\n  return",
        "s.momentum + (local > 0) * s.momentum_stride + column;\n  return", ("lists", "ranges"),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources compiled one by one, without a fault."""
    if shutil.which(COMPILER[0]) is None:
        pytest.skip(f"there is no C++ compiler {COMPILER[0]} (CXX= names another)")
    folder = tmp_path_factory.mktemp("objects")
    SETUP.compile_library(folder / "library.so", folder, (QUICKLY,), SOURCES)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", [None, *FAULTS])
def test_planted(
    name: str | None, objects: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = {part: str(objects / f"{part}.o") for part in SETUP.WITH_FLAGS}
    caught_by: tuple[str, ...] = ()
    if name is not None:
        fault = FAULTS[name]
        caught_by = fault.caught_by
        shutil.copytree(SOURCES, tmp_path / "sources")
        fault.plant(tmp_path / "sources")
        changed = f"rows_{native.isas()[-1]}.cpp"
        source = str(tmp_path / "sources" / changed)
        parts[changed] = str(tmp_path / "changed.o")
        flags = [*SETUP.FLAGS, *SETUP.WITH_FLAGS[changed], QUICKLY]
        subprocess.run([*COMPILER, *flags, "-c", source, "-o", parts[changed]], check=True)
    library = tmp_path / "library.so"
    link = [*COMPILER, "-shared", "-pthread", *parts.values(), "-o", str(library)]
    subprocess.run(link, check=True)
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    monkeypatch.setattr(native, "library", functools.partial(native.library, library))
    found = {"lists": lists_are_right(), "ranges": ranges_are_right()}
    assert found == {check: check not in caught_by for check in found}
