"""Checks of the nodes of a cluster before the work starts: versions of packages, shared storage, shared memory.

A cheap task on each node reports what it finds, and this process compares it with what it finds itself. A rank that
starts on a node that joined later checks its versions again.
"""

import os
import platform
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import gtc_dist
from gtc_dist.data import storage
from gtc_dist.errors import InputError
from gtc_dist.preflight.room import ClusterNode, alive_nodes, started_here

PACKAGES = ("ray", "torch", "numpy")
READ_SECONDS = 15.0  # for a node to read a file; an object store out of reach would be retried for longer
SAY_SECONDS, ANSWER_SECONDS = 15.0, 60.0  # for a node to answer: until a line says so, and in all
SHOWN_PROBLEMS = 3  # problems in a message, and nodes of a problem
HEAD_BYTES = 64  # of a file that are compared: the id of a run lock, the fingerprint of a catalog
SHARED_MEMORY = "/dev/shm"


def installed_versions() -> dict[str, str]:
    """Versions of Python, this package and those it computes with, without an import of them. A build's own suffix
    (2.13.0+cpu) is left out."""
    found = {"python": platform.python_version(), "gtc_dist": gtc_dist.__version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def check_nodes(files: dict[str, str]) -> None:
    """Check every node that can run tasks, unless this process started the cluster, which then is this machine. A node
    whose shared memory is too small gets a warning on stderr.

    Args:
        files: files that exist, by what they belong to ("run.storage": URI). Every node must find them, with the same
            first HEAD_BYTES.

    Raises:
        InputError: a node has other versions, does not see a file, or does not answer. Names the nodes.
    """
    if started_here():
        return
    nodes = [node for node in alive_nodes() if node.resources.get("CPU") or node.resources.get("GPU")]
    here, reports, problems = report_node(files), {}, defaultdict(list)
    tasks = {node: _task_on(node).remote(files) for node in nodes}
    deadline, said = time.monotonic() + ANSWER_SECONDS, False
    for node, task in tasks.items():
        try:
            while node not in reports:
                wait = SAY_SECONDS if not said else max(deadline - time.monotonic(), 0)
                try:
                    reports[node] = ray.get(task, timeout=wait)
                except GetTimeoutError:
                    if said:
                        raise
                    said = True
                    print(f"waiting for node {node.name} to start a task", file=sys.stderr, flush=True)
        except GetTimeoutError:
            problems[f"did not start a task within {ANSWER_SECONDS:g} s; look at it with `ray list nodes`"].append(node)
        except RayError as error:
            if node.id in {other.id for other in alive_nodes()}:  # a node may leave meanwhile
                problems[f"cannot run a task of this package: {_last_line(error)}"].append(node)
    for node, report in reports.items():
        for problem in _differences(here, report, files):
            problems[problem].append(node)
        _warn_of_shared_memory(node, report["shared_memory"])
    if problems:
        shown = [f"{_names(nodes)} {problem}" for problem, nodes in problems.items()]
        more = f"; and {len(shown) - SHOWN_PROBLEMS} more problems" if len(shown) > SHOWN_PROBLEMS else ""
        raise InputError("; ".join(shown[:SHOWN_PROBLEMS]) + more)


def check_versions(expected: dict[str, str]) -> None:
    """Check this process's own versions. Raises InputError, which names the node."""
    if other := _other_versions(expected, installed_versions()):
        raise InputError(f"node {ray.util.get_node_ip_address()} {other}")


def report_node(files: dict[str, str]) -> dict:
    """Versions, the first bytes of `files` and the size of the shared memory, as this process finds them."""
    pool = ThreadPoolExecutor(max(len(files), 1))
    reads = {key: pool.submit(_read_head, uri) for key, uri in files.items()}
    contents, problems = {}, {}
    for key, read in reads.items():
        try:
            contents[key] = read.result(READ_SECONDS)
        except TimeoutError:
            problems[key] = f"no answer within {READ_SECONDS:g} s"
        except Exception as error:
            problems[key] = _last_line(error)
    pool.shutdown(wait=False)
    try:
        found = os.statvfs(SHARED_MEMORY)
        size = found.f_blocks * found.f_frsize
    except OSError:
        size = 0
    return {"versions": installed_versions(), "contents": contents, "problems": problems, "shared_memory": size}


def _read_head(uri: str) -> bytes:
    with storage.open_input(uri, buffered=False) as file:
        return file.read(HEAD_BYTES)


def _task_on(node: ClusterNode):
    on = NodeAffinitySchedulingStrategy(node.id, soft=False)
    return ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=on)(report_node)


def _differences(here: dict, there: dict, files: dict[str, str]) -> list[str]:
    """What a node lacks, each as the end of a sentence that starts with the node."""
    found = [other] if (other := _other_versions(here["versions"], there["versions"])) else []
    shared = "on several nodes it must be in object storage or in a folder that all nodes share"
    for key, uri in files.items():
        if key in there["problems"]:
            found.append(f"cannot see {key}, {uri} ({there['problems'][key]}); {shared}")
        elif there["contents"][key] != here["contents"].get(key):
            found.append(f"has another file in the place of {key}, {uri}; {shared}")
    return found


def _other_versions(expected: dict[str, str], found: dict[str, str]) -> str:
    other = [f"{name} {found[name]} where this command has {expected[name]}" for name in expected]
    other = [text for text, name in zip(other, expected, strict=True) if found[name] != expected[name]]
    return f"has {', '.join(other)}; use the same image or packages on all nodes" if other else ""


def _warn_of_shared_memory(node: ClusterNode, size: int) -> None:
    store = node.resources.get("object_store_memory", 0)
    if size < store:
        print(
            f"warning: node {node.name} has {size / 2**20:,.0f} MiB of {SHARED_MEMORY}, so Ray keeps its object store "
            f"of {store / 2**20:,.0f} MiB on disk, which is slow, and NCCL may fail; give the node more (docker "
            f"--shm-size; Kubernetes: a volume with `medium: Memory` at {SHARED_MEMORY})",
            file=sys.stderr,
            flush=True,
        )


def _names(nodes: list[ClusterNode]) -> str:
    shown = ", ".join(node.name for node in nodes[:SHOWN_PROBLEMS])
    more = f" and {len(nodes) - SHOWN_PROBLEMS} more" if len(nodes) > SHOWN_PROBLEMS else ""
    return f"node{'s' if len(nodes) > 1 else ''} {shown}{more}"


def _last_line(error: BaseException) -> str:
    return str(error).strip().rpartition("\n")[2] or type(error).__name__
