"""One local Ray for all tests of this folder: starting it takes seconds."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


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
