"""Starts a local Ray or joins a running one, quietly."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dist_dp.cluster import quiet
from dist_dp.cluster.config import ClusterConfig
from dist_dp.cluster.placement import check_room
from dist_dp.errors import DistDpError


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
        check_room(cluster)
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
            ray.init(address=_join_address(cluster.address), **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = cluster.address or "this machine"
        raise DistDpError(
            f"cannot start or reach Ray on {where}: {error}. Check the address (ray status), or "
            "leave --address out to start Ray here."
        ) from error
    try:
        check_room(cluster)
        yield
    finally:
        ray.shutdown()


def _join_address(address: str) -> str:
    """The address to join; the cluster of ``dist-dp cluster up`` is known with its token."""
    from dist_dp.cluster.local_nodes import node_environment, read_state
    from dist_dp.cluster.loopback import take_literally

    # As in Ray, the environment goes first: a submitted job is told its cluster so.
    address = os.environ.get("RAY_ADDRESS") or address
    local = read_state()
    if local is None or not local.is_up or address not in ("auto", local.address):
        return address
    os.environ.update(node_environment(local.token_file))
    # Ray has read the environment when it was imported.
    raylet: Any = importlib.import_module("ray._raylet")
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()
    take_literally()
    return local.address
