"""Faults planted in a copy of the kernels are caught by the checks that the kernels pass.

Each is one piece of text changed in a copy of one source, which is then compiled or imported and
called through the ordinary face. Beside the statistical checks, `definition` compares bits with
the reference and would notice nearly all of them; a fault counts as caught only by the checks
named with it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dist_dp import kernels
from dist_dp.kernels import draws
from tests.kernels.planted import Fault, compiled, imported, use, with_fault
from tests.kernels.sample import Generator, Sample
from tests.kernels.statistics import CHECKS, rejected

TILES = 16
"""2.5 * 10^7 draws."""

pytestmark = pytest.mark.slow

STEPS = "load(batch.from), to};"
BOTH = "bit_xor(load(batch.from), to)"

COMPILED = {
    "steps swapped": Fault("rows.h", STEPS, "to, load(batch.from)};", ("definition",)),
    "steps used symmetrically": Fault(
        "rows.h", STEPS, f"{BOTH}, {BOTH}}};", ("blocks", "correlations")
    ),
    "from-step ignored": Fault("rows.h", STEPS, "words(0), to};", ("blocks", "correlations")),
    "to-step ignored": Fault(
        "rows.h", STEPS, "load(batch.from), words(0)};", ("blocks", "correlations")
    ),
    "upper bits of the row dropped": Fault(
        "rows.h", "(global >> 32) << 16", "(global >> 48) << 16", ("blocks", "correlations")
    ),
    "column offset ignored": Fault(
        "rows.h", "high_ | static_cast<uint32_t>(block_)", "high_", ("blocks", "correlations")
    ),
    "uniforms of 24 bits": Fault(
        "normals.h",
        "const Floats u = choose(",
        "near = mul(to_float(bit_or(bit_and(folded, words(0xffffff00u)), words(0x80u))), "
        "floats(0x1p-32f));\n  const Floats u = choose(",
        ("far_tail",),
    ),
    "uniforms of 24 bits, extended by 32 more": Fault(
        "normals.h",
        "x[2 * pair], x[2 * pair + 1],",
        "bit_and(x[2 * pair], words(0xffffff00u)), x[2 * pair + 1],",
        ("far_tail",),
    ),
    "uniforms of 32 bits": Fault(
        "normals.h", "if (__builtin_expect(tail != 0, 0)) {", "if (tail > 99999) {", ("far_tail",)
    ),
    "tail takes the same words again": Fault(
        "normals.h", "kTailDomain = 1u << 13", "kTailDomain = 0", ("far_tail",)
    ),
    "half of the key repeated": Fault(
        "chacha.h",
        "  return key;",
        "  for (int i = 4; i < 8; ++i) key.word[i] = key.word[i - 4];\n  return key;",
        ("blocks", "correlations"),
    ),
    "half of the key only added at the end": Fault(
        "chacha.h",
        "x[4 + i] = words(key.word[i]);",
        "x[4 + i] = words(key.word[i & 3]);",
        ("blocks", "correlations"),
    ),
    "sign never used": Fault(
        "normals.h",
        "bit_and(angle, words(0x80000000u))",
        "words(0)",
        ("moments", "distribution", "pairs"),
    ),
    "angle made of the word of the length": Fault(
        "normals.h",
        "x[2 * pair], x[2 * pair + 1],",
        "x[2 * pair], x[2 * pair],",
        ("pairs", "distribution"),
    ),
    "cosine off by 10^-4 of a coefficient": Fault(
        "normals.h", "kCos[4] = {-0x1.3bd3ccp-2f", "kCos[4] = {-0.30845547f", ("accuracy",)
    ),
}
PYTHON = {
    "tables share counters": Fault(
        "draws.py",
        "(stream.encode(), name.encode())",
        "(stream.encode(),)",
        ("blocks", "correlations", "key_bits"),
    ),
    "streams share counters": Fault(
        "draws.py",
        "(stream.encode(), name.encode())",
        "(name.encode(),)",
        ("blocks", "correlations"),
    ),
    "names run together": Fault(
        "draws.py",
        'digest.update(len(part).to_bytes(8, "little"))',
        "pass",
        ("blocks", "correlations"),
    ),
    "key of 128 bits, twice": Fault(
        "draws.py", "return digest.digest()", "return digest.digest()[:16] * 2", ("key_bits",)
    ),
    "key of 128 bits, and zeros": Fault(
        "draws.py",
        "return digest.digest()",
        "return digest.digest()[:16] + bytes(16)",
        ("key_bits",),
    ),
    "half of the secret ignored": Fault(
        "draws.py", "key=secret,", "key=secret[:16],", ("blocks", "correlations", "key_bits")
    ),
}


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("unchanged"))


def verdicts(generator: Generator, names: tuple[str, ...]) -> dict[str, bool]:
    """For each check, whether it rejects."""
    sample = Sample(generator, TILES)
    return {name: bool(rejected(name, sample)) for name in names}


def test_unchanged_copy_passes(unchanged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(unchanged / "library.so", monkeypatch)
    assert verdicts(kernels, tuple(CHECKS)) == dict.fromkeys(CHECKS, False)


@pytest.mark.parametrize("name", COMPILED)
def test_compiled(
    name: str, unchanged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = COMPILED[name]
    use(with_fault(fault, unchanged, tmp_path), monkeypatch)
    assert verdicts(kernels, fault.caught_by) == dict.fromkeys(fault.caught_by, True)


@pytest.mark.parametrize("name", PYTHON)
def test_python(name: str, tmp_path: Path) -> None:
    fault = PYTHON[name]
    shutil.copy(str(draws.__file__), tmp_path / fault.file)
    generator = imported(fault.plant(tmp_path))
    assert verdicts(generator, fault.caught_by) == dict.fromkeys(fault.caught_by, True)
