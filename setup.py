"""List the packages for setuptools; everything else is in pyproject.toml.

The folders ``kernels``, ``cluster`` and ``datasets`` stand at the top level of the
checkout but are imported as ``dist_dp.kernels``, ``dist_dp.cluster`` and
``dist_dp.datasets``. ``[tool.setuptools.package-dir]`` maps them, and setuptools cannot
search for packages under a mapped name by itself. Searching here means that a new
sub-package needs no entry by hand.
"""

import tomllib
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent


def packages() -> list[str]:
    """List every package of the mapped folders under its import name."""
    settings = tomllib.loads((HERE / "pyproject.toml").read_text(encoding="utf-8"))
    found: list[str] = []
    for name, folder in settings["tool"]["setuptools"]["package-dir"].items():
        found.append(name)
        found.extend(f"{name}.{sub}" for sub in find_packages(str(HERE / folder)))
    return found


setup(packages=packages())
