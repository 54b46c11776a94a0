"""A local cluster of three nodes, started, trained on and stopped by the command line."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_dp.cluster.local_nodes import (
    LocalCluster,
    has_job_server,
    node_environment,
    read_state,
)
from dist_dp.cluster.processes import Process
from dist_dp.datasets.store import ArrowStore
from dist_dp.ledger import Ledger
from tests.cluster.small import (
    ROOT,
    assert_one_line_error,
    charged_steps,
    run,
    small,
    start,
    write_config,
)

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SPLITS = ("train", "valid", "test")
HAS_AGENTS = has_job_server()
needs_agents = pytest.mark.skipif(
    not HAS_AGENTS, reason="needs ray[default] (pip install 'dist-dp[cluster]')"
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """Three nodes, by ``dist-dp cluster up``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        patch.setenv("RAY_metrics_report_interval_ms", "500")
        # Workers import this folder's models.
        patch.setenv("PYTHONPATH", f"{ROOT}:{os.environ.get('PYTHONPATH', '')}")
        jobs = ["--jobs"] if HAS_AGENTS else []
        result = run("cluster", "up", "--nodes", "3", "--cpus-per-node", "2", *jobs)
        state = read_state()
        assert result.exit_code == 0 and state is not None, result.output
        assert f"--address {state.address}" in result.output
        yield state
        if read_state() is not None:
            run("cluster", "down")


@pytest.fixture(scope="module")
def trained(
    cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory, clicks: Path
) -> tuple[Path, str]:
    """A run on the cluster, workers spread and off the head; and what its metrics port showed."""
    home = tmp_path_factory.mktemp("trained")
    values = small(
        home,
        clicks,
        model={
            "name": "custom",
            "factory": "tests.cluster.factories:placed",
            "factory_args": {"folder": str(home)},
        },
        cluster={"address": "auto", "placement": "spread", "workers_off_head": True},
        data={"name": "clicks"},
    )
    scraped: list[str] = []
    done = threading.Event()
    watcher = threading.Thread(target=_scrape, args=(cluster, scraped, done))
    watcher.start()
    try:
        path = write_config(home, values)
        process = start("train", "-c", path, "--name", "spread", folder=home)
        assert process.wait(timeout=180) == 0, (home / "err.txt").read_text()
    finally:
        time.sleep(1.5 if HAS_AGENTS else 0)
        done.set()
        watcher.join()
    return home, "\n".join(scraped)


def _scrape(cluster: LocalCluster, into: list[str], done: threading.Event) -> None:
    """Reads the metrics ports of the nodes, as Prometheus would."""
    speaks: dict[int, bool] = {}
    while HAS_AGENTS and not done.wait(1.0):
        for port in _listening(cluster)[0]:
            if not speaks.get(port, True):
                continue
            try:
                url = f"http://127.0.0.1:{port}/metrics"
                text = urllib.request.urlopen(url, timeout=1).read().decode()
            except (OSError, ValueError, http.client.HTTPException):
                text = ""
            speaks[port] = "ray_" in text  # Agents have ports for other things, too.
            into.append(text)


def _listening(cluster: LocalCluster) -> tuple[set[int], set[str]]:
    """Ports of the nodes' agents, and addresses on which any process of the nodes listens."""
    listening = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                listening[fields[9]] = fields[1]
    agents, addresses = set(), set()
    for node in cluster.nodes:
        for pid in node.members():
            try:
                name = (Path("/proc") / str(pid) / "cmdline").read_bytes()
                links = [str(p.readlink()) for p in (Path("/proc") / str(pid) / "fd").iterdir()]
            except OSError:  # It has ended, or closed something.
                continue
            for link in links:
                inode = re.fullmatch(r"socket:\[(\d+)\]", link)
                if inode and inode[1] in listening:
                    address, _, port = listening[inode[1]].partition(":")
                    addresses.add(address)
                    if b"DashboardAgent" in name:
                        agents.add(int(port, 16))
    return agents, addresses


def test_nodes_are_private_to_the_user_and_the_machine(cluster: LocalCluster) -> None:
    folder = Path(cluster.token_file).parent
    modes = {p.name: p.stat().st_mode & 0o777 for p in folder.iterdir()}
    assert modes["cluster.json"] == modes["cluster.token"] == 0o600
    # 127.0.0.1, by itself or as IPv6 writes it, in the kernel's byte order.
    loopback = {"0100007F", "0000000000000000FFFF00000100007F"}
    assert _listening(cluster)[1] <= loopback
    commands = [(Path("/proc") / str(n.pid) / "cmdline").read_bytes() for n in cluster.nodes]
    token = Path(cluster.token_file).read_bytes()
    assert not any(token in command for command in commands)


