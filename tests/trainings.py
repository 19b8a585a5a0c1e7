"""Trainings of small catalogs without Ray, in this process or on plain ranks, and look-ups in their run folders."""

import time
from pathlib import Path

import numpy as np
import yaml

from gtc_dist import train
from gtc_dist.checkpoint import checkpoint_files
from gtc_dist.config_file import load_config
from gtc_dist.data import formats, storage
from gtc_dist.data.catalog import Catalog
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.graph.csc import load_graphs
from gtc_dist.training.trainer import Trainer

EPOCHS = 5
LONG_OVERRIDES = [f"train.epochs={EPOCHS}", "train.batch_size=32", "train.checkpoint_minutes=0", "train.log_every=5"]
LONG_OVERRIDES += ["model.propagation=sampled", "model.fanout=[3,3]", "train.refresh=4"]


def trainer_of(comm: Communicator, config, run: str, **options) -> Trainer:
    """Trainer of this rank; the ranks take turns in the catalog's interactions.

    Args:
        options: further arguments of `Trainer`.
    """
    catalog = Catalog(config.data.catalog)
    users, items = catalog.interactions("train")
    own = slice(comm.rank, None, comm.size)
    return Trainer(config, catalog, run, users[own], items[own], load_graphs(config, catalog), comm, **options)


def interrupt_after(trainer: Trainer, steps: int) -> None:
    """Make `fit` raise KeyboardInterrupt after so many steps, with every state that was begun on disk."""
    step, done = trainer.train_step, []

    def interrupted(batch):
        if trainer.writer.pending is not None:
            trainer.writer.pending.thread.join()
        if len(done) == steps:
            raise KeyboardInterrupt
        done.append(1)
        return step(batch)

    trainer.train_step = interrupted


def fit(comm: Communicator, run: str, config) -> dict:
    """Train to the end; returns the validated epochs, the interactions of each rank and the test metrics."""
    reported = []
    trainer = trainer_of(comm, config, run, report=reported.append)
    result = trainer.fit()
    return {
        "epochs": [r["epoch"] for r in reported],
        "rows": trainer.loader.interactions_per_rank,
        "test": result["test"],
    }


def train_without_ray(file: str, *overrides: str, comm: Communicator | None = None) -> str:
    """Train a configuration in this process or on the ranks of `comm`; returns the run folder."""
    config = train.with_absolute_uris(load_config(file, list(overrides)))
    run = storage.join(config.run.storage, config.run.name)
    storage.write_bytes(f"{run}/config.yaml", yaml.safe_dump(config.model_dump()).encode())
    trainer_of(comm or Communicator(), config, run).fit()
    return run


def train_on(comm: Communicator, file: str, overrides: list[str]) -> None:
    """`train_without_ray` as a function for `run_ranks`."""
    train_without_ray(file, *overrides, comm=comm)


def run_result(run: Path | str) -> dict:
    """Content of metrics.json without the times."""
    found = storage.read_json(f"{run}/metrics.json")
    return {name: value for name, value in found.items() if not name.startswith("seconds")}


def wait_for_states(run: Path | str, count: int, limit: float = 120) -> None:
    """Wait until `count` training states have been completed."""
    seen: set[str] = set()
    deadline = time.monotonic() + limit
    while len(seen) < count:
        assert time.monotonic() < deadline, f"{run} has {sorted(seen)}"
        seen |= set(checkpoint_files.list_checkpoints(str(run), "step-")[0])
        time.sleep(0.02)


def read_export(folder: str, kind: str) -> tuple[list, np.ndarray]:
    """Ids and embeddings of an export, kind "users" or "items"."""
    ids, vectors = [], []
    for name in sorted(storage.listing(storage.join(folder, kind))):
        table = formats.read_table(storage.join(folder, kind, name))
        ids += table["id"].to_pylist()
        vectors.append(table["embedding"].combine_chunks().flatten().to_numpy().reshape(table.num_rows, -1))
    return ids, np.concatenate(vectors)
