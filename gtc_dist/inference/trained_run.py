"""A finished run, opened for evaluation or export: by one process, or by each rank of a world."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from gtc_dist.checkpoint import checkpoint_files
from gtc_dist.config import Config
from gtc_dist.config_file import read_config
from gtc_dist.data import storage
from gtc_dist.data.catalog import Catalog
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.distributed.sharded_table import ShardedTable
from gtc_dist.errors import InputError
from gtc_dist.evaluation import ranking
from gtc_dist.evaluation.ranking import RankingOptions
from gtc_dist.graph.csc import Graphs
from gtc_dist.hybrid.scorer import HybridScorer
from gtc_dist.inference.layerwise import embed_catalog
from gtc_dist.model.build import build_network, load_features, load_graphs, ranking_options
from gtc_dist.model.gtc import GTC, Tables

CONFIG_FILE = "config.yaml"


@dataclass
class TrainedRun:
    """A run's best checkpoint with the catalog that it was trained on."""

    uri: str
    checkpoint: str  # relative to the run
    epoch: int
    config: Config
    catalog: Catalog
    graphs: Graphs
    network: GTC
    tables: Tables
    features: dict[str, ShardedTable]
    final: HybridScorer

    def embed(self) -> tuple[ShardedTable, ShardedTable]:
        """Final embeddings of users and items, row = catalog index. A collective."""
        return self.final.filled(self.blended())

    def blended(self) -> tuple[ShardedTable, ShardedTable]:
        """The same before cold items are told by their content. A collective."""
        layers, chunk = self.config.model.layers, self.config.eval.chunk
        return self.final.blended(embed_catalog(self.network, self.tables, self.features, self.graphs, layers, chunk))

    def by_user(self, split: str, users: int | None) -> dict[str, np.ndarray]:
        """Each metric of every ranked user of all ranks, name@K -> float64 [users], by user index. A collective."""
        own, comm = self.tables.user, self.tables.user.comm
        truth = ranking.load_ground_truth(self.catalog, split, own.start, own.stop)
        options = replace(self.ranking_options(users), seed=0)
        overall, _ = ranking.metrics_by_user(*self.embed(), self.graphs, truth, options)
        counts = comm.all_gather_int(len(overall["recall@20"]))
        return {
            name: comm.all_gather(torch.from_numpy(values).to(comm.device), counts).cpu().numpy()
            for name, values in overall.items()
        }

    def evaluate(self, split: str, users: int | None) -> dict:
        """Metrics of a split over about `users` of its users, None for all. A collective."""
        embeddings = self.embed()
        own = self.tables.user
        truth = ranking.load_ground_truth(self.catalog, split, own.start, own.stop)
        return ranking.evaluate(*embeddings, self.graphs, truth, self.ranking_options(users))

    def ranking_options(self, users: int | None) -> RankingOptions:
        """As the run was validated, but for the number of users."""
        return replace(ranking_options(self.config), users=users)


@dataclass(frozen=True)
class RunRef:
    """A run whose files were checked; nothing that grows with the catalog was read."""

    uri: str
    checkpoint: str  # relative to the run
    epoch: int
    config: Config


def find_run(uri: str) -> RunRef:
    """Look a run up and check that it fits its catalog.

    Raises:
        InputError: no run at `uri`, no whole checkpoint in it, or a catalog that is gone or was changed.
    """
    path = storage.join(uri, CONFIG_FILE)
    if not storage.exists(path):
        raise InputError(f"{uri} holds no run (no {CONFIG_FILE}); give run.storage/run.name of a training")
    config = read_config(storage.read_bytes(path), path)
    name = newest_checkpoint(uri)
    manifest = checkpoint_files.read_manifest(storage.join(uri, name))
    catalog = Catalog(config.data.catalog, verify=config.data.verify)
    if catalog.manifest.fingerprint != manifest["catalog"]:
        raise InputError(f"{config.data.catalog} was rebuilt after the run {uri} was trained on it; train again")
    return RunRef(uri, name, manifest["epoch"], config)


def load_run(found: RunRef, comm: Communicator | None = None, graphs: Graphs | None = None) -> TrainedRun:
    """Load a run: this rank's rows of its tables and of the features.

    Args:
        world: the ranks; None: this process alone.
        graphs: the node's copy; None: read them.
    """
    comm = comm or Communicator()
    catalog = Catalog(found.config.data.catalog)
    network, tables = build_network(found.config, catalog, comm, trainable=False)
    dense = checkpoint_files.load(
        storage.join(found.uri, found.checkpoint), checkpoint_files.weight_shards(list(tables.all()))
    )
    network.load_state_dict(dense["network"])
    features = load_features(network.shape, catalog, comm)
    graphs = graphs or load_graphs(found.config, catalog)
    final = HybridScorer.of(found.config, graphs, features, comm)
    final.load(dense)
    return TrainedRun(
        found.uri, found.checkpoint, found.epoch, found.config, catalog, graphs, network, tables, features, final
    )


def newest_checkpoint(run: str) -> str:
    """Name of a run's best checkpoint: the one that metrics.json names, or, while it trains, the newest whole one."""
    if storage.exists(storage.join(run, "metrics.json")):
        return storage.read_json(storage.join(run, "metrics.json"))["checkpoint"]
    whole, _ = checkpoint_files.list_checkpoints(run, "epoch-")
    if not whole:
        raise InputError(f"{run} has no whole checkpoint yet")
    return f"{checkpoint_files.FOLDER}/{whole[-1]}"
