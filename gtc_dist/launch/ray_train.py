"""Ray's part of a training: what each rank may use, the trainer, and what a rank does first."""

import ctypes
import logging
import math
import os
import signal
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # else every line of a rank is printed twice

import numpy as np
import ray
import ray.data
import torch
from ray import train
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from gtc_dist.checkpoint.run_folder import METRICS_FILE
from gtc_dist.config import ClusterConfig, Config
from gtc_dist.data import storage
from gtc_dist.data.catalog import Catalog
from gtc_dist.data.ray_tasks import EveryRow, read_rows
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.errors import InputError, NotFinite
from gtc_dist.graph.csc import Graphs
from gtc_dist.inference.trained_run import CONFIG_FILE
from gtc_dist.launch.ray_cluster import cores
from gtc_dist.launch.watchdog import Watchdog, watch_rank
from gtc_dist.training.trainer import Trainer

RAY_FOLDER = "ray"  # Ray Train's own folder in a run
STOP_FILE = "stop"  # stands in a run folder where its training is asked to leave
FAILURE_FILE = "failed.json"  # what a rank met that another try would meet again
READER_CPUS = 0.25  # of a Ray Data task: it also fits where the ranks take nearly all of every node
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
KEPT_BYTES = 2**30  # blocks of up to this size, and free memory of up to this size, stay with a rank

FATAL = {error.__name__: error for error in (InputError, NotFinite)}


def worker_resources(cluster: ClusterConfig) -> dict[str, float]:
    """Resources of a rank. Raises InputError, instead of hanging, where the cluster cannot give them.

    Ray Data needs a share of a CPU beside the ranks. On a cluster with just as many CPUs as ranks each rank asks for a
    little less than one, which changes how Ray counts and not how the rank runs. Elastic ranks, which fill whatever
    there is, leave that share on every node.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus = [node.get("CPU", 0.0) for node in nodes]
    gpus = [node.get("GPU", 0.0) for node in nodes]
    workers, asked = cluster.min_workers or cluster.workers, cluster.cpus_per_worker
    key = "workers" if cluster.min_workers is None else "min_workers"
    if cluster.gpu and sum(gpus) < workers:
        raise InputError(
            f"cluster.{key}={workers} with cluster.gpu=true needs {workers} GPUs; the cluster has {sum(gpus):g}"
        )
    each = asked or 1
    if asked is None and cluster.min_workers is not None:
        each = 1 - READER_CPUS / max(min((cpu for cpu in cpus if cpu >= 1), default=1), 1)
    elif asked is None and workers <= sum(cpus) < workers + 1:
        each = max((sum(cpus) - 1) / workers, 0.1)
    slots = sum(
        min(math.floor(cpu / each), math.floor(gpu) if cluster.gpu else math.inf)
        for cpu, gpu in zip(cpus, gpus, strict=True)
    )
    if slots < workers or workers * each + READER_CPUS > sum(cpus):
        raise InputError(
            f"cluster.{key}={workers} needs {workers * (asked or 1):g} CPUs, and {READER_CPUS:g} to read data; the "
            f"cluster has {sum(cpus):g} on {len(nodes)} nodes. Use fewer workers or a smaller cluster.cpus_per_worker"
        )
    return {"CPU": each, "GPU": 1} if cluster.gpu else {"CPU": each}


def share_graphs(graphs: Graphs) -> ray.ObjectRef:
    """One copy of the graphs a node, in Ray's object store; ranks wrap its arrays without a copy."""
    return ray.put(graphs)


def train_on_ray(
    config: Config, catalog: Catalog, graphs: ray.ObjectRef, run: str, resources: dict[str, float]
) -> dict | None:
    """Train on the ranks to the end and return what metrics.json holds, or None where SIGTERM asked to leave before.

    After a rank was lost, or its node, all of them start again from the last checkpoint, `cluster.retries` times for
    other reasons than that the cluster took the node back.
    """
    files = [{"uri": uri} for uri in catalog.interaction_uris("train")]
    rows = ray.data.from_items(files, override_num_blocks=len(files))
    rows = rows.map_batches(read_rows, batch_size=1, batch_format="pyarrow", num_cpus=READER_CPUS)
    settings = {"config": config, "run": run, "graphs": graphs}
    datasets = {"datasets": {"train": rows}, "dataset_config": EveryRow()}
    for name in (RAY_FOLDER, STOP_FILE, FAILURE_FILE):  # of a process that is gone
        storage.remove_tree(storage.join(run, name))
    with stop_file_on_sigterm(run):
        _trainer(
            train_rank, settings, config.cluster, run, RAY_FOLDER, resources, config.cluster.retries, **datasets
        ).fit()
    failed, metrics = storage.join(run, FAILURE_FILE), storage.join(run, METRICS_FILE)
    if storage.exists(failed):
        problem = storage.read_json(failed)
        storage.remove_tree(failed)
        raise FATAL[problem["kind"]](problem["message"])
    return storage.read_json(metrics) if storage.exists(metrics) else None


@contextmanager
def stop_file_on_sigterm(run: str) -> Iterator[None]:
    """Turn SIGTERM into a note in the run folder, which the ranks look for; a second one ends the process."""
    stop = storage.join(run, STOP_FILE)

    def ask(number, frame) -> None:
        signal.signal(signal.SIGTERM, before)
        print("asked to leave: saving the state of training", flush=True)
        storage.write_bytes(stop, b"")

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        storage.remove_tree(stop)


