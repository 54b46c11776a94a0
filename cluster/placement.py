"""Which nodes the workers of a run go to, and whether they fit there.

The accountant and the ledger stay on the driver's node: the ledger is a file of that node. Workers
are kept away from it, if asked, by the label that Ray itself gives every node, so no node needs to
be labelled by hand.
"""

from __future__ import annotations

from typing import Any

from dist_dp.cluster.config import ClusterConfig
from dist_dp.errors import ConfigError

_NODE_ID_LABEL = "ray.io/node-id"


def scaling(cluster: ClusterConfig) -> dict[str, Any]:
    """Arguments of Ray Train's ``ScalingConfig``; Ray must be initialised."""
    options: dict[str, Any] = {
        "num_workers": cluster.num_workers
        if cluster.min_workers in (None, cluster.num_workers)
        else (cluster.min_workers, cluster.num_workers),
        "use_gpu": bool(cluster.use_gpu),
        "resources_per_worker": {
            "CPU": cluster.cpus_per_worker,
            **({"GPU": 1} if cluster.use_gpu else {}),
        },
        "placement_strategy": cluster.placement.upper(),
    }
    if cluster.workers_off_head:
        options["label_selector"] = {_NODE_ID_LABEL: f"!{_driver_node()}"}
    return options


def check_room(cluster: ClusterConfig) -> None:
    """Sees that every worker finds a node; Ray would wait for one without a word.

    Raises:
        ConfigError: The nodes hold fewer workers than asked for.
    """
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    where = "the cluster"
    if cluster.workers_off_head:
        driver = _driver_node()
        alive = [node for node in alive if node["NodeID"] != driver]
        if not alive:
            raise ConfigError(
                "cluster.workers_off_head: the cluster has no node beside the driver's, where the "
                "ledger is; add a node, or set workers_off_head to false"
            )
        where = "the cluster beside the driver's node (cluster.workers_off_head)"
    resources = [node["Resources"] for node in alive]
    each = cluster.cpus_per_worker
    # A worker's CPUs are on one node; what is left over on several nodes makes no worker.
    room = sum(int(have.get("CPU", 0.0) / each + 1e-6) for have in resources)
    needed = cluster.min_workers or cluster.num_workers
    if room < needed:
        have = " + ".join(f"{have.get('CPU', 0.0):g}" for have in resources)
        raise ConfigError(
            f"cluster.num_workers: {needed} workers need "
            f"{each * needed:g} CPUs, {each:g} on one node for each; {where} has "
            f"{have}, room for {room}; lower num_workers or cpus_per_worker, or add nodes"
        )
    if not cluster.use_gpu:
        return
    room = sum(
        min(int(have.get("GPU", 0.0)), int(have.get("CPU", 0.0) / each + 1e-6))
        for have in resources
    )
    if room < needed:
        raise ConfigError(
            f"cluster.use_gpu: {needed} workers need a GPU each, with {each:g} CPUs "
            f"beside it; {where} has {sum(have.get('GPU', 0.0) for have in resources):g} GPUs, "
            f"room for {room}; lower num_workers, or set use_gpu to false"
        )


def _driver_node() -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())
