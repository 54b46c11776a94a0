"""Starts a local Ray or joins a running one, quietly."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dist_dp.cluster import quiet
from dist_dp.cluster.config import ClusterConfig
from dist_dp.errors import ConfigError, DistDpError


@contextmanager
def ray_session(cluster: ClusterConfig, verbose: bool = False) -> Iterator[None]:
    """Connects to Ray for the length of a block.

    Args:
        cluster: Address (None starts Ray on this machine) and the workers' needs.
        verbose: Let Ray print.

    Raises:
        DistDpError: The cluster cannot be reached, or cannot hold the workers.
    """
    quiet.apply(verbose)
    import ray

    if ray.is_initialized():
        _check_room(cluster)
        yield
        return
    options: dict[str, Any] = {
        "namespace": "dist-dp",
        "log_to_driver": verbose,
        "logging_level": logging.INFO if verbose else logging.ERROR,
        "configure_logging": True,
    }
    try:
        if cluster.address is None:
            needed = cluster.num_workers * cluster.cpus_per_worker
            # Ray counts CPUs, it does not bind them: fewer than needed would hang without a word.
            ray.init(
                num_cpus=max(os.cpu_count() or 1, -int(-needed // 1)),
                include_dashboard=False,
                **options,
            )
        else:
            ray.init(address=cluster.address, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = cluster.address or "this machine"
        raise DistDpError(
            f"cannot start or reach Ray on {where}: {error}. Check the address (ray status), or "
            "leave --address out to start Ray here."
        ) from error
    try:
        _check_room(cluster)
        yield
    finally:
        ray.shutdown()


def _check_room(cluster: ClusterConfig) -> None:
    import ray

    have = ray.cluster_resources()
    cpus = cluster.num_workers * cluster.cpus_per_worker
    if have.get("CPU", 0.0) < cpus:
        raise ConfigError(
            f"cluster.num_workers: {cluster.num_workers} workers need {cpus:g} CPUs, the cluster "
            f"has {have.get('CPU', 0.0):g}; lower num_workers or cpus_per_worker, or add nodes"
        )
    if cluster.use_gpu and have.get("GPU", 0.0) < cluster.num_workers:
        raise ConfigError(
            f"cluster.use_gpu: {cluster.num_workers} workers need a GPU each, the cluster has "
            f"{have.get('GPU', 0.0):g}; lower num_workers, or set use_gpu to false"
        )
