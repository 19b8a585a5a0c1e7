"""Training on Ray: resources of the ranks, the Ray Train trainer, and the function that each rank runs."""

import logging
import math
import os
import posixpath
import signal
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # otherwise every line of a rank is printed twice
# Ray Train looks at the ranks every 2 seconds by default, and each phase of a start and of an end waits for that.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")

import numpy as np
import ray
import ray.data
import torch
from ray import train
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gtc_dist.checkpoint.run_folder import CONFIG_FILE, FAILURE_FILE, METRICS_FILE, RAY_FOLDER, STOP_FILE
from gtc_dist.config import ClusterConfig, Config
from gtc_dist.data import storage
from gtc_dist.data.catalog import Catalog
from gtc_dist.data.ray_tasks import EveryRow, read_rows
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.errors import InputError, NotFinite
from gtc_dist.final_fit.final_trainer import FinalTrainer
from gtc_dist.graph.csc import Graphs
from gtc_dist.launch.rank_memory import keep_memory
from gtc_dist.launch.ray_cluster import cores
from gtc_dist.launch.ray_metrics import RunGauges
from gtc_dist.launch.watchdog import Watchdog, watch_rank
from gtc_dist.preflight import node_checks
from gtc_dist.preflight.room import READER_CPUS
from gtc_dist.training.trainer import Trainer

FATAL = {error.__name__: error for error in (InputError, NotFinite)}  # a retry would only repeat them


def share_graphs(graphs: Graphs) -> ray.ObjectRef:
    """Put the graphs into Ray's object store: one copy per node, which the ranks map without copying."""
    return ray.put(graphs)


def train_on_ray(
    config: Config, catalog: Catalog, graphs: ray.ObjectRef, run: str, resources: dict[str, float]
) -> dict | None:
    """Train on the ranks; returns the content of metrics.json, or None if SIGTERM stopped the training early. If Ctrl-C
    did, KeyboardInterrupt is raised after the state was saved.

    After a rank or its node is lost, all ranks restart from the last checkpoint: at most `cluster.retries` times,
    preempted nodes not counted.
    """
    files = [{"uri": uri} for uri in catalog.interaction_uris(*config.train_splits)]
    rows = ray.data.from_items(files, override_num_blocks=len(files))
    rows = rows.map_batches(read_rows, batch_size=1, batch_format="pyarrow", num_cpus=READER_CPUS)
    rows.set_name(f"train {config.run.name}")
    settings = {"config": config, "run": run, "graphs": graphs}
    datasets = {"datasets": {"train": rows}, "dataset_config": EveryRow()}
    for name in (RAY_FOLDER, STOP_FILE, FAILURE_FILE):  # left by an earlier command
        storage.remove_tree(storage.join(run, name))
    with stop_file_on_signals(run) as received:
        _ray_trainer(
            train_rank, settings, config.cluster, run, RAY_FOLDER, resources, config.cluster.retries, **datasets
        ).fit()
    failed, metrics = storage.join(run, FAILURE_FILE), storage.join(run, METRICS_FILE)
    if storage.exists(failed):
        problem = storage.read_json(failed)
        storage.remove_tree(failed)
        raise FATAL[problem["kind"]](problem["message"])
    if storage.exists(metrics):
        return storage.read_json(metrics)
    if signal.SIGINT in received:
        raise KeyboardInterrupt
    return None