def test_a_second_cluster_is_refused_and_the_first_shown(cluster: LocalCluster) -> None:
    if not HAS_AGENTS:
        assert_one_line_error(run("cluster", "up", "--jobs"), "job server", "pip install")
    assert_one_line_error(run("cluster", "up"), cluster.address, "up already", "cluster down")
    shown = run("cluster", "status")
    assert shown.exit_code == 0 and cluster.address in shown.output
    assert shown.output.count(" up ") == 3 and shown.output.count("worker") == 2


def test_nobody_joins_without_the_token(cluster: LocalCluster) -> None:
    code = (
        "import os; os.environ.update(RAY_AUTH_MODE='token', RAY_AUTH_TOKEN='f' * 64)\n"
        "from dist_dp.cluster.loopback import take_literally; take_literally()\n"
        "from ray._raylet import GcsClient\n"
        f"print(GcsClient(address={cluster.address!r}).internal_kv_get(b'x', b'y', 2))\n"
    )
    joined = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert joined.returncode != 0 and "InvalidAuthToken" in joined.stderr


def test_workers_go_to_different_nodes_and_the_accountant_stays(
    cluster: LocalCluster, trained: tuple[Path, str]
) -> None:
    home, _ = trained
    summary = json.loads((home / "runs" / "spread" / "summary.json").read_text())
    assert summary["status"] == "completed" and summary["world_size"] == 2
    sessions = [int((home / f"rank-{rank}.txt").read_text()) for rank in (0, 1)]
    assert sorted(sessions) == sorted(node.pid for node in cluster.nodes[1:])
    found = {index: _names(node) for index, node in enumerate(cluster.nodes)}
    assert [i for i, names in found.items() if any("AccountantActor" in n for n in names)] == [0]
    assert charged_steps(home / "ledger.sqlite", "clicks", "spread") == 12
    assert Ledger(home / "ledger.sqlite").spent("clicks").runs == ("spread",)


def _names(node: Process) -> list[str]:
    return [(Path("/proc") / str(p) / "cmdline").read_text() for p in node.members()]


@needs_agents
def test_prometheus_finds_what_is_promised_and_nothing_else(trained: tuple[Path, str]) -> None:
    from dist_dp.cluster.live_metrics import LEDGER_METRICS, RUN_METRICS

    _, text = trained
    ends = {"gauge": "", "counter": "_total", "histogram": "_bucket"}
    promised = {name: f"ray_{name}{ends[m.kind]}" for name, m in LEDGER_METRICS.items()}
    promised |= {name: f"ray_{name}" for name in RUN_METRICS}
    del promised["dist_dp_ledger_errors"]  # There were none.
    found = set(re.findall(r"^(ray_dist_dp_\w+)\{", text, flags=re.MULTILINE))
    assert set(promised.values()) <= found
    whole = {re.sub("_(bucket|sum|count|total)$", "", name) for name in found}
    assert whole == {f"ray_{name}" for name in promised}
    assert re.search(r'ray_dist_dp_dataset_budget_epsilon\{[^}]*dataset="clicks"[^}]*\} 8\.0', text)
    assert re.search(r'ray_dist_dp_run_steps_charged\{[^}]*run="spread"[^}]*\} 12\.0', text)


@needs_agents
def test_a_submitted_job_runs_on_the_head_and_joins(
    cluster: LocalCluster, clicks: Path, tmp_path: Path
) -> None:
    assert cluster.jobs_address is not None
    script = Path(sys.executable).with_name("dist-dp")
    program = [str(script), "convert", str(clicks), "--to", str(tmp_path / "store")]
    # RAY_ADDRESS tells a job which cluster it is of; with `auto` nothing else has to.
    program += ["--distributed", "--address", "auto"]
    submit = ["job", "submit", "--address", cluster.jobs_address, "--", *program]
    command = [sys.executable, "-m", "ray.scripts.scripts", *submit]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    secret = Path(cluster.token_file).read_text()
    assert secret not in " ".join(command)
    refused = subprocess.run(
        command, env={**clean, "RAY_AUTH_MODE": "disabled"}, capture_output=True, timeout=60
    )
    assert refused.returncode != 0 and not (tmp_path / "store").exists()
    env = {**clean, **node_environment(cluster.token_file)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "succeeded" in done.stdout, done.stdout + done.stderr
    assert sum(ArrowStore.open(tmp_path / "store").manifest.splits[s].rows for s in SPLITS) == 2000


def test_down_stops_what_up_started_and_nothing_else(cluster: LocalCluster) -> None:
    other = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        began = time.monotonic()
        stopped = run("cluster", "down")
        assert stopped.exit_code == 0 and "3 node(s)" in stopped.output
        assert time.monotonic() - began < 20
        assert not any(node.is_alive or node.members() for node in cluster.nodes)
        assert other.poll() is None
        assert not Path(cluster.session_folder).exists()
        assert_one_line_error(run("cluster", "down"), "no local cluster is up", "cluster up")
        assert_one_line_error(run("cluster", "status"), "no local cluster is up")
    finally:
        other.kill()
        other.wait()
