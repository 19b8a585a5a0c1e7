"""One step computed again, with the weights that met it: what is not finite, and how large everything is.

The rows of a history (`history.py`) come from the newest checkpoint before the step, as they are not in the file.
"""

import io
from dataclasses import dataclass, replace

import numpy as np
import torch

from gtc_dist.config import Config
from gtc_dist.config_file import read_config
from gtc_dist.data import storage
from gtc_dist.data.catalog import Catalog
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.errors import InputError
from gtc_dist.inference.trained_run import CONFIG_FILE
from gtc_dist.model.build import load_graphs
from gtc_dist.training.data_loader import SampledBatch
from gtc_dist.training.gradient_guard import FIELDS, NETWORK, Rows, non_finite_names
from gtc_dist.training.trainer import Trainer


@dataclass(frozen=True)
class DumpedStep:
    """What `health.batch_file` wrote."""

    draws: SampledBatch
    pairs: np.ndarray  # of all ranks, int64 [n, 2]
    ranks: int
    negative_weight: torch.Tensor | None  # as in `Batch`
    rows: dict[str, torch.Tensor]  # "user", "item" -> of the batch
    network: dict[str, torch.Tensor]  # its state


def replay_step(uri: str) -> dict:
    """Loss parts, norms of the gradients and what is not finite, of the step in a file that a run left.

    Raises:
        InputError: no such file, no run around it, or a run of another network.
    """
    run, _, _ = uri.rpartition("/")
    left = read_dumped_step(uri)
    path = storage.join(run or ".", CONFIG_FILE)
    if not storage.exists(path):
        raise InputError(f"{uri} is in no run folder (there is no {path}); replay it from where it was written")
    config = of_one_rank(read_config(storage.read_bytes(path), path), left.ranks)
    catalog = Catalog(config.data.catalog, verify="size")
    trainer = Trainer(
        config, catalog, run, *catalog.interactions("train"), load_graphs(config, catalog), Communicator()
    )
    found = trainer.state.resume()
    batch = replace(trainer.loader.assemble(left.draws, left.pairs), negative_weight=left.negative_weight)
    rows = trainer.rows(batch)
    restore(trainer, rows, left, uri)
    parts = trainer.gradients(batch, rows)
    norms = {f"{table.name} table": table.pending[0][1] for table in trainer.tables.all() if table.pending}
    norms |= {name: p.grad for name, p in trainer.network.named_parameters() if p.grad is not None}
    return {
        "pairs": len(left.draws.users),
        "newest_checkpoint": f"after {found.steps} steps" if found else None,
        "loss": {name: float(value) for name, value in parts.items()},
        "not_finite": non_finite_names(parts, trainer.network, trainer.tables.all()),
        "gradient_norms": {name: float(gradient.norm()) for name, gradient in norms.items()},
    }


def of_one_rank(config: Config, ranks: int) -> Config:
    """The configuration with which one process plans a step as one of several ranks did."""
    model = config.model
    nodes = None if model.layer_nodes is None else -(-model.layer_nodes // ranks)
    correlation = model.correlation.model_copy(update={"rows": -(-model.correlation.rows // ranks)})  # 0: all
    return config.model_copy(
        update={"model": model.model_copy(update={"layer_nodes": nodes, "correlation": correlation})}
    )


def restore(trainer: Trainer, rows: Rows, left: DumpedStep, uri: str) -> None:
    """Put the weights of the step into the network, and its rows into those that were looked up."""
    saved = tuple(left.rows.values())
    fits = [r.shape for r in rows] == [r.shape for r in saved]
    now = {name: tensor.shape for name, tensor in trainer.network.state_dict().items()}
    if not fits or now != {name: tensor.shape for name, tensor in left.network.items()}:
        raise InputError(f"{uri} was written by a training of another network or catalog than its run folder has now")
    trainer.network.load_state_dict(left.network)
    for row, value in zip(rows, saved, strict=True):
        row.data.copy_(value)  # behind autograd's back: gradients go to the tables all the same


def read_dumped_step(uri: str) -> DumpedStep:
    """Raises InputError where it is not such a file."""
    if not storage.exists(uri):
        raise InputError(f"{uri} does not exist")
    content = storage.read_bytes(uri)
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            names = ("users", "positives", "negatives", "pairs", "ranks", "seeds", *FIELDS)
            arrays = {name: file[name] for name in names}
            weight = torch.from_numpy(file["negative_weight"]) if "negative_weight" in file.files else None
            rows = {name: torch.from_numpy(file[f"{name}_rows"]) for name in ("user", "item")}
            state = {n.removeprefix(NETWORK): torch.from_numpy(file[n]) for n in file.files if n.startswith(NETWORK)}
    except (ValueError, KeyError, OSError, TypeError) as error:
        raise InputError(f"{uri} is not a batch that a run left behind: {error}") from error
    permutation, sampler = (int(seed) for seed in arrays.pop("seeds"))
    pairs, ranks = arrays.pop("pairs"), int(arrays.pop("ranks"))
    draws = SampledBatch(**arrays, seed=permutation, sampler_seed=sampler, counts=[len(arrays["users"])])
    return DumpedStep(draws, pairs, ranks, weight, rows, state)