@contextmanager
def stop_file_on_signals(run: str) -> Iterator[list[int]]:
    """Turn SIGTERM and Ctrl-C into a stop file in the run folder, which the ranks poll; yields the signals received.
    The second of a kind does what it did before."""
    stop, received = storage.join(run, STOP_FILE), []

    def request_stop(number, frame) -> None:
        signal.signal(number, before[number])
        received.append(number)
        name = signal.Signals(number).name
        print(f"{name} received: saving the training state before exit (a second one ends at once)", flush=True)
        storage.write_bytes(stop, b"")

    before = {number: signal.signal(number, request_stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        storage.remove_tree(stop)


def run_on_ranks(
    work: Callable[[Communicator, Graphs], dict],
    cluster: ClusterConfig,
    graphs: ray.ObjectRef,
    run: str,
    resources: dict[str, float],
) -> dict:
    """Run `work` on every rank; returns rank 0's result, a JSON value.

    The result comes back through the run's storage, since Ray Train keeps metrics only with checkpoints.
    """
    name = f"{RAY_FOLDER}-{uuid.uuid4().hex[:8]}"
    result = storage.join(run, name, "result.json")
    try:
        settings = {"work": work, "cluster": cluster, "graphs": graphs, "result": result}
        _ray_trainer(work_rank, settings, cluster, run, name, resources).fit()
        return storage.read_json(result)
    finally:
        storage.remove_tree(storage.join(run, name))


class _SignalsLeftAlone(TorchTrainer):
    """Ray Train's trainer, which would end all ranks at Ctrl-C."""

    def _register_sigint_handler(self, controller) -> None:
        pass


def _ray_trainer(
    function, settings: dict, cluster: ClusterConfig, run: str, name: str, resources: dict, retries: int = 0, **datasets
):
    filesystem, path = storage.arrow_filesystem(storage.join(run, name))
    seconds = 60 * cluster.wait_minutes
    # on the node of this command, without which no rank runs either: the loss of another node must not end it
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(num_cpus=0, scheduling_strategy=here)(Watchdog)
    watchdog = actor.remote(seconds) if cluster.workers > 1 else None
    backend = "nccl" if cluster.gpu else "gloo"
    workers = (cluster.min_workers, cluster.workers) if cluster.min_workers else cluster.workers
    return _SignalsLeftAlone(
        function,
        train_loop_config={**settings, "watchdog": watchdog, "versions": node_checks.installed_versions()},
        # longer than the watchdog's limit: the watchdog names the rank that hangs, a time-out does not
        torch_config=TorchConfig(backend=backend, timeout_s=math.ceil(2 * seconds) + 60),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=cluster.gpu, resources_per_worker=resources),
        run_config=RunConfig(
            name=posixpath.basename(run),  # Ray's dashboards and metrics show it
            storage_path=path,
            storage_filesystem=filesystem,
            logging_config=LoggingConfig(log_level="WARNING"),
            failure_config=FailureConfig(max_failures=retries, max_preemption_failures=-1 if retries else 0),
        ),
        **datasets,
    )


def train_rank(settings: dict) -> None:
    """Entry point of every rank of a training (a Ray Train worker)."""
    config: Config = settings["config"]
    _begin_rank(settings)
    if not storage.exists(storage.join(settings["run"], CONFIG_FILE)):
        raise InputError(
            f"node {ray.util.get_node_ip_address()} cannot see {settings['run']}; "
            "on several nodes run.storage must be a shared file system or object storage"
        )
    run, comm = settings["run"], _make_communicator(config.cluster)
    if comm.rank == 0:
        print(f"ranks started: {comm.size}; reading the catalog", flush=True)
    users, items = read_shard(train.get_dataset_shard("train"))
    graphs = ray.get(settings["graphs"])
    if storage.exists(storage.join(run, FAILURE_FILE)):
        return  # a retry would only repeat the failure
    try:
        with watch_rank(comm, settings["watchdog"], 60 * config.cluster.wait_minutes):
            catalog, poll, gauges = Catalog(config.data.catalog), RequestPoll(run, comm), RunGauges(config.run.name)

            def report(metrics: dict) -> None:
                if comm.rank == 0:
                    gauges.set(metrics)
                train.report(metrics)

            kind = Trainer if config.train.final_fit is None else FinalTrainer
            kind(config, catalog, run, users, items, graphs, comm, report, poll, gauges.set).fit()
    except tuple(FATAL.values()) as error:
        kind = next(name for name, fatal in FATAL.items() if isinstance(error, fatal))
        storage.write_json(storage.join(run, FAILURE_FILE), {"kind": kind, "message": str(error)})
        raise


class RequestPoll:
    """Polls for requests to the training; a call returns the same answer on every rank.

    - "leave": save the training state and stop; SIGTERM was received and the stop file is in the run folder.
    - "save": save the training state now; a node is about to be preempted, and Ray will restart the ranks elsewhere.
    - "": no request.

    Calls are collectives: every rank must make them.
    """

    def __init__(self, run: str, comm: Communicator):
        self.stop_file, self.comm, self.preempted = storage.join(run, STOP_FILE), comm, False

    def __call__(self) -> str:
        stop = 0
        with suppress(OSError, InputError):  # an unreachable object store is no reason to stop
            stop = int(self.comm.rank == 0 and storage.exists(self.stop_file))
        if self.comm.all_reduce_max(stop):
            return "leave"
        before, self.preempted = self.preempted, train.get_preemption_info() is not None
        return "save" if self.preempted and not before else ""


def work_rank(settings: dict) -> None:
    """Entry point of every rank of `run_on_ranks`."""
    cluster: ClusterConfig = settings["cluster"]
    _begin_rank(settings)
    comm = _make_communicator(cluster)
    with watch_rank(comm, settings["watchdog"], 60 * cluster.wait_minutes):
        result = settings["work"](comm, ray.get(settings["graphs"]))
    if comm.rank == 0:
        storage.write_json(settings["result"], result)


def _begin_rank(settings: dict) -> None:
    """Silence what libraries log on a rank, and check its node, which may have joined after `check_nodes`."""
    logging.disable(logging.INFO)  # Ray prints every reported metric, botocore where its credentials come from
    node_checks.check_versions(settings["versions"])


def _make_communicator(cluster: ClusterConfig) -> Communicator:
    """Communicator of this Ray Train worker; also sets its torch threads and its allocator."""
    context = train.get_context()
    # one core per rank is left to its prefetch thread: a thread too many costs more than one too few
    torch.set_num_threads(cluster.threads or max(1, cores() // context.get_local_world_size() - 1))
    keep_memory()
    device = train.torch.get_device() if cluster.gpu else torch.device("cpu")
    return Communicator(context.get_world_rank(), context.get_world_size()).new_group(device)


def read_shard(shard) -> tuple[np.ndarray, np.ndarray]:
    """Read this rank's interactions in one pass: users and items, int32 [n] each."""
    columns: dict[str, list[np.ndarray]] = {"user": [], "item": []}
    for batch in shard.iter_batches(batch_size=1 << 16, batch_format="numpy", prefetch_batches=1):
        for name, parts in columns.items():
            parts.append(batch[name].astype(np.int32))
    empty = [np.empty(0, np.int32)]
    return np.concatenate(columns["user"] or empty), np.concatenate(columns["item"] or empty)
