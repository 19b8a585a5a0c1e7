"""Room for the ranks: what a rank reserves, and what the command does when the nodes have too little.

Ray itself waits for ever, without a word, for what no node can give. A cluster with an autoscaler is waited for, since
it adds nodes for what waits; elsewhere too few CPUs or GPUs are an error, which lists what there is.
"""

import json
import math
import sys
import time
from dataclasses import dataclass

import ray
from ray._private import ray_constants
from ray._private.state import available_resources_per_node
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.experimental.internal_kv import _internal_kv_get
from ray.util.placement_group import placement_group, remove_placement_group

from gtc_dist.config import ClusterConfig
from gtc_dist.errors import InputError

READER_CPUS = 0.25  # CPUs of a Ray Data task; small, to fit beside ranks that take nearly all of every node
SHOWN_NODES = 8  # in a message
STATUS_SECONDS = 15.0  # an autoscaler publishes its first report within seconds of its start
WAIT_SECONDS = 1.0  # between looks at the nodes while they are waited for


@dataclass(frozen=True, eq=False)
class ClusterNode:
    """A node of the Ray cluster; `resources`: name ("CPU", "GPU", ...) -> amount."""

    id: str
    name: str
    resources: dict[str, float]

    def __str__(self) -> str:
        return f"{self.name} {self.resources.get('CPU', 0):g} CPU, {self.resources.get('GPU', 0):g} GPU"


def alive_nodes() -> list[ClusterNode]:
    """The nodes of the cluster, the head first."""
    nodes = [ClusterNode(node["NodeID"], _name(node), node["Resources"]) for node in ray.nodes() if node["Alive"]]
    return sorted(nodes, key=lambda node: ("node:__internal_head__" not in node.resources, node.name, node.id))


def _name(node: dict) -> str:
    """`NAME (ADDRESS)`; Ray takes the address for the name of a node without one."""
    name, address = node["NodeName"], node["NodeManagerAddress"]
    return address if name in ("", address) else f"{name} ({address})"


def started_here() -> bool:
    """Whether this process started the cluster it is connected to, which then has one node and no other user."""
    node = ray._private.worker._global_node
    return node is not None and node.is_head()


def _sees_others() -> bool:
    """Whether others may use the cluster, and this process can ask for its state: one of Ray Client cannot."""
    return ray._private.worker._global_node is not None and not started_here()


def room_for_ranks(cluster: ClusterConfig) -> dict[str, float]:
    """Ray resources of one rank, as soon as the nodes, or those that an autoscaler adds, have room for the ranks.

    Raises:
        InputError: the cluster has too few CPUs or GPUs, and no autoscaler.
    """
    nodes = alive_nodes()
    try:
        resources = worker_resources(cluster, nodes)
    except InputError as error:
        if not _sees_others() or not has_autoscaler(nodes):
            raise
        _say(f"{error} The cluster's autoscaler may add nodes: waiting for them, until this command is stopped")
        resources = _wait_for_nodes(cluster)
        _say(f"nodes were added; the cluster has {_by_node(alive_nodes())}")
        return resources
    if _sees_others():
        _say_if_taken(cluster, nodes, resources)
    return resources


