"""The manifests fit their schemas, and what the guarantee needs of them is there.

KubeRay's own schemas are in its Helm chart and in no Python package. With
``DIST_DP_KUBERAY_CRDS=FOLDER``, the chart's ``crds`` folder, the manifests are checked against them
whole; without, against the fields written down in ``kuberay_fields.yaml``.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from dist_dp.cluster.config import parse_config
from dist_dp.cluster.loopback import without_client_server
from tests.cluster.small import ROOT

MANIFESTS = ROOT / "cluster" / "manifests"
FIELDS = Path(__file__).with_name("kuberay_fields.yaml")
KUBERNETES = sorted(p.name for p in MANIFESTS.glob("*.yaml") if p.name != "ray-up.yaml")
CRDS = os.environ.get("DIST_DP_KUBERAY_CRDS")


def closed(schema: Any) -> Any:
    """A schema whose objects take no other fields than they name, as Kubernetes reads them."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    result = {
        key: {k: closed(v) for k, v in value.items()} if key == "properties" else closed(value)
        for key, value in schema.items()
    }
    is_open = schema.get("x-kubernetes-preserve-unknown-fields", False)
    if isinstance(schema.get("properties"), dict) and not is_open:
        result.setdefault("additionalProperties", False)
    return result


def written_down(kind: str) -> Any:
    fields = yaml.safe_load(FIELDS.read_text(encoding="utf-8"))
    return closed({**fields["kinds"][kind], "definitions": fields["definitions"]})


def published(kind: str) -> Any:
    """The schema in one of the chart's files."""
    assert CRDS is not None
    crd = yaml.safe_load((Path(CRDS) / f"ray.io_{kind.lower()}s.yaml").read_text(encoding="utf-8"))
    version = next(v for v in crd["spec"]["versions"] if v["name"] == "v1")
    return closed(version["schema"]["openAPIV3Schema"])


def documents(name: str) -> list[Any]:
    text = (MANIFESTS / name).read_text(encoding="utf-8")
    return [d for d in yaml.safe_load_all(text) if d]


def all_documents() -> list[Any]:
    return [document for name in KUBERNETES for document in documents(name)]


def pods() -> Iterator[tuple[str, Any]]:
    """Every pod template, with the file and the group it is of."""
    for name in KUBERNETES:
        for document in documents(name):
            spec = document.get("spec", {})
            if "submitterPodTemplate" in spec:
                yield f"{name} submitter", spec["submitterPodTemplate"]
            spec = spec.get("rayClusterSpec", spec)
            if "headGroupSpec" in spec:
                yield f"{name} head", spec["headGroupSpec"]["template"]
                for group in spec["workerGroupSpecs"]:
                    yield f"{name} {group['groupName']}", group["template"]


def test_the_promised_manifests_are_there() -> None:
    assert KUBERNETES == [
        "raycluster-cpu.yaml",
        "raycluster-gpu.yaml",
        "rayjob-cpu.yaml",
        "rayjob-gpu.yaml",
        "storage.yaml",
    ]
    assert len(list(pods())) == 10


@pytest.mark.parametrize("name", KUBERNETES)
def test_kubernetes_manifests_have_known_fields_only(name: str) -> None:
    for document in documents(name):
        jsonschema.validate(document, written_down(document["kind"]))


