"""Several Ray nodes on this machine that outlive the command which started them.

Each node is one ``ray start --block`` in a session of its own, which ends with all it started.
Nodes listen on the loopback address alone, without a dashboard, and ask for a token that is made
for this cluster and lies in the user's state folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dist_dp.cluster.loopback import HOST, START_HOOK
from dist_dp.cluster.processes import Process
from dist_dp.errors import ConfigError, DistDpError
from dist_dp.limits import read_json

START_TIMEOUT_S = 60.0
DRAIN_S = 3
STOP_TIMEOUT_S = 20.0
_STARTED = "Ray runtime started."
_LONGEST_FOLDER = 40  # Ray puts sockets some 65 characters below; a socket's path has at most 107.


@dataclass(frozen=True)
class LocalCluster:
    """The nodes that ``up`` started.

    Attributes:
        address: Of the head, for ``--address``.
        jobs_address: Where ``ray job submit`` sends to; None without a job server.
        session_folder: Where Ray keeps sockets and logs.
        token_file: The token that the nodes ask for.
        cpus_per_node: CPUs of each node, as Ray counts them.
        nodes: One process for each node, the head first.
        started_at: Seconds since 1970.
    """

    address: str
    jobs_address: str | None
    session_folder: str
    token_file: str
    cpus_per_node: int
    nodes: tuple[Process, ...]
    started_at: float

    @property
    def is_up(self) -> bool:
        """Whether any of its nodes runs."""
        return any(node.is_alive or node.members() for node in self.nodes)


def state_folder() -> Path:
    """Where the state of the user's local cluster lies."""
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(home) / "dist-dp"


def state_file() -> Path:
    """What is known of the local cluster."""
    return state_folder() / "cluster.json"


def read_state() -> LocalCluster | None:
    """The cluster that ``up`` started, or None if there is none.

    Raises:
        DistDpError: The file is damaged.
    """
    path = state_file()
    try:
        values = read_json(path)
        nodes = tuple(Process(**node) for node in values.pop("nodes"))
        return LocalCluster(**values, nodes=nodes)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise DistDpError(
            f"{path} is damaged ({error}); end its 'ray start' processes by hand (ps lists them) "
            "and remove the file"
        ) from error


def start_nodes(
    nodes: int, cpus_per_node: int, port: int | None = None, jobs: bool = False
) -> LocalCluster:
    """Starts a head and ``nodes - 1`` more nodes.

    Args:
        nodes: How many.
        cpus_per_node: CPUs of each, as Ray counts them; they may be more than the machine has.
        port: Of the head; a free one by default.
        jobs: Also start Ray's job server (and with it the dashboard), on the loopback address too.

    Raises:
        ConfigError: A cluster is up already, the port is taken, the paths are too long, or a
            package for the job server is missing.
        DistDpError: A node did not start.
    """
    if jobs and not has_job_server():
        raise ConfigError(
            "--jobs: Ray's job server needs packages that are not installed; install them with: "
            "pip install 'dist-dp[cluster]'"
        )
    with _locked():
        known = read_state()
        if known is not None and known.is_up:
            raise ConfigError(
                f"a local cluster is up already at {known.address}; use it (--address "
                f"{known.address}), or end it first: dist-dp cluster down"
            )
        if known is not None:
            _forget(known)
        port = _free_port() if port is None else _checked_port(port)
        folder = Path(tempfile.mkdtemp(prefix="dist-dp-ray-"))
        if len(str(folder)) > _LONGEST_FOLDER:
            folder.rmdir()
            raise ConfigError(
                f"the folder for temporary files, '{folder.parent}', has too long a path for Ray's "
                "sockets; set TMPDIR to a shorter one"
            )
        token = state_folder() / "cluster.token"
        _write_private(token, secrets.token_hex(32))
        cluster = LocalCluster(
            address=f"{HOST}:{port}",
            jobs_address=f"http://{HOST}:{_free_port()}" if jobs else None,
            session_folder=str(folder),
            token_file=str(token),
            cpus_per_node=cpus_per_node,
            nodes=(),
            started_at=time.time(),
        )
        try:
            for index in range(nodes):
                cluster = _start_node(cluster, index, nodes)
        except BaseException:
            _stop(cluster)
            _forget(cluster)
            raise
        return cluster