def worker_resources(cluster: ClusterConfig, nodes: list[ClusterNode]) -> dict[str, float]:
    """Ray resources of one rank. Raises InputError if the cluster cannot provide them, instead of waiting for ever.

    Ray Data needs a share of a CPU beside the ranks. On a cluster with exactly as many CPUs as ranks, each rank
    therefore reserves slightly less than one CPU, which changes Ray's bookkeeping but not how the rank runs. Elastic
    ranks, which fill all nodes, leave that share free on every node.
    """
    cpus = [node.resources.get("CPU", 0.0) for node in nodes]
    gpus = [node.resources.get("GPU", 0.0) for node in nodes]
    workers, requested = cluster.min_workers or cluster.workers, cluster.cpus_per_worker
    key = "workers" if cluster.min_workers is None else "min_workers"
    if cluster.gpu and sum(gpus) < workers:
        raise InputError(
            f"cluster.{key}={workers} with cluster.gpu=true needs {workers} GPUs; the cluster has {sum(gpus):g}: "
            f"{_by_node(nodes)}. Use fewer workers."
        )
    each = requested or 1
    if requested is None and cluster.min_workers is not None:
        each = 1 - READER_CPUS / max(min((cpu for cpu in cpus if cpu >= 1), default=1), 1)
    elif requested is None and workers <= sum(cpus) < workers + 1:
        each = max((sum(cpus) - 1) / workers, 0.1)
    slots = sum(
        min(math.floor(cpu / each), math.floor(gpu) if cluster.gpu else math.inf)
        for cpu, gpu in zip(cpus, gpus, strict=True)
    )
    enough = workers * each + READER_CPUS <= sum(cpus)
    if slots < workers or not enough:
        room = f", with room for {slots} such ranks (a rank does not span nodes)" if enough else ""
        raise InputError(
            f"cluster.{key}={workers} needs {workers * (requested or 1):g} CPUs, and {READER_CPUS:g} to read data; the "
            f"cluster has {sum(cpus):g} on {len(nodes)} nodes{room}: {_by_node(nodes)}. Use fewer workers or a smaller "
            "cluster.cpus_per_worker."
        )
    return {"CPU": each, "GPU": 1} if cluster.gpu else {"CPU": each}


def has_autoscaler(nodes: list[ClusterNode]) -> bool:
    """Whether the cluster has an autoscaler.

    Every head publishes a report of the nodes by type. Without an autoscaler each node is a type of its own,
    `node_ID`; with one, types are those of its configuration. Autoscaler 2, which KubeRay can use, publishes none.
    """
    deadline = time.monotonic() + STATUS_SECONDS
    while True:
        if is_autoscaler_v2():
            return True
        status = json.loads(_internal_kv_get(ray_constants.DEBUG_AUTOSCALING_STATUS) or "{}")
        if types := status.get("autoscaler_report", {}).get("active_nodes"):
            return not types.keys() <= {f"node_{node.id}" for node in nodes}
        if time.monotonic() > deadline:
            return False
        time.sleep(WAIT_SECONDS)


def _wait_for_nodes(cluster: ClusterConfig) -> dict[str, float]:
    """Request room for the ranks until the nodes have it; the autoscaler adds nodes for what is requested."""
    rank = {"CPU": float(cluster.cpus_per_worker or 1)} | ({"GPU": 1.0} if cluster.gpu else {})
    # ends with this process, unlike ray.autoscaler.sdk.request_resources
    requested = placement_group([rank] * (cluster.min_workers or cluster.workers) + [{"CPU": READER_CPUS}])
    try:
        while True:
            time.sleep(WAIT_SECONDS)
            try:
                return worker_resources(cluster, alive_nodes())
            except InputError:
                continue
    finally:
        remove_placement_group(requested)


def _say_if_taken(cluster: ClusterConfig, nodes: list[ClusterNode], resources: dict[str, float]) -> None:
    """Print a line if others use what the ranks need; Ray Train waits until it is free."""
    free = available_resources_per_node()
    left = [ClusterNode(node.id, node.name, free.get(node.id, {})) for node in nodes]
    fit = sum(
        min(math.floor(node.resources.get(name, 0) / need + 1e-6) for name, need in resources.items()) for node in left
    )
    workers = cluster.min_workers or cluster.workers
    if fit < workers:
        _say(f"room for {fit} of {workers} ranks is free ({_by_node(left)}); training starts when other jobs end")


def _by_node(nodes: list[ClusterNode]) -> str:
    more = f"; and {len(nodes) - SHOWN_NODES} more nodes" if len(nodes) > SHOWN_NODES else ""
    return "; ".join(str(node) for node in nodes[:SHOWN_NODES]) + more


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
