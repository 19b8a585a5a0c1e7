"""Join or start a Ray cluster, the same way in every command.

With `RAY_ADDRESS` set (`ray job submit` sets it) a command joins that cluster; otherwise it starts a local one.
"""

import logging
import os

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing leaves the machine; read when ray is imported
os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # joins similar lines of ranks, with colours

import ray

from gtc_dist.launch import worker_output
from gtc_dist.preflight import ray_start

MIN_OBJECT_STORE = 512 << 20
MAX_OBJECT_STORE = 2 << 30


def connect(num_cpus_needed: int = 1, dashboard: bool = False, shared_bytes: int = 0) -> None:
    """Connect this process to a Ray cluster, unless it is connected already.

    Args:
        num_cpus_needed: least number of logical CPUs of a local cluster, even on a machine with fewer cores. An
            existing cluster keeps its own number.
        dashboard: start Ray's dashboard with a local cluster; Ray Train asks it for the state of its actors.
        shared_bytes: size of what the command will share; added to a local cluster's object store.

    Raises:
        InputError, Unreachable: Ray cannot start, or the cluster of RAY_ADDRESS cannot be joined.
    """
    # This logger reports at every start that token authentication is on; docs/cluster.md, Tokens, explains it.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    if not ray.is_initialized():
        if address := ray_start.check_start(dashboard):
            with ray_start.one_line_errors(f"the connection to the Ray cluster {address}"):
                ray.init(logging_level=logging.WARNING)
        else:
            with ray_start.one_line_errors("a local Ray cluster"):
                ray.init(
                    address="local",
                    num_cpus=max(cores(), num_cpus_needed),
                    object_store_memory=object_store_bytes() + shared_bytes,
                    include_dashboard=dashboard,
                    logging_level=logging.WARNING,
                    runtime_env={"worker_process_setup_hook": name_own_cluster},
                )
        worker_output.print_plainly()
    quiet()


def node_resources() -> list[dict[str, float]]:
    """Resources ("CPU", "GPU", ...) of each node of the cluster."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def cores() -> int:
    """Number of cores that this process may use: its affinity and, in a container, the control group's quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota, period = file.read().split()
        return allowed if quota == "max" else max(1, min(allowed, int(quota) // int(period)))
    except (OSError, ValueError):
        return allowed


def name_own_cluster() -> None:
    """Set RAY_ADDRESS in every worker of a local cluster, so that Ray's own helpers do not connect to another cluster
    of the machine."""
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address


def quiet() -> None:
    """Turn off Ray Data's progress bars and execution plans: commands print their own progress."""
    import ray.data  # slow; every worker imports this module for `name_own_cluster`

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    # warns that a job "may hang forever" whenever a busy machine keeps a task waiting for ten seconds
    logging.getLogger("ray.data._internal.execution.resource_manager").setLevel(logging.ERROR)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # warns about the missing bars


def object_store_bytes() -> int:
    """Object store size of a local cluster: an eighth of the free memory, within bounds. prepare and train need no
    more: both read the data block by block."""
    page = os.sysconf("SC_PAGE_SIZE")
    free = os.sysconf("SC_AVPHYS_PAGES") * page
    return int(min(max(free // 8, MIN_OBJECT_STORE), MAX_OBJECT_STORE))
