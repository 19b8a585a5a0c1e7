"""LightGCN beside this project, for tools/bench/measure.py: processor seconds of an epoch.

LightGCN (He et al. 2020) as public code of its authors and of multi-modal toolkits runs it: every step propagates all
nodes by a sparse product, ranks the batch's pairs with BPR, and applies Adam to the whole table.
"""

import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import closing

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from gtc_dist.config_file import load_config
from gtc_dist.data.catalog import Catalog
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.graph.csc import Graphs, load_graphs
from gtc_dist.training.trainer import Trainer

WIDTH, LAYERS, LR, L2 = 64, 2, 1e-3, 1e-4
NETWORK_ALONE = ["model.masked_members=0", "model.hybrid.graph_filter=0", "model.hybrid.content_profile=0"]


class LightGCN(nn.Module):
    """The model, and Adam for its table.

    Args:
        graphs: of the catalog; users are the first nodes, items the others.
    """

    def __init__(self, graphs: Graphs):
        super().__init__()
        self.users, self.items = graphs.users, graphs.items
        nodes = self.users + self.items
        user_items = graphs.nodes.indices[: graphs.nodes.indptr[self.users]].astype(np.int64) - self.users
        degree = np.diff(graphs.nodes.indptr[: self.users + 1])
        self.known = np.sort(np.repeat(np.arange(self.users), degree) * self.items + user_items)
        self.table = nn.Parameter(nn.init.xavier_uniform_(torch.empty(nodes, WIDTH)))
        csc = graphs.nodes
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
        self.adjacency = torch.sparse_csr_tensor(
            *(torch.from_numpy(np.array(each)) for each in (csc.indptr, csc.indices.astype(np.int64), csc.weight)),
            size=(nodes, nodes),
            check_invariants=False,
        )
        self.optimizer = torch.optim.Adam([self.table], lr=LR)

    def knows(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Whether each pair is an interaction of train, bool [B]."""
        pairs = users * self.items + items
        at = np.minimum(np.searchsorted(self.known, pairs), len(self.known) - 1)
        return self.known[at] == pairs

    def step(self, users: torch.Tensor, items: torch.Tensor, negatives: torch.Tensor) -> float:
        """One step on pairs and their negatives, int64 [B] each; returns the loss."""
        total = rows = self.table
        for _ in range(LAYERS):
            rows = self.adjacency @ rows
            total = total + rows
        mean = total / (LAYERS + 1)
        at = [users, items + self.users, negatives + self.users]
        user, item, negative = (mean[each] for each in at)
        loss = -F.logsigmoid((user * item).sum(1) - (user * negative).sum(1)).mean()
        loss = loss + L2 / 2 * sum(self.table[each].square().sum() for each in at) / len(users)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


def lightgcn_epoch(network: LightGCN, users: np.ndarray, items: np.ndarray, batch: int, seed: int) -> float:
    """One pass over the interactions, each with a negative that the user does not have; returns the mean loss."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(users))
    losses = []
    for first in range(0, len(order), batch):
        user, item = (each[order[first : first + batch]].astype(np.int64) for each in (users, items))
        negative = rng.integers(0, network.items, len(user))
        while (taken := network.knows(user, negative)).any():
            negative[taken] = rng.integers(0, network.items, taken.sum())
        losses.append(network.step(*(torch.from_numpy(each) for each in (user, item, negative))))
    return statistics.fmean(losses)


def measure_peer(case: dict, comm: Communicator) -> dict:
    """Processor seconds of an epoch, without validation: LightGCN, this project's network alone, and the whole default;
    in turn, `repeats` times after one that does not count."""
    epochs: dict[str, Callable[[int], object]] = {}
    with tempfile.TemporaryDirectory(prefix="gtc-benchmark-") as run:
        for name, more in (("network_alone", NETWORK_ALONE), ("default", [])):
            config = load_config(case["config"], [*case["overrides"], *more])
            catalog = Catalog(config.data.catalog)
            users, items = catalog.interactions("train")
            trainer = Trainer(config, catalog, f"{run}/{name}", users, items, load_graphs(config, catalog), comm)
            epochs[name] = lambda number, trainer=trainer: train_epoch(trainer, number)
        network = LightGCN(trainer.graphs)
        batch = config.train.batch_size
        epochs = {"lightgcn": lambda number: lightgcn_epoch(network, users, items, batch, number)} | epochs
        seconds: dict[str, list[float]] = {name: [] for name in epochs}
        for number in range(1, case["repeats"] + 2):
            for name, epoch in epochs.items():
                start = time.process_time()
                epoch(number)
                seconds[name].append(time.process_time() - start)
    medians = {name: statistics.median(each[1:]) for name, each in seconds.items()}
    result = {f"processor_seconds/{name}": value for name, value in medians.items()}
    return result | {f"of_lightgcn/{name}": value / medians["lightgcn"] for name, value in medians.items()}


def train_epoch(trainer: Trainer, number: int) -> None:
    """The steps of an epoch."""
    trainer.network.train()
    with closing(trainer.loader.epoch(number)) as batches:
        for batch in batches:
            trainer.train_step(batch)
