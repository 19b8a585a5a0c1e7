"""Replay of one dumped step, with the weights it met: loss terms, gradient norms, and names that are not finite.

Historical embeddings (control_variate.py) are not in the file; they are computed from the newest training state.
"""

import io
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from gtc_dist.checkpoint.existing_run import with_catalog
from gtc_dist.checkpoint.run_folder import CONFIG_FILE
from gtc_dist.config import Config
from gtc_dist.config_file import read_run_config
from gtc_dist.data import storage
from gtc_dist.data.catalog import Catalog
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.distributed.device_transfer import to_device
from gtc_dist.errors import InputError
from gtc_dist.graph.csc import load_graphs
from gtc_dist.model.batch import DrawnPairs
from gtc_dist.training.gradient_guard import NETWORK, ROW_NAMES, Rows, non_finite_names
from gtc_dist.training.trainer import Trainer

# what files of version 0.2.0 lack
NO_MASKED_USERS = {"masked_users": np.empty(0, np.int64), "masked_counts": np.empty(0, np.int64), "mask_seed": 0}


@dataclass(frozen=True)
class DumpedStep:
    """Content of a file that `gradient_guard.dump_step` wrote."""

    drawn: DrawnPairs
    all_pairs: np.ndarray  # of all ranks, int64 [n, 2]
    ranks: int
    negative_weight: torch.Tensor | None  # as in `Batch`
    rows: dict[str, torch.Tensor]  # table -> rows of the batch
    network: dict[str, torch.Tensor]  # its state_dict


def replay_step(uri: str) -> dict:
    """Loss terms, gradient norms and non-finite names of a dumped step.

    Raises:
        InputError: no such file, no run around it, or a run of another network.
    """
    run, _, _ = uri.rpartition("/")
    dumped = read_dumped_step(uri)
    path = storage.join(run or ".", CONFIG_FILE)
    if not storage.exists(path):
        raise InputError(f"{uri} is in no run folder (there is no {path}); replay it where the run wrote it")
    config = with_catalog(read_run_config(storage.read_bytes(path), path), run)
    config = for_one_rank(config, dumped.ranks)
    catalog = Catalog(config.data.catalog, verify="size")
    pairs = catalog.interactions(*config.train_splits)
    trainer = Trainer(config, catalog, run, *pairs, load_graphs(config, catalog), Communicator())
    found = trainer.resume()
    set_network(trainer, dumped, uri)
    batch = trainer.loader.assemble(dumped.drawn, dumped.all_pairs)
    batch = to_device(replace(batch, negative_weight=dumped.negative_weight), trainer.comm.device)
    rows = trainer.look_up(batch)
    set_rows(rows, dumped, uri)
    terms = trainer.forward_backward(batch, rows)
    gradients = {f"{table.name} table": table.pending[0][1] for table in trainer.tables.all() if table.pending}
    gradients |= {name: p.grad for name, p in trainer.network.named_parameters() if p.grad is not None}
    return {
        "pairs": len(dumped.drawn.users),
        "newest_checkpoint": f"after {found.steps} steps" if found else None,
        "loss": {name: float(value) for name, value in terms.items()},
        "not_finite": non_finite_names(terms, trainer.network, trainer.tables.all()),
        "gradient_norms": {name: float(gradient.norm()) for name, gradient in gradients.items()},
    }


def for_one_rank(config: Config, ranks: int) -> Config:
    """The configuration with which one process builds a step as one of several ranks did."""
    nodes = config.model.layer_nodes
    model = config.model.model_copy(update={"layer_nodes": None if nodes is None else -(-nodes // ranks)})
    train = config.train.model_copy(update={"tc_rows": -(-config.train.tc_rows // ranks)})  # 0: all
    return config.model_copy(update={"model": model, "train": train})


def set_network(trainer: Trainer, dumped: DumpedStep, uri: str) -> None:
    """Put the dense weights of the step into the network. Raises InputError if it is another network."""
    current = {name: tensor.shape for name, tensor in trainer.network.state_dict().items()}
    if current != {name: tensor.shape for name, tensor in dumped.network.items()}:
        raise InputError(f"{uri} was written by a training with another network than its run folder has now")
    trainer.network.load(dumped.network)
    trainer.use_content()


def set_rows(rows: Rows, dumped: DumpedStep, uri: str) -> None:
    """Put the rows of the step into the looked-up ones. Raises InputError if there are other ones."""
    saved = tuple(dumped.rows.values())
    if [row.shape for row in rows] != [row.shape for row in saved]:
        raise InputError(f"{uri} was written by a training with another catalog than its run folder has now")
    for row, value in zip(rows, saved, strict=True):
        row.data.copy_(value)  # bypasses autograd: gradients still go to the tables


def read_dumped_step(uri: str) -> DumpedStep:
    """Raises InputError unless `uri` is such a file."""
    if not storage.exists(uri):
        raise InputError(f"{uri} does not exist")
    content = storage.read_bytes(uri)
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            absent = {name: value for name, value in NO_MASKED_USERS.items() if name not in file.files}
            arrays = absent | {f.name: file[f.name] for f in fields(DrawnPairs) if f.name not in absent}
            all_pairs = file["all_pairs"]
            weight = torch.from_numpy(file["negative_weight"]) if "negative_weight" in file.files else None
            rows = {name: torch.from_numpy(file[f"{name}_rows"]) for name in ROW_NAMES if f"{name}_rows" in file}
            state = {n.removeprefix(NETWORK): torch.from_numpy(file[n]) for n in file.files if n.startswith(NETWORK)}
    except (ValueError, KeyError, OSError, TypeError) as error:
        raise InputError(f"{uri} is not a step that a run wrote: {error}") from error
    ranks = len(arrays["counts"])
    arrays |= {name: int(arrays[name]) for name in ("permutation_seed", "sampler_seed", "mask_seed")}
    own = {"counts": [len(arrays["users"])], "masked_counts": [len(arrays["masked_users"])]}
    drawn = DrawnPairs(**arrays | own)
    return DumpedStep(drawn, all_pairs, ranks, weight, rows, state)
