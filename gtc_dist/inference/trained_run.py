"""A trained run, loaded for evaluation or export: by one process, or by each rank of a communicator."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from gtc_dist.checkpoint import checkpoint_files
from gtc_dist.checkpoint.existing_run import RunRef
from gtc_dist.config import Config
from gtc_dist.data import storage
from gtc_dist.data.catalog import CSC, Catalog
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.distributed.sharded_table import ShardedTable
from gtc_dist.evaluation import ranking
from gtc_dist.evaluation.item_groups import HEAD_ITEMS, valid_head
from gtc_dist.evaluation.ranking import RankingOptions
from gtc_dist.graph.csc import Graphs, load_graphs
from gtc_dist.hybrid.embeddings import Embeddings
from gtc_dist.hybrid.scorer import HybridScorer
from gtc_dist.inference.layerwise import embed_catalog
from gtc_dist.inference.masked_content import masked_content
from gtc_dist.inference.masked_embeddings import embed_masked
from gtc_dist.model.build import build_network, load_features
from gtc_dist.model.gtc import GTC, Tables


@dataclass
class TrainedRun:
    """A run's best checkpoint, with the catalog that it was trained on. Methods are collectives unless marked Local."""

    uri: str
    checkpoint: str  # relative to the run
    epoch: int
    config: Config
    catalog: Catalog
    graphs: Graphs
    network: GTC
    tables: Tables
    features: dict[str, ShardedTable]
    scorer: HybridScorer

    def final_embeddings(self) -> Embeddings:
        """Final embeddings of users and items; the row is the catalog index."""
        return self.scorer.impute_cold(self.fused_embeddings())

    def fused_embeddings(self) -> Embeddings:
        """Fused embeddings, before cold items are predicted."""
        models, chunk = (self.network, self.tables), self.config.eval.block_rows
        content = masked_content(self.network.masked, self.features, self.graphs, chunk)
        network = embed_catalog(*models, self.features, self.graphs, chunk)
        return self.scorer.fuse(network, embed_masked(*models, content, self.graphs, chunk))

    def metrics_by_user(
        self, split: str, users: int | None, head_items: int = HEAD_ITEMS
    ) -> dict[str, dict[str, np.ndarray]]:
        """Metrics of each ranked user of all ranks, in the order of user indexes.

        Args:
            head_items: number of the most frequent items of valid, which runs that are compared must share.

        Returns:
            {"overall": {name@K: float64 [users]}, "head_free": {name@K: float64 [users with a positive outside the
            head]}}
        """
        comm = self.tables.user.comm
        options = replace(self.ranking_options(users), seed=0)
        groups = {"overall": None, "head_free": ~self.valid_head(head_items)}
        truth, gathered = self._ground_truth(split), {}
        by_group = ranking.metrics_by_user(*self.final_embeddings(), self.graphs, truth, options, groups)
        for group, metrics in by_group.items():
            counts = comm.all_gather_int(len(metrics["recall@20"]))
            gathered[group] = {
                name: comm.all_gather(torch.from_numpy(values).to(comm.device), counts).cpu().numpy()
                for name, values in metrics.items()
            }
        return gathered

    def evaluate(self, split: str, users: int | None, head_items: int = HEAD_ITEMS) -> dict:
        """Metrics of a split over about `users` of its users; None: all."""
        truth, options, head = self._ground_truth(split), self.ranking_options(users), self.valid_head(head_items)
        return ranking.evaluate_split(*self.final_embeddings(), self.graphs, truth, options, head)

    def valid_head(self, head_items: int = HEAD_ITEMS) -> np.ndarray:
        """Mask bool [items] of the most frequent items of the valid split."""
        return valid_head(self._ground_truth("valid"), self.graphs.items, head_items, self.tables.user.comm)

    def ranking_options(self, users: int | None) -> RankingOptions:
        """Local. Options of the run's validation, with another number of users."""
        return replace(RankingOptions.of(self.config), users=users)

    def _ground_truth(self, split: str) -> CSC:
        """Local. A split's items of this rank's users."""
        return ranking.load_ground_truth(self.catalog, split, self.tables.user.start, self.tables.user.stop)


def load_run(run_ref: RunRef, comm: Communicator | None = None, graphs: Graphs | None = None) -> TrainedRun:
    """Load a run: this rank's rows of its tables and features. Collective: every rank must call it.

    Args:
        comm: the ranks; None: this process alone.
        graphs: the node's shared copy; None: read from the catalog.
    """
    comm = comm or Communicator()
    catalog = Catalog(run_ref.config.data.catalog)
    network, tables = build_network(run_ref.config, catalog, comm, trainable=False)
    dense = checkpoint_files.load(
        storage.join(run_ref.uri, run_ref.checkpoint), checkpoint_files.weight_shards(list(tables.all()))
    )
    network.load(dense["network"])
    features = load_features(network.modalities, catalog, comm)
    graphs = graphs or load_graphs(run_ref.config, catalog)
    scorer = HybridScorer.build(run_ref.config, graphs, features, comm)
    scorer.load(dense)
    return TrainedRun(
        run_ref.uri,
        run_ref.checkpoint,
        run_ref.epoch,
        run_ref.config,
        catalog,
        graphs,
        network,
        tables,
        features,
        scorer,
    )
