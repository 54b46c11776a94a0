"""Imports point one way: cluster -> dist_dp -> kernels; the core knows nothing of Ray."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# What the modules of a folder may not import, as prefixes of import names.
FORBIDDEN = {
    "kernels": ("ray", "dist_dp"),
    "dist_dp": ("ray", "dist_dp.cluster", "dist_dp.datasets"),
    "datasets": ("ray", "dist_dp.cluster"),
}
ALLOWED = {"kernels": ("dist_dp.kernels",)}


def imported(source: str) -> Iterator[str]:
    """Yield the absolute names that a module imports, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            # `from dist_dp import cluster` imports dist_dp.cluster
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_under(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def violations(folder: str, source: str) -> list[str]:
    return [
        name
        for name in imported(source)
        if is_under(name, FORBIDDEN[folder]) and not is_under(name, ALLOWED.get(folder, ()))
    ]


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_imports_point_one_way(folder: str) -> None:
    paths = sorted((ROOT / folder).rglob("*.py"))
    assert paths
    found = {
        str(path.relative_to(ROOT)): bad
        for path in paths
        if (bad := violations(folder, path.read_text(encoding="utf-8")))
    }
    assert not found


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("dist_dp", "import ray"),
        ("dist_dp", "def f():\n    from ray.train import report"),
        ("dist_dp", "from dist_dp import cluster"),
        ("kernels", "from dist_dp.errors import DistDpError"),
        ("datasets", "import dist_dp.cluster.trainer"),
    ],
)
def test_a_wrong_import_is_seen(folder: str, source: str) -> None:
    assert violations(folder, source)


@pytest.mark.parametrize(
    ("folder", "source"),
    [("kernels", "from dist_dp.kernels import noise"), ("dist_dp", "import rayon")],
)
def test_a_right_import_is_not(folder: str, source: str) -> None:
    assert not violations(folder, source)
