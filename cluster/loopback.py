"""Ray on the loopback address, and nowhere else.

Ray takes ``127.0.0.1`` for "this machine as others see it", and a node that others can see listens
on every interface. Here the address is taken as it is written: nodes with it, and drivers that
join them, are reachable from this machine alone.
"""

from __future__ import annotations

import os
from typing import Any

HOST = "127.0.0.1"
START_HOOK = f"{__name__}.on_ray_start"
"""For ``RAY_START_HOOK``: Ray calls it in ``ray start``, before anything is started."""


def is_loopback(address: str) -> bool:
    """Whether ``host:port`` names the loopback address."""
    return address.rpartition(":")[0] in (HOST, "localhost")


def take_literally() -> None:
    """Keeps Ray in this process and its children from replacing the loopback address."""
    from ray._private import ray_constants, services

    # What Ray does on macOS; read when Ray is imported, so it is for children. A node's own process
    # would refuse to join a cluster with it.
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"

    services.resolve_ip_for_localhost = lambda host: HOST if host == "localhost" else host


def on_ray_start(params: Any, head: bool) -> None:
    """Binds a node of ``ray start`` to the loopback address, without a server for Ray Client."""
    take_literally()
    params.node_ip_address = params.node_name = HOST
    without_client_server(params, head)


def without_client_server(params: Any, _head: bool) -> None:
    """For ``RAY_START_HOOK`` on any node: does not open the port of Ray Client.

    A run's driver is a process of the cluster; nothing here connects through that port.
    """
    params.ray_client_server_port = None