def stop_nodes() -> tuple[LocalCluster, list[int]]:
    """Ends the nodes that ``start_nodes`` started, and no other process.

    Returns:
        What was there, and the positions of nodes that had to be killed.

    Raises:
        ConfigError: No cluster is up.
    """
    with _locked():
        cluster = read_state()
        if cluster is None:
            raise ConfigError("no local cluster is up; start one with: dist-dp cluster up")
        killed = _stop(cluster)
        _forget(cluster)
        return cluster, killed


def has_job_server() -> bool:
    """Whether what ``ray[default]`` brings is installed."""
    return all(importlib.util.find_spec(name) for name in ("aiohttp_cors", "opencensus"))


def node_environment(token_file: str) -> dict[str, str]:
    """What a process needs in its environment to be a node, or to join as a driver."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": token_file}


def _start_node(cluster: LocalCluster, index: int, nodes: int) -> LocalCluster:
    log = Path(cluster.session_folder) / f"node-{index}.log"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # Nodes share the machine: each gets its part of the 30 % that Ray takes for objects.
    store = max(100 << 20, int(0.3 * memory / nodes))
    head = ["--head", "--port", cluster.address.rpartition(":")[2]]
    head += ["--include-dashboard", "false" if cluster.jobs_address is None else "true"]
    head += ["--disable-usage-stats"]
    if cluster.jobs_address is not None:
        jobs_port = cluster.jobs_address.rpartition(":")[2]
        head += ["--dashboard-host", HOST, "--dashboard-port", jobs_port]
    options = head if index == 0 else ["--address", cluster.address]
    options += ["--temp-dir", cluster.session_folder, "--num-cpus", str(cluster.cpus_per_node)]
    options += ["--object-store-memory", str(store), "--dashboard-agent-listen-port", "0"]
    # Any free port: Ray's usual range would be the same for every node.
    options += ["--min-worker-port", "0", "--max-worker-port", "0"]
    # Another cluster's address and token are not this one's.
    foreign = ("RAY_ADDRESS", "RAY_AUTH_", "RAY_ENABLE_", "RAY_NAMESPACE", "RAY_START_HOOK")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    environment = {
        **inherited,
        **node_environment(cluster.token_file),
        "RAY_START_HOOK": START_HOOK,
        # A node that is told to end waits so long for what runs on it; detached actors never end.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(DRAIN_S),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *options],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=cluster.session_folder,
            start_new_session=True,
        )
    cluster = replace(cluster, nodes=(*cluster.nodes, Process.of(process.pid)))
    _write_private(state_file(), json.dumps(asdict(cluster), indent=2))
    deadline = time.monotonic() + START_TIMEOUT_S
    while _STARTED not in (text := log.read_text(errors="replace")):
        if process.poll() is not None or time.monotonic() > deadline:
            how = "ended" if process.returncode is not None else f"took over {START_TIMEOUT_S:g} s"
            last = next((line for line in reversed(text.splitlines()) if line.strip()), "")
            _stop(cluster)
            _forget(cluster)
            raise DistDpError(
                f"node {index} of the local cluster did not start ({how}): {last.strip()[:300]} "
                "See that memory and disk are left, and try with fewer nodes."
            )
        time.sleep(0.05)
    return cluster


def _stop(cluster: LocalCluster) -> list[int]:
    """Ends all nodes at once, and kills those that take too long."""
    asked = [node.terminate() for node in cluster.nodes]
    killed = []
    for index, node in enumerate(cluster.nodes):
        # What a node that died left behind has nobody to end it.
        if not node.wait(STOP_TIMEOUT_S if asked[index] else 0.0):
            node.kill()
            node.wait(5.0)
            killed.append(index)
    return killed


def _forget(cluster: LocalCluster) -> None:
    shutil.rmtree(cluster.session_folder, ignore_errors=True)
    Path(cluster.token_file).unlink(missing_ok=True)
    state_file().unlink(missing_ok=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _checked_port(port: int) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ConfigError(
                f"port {port} of {HOST} cannot be used ({error.strerror}); choose another --port, "
                "or leave it out to take a free one"
            ) from None
    return port


def _write_private(path: Path, text: str) -> None:
    """Replaces a file that only its owner may read."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "w", encoding="utf-8") as stream:
        stream.write(text)
    partial.rename(path)


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    """One ``up`` or ``down`` at a time."""
    folder = state_folder()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (folder / "cluster.lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                "another 'dist-dp cluster' command is at work; wait until it is done"
            ) from None
        yield
