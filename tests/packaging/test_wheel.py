"""The wheel holds dist_dp, all of it and nothing else, and works away from the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path, PurePosixPath

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS: dict[str, str] = PROJECT["tool"]["setuptools"]["package-dir"]
CACHES = shutil.ignore_patterns("__pycache__", "*.pyc", "*.egg-info", "*.so")
LIBRARY = PurePosixPath("dist_dp/kernels/_native.so")  # built, so in no folder of sources


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command with nothing of this process's Python paths; return its output."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=clean, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def pip(*arguments: str | Path, cwd: Path, python: Path | None = None) -> None:
    """Run this environment's pip, without the network, on it or on another interpreter."""
    other = ["--python", python] if python else []
    run(sys.executable, "-m", "pip", *other, *arguments, "--no-index", "-q", cwd=cwd)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the wheel is made of: building in the checkout would leave traces in it."""
    copy = tmp_path_factory.mktemp("source")
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, copy)
    for folder in FOLDERS.values():
        shutil.copytree(ROOT / folder, copy / folder, ignore=CACHES)
    # What must not get in: tests and examples stand beside the packages.
    for folder in ("tests", "examples"):
        (copy / folder).mkdir()
        (copy / folder / "__init__.py").touch()
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "-w", out, source, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel in it, and the heavy libraries within reach.

    A line of a .pth file puts this environment's site-packages on the path without reading the
    .pth files in there, so the editable install of the checkout stays behind.
    """
    home = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", home, cwd=home)
    python = home / "bin" / "python"
    pip("install", "--no-deps", wheel, cwd=home, python=python)
    site = Path(
        run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=home).strip()
    )
    heavy = Path(pytest.__file__).parents[1]
    (site / "heavy_libraries.pth").write_text(f"{heavy}\n")
    return home


def test_wheel_holds_nothing_but_dist_dp(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        tops = {PurePosixPath(name).parts[0] for name in archive.namelist()}
    version = PROJECT["project"]["version"]
    assert tops == {"dist_dp", f"dist_dp-{version}.dist-info"}


def test_wheel_holds_every_source_file(source: Path, wheel: Path) -> None:
    expected = {
        # kernels/a/b.py is dist_dp/kernels/a/b.py
        PurePosixPath(*package.split("."), *path.relative_to(source / folder).parts)
        for package, folder in FOLDERS.items()
        for path in (source / folder).rglob("*")
        if path.is_file() and path.suffix != ".pyc" and path.parent.name != "__pycache__"
    }
    with zipfile.ZipFile(wheel) as archive:
        held = {PurePosixPath(name) for name in archive.namelist()}
    missing = sorted(map(str, expected - held))
    assert not missing, (
        f"not in the wheel: {missing}. A folder of modules needs an __init__.py; another kind of "
        "file needs an entry in [tool.setuptools.package-data]."
    )
    extra = {name for name in held - expected if name.parts[0] == "dist_dp"}
    assert extra == {LIBRARY}


def test_wheel_serves_every_python_of_the_platform(wheel: Path) -> None:
    assert "-py3-none-linux_" in wheel.name


def test_wheel_without_a_compiler(source: Path, tmp_path: Path) -> None:
    """It is built all the same, without the library, and says so."""
    copy = tmp_path / "source"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("build"))
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-index",
         "--no-build-isolation", "-w", tmp_path, copy],
        env={**os.environ, "CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
        check=True,
    )  # fmt: skip
    assert "noise kernels were not compiled" in done.stdout + done.stderr
    (built,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        assert str(LIBRARY) not in archive.namelist()


def test_installed_wheel_has_compiled_kernels(environment: Path, tmp_path: Path) -> None:
    code = (
        "from dist_dp import kernels; from dist_dp.kernels import native;"
        "print(native.FILE); print(kernels.implementation())"
    )
    file, name = run(environment / "bin" / "python", "-c", code, cwd=tmp_path).splitlines()
    assert Path(file).is_relative_to(environment)
    assert name.startswith("compiled")


def test_installed_wheel_imports_away_from_the_checkout(environment: Path, tmp_path: Path) -> None:
    names = ", ".join(FOLDERS)
    code = f"import {names}; print(dist_dp.__file__, dist_dp.kernels.__file__, sep='\\n')"
    for location in run(environment / "bin" / "python", "-c", code, cwd=tmp_path).splitlines():
        assert Path(location).is_relative_to(environment)


@pytest.mark.parametrize("name", ["kernels", "cluster", "datasets", "tests", "examples"])
def test_installed_wheel_takes_no_other_name(environment: Path, tmp_path: Path, name: str) -> None:
    code = f"import importlib.util as u; spec = u.find_spec({name!r}); print(spec and spec.origin)"
    origin = run(environment / "bin" / "python", "-c", code, cwd=tmp_path).strip()
    # Another project's package of that name may be installed; ours may not.
    assert origin == "None" or not Path(origin).is_relative_to(environment)
    assert not Path(origin).is_relative_to(ROOT / name)


def test_installed_command_prints_its_help(environment: Path, tmp_path: Path) -> None:
    shown = run(environment / "bin" / "dist-dp", "--help", cwd=tmp_path)
    for command in ("train", "evaluate", "export", "plan"):
        assert command in shown
