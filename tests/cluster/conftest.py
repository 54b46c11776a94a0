"""One local Ray for all tests of this folder: starting it takes seconds."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_dp.datasets.synthetic import write_criteo_like


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """A local Ray with two CPUs, in the namespace of the project."""
    import ray

    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        namespace="dist-dp",
        logging_level=logging.ERROR,
    )
    yield
    ray.shutdown()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Ray ends with the last test of this folder: its idle processes would slow all others."""
    ours = Path(__file__).parent
    if nextitem is None or not nextitem.path.is_relative_to(ours):
        ray = sys.modules.get("ray")
        if ray is not None:
            ray.shutdown()


@pytest.fixture(scope="session", autouse=True)
def ledger_of_nobody(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No test may touch the user's ledger, not even by mistake."""
    path = tmp_path_factory.mktemp("ledger") / "ledger.sqlite"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIST_DP_LEDGER", str(path))
        yield path


@pytest.fixture(scope="session")
def clicks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2,000 generated click records in Criteo's layout."""
    path = tmp_path_factory.mktemp("data") / "clicks.tsv"
    write_criteo_like(path, 2000, seed=1)
    return path
