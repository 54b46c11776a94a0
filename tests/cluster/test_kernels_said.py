"""Which kernels make the noise is said for every worker, and what to do where they are slow."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_dp import kernels
from dist_dp.distributed import rank
from dist_dp.engine import PrivacyEngine
from dist_dp.kernels import dispatch, native
from tests.dist_dp.worlds import run_world


def said_by_worker(slow: list[int]) -> dict[str, Any]:
    """What a worker says when some workers are made to use the reference."""
    from dist_dp.cluster.summary import say_kernels

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(dispatch.VARIABLE, raising=False)
        if rank() in slow:
            patch.setenv(dispatch.VARIABLE, "reference")
        return say_kernels(torch.device("cpu"))


def said(slow: list[list[int]]) -> list[dict[str, Any]]:
    return [said_by_worker(case) for case in slow]


@pytest.mark.skipif(not native.available(), reason="no C++ compiler: no compiled kernels")
def test_every_worker_is_heard() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(dispatch.VARIABLE, raising=False)
        here = kernels.implementation()
    assert here.startswith("compiled")
    found = run_world(said, 2, [[], [1], [0, 1]])
    assert found[0] == found[1]  # rank 0 knows it of all
    none, one, both = found[0]
    assert none == {"phase": f"noise kernels: {here}", "kernels": here, "slow_kernels": []}
    assert one["kernels"] == f"{here} on worker 0, reference (NumPy) on worker 1"
    (warning,) = one["slow_kernels"]
    assert warning.startswith("worker 1: noise is made by the NumPy reference")
    assert "unset it" in warning
    assert both["kernels"] == "reference (NumPy)"
    assert [w.split(":")[0] for w in both["slow_kernels"]] == ["workers 0, 1"]


def test_the_engine_warns_when_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(mechanism: str) -> PrivacyEngine:
        return PrivacyEngine(dataset="d", mechanism=mechanism, ledger=tmp_path / "l", device="cpu")

    monkeypatch.setattr(dispatch, "_warned", set())
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make("none")
    with pytest.warns(kernels.SlowKernelsWarning, match="unset it"):
        make("lazydp")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make("dpsgd")  # once is enough
        kernels.normal(bytes(32), torch.arange(2), 0, 1, num_columns=3)
