"""List the packages for setuptools and build the native kernels; the rest is in pyproject.toml.

The folders ``kernels``, ``cluster`` and ``datasets`` stand at the top level of the checkout but
are imported as ``dist_dp.kernels``, ``dist_dp.cluster`` and ``dist_dp.datasets``.
``[tool.setuptools.package-dir]`` maps them, and setuptools cannot search for packages under a
mapped name by itself. Searching here means that a new sub-package needs no entry by hand.

The kernels are one shared library without Python or torch in it, loaded with ctypes: it needs a
C++ compiler and nothing else, and one wheel serves every Python 3 of a platform. Each set of
instructions is a source file with its own flags; the library chooses among them when it runs.
Where the compiler is missing or fails, the package is installed without the library, and says so
whenever the slow reference runs instead.
"""

import os
import platform
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
NATIVE = Path("kernels") / "native"

# No contraction and no fast math: every path must round alike (kernels/box_muller.py).
FLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"),
    *("-fno-math-errno", "-Wall", "-Wextra"),
]
WITH_FLAGS = {"library.cpp": [], "lookups.cpp": [], "rows_portable.cpp": []}
if platform.machine() in ("x86_64", "AMD64"):
    WITH_FLAGS["rows_avx2.cpp"] = ["-mavx2", "-mfma"]
    WITH_FLAGS["rows_avx512.cpp"] = [
        *("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma"),
        # GCC's own AVX-512 headers trip this warning
        *("-mprefer-vector-width=512", "-Wno-maybe-uninitialized"),
    ]


def packages() -> list[str]:
    """List every package of the mapped folders under its import name."""
    settings = tomllib.loads((HERE / "pyproject.toml").read_text(encoding="utf-8"))
    found: list[str] = []
    for name, folder in settings["tool"]["setuptools"]["package-dir"].items():
        found.append(name)
        found.extend(f"{name}.{sub}" for sub in find_packages(str(HERE / folder)))
    return found


def compile_library(
    target: Path, objects: Path, extra: tuple[str, ...] = (), sources: Path = HERE / NATIVE
) -> None:
    """Compile the kernels into one shared library.

    Args:
        target: The library to write.
        objects: Folder for what the compiler leaves.
        extra: More flags for compiler and linker, such as ``-fsanitize=address``.
        sources: Folder of the sources.

    Raises:
        OSError: There is no compiler.
        subprocess.CalledProcessError: It failed.
    """
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    objects.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    linked = []
    for name, flags in WITH_FLAGS.items():
        linked.append(str(objects / f"{name}.o"))
        source = str(sources / name)
        subprocess.run(
            [*compiler, *FLAGS, *flags, *extra, "-c", source, "-o", linked[-1]], check=True
        )
    # the C++ runtime goes in, so that the library also loads where another one is installed
    static = ["-static-libstdc++", "-static-libgcc"] if not extra else []
    subprocess.run(
        [*compiler, "-shared", "-pthread", *extra, *static, *linked, "-o", str(target)], check=True
    )


class BuildNative(build_ext):
    """Builds the library, or leaves it out with a message."""

    def build_extension(self, ext: Extension) -> None:
        """Compile into the place where setuptools expects the extension."""
        target = Path(self.get_ext_fullpath(ext.name))
        # nothing built from older sources may stay behind
        target.unlink(missing_ok=True)
        if self.editable_mode:
            (HERE / "kernels" / "_native.so").unlink(missing_ok=True)
        try:
            compile_library(target, Path(self.build_temp) / "native")
        except (OSError, subprocess.CalledProcessError) as error:
            print(
                f"The noise kernels were not compiled ({error}). dist-dp will use the NumPy "
                "reference, about fifty times slower, and warn when it does. Install a C++ "
                "compiler (g++, or name one with CXX=) and install again.",
                file=sys.stderr,
            )

    def get_ext_filename(self, fullname: str) -> str:
        """No Python version in the name: the library knows nothing of Python."""
        return str(Path(*fullname.split(".")).with_suffix(".so"))


class AnyPython(bdist_wheel):
    """Tags the wheel for every Python 3 of this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        """Only the platform counts."""
        return "py3", "none", super().get_tag()[2]


if __name__ == "__main__":
    setup(
        packages=packages(),
        ext_modules=[
            Extension(
                "dist_dp.kernels._native",
                sources=[str(NATIVE / name) for name in WITH_FLAGS],
                depends=[str(path.relative_to(HERE)) for path in (HERE / NATIVE).glob("*.h")],
                optional=True,  # an editable install does not mind its absence
            )
        ],
        cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPython},
    )