def run_on_ranks(
    work: Callable[[Communicator, Graphs], dict],
    cluster: ClusterConfig,
    graphs: ray.ObjectRef,
    run: str,
    resources: dict[str, float],
) -> dict:
    """Run `work` on every rank of a world and return what it returned on rank 0, a JSON value.

    It comes back through the run's storage, since Ray Train keeps metrics with checkpoints alone.
    """
    name = f"ray-{uuid.uuid4().hex[:8]}"
    result = storage.join(run, name, "result.json")
    try:
        settings = {"work": work, "cluster": cluster, "graphs": graphs, "result": result}
        _trainer(work_rank, settings, cluster, run, name, resources).fit()
        return storage.read_json(result)
    finally:
        storage.remove_tree(storage.join(run, name))


def _trainer(
    function, settings: dict, cluster: ClusterConfig, run: str, name: str, resources: dict, retries: int = 0, **datasets
):
    filesystem, path = storage.arrow_filesystem(run)
    seconds = 60 * cluster.wait_minutes
    stalls = ray.remote(num_cpus=0)(Watchdog).remote(seconds) if cluster.workers > 1 else None
    backend = "nccl" if cluster.gpu else "gloo"
    workers = (cluster.min_workers, cluster.workers) if cluster.min_workers else cluster.workers
    return TorchTrainer(
        function,
        train_loop_config={**settings, "stalls": stalls},
        torch_config=TorchConfig(backend=backend, timeout_s=math.ceil(2 * seconds) + 60),  # `stalls` is first to speak
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=cluster.gpu, resources_per_worker=resources),
        run_config=RunConfig(
            name=name,
            storage_path=path,
            storage_filesystem=filesystem,
            logging_config=LoggingConfig(log_level="WARNING"),
            failure_config=FailureConfig(max_failures=retries, max_preemption_failures=-1 if retries else 0),
        ),
        **datasets,
    )


def train_rank(settings: dict) -> None:
    """What every rank of a training runs (a Ray Train worker)."""
    config: Config = settings["config"]
    if not storage.exists(storage.join(settings["run"], CONFIG_FILE)):
        raise InputError(
            f"{settings['run']} cannot be seen from node {ray.util.get_node_ip_address()}; "
            "on several nodes run.storage must be shared or object storage"
        )
    run, comm = settings["run"], _world(config.cluster)
    users, items = read_shard(train.get_dataset_shard("train"))
    graphs = ray.get(settings["graphs"])
    if storage.exists(storage.join(run, FAILURE_FILE)):
        return  # trying again would not help
    try:
        with watch_rank(comm, settings["stalls"], 60 * config.cluster.wait_minutes):
            catalog, notice = Catalog(config.data.catalog), StopRequest(run, comm)
            Trainer(config, catalog, run, users, items, graphs, comm, train.report, notice).fit()
    except tuple(FATAL.values()) as error:
        kind = next(name for name, one in FATAL.items() if isinstance(error, one))
        storage.write_json(storage.join(run, FAILURE_FILE), {"kind": kind, "message": str(error)})
        raise


class StopRequest:
    """Whether a training is to leave (someone ended the command) or to save now (the cluster takes a node back, and
    will start the ranks again elsewhere). Called by all ranks at once."""

    def __init__(self, run: str, comm: Communicator):
        self.stop, self.comm, self.preempted = storage.join(run, STOP_FILE), comm, False

    def __call__(self) -> str:
        told = 0
        with suppress(OSError, InputError):  # no object store for the moment is no reason to stop
            told = int(self.comm.rank == 0 and storage.exists(self.stop))
        if self.comm.all_reduce_max(told):
            return "leave"
        before, self.preempted = self.preempted, train.get_preemption_info() is not None
        return "save" if self.preempted and not before else ""


def work_rank(settings: dict) -> None:
    """What every rank of `run_on_ranks` runs."""
    cluster: ClusterConfig = settings["cluster"]
    comm = _world(cluster)
    with watch_rank(comm, settings["stalls"], 60 * cluster.wait_minutes):
        result = settings["work"](comm, ray.get(settings["graphs"]))
    if comm.rank == 0:
        storage.write_json(settings["result"], result)


def _world(cluster: ClusterConfig) -> Communicator:
    """This Ray Train worker among its peers, with its threads set."""
    logging.disable(logging.INFO)  # Ray would print every reported metric
    context = train.get_context()
    # each rank leaves a core to its prefetch thread: one thread too many costs more than one too few
    torch.set_num_threads(cluster.threads or max(1, cores() // context.get_local_world_size() - 1))
    _keep_memory()
    device = train.torch.get_device() if cluster.gpu else torch.device("cpu")
    return Communicator(context.get_world_rank(), context.get_world_size()).split(device)


def _keep_memory() -> None:
    """Tell glibc to keep freed blocks of any size for the next step: it gives large ones back to the system, which then
    has to clear every page again, a fifth of a step on a CPU. Elsewhere nothing happens."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            mallopt(option, KEPT_BYTES)


def read_shard(shard) -> tuple[np.ndarray, np.ndarray]:
    """This rank's interactions, in one pass: 8 bytes each."""
    columns: dict[str, list[np.ndarray]] = {"user": [], "item": []}
    for batch in shard.iter_batches(batch_size=1 << 16, batch_format="numpy", prefetch_batches=1):
        for name, parts in columns.items():
            parts.append(batch[name].astype(np.int32))
    empty = [np.empty(0, np.int32)]
    return np.concatenate(columns["user"] or empty), np.concatenate(columns["item"] or empty)
