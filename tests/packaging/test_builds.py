"""The wrong build of FBGEMM, or a wrong pairing, is noticed and the remedy named."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from dist_dp import _builds
from dist_dp._builds import BuildError, Builds, check_builds, read_builds

CPU = Builds(
    torch="2.13.0+cpu",
    torch_cuda=None,
    fbgemm_cpu="1.8.0",
    fbgemm_cuda=None,
    fbgemm_variant="cpu",
    torchrec="1.8.0",
)
CUDA = Builds(
    torch="2.13.0",
    torch_cuda="13.0",
    fbgemm_cpu=None,
    fbgemm_cuda="1.8.0",
    fbgemm_variant="cuda",
    torchrec="1.8.0",
)
CUDA_TORCH_CPU_FBGEMM = replace(CPU, torch="2.13.0", torch_cuda="13.0")

REINSTALL_CPU = "--force-reinstall fbgemm-gpu-cpu==1.8.0"
REINSTALL_CUDA = "--force-reinstall fbgemm-gpu==1.8.0"


def test_this_environment_has_matching_builds() -> None:
    assert check_builds() == read_builds()


@pytest.mark.parametrize("builds", [CPU, CUDA, CUDA_TORCH_CPU_FBGEMM])
def test_matching_builds_pass(builds: Builds) -> None:
    assert check_builds(builds) is builds


def test_cuda_builds_serve_a_gpu() -> None:
    assert check_builds(CUDA, need_cuda=True) is CUDA


@pytest.mark.parametrize(
    ("builds", "need_cuda", "problem", "remedy"),
    [
        # pip install torchrec without --no-deps, before and after it removed or kept the CPU one
        (replace(CPU, fbgemm_cuda="1.8.0"), False, "both installed", REINSTALL_CPU),
        (replace(CUDA, fbgemm_cpu="1.8.0"), True, "both installed", REINSTALL_CUDA),
        (
            replace(CPU, fbgemm_cpu=None, fbgemm_cuda="1.8.0", fbgemm_variant="cuda"),
            False,
            r"CUDA build, but torch 2\.13\.0\+cpu",
            REINSTALL_CPU,
        ),
        # one uninstalled after the other had overwritten its files
        (replace(CPU, fbgemm_variant="cuda"), False, "those of another", REINSTALL_CPU),
        (replace(CPU, fbgemm_variant=None), False, "missing or unknown", REINSTALL_CPU),
        (replace(CUDA, fbgemm_variant="cpu"), False, "those of another", REINSTALL_CUDA),
        (replace(CPU, fbgemm_cpu=None), False, "not installed", "fbgemm-gpu-cpu==1.8.0"),
        (CPU, True, "torch 2.13.0.cpu is a CPU build", "CUDA=1"),
        (CUDA_TORCH_CPU_FBGEMM, True, "fbgemm-gpu-cpu 1.8.0 is the CPU", REINSTALL_CUDA),
        (replace(CPU, torch="2.14.0+cpu"), False, "torch 2.14.0", "torch==2.13.0"),
        (replace(CPU, torch="2.1.0"), False, "torch 2.1.0", "torch==2.13.0"),
        (replace(CPU, fbgemm_cpu="1.6.0"), False, "FBGEMM 1.6.0", REINSTALL_CPU),
        (replace(CPU, torchrec=None), False, "not installed", "--no-deps torchrec==1.8.0"),
        (replace(CPU, torchrec="1.6.0"), False, "1.6.0, not 1.8.0", "--no-deps torchrec==1.8.0"),
    ],
)
def test_wrong_builds_are_refused(
    builds: Builds, need_cuda: bool, problem: str, remedy: str
) -> None:
    with pytest.raises(BuildError, match=problem) as caught:
        check_builds(builds, need_cuda=need_cuda)
    assert remedy in str(caught.value)


def test_the_files_on_disk_decide_not_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "fbgemm_gpu"
    (package / "docs").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "docs" / "target.default.json.py").write_text('{"variant": "cuda"}')
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "fbgemm_gpu", raising=False)
    monkeypatch.setattr(_builds, "_version", {"fbgemm-gpu-cpu": "1.8.0"}.get)
    with pytest.raises(BuildError, match=r"those of another one \(cuda\)"):
        check_builds(need_cuda=False)


def test_versions_agree_with_pyproject() -> None:
    root = Path(__file__).resolve().parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    assert f"torch=={_builds.TORCH}.0" in project["dependencies"]
    assert extras["cpu"] == [f"fbgemm-gpu-cpu=={_builds.FBGEMM}"]
    assert extras["cuda"] == [f"fbgemm-gpu=={_builds.FBGEMM}", f"torchrec=={_builds.TORCHREC}"]
