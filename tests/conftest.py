"""What every test shares: quiet libraries, and reasons where a test cannot run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from tests.postgres_server import PostgresServer, running_server, why_no_server

# Before Ray is imported anywhere: no usage report, no repeated log lines, no hints.
for _name, _value in {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    # Threads that wait give their core to the other processes of a test, and of the other tests.
    "OMP_WAIT_POLICY": "PASSIVE",
}.items():
    os.environ.setdefault(_name, _value)

REAL_DATA = "DIST_DP_REAL_DATA"
RAY_TESTS = "tests/cluster/"


def _no_real_data() -> str | None:
    """Say why tests on real data cannot run, or ``None`` where they can."""
    folder = os.environ.get(REAL_DATA)
    if not folder:
        return f"{REAL_DATA} is not set; it names the folder of the public data sets"
    if not Path(folder).is_dir():
        return f"{REAL_DATA}={folder} is not a folder"
    return None


def _no_gpu() -> str | None:
    """Say why tests on a GPU cannot run, or ``None`` where they can."""
    import torch

    return None if torch.cuda.is_available() else "torch finds no CUDA device"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for marker, why_not in (("real_data", _no_real_data), ("gpu", _no_gpu)):
        marked = [item for item in items if item.get_closest_marker(marker)]
        reason = why_not() if marked else None
        if reason:
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


class _Pieces(LoadScopeScheduling):
    """Where tests run in several processes: one Ray for all of them, and a file in one piece."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return RAY_TESTS if file.startswith(RAY_TESTS) else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    # Not --dist loadgroup: xdist 3.8 renames tests for its groups, which pytest 9.2 ignores.
    return _Pieces(config, log)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of the public data sets; for tests marked ``real_data``."""
    reason = _no_real_data()
    if reason:
        pytest.skip(reason)
    return Path(os.environ[REAL_DATA])


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    """A real PostgreSQL server; its ledgers' witnesses are in a folder of the tests."""
    reason = why_no_server()
    if reason:
        pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patch, running_server() as server:
        patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data-home")))
        yield server
