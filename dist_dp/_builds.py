"""Notice when the installed builds of torch, FBGEMM and TorchRec do not fit together.

``fbgemm-gpu`` (CUDA) and ``fbgemm-gpu-cpu`` are two distributions that install the same
package ``fbgemm_gpu`` and overwrite each other's files. pip does not see the conflict, and
TorchRec pulls the CUDA one in by itself, so a wrong build shows only later, as a missing
symbol. This module looks before anything of FBGEMM is imported.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

from dist_dp.errors import DistDpError

TORCH = "2.13"
"""Release series of torch that the FBGEMM and TorchRec builds below are compiled for."""

FBGEMM = "1.8.0"
TORCHREC = "1.8.0"


class BuildError(DistDpError):
    """The installed builds of torch, FBGEMM and TorchRec do not fit together."""


@dataclass(frozen=True)
class Builds:
    """What is installed.

    Attributes:
        torch: Version of torch, with its local part (``2.13.0+cpu``).
        torch_cuda: Version of CUDA that torch was built for; ``None`` for a CPU build.
        fbgemm_cpu: Version of the distribution ``fbgemm-gpu-cpu``, or ``None``.
        fbgemm_cuda: Version of the distribution ``fbgemm-gpu``, or ``None``.
        fbgemm_variant: What the files of ``fbgemm_gpu`` on disk say they are (``cpu``,
            ``cuda``, …); ``None`` where there are none, or where they do not say.
        torchrec: Version of TorchRec, or ``None``.
    """

    torch: str
    torch_cuda: str | None
    fbgemm_cpu: str | None
    fbgemm_cuda: str | None
    fbgemm_variant: str | None
    torchrec: str | None


def read_builds() -> Builds:
    """Read what is installed, importing torch but neither FBGEMM nor TorchRec.

    Raises:
        BuildError: torch is not installed.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        remedy = f"pip install torch=={TORCH}.0"
        raise BuildError(f"torch is not installed. Remedy: {remedy}") from error
    return Builds(
        torch=torch.__version__,
        torch_cuda=torch.version.cuda,
        fbgemm_cpu=_version("fbgemm-gpu-cpu"),
        fbgemm_cuda=_version("fbgemm-gpu"),
        fbgemm_variant=_variant_on_disk(),
        torchrec=_version("torchrec"),
    )


def check_builds(builds: Builds | None = None, *, need_cuda: bool = False) -> Builds:
    """Check that torch, FBGEMM and TorchRec fit together.

    Args:
        builds: What to judge; by default what is installed.
        need_cuda: The run is to use a GPU, so CPU builds are wrong too.

    Returns:
        What was judged, for the record of a run.

    Raises:
        BuildError: The builds do not fit; the message says which, and how to install the
            right ones.
    """
    found = builds if builds is not None else read_builds()
    cuda = found.torch_cuda is not None and (need_cuda or found.fbgemm_cpu is None)
    right = f"fbgemm-gpu=={FBGEMM}" if cuda else f"fbgemm-gpu-cpu=={FBGEMM}"
    replace = (
        "Remedy: pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu && "
        f"pip install --no-deps --force-reinstall {right}"
    )

    if not _is_series(found.torch, TORCH):
        raise BuildError(
            f"torch {found.torch} is installed, but FBGEMM {FBGEMM} and TorchRec {TORCHREC} are "
            f"compiled for torch {TORCH}. Remedy: pip install torch=={TORCH}.0"
        )
    if need_cuda and found.torch_cuda is None:
        raise BuildError(
            f"A GPU was asked for, but torch {found.torch} is a CPU build. Remedy: a new "
            "environment with the CUDA build of torch (in a checkout: rm -r .venv, then "
            "make setup CUDA=1)"
        )
    if found.fbgemm_cpu is not None and found.fbgemm_cuda is not None:
        raise BuildError(
            f"fbgemm-gpu-cpu {found.fbgemm_cpu} and fbgemm-gpu {found.fbgemm_cuda} are both "
            f"installed and have overwritten each other's files. {replace}"
        )
    if found.fbgemm_cpu is None and found.fbgemm_cuda is None:
        raise BuildError(f"FBGEMM is not installed. Remedy: pip install {right}")
    if found.fbgemm_cuda is not None and found.torch_cuda is None:
        raise BuildError(
            f"fbgemm-gpu {found.fbgemm_cuda} is the CUDA build, but torch {found.torch} is a CPU "
            f"build (pip install torchrec without --no-deps does this). {replace}"
        )
    if need_cuda and found.fbgemm_cuda is None:
        raise BuildError(
            f"A GPU was asked for, but fbgemm-gpu-cpu {found.fbgemm_cpu} is the CPU build. "
            f"{replace}"
        )
    declared = "cpu" if found.fbgemm_cuda is None else "cuda"
    if found.fbgemm_variant != declared:
        on_disk = found.fbgemm_variant or "missing or unknown"
        raise BuildError(
            f"The {declared} build of FBGEMM is recorded as installed, but its files are those of "
            f"another one ({on_disk}). {replace}"
        )
    fbgemm = found.fbgemm_cpu or found.fbgemm_cuda or ""
    if not _is_series(fbgemm, FBGEMM):
        raise BuildError(f"FBGEMM {fbgemm} does not go with torch {TORCH}. {replace}")
    if found.torchrec is None or not _is_series(found.torchrec, TORCHREC):
        state = "not installed" if found.torchrec is None else f"{found.torchrec}, not {TORCHREC}"
        raise BuildError(
            f"TorchRec is {state}. Remedy: pip install --no-deps torchrec=={TORCHREC} "
            "(--no-deps, because it would replace the CPU build of FBGEMM)"
        )
    return found


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _variant_on_disk() -> str | None:
    """Read the build's own note of its variant, without importing the package."""
    spec = util.find_spec("fbgemm_gpu")
    if spec is None or spec.origin is None:
        return None
    note = Path(spec.origin).parent / "docs" / "target.default.json.py"
    try:
        variant = json.loads(note.read_text(encoding="utf-8")).get("variant")
    except (OSError, ValueError):
        return None
    return variant if isinstance(variant, str) else None


def _is_series(version: str, series: str) -> bool:
    """Tell whether a version, its local part aside, is of a release series."""
    public = version.partition("+")[0].split(".")
    wanted = series.split(".")
    return public[: len(wanted)] == wanted
