"""Nodes of a `LocalCluster` that differ from its head: other mounts, other packages, an autoscaler's."""

import subprocess
import sys

from local_cluster import LocalCluster
from seaweed import find_program, free_ports

PORTS = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "runtime-env-agent-port", "metrics-export-port")


def can_mount() -> bool:
    """Whether this user may make a mount namespace."""
    return subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode == 0


def add_strange_node(cluster: LocalCluster, name: str, setup: str = "true", **env: str) -> subprocess.Popen:
    """Start a node in a mount namespace of its own.

    Args:
        setup: shell command there before the node starts, such as a mount.
        env: variables of the node.
    """
    ports = [f"--{kind}={port}" for kind, port in zip(PORTS, free_ports(len(PORTS)), strict=True)]
    words = [find_program("ray"), "start", "--block", f"--address={cluster.head}", f"--node-name={name}"]
    words += [f"--num-cpus={cluster.cpus}", f"--object-store-memory={cluster.object_store_mb << 20}", *ports]
    words += [f"--temp-dir={cluster.folder / name}", "--min-worker-port=0", "--max-worker-port=0"]
    with open(cluster.folder / f"{name}.log", "wb") as log:
        process = subprocess.Popen(
            ["unshare", "--mount", "sh", "-ec", f'{setup}; exec "$@"', "sh", *words],
            env=cluster.env | env,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    cluster.processes.append(process)
    cluster.nodes += 1
    return process


def run_python(cluster: LocalCluster, code: str, **env: str) -> subprocess.CompletedProcess:
    """Run Python code as a command that joins the cluster."""
    env = cluster.env | {"RAY_ADDRESS": cluster.head} | env
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=200)
