"""Where workers go, and what is said when they cannot."""

from __future__ import annotations

from typing import Any

import pytest

from dist_dp.cluster.config import ClusterConfig
from dist_dp.cluster.placement import check_room, scaling
from dist_dp.errors import ConfigError


class Nodes:
    """What Ray says of three nodes, the driver's first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *resources: dict[str, float]) -> None:
        import ray

        nodes = [
            {"NodeID": f"node{i}", "Alive": bool(have), "Resources": have}
            for i, have in enumerate(resources)
        ]
        monkeypatch.setattr(ray, "nodes", lambda: nodes)
        monkeypatch.setattr(ray, "get_runtime_context", lambda: self)

    def get_node_id(self) -> str:
        return "node0"


def room(**settings: Any) -> None:
    check_room(ClusterConfig(**settings))


def test_the_rest_of_several_nodes_makes_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    Nodes(monkeypatch, {"CPU": 3.0}, {"CPU": 3.0}, {})
    room(num_workers=6)
    room(num_workers=2, cpus_per_worker=2)
    with pytest.raises(ConfigError, match=r"3 workers need 6 CPUs, 2 on one.*3 \+ 3, room for 2"):
        room(num_workers=3, cpus_per_worker=2)
    room(num_workers=60, cpus_per_worker=0.1)


def test_workers_off_the_head_need_other_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    Nodes(monkeypatch, {"CPU": 8.0, "GPU": 8.0}, {"CPU": 2.0, "GPU": 1.0}, {})
    room(num_workers=2, workers_off_head=True)
    with pytest.raises(ConfigError, match=r"workers_off_head\) has 2, room for 2; lower"):
        room(num_workers=3, workers_off_head=True)
    room(num_workers=8, use_gpu=True)
    with pytest.raises(ConfigError, match=r"need a GPU each.*has 1 GPUs, room for 1"):
        room(num_workers=2, use_gpu=True, workers_off_head=True)
    Nodes(monkeypatch, {"CPU": 8.0}, {})
    with pytest.raises(ConfigError, match=r"no node beside the driver's.*add a node"):
        room(workers_off_head=True)


def test_what_ray_train_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.train import ScalingConfig

    Nodes(monkeypatch, {"CPU": 8.0})
    told = scaling(ClusterConfig(num_workers=2, placement="spread", workers_off_head=True))
    assert told["label_selector"] == {"ray.io/node-id": "!node0"}
    assert told["placement_strategy"] == "SPREAD"
    ScalingConfig(**told)
    told = scaling(ClusterConfig(use_gpu=True, cpus_per_worker=2))
    assert told["resources_per_worker"] == {"CPU": 2, "GPU": 1} and "label_selector" not in told
    ScalingConfig(**told)