@pytest.mark.skipif(CRDS is None, reason="DIST_DP_KUBERAY_CRDS is not set; it names KubeRay's CRDs")
@pytest.mark.parametrize("name", [n for n in KUBERNETES if n.startswith("ray")])
def test_kuberay_manifests_fit_the_published_schemas(name: str) -> None:
    for document in documents(name):
        if document["apiVersion"] == "ray.io/v1":
            content = {**document, "metadata": {}}
            jsonschema.validate(content, published(document["kind"]))


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every object that has fields of its own choosing no say in, by its path."""
    if isinstance(value, dict):
        free = {"labels", "matchLabels", "rayStartParams", "data", "limits", "requests"}
        if not free & {path[-1] if path else None}:
            yield path
        for key, inner in value.items():
            yield from places(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from places(inner, (*path, index))


def test_an_unknown_field_is_seen_wherever_it_stands() -> None:
    for document in all_documents():
        schema = written_down(document["kind"])
        for path in places(document):
            planted = copy.deepcopy(document)
            inner = planted
            for step in path:
                inner = inner[step]
            inner["numberOfWorkers"] = 3
            with pytest.raises(jsonschema.ValidationError, match="numberOfWorkers"):
                jsonschema.validate(planted, schema)


def ray_schema() -> Any:
    return json.loads((files("ray.autoscaler") / "ray-schema.json").read_text(encoding="utf-8"))


def test_the_launchers_file_fits_rays_schema() -> None:
    (cluster,) = documents("ray-up.yaml")
    jsonschema.validate(cluster, ray_schema())
    for path in ((), ("auth",), ("docker",), ("available_node_types", "head")):
        planted = copy.deepcopy(cluster)
        inner = planted
        for step in path:
            inner = inner[step]
        inner["numberOfWorkers"] = 3
        with pytest.raises(jsonschema.ValidationError, match="numberOfWorkers"):
            jsonschema.validate(planted, ray_schema())
    starts = cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"]
    assert all("RAY_AUTH_MODE=token" in line for line in starts if "ray start" in line)


def test_every_pod_runs_without_rights() -> None:
    for where, pod in pods():
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False, where
        assert spec["securityContext"]["runAsNonRoot"] is True, where
        assert spec["securityContext"]["runAsUser"] == 1000, where
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, where
        for container in spec["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False, where
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, where
            resources = container["resources"]
            assert {"cpu", "memory"} <= set(resources["requests"]), where
            assert "memory" in resources["limits"], where
        # The network policy is for these pods.
        assert pod["metadata"]["labels"] == {"app.kubernetes.io/part-of": "dist-dp"}, where


def test_the_ledger_is_with_the_head_alone() -> None:
    storage = {d["metadata"]["name"]: d for d in documents("storage.yaml")}
    assert storage["dist-dp-ledger"]["spec"]["accessModes"] == ["ReadWriteOnce"]
    for where, pod in pods():
        claims = {
            v["persistentVolumeClaim"]["claimName"]
            for v in pod["spec"].get("volumes", [])
            if "persistentVolumeClaim" in v
        }
        assert claims <= set(storage), where
        assert ("dist-dp-ledger" in claims) == where.endswith("head"), where
        for container in pod["spec"]["containers"]:
            mounts = {m["name"]: m["mountPath"] for m in container.get("volumeMounts", [])}
            assert set(mounts) == {v["name"] for v in pod["spec"].get("volumes", [])}, where
            env = {e["name"]: e["value"] for e in container.get("env", [])}
            if where.endswith("head"):
                assert Path(env["DIST_DP_LEDGER"]).parent == Path(mounts["ledger"]), where
                module = f"{without_client_server.__module__}.{without_client_server.__name__}"
                assert env["RAY_START_HOOK"] == module


def test_clusters_ask_for_a_token_and_keep_their_size() -> None:
    for document in all_documents():
        spec = document.get("spec", {})
        spec = spec.get("rayClusterSpec", spec)
        if "headGroupSpec" not in spec:
            continue
        assert spec["authOptions"] == {"mode": "token"}
        assert spec["enableInTreeAutoscaling"] is False
        assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        for group in spec["workerGroupSpecs"]:
            assert group["minReplicas"] == group["replicas"] == group["maxReplicas"]


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_a_jobs_run_is_a_valid_one_that_fits_its_workers(kind: str) -> None:
    config_map, job = documents(f"rayjob-{kind}.yaml")
    config = parse_config(yaml.safe_load(config_map["data"]["run.yaml"]))
    assert config.cluster.workers_off_head and config.cluster.address == "auto"
    assert job["spec"]["backoffLimit"] == 0
    group = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert config.cluster.num_workers == group["replicas"]
    assert config.cluster.cpus_per_worker <= float(limits["cpu"])
    assert config.cluster.use_gpu == ("nvidia.com/gpu" in limits) == (kind == "gpu")


def test_manifests_hold_no_secrets_and_the_image_they_name() -> None:
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    for path in sorted(MANIFESTS.iterdir()):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"(password|secret|token)\w*:\s+[\"']?[A-Za-z0-9+/]{16,}", text, re.I)
        for image in re.findall(r"image: (\S+)", text):
            assert image.split(":")[1].removesuffix("-cuda") == version[1], path
