"""The commands of ``dist-dp cluster``: several Ray nodes on this machine, for trying things out."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from dist_dp.cluster.readable_errors import readable_errors

cluster_app = typer.Typer(help="Start and stop several Ray nodes on this machine.")


@cluster_app.command("up")
@readable_errors
def up(
    nodes: Annotated[int, typer.Option(min=1, max=64, help="Ray nodes, the head included.")] = 2,
    cpus_per_node: Annotated[
        int | None, typer.Option(min=1, help="CPUs of each, as Ray counts; by default its share.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=1024, max=65535, help="Of the head; by default a free one.")
    ] = None,
    jobs: Annotated[
        bool, typer.Option("--jobs", help="Also start the server of 'ray job submit'.")
    ] = False,
) -> None:
    """Start nodes that stay up until ``dist-dp cluster down``."""
    from dist_dp.cluster.local_nodes import start_nodes

    cpus = cpus_per_node or max(1, (os.cpu_count() or 1) // nodes)
    cluster = start_nodes(nodes, cpus, port, jobs)
    submit = (
        f"RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={cluster.token_file} ray job submit "
        f"--address {cluster.jobs_address} -- dist-dp train --address auto …"
    )
    print(
        f"{nodes} node(s) of {cpus} CPU(s) at {cluster.address}, on this machine alone\n"
        f"train on it:  dist-dp train --address {cluster.address} …  (or --address auto)\n"
        + (f"submit a job: {submit}\n" if cluster.jobs_address else "")
        + f"its token:    {cluster.token_file}  (dist-dp finds it there)\n"
        "end it:       dist-dp cluster down"
    )


@cluster_app.command("status")
@readable_errors
def status() -> None:
    """Show the nodes that ``up`` started; exit status 1 if one of them has ended."""
    from datetime import datetime

    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from dist_dp.cluster.local_nodes import read_state
    from dist_dp.errors import ConfigError, DistDpError

    cluster = read_state()
    if cluster is None:
        raise ConfigError("no local cluster is up; start one with: dist-dp cluster up")
    console = Console()
    table = Table(box=SIMPLE_HEAD)
    for column in ("node", "role", "CPUs", "process", "state"):
        table.add_column(column, justify="right" if column in ("node", "CPUs") else "left")
    for index, node in enumerate(cluster.nodes):
        table.add_row(
            str(index),
            "worker" if index else "head",
            str(cluster.cpus_per_node),
            str(node.pid),
            "up" if node.is_alive else "ended",
        )
    since = datetime.fromtimestamp(cluster.started_at).strftime("%Y-%m-%d %H:%M:%S")
    console.print(
        f"{cluster.address}, since {since}, logs in {cluster.session_folder}", soft_wrap=True
    )
    console.print(table)
    ended = [str(i) for i, node in enumerate(cluster.nodes) if not node.is_alive]
    if ended:
        raise DistDpError(
            f"node {', '.join(ended)} of the local cluster has ended; start anew: dist-dp cluster "
            "down, then up"
        )


@cluster_app.command("down")
@readable_errors
def down() -> None:
    """Stop the nodes that ``up`` started, and no other process."""
    from dist_dp.cluster.local_nodes import stop_nodes

    cluster, killed = stop_nodes()
    text = f"{len(cluster.nodes)} node(s) at {cluster.address} stopped"
    if killed:
        text += f"; node {', '.join(map(str, killed))} had to be killed"
    print(text)
