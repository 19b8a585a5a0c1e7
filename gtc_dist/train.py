"""Command: a catalog to a trained run, on one machine or a cluster.

    python -m gtc_dist.train --config configs/X.yaml [a.b=c ...]
    ray job submit --working-dir . -- python -m gtc_dist.train --config configs/X.yaml [a.b=c ...]

Joins the cluster of RAY_ADDRESS or of the job that it runs in, else starts a local one. The run folder
run.storage/run.name gets the resolved config.yaml, metrics.jsonl, metrics.json, checkpoints/ and tensorboard/.
"""

import argparse
import logging
import os

os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # else every line of a rank is printed twice

import numpy as np
import yaml

from gtc_dist.cluster import connect
from gtc_dist.config import Config, parse_command_line
from gtc_dist.data import storage
from gtc_dist.data.catalog import Catalog
from gtc_dist.engine.build import load_graphs, network_shape
from gtc_dist.engine.restore import CONFIG
from gtc_dist.errors import InputError, run_command


def main(argv: list[str] | None = None) -> None:
    config, _ = parse_command_line(argparse.ArgumentParser(description="Train GTC on a catalog."), argv)
    config = with_absolute_uris(config)
    run = storage.join(config.run.storage, config.run.name)
    catalog = Catalog(config.data.catalog, verify=config.data.verify)
    check(config, catalog, run)
    connect(config.cluster.workers + 1, dashboard=True)
    resources = worker_resources(config)
    storage.write_bytes(storage.join(run, CONFIG), yaml.safe_dump(config.model_dump(), sort_keys=False).encode())
    result = fit(config, catalog, run, resources)
    print(summary(run, result))


def with_absolute_uris(config: Config) -> Config:
    """Local paths made absolute: workers and later commands run in other folders."""
    data = config.data.model_copy(
        update={"raw": storage.absolute(config.data.raw), "catalog": storage.absolute(config.data.catalog)}
    )
    run = config.run.model_copy(update={"storage": storage.absolute(config.run.storage)})
    return config.model_copy(update={"data": data, "run": run})


def check(config: Config, catalog: Catalog, run: str) -> None:
    """What can be refused before anything starts."""
    network_shape(config, catalog)
    if not catalog.manifest.modalities:
        raise InputError(f"the catalog {catalog.uri} has no modality; GTC needs at least one (data.features)")
    for split, rows in catalog.manifest.interactions.items():
        if rows == 0:
            raise InputError(f"the {split} split of the catalog {catalog.uri} is empty")
    if storage.listing(run):
        raise InputError(f"the run folder {run} is not empty; choose another run.name, or remove it")


def worker_resources(config: Config) -> dict[str, float]:
    """Resources of a rank. Raises InputError, instead of hanging, where the cluster cannot give them.

    Ray Data needs a CPU of its own beside the ranks. On a cluster with just as many CPUs as ranks each rank asks for a
    little less than one, which changes how Ray counts and not how the rank runs.
    """
    import ray

    total = ray.cluster_resources()
    workers, cpus, gpus = config.cluster.workers, int(total.get("CPU", 0)), int(total.get("GPU", 0))
    if config.cluster.gpu and gpus < workers:
        raise InputError(
            f"cluster.workers={workers} with cluster.gpu=true needs {workers} GPUs; the cluster has {gpus}"
        )
    asked = config.cluster.cpus_per_worker
    if workers * (asked or 1) > cpus:
        raise InputError(
            f"cluster.workers={workers} needs {workers * (asked or 1):g} CPUs; the cluster has {cpus}. "
            "Use fewer workers, or set cluster.cpus_per_worker below 1"
        )
    each = asked or (1 if workers + 1 <= cpus else max((cpus - 1) / workers, 0.1))
    return {"CPU": each, "GPU": 1} if config.cluster.gpu else {"CPU": each}


def fit(config: Config, catalog: Catalog, run: str, resources: dict[str, float]) -> dict:
    """Run the ranks to the end and return what metrics.json holds."""
    import ray
    from ray.train import DataConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    filesystem, _ = storage.arrow_filesystem(catalog.uri)
    uris = catalog.interaction_uris("train")
    paths = [storage.filesystem(uri)[1] for uri in uris]
    arrow_storage, run_path = storage.arrow_filesystem(run)
    trainer = TorchTrainer(
        train_rank,
        train_loop_config={
            "config": config,
            "run": run,
            # one copy of the graphs a node: in Ray's object store, wrapped without a copy by every rank
            "graphs": ray.put(load_graphs(config, catalog)),
        },
        # a quarter CPU a task: they also fit where the ranks take nearly all of every node
        datasets={"train": ray.data.read_parquet(paths, filesystem=filesystem, ray_remote_args={"num_cpus": 0.25})},
        # equal=False: every interaction reaches a rank
        dataset_config=DataConfig(datasets_to_split=["train"]),
        torch_config=TorchConfig(backend="nccl" if config.cluster.gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=config.cluster.workers, use_gpu=config.cluster.gpu, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name="ray",
            storage_path=run_path,
            storage_filesystem=arrow_storage,
            logging_config=LoggingConfig(log_level="WARNING"),  # else every reported metric is printed
        ),
    )
    trainer.fit()
    return storage.read_json(storage.join(run, "metrics.json"))


def summary(run: str, result: dict) -> str:
    """What metrics.json holds, for a person."""
    shown = ("recall@5", "recall@10", "recall@20", "ndcg@5", "ndcg@20")
    lines = [f"run {run}: best epoch {result['best_epoch']} of {result['last_epoch']}, {result['seconds']:.0f} s"]
    rows = {"valid": result["valid"]["overall"], "test": result["test"]["overall"], "popularity": result["popularity"]}
    lines += [
        f"{name:>10}  " + "  ".join(f"{metric} {values[metric]:.4f}" for metric in shown)
        for name, values in rows.items()
    ]
    return "\n".join(lines)


def train_rank(settings: dict) -> None:
    """What every rank runs (a Ray Train worker)."""
    import ray
    import torch
    from ray import train

    from gtc_dist.engine.loop import Trainer
    from gtc_dist.model.collectives import World

    logging.disable(logging.INFO)  # Ray would print every reported metric
    config: Config = settings["config"]
    context = train.get_context()
    # each rank leaves a core to its prefetch thread: one thread too many costs more than one too few
    cores = (os.cpu_count() or 1) // context.get_local_world_size()
    torch.set_num_threads(config.cluster.threads or max(1, cores - 1))
    device = train.torch.get_device() if config.cluster.gpu else torch.device("cpu")
    world = World(context.get_world_rank(), context.get_world_size()).split(device)
    users, items = read_shard(train.get_dataset_shard("train"))
    catalog = Catalog(config.data.catalog)
    graphs = ray.get(settings["graphs"])
    Trainer(config, catalog, settings["run"], users, items, graphs, world, train.report).fit()


def read_shard(shard) -> tuple[np.ndarray, np.ndarray]:
    """This rank's interactions, in one pass: 8 bytes each."""
    columns: dict[str, list[np.ndarray]] = {"user": [], "item": []}
    for batch in shard.iter_batches(batch_size=1 << 16, batch_format="numpy", prefetch_batches=1):
        for name, parts in columns.items():
            parts.append(batch[name].astype(np.int32))
    empty = [np.empty(0, np.int32)]
    return np.concatenate(columns["user"] or empty), np.concatenate(columns["item"] or empty)


if __name__ == "__main__":
    run_command(main)
