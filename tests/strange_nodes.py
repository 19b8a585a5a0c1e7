"""Nodes of a `LocalCluster` that differ from its head: other mounts, other packages, an autoscaler's."""

import subprocess
import sys

import yaml
from local_cluster import LocalCluster
from ray.autoscaler._private.monitor import BASE_READONLY_CONFIG
from ray.util import get_node_ip_address
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


class AutoscalingCluster(LocalCluster):
    """A head with an autoscaler that adds up to `more` nodes of `cpus` CPUs when something waits for room.

    Ray's own `ray.cluster_utils.AutoscalingCluster` starts the same, but first ends every Ray of the machine.
    """

    def __init__(self, more: int, cpus: int, **options):
        super().__init__(nodes=1, cpus=cpus, **options)
        self.more = more

    def _environment(self) -> dict[str, str]:
        return super()._environment() | {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}

    def _ray_start(self, name: str, *flags: str) -> subprocess.Popen:
        (port,) = (flag.partition("=")[2] for flag in flags if flag.startswith("--port="))
        provider = {"type": "fake_multinode", "gcs_address": f"{get_node_ip_address()}:{port}"}
        provider |= {"use_node_id_as_ip": True, "disable_launch_config_check": True, "disable_node_updaters": True}
        workers = {"resources": {"CPU": self.cpus, "object_store_memory": self.object_store_mb << 20}}
        workers |= {"node_config": {}, "min_workers": 0, "max_workers": self.more}
        head = {"resources": {"CPU": self.cpus}, "node_config": {}, "max_workers": 0}
        types = {"ray.head.default": head, "late": workers}
        config = BASE_READONLY_CONFIG | {"provider": provider, "available_node_types": types, "max_workers": self.more}
        config |= {"idle_timeout_minutes": 60}
        path = self.folder / "autoscaler.yaml"
        path.write_text(yaml.safe_dump(config))
        return super()._ray_start(name, f"--autoscaling-config={path}", *flags)
