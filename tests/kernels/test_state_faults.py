"""Faults planted in copies of the kernels for rows with a state are caught by their tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kernels.planted import Fault, compiled, use, with_fault
from tests.kernels.state_shards import lists_are_right, ranges_are_right

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
def unchanged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("unchanged"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [None, *FAULTS])
def test_planted(
    name: str | None, unchanged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library, caught_by = unchanged / "library.so", tuple[str, ...]()
    if name is not None:
        library, caught_by = with_fault(FAULTS[name], unchanged, tmp_path), FAULTS[name].caught_by
    use(library, monkeypatch)
    found = {"lists": lists_are_right(), "ranges": ranges_are_right()}
    assert found == {check: check not in caught_by for check in found}
