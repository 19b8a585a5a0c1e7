"""Post-processing of the network's embeddings: score fusion, then predicted embeddings for cold-start items.

Its results are ranked and exported.
"""

from dataclasses import dataclass

import torch

from gtc_dist.config import Config
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.distributed.sharded_table import ShardedTable
from gtc_dist.graph.csc import Graphs
from gtc_dist.hybrid.cold_start import ColdStart, ObjectiveByAdjustment
from gtc_dist.hybrid.content_profile import content_profile_scores
from gtc_dist.hybrid.embeddings import Embeddings, SpecialColumns
from gtc_dist.hybrid.graph_filter import CooccurrenceOperator, graph_filter_scores
from gtc_dist.hybrid.score_fusion import MEMBERS, ScoreFusion, Shortlister
from gtc_dist.hybrid.warm_neighbours import WarmNeighbours


@dataclass
class HybridScorer:
    """Score fusion and cold start with their tuned weights, together the hybrid weights.

    Methods are collectives unless marked Local.

    fusion: None where the network is the only scorer.
    cold_start: None without an item-item graph and without content features.
    """

    fusion: ScoreFusion | None
    cold_start: ColdStart | None

    @staticmethod
    def build(config: Config, graphs: Graphs, features: dict[str, ShardedTable], comm: Communicator) -> "HybridScorer":
        """The untrained scorers of a configuration, with initial weights.

        Args:
            features: modality -> table of the items' features, over `comm`.
        """
        chunk = config.eval.block_rows
        neighbours = None if graphs.item_item is None else WarmNeighbours(graphs, comm, chunk)
        fusion = build_score_fusion(config, graphs, features, comm, neighbours)
        allowed_loss = config.eval.cold_loss
        return HybridScorer(fusion, ColdStart.build(graphs, features, comm, chunk, neighbours, allowed_loss))

    @property
    def has_untrained(self) -> bool:
        """Local. Whether there are scores before training."""
        return self.fusion is not None and len(self.fusion.scorers) > 0

    def tune_untrained(self, shortlist_by: Shortlister) -> None:
        """Fit the weights of the untrained scorers, before training."""
        if self.fusion is not None:
            self.fusion.tune_untrained(shortlist_by)

    def tune_fusion(self, network: Embeddings, masked: Embeddings | None, shortlist_by: Shortlister) -> Embeddings:
        """Fit the weights of the fusion; returns the fused embeddings.

        Args:
            masked: of the masked diffusion, if there is one; so in the other methods.
        """
        return network if self.fusion is None else self.fusion.tune(network, shortlist_by, masked)

    def tune_cold_start(self, fused: Embeddings, shortlist_by: Shortlister, objective: ObjectiveByAdjustment) -> None:
        """Fit the weights of the cold-start predictions and tune how many cold items are listed."""
        if self.cold_start is not None:
            self.cold_start.tune(fused, self.special_columns(fused[1].width), shortlist_by, objective)

    @torch.no_grad()
    def __call__(self, network: Embeddings, masked: Embeddings | None = None) -> Embeddings:
        """Final embeddings, from those of the trained models."""
        return self.impute_cold(self.fuse(network, masked))

    def fuse(self, network: Embeddings, masked: Embeddings | None = None) -> Embeddings:
        """Fused embeddings, before cold items are predicted."""
        return network if self.fusion is None else self.fusion.fuse(network, masked)

    def impute_cold(self, fused: Embeddings) -> Embeddings:
        """Final embeddings: fused ones with predicted rows for cold items."""
        if self.cold_start is None:
            return fused
        return self.cold_start.impute(fused, self.special_columns(fused[1].width))

    def special_columns(self, width: int) -> SpecialColumns:
        """Local. Of fused and final embeddings of this width."""
        return SpecialColumns() if self.fusion is None else self.fusion.special_columns(width)

    def column_groups(self, width: int, network: int) -> dict[str, slice]:
        """Local. Columns of each part of fused and final embeddings; see `ScoreFusion.column_groups`."""
        return {MEMBERS: slice(0, width)} if self.fusion is None else self.fusion.column_groups(width, network)

    def state(self) -> dict[str, dict[str, float]]:
        """Local. The hybrid weights, under the names that checkpoints use."""
        parts = {"blend": self.fusion, "cold": self.cold_start}
        return {name: dict(part.weights) for name, part in parts.items() if part}

    def load(self, saved: dict) -> None:
        """Local. Set the hybrid weights from a checkpoint that contains `state()` among other entries."""
        if self.fusion is not None:
            self.fusion.weights = self.fusion.unfitted_weights() | saved["blend"]
        if self.cold_start is not None:
            self.cold_start.load(saved["cold"])


def build_score_fusion(
    config: Config,
    graphs: Graphs,
    features: dict[str, ShardedTable],
    comm: Communicator,
    neighbours: WarmNeighbours | None,
) -> ScoreFusion | None:
    """Score fusion of the configured scorers; None where the network is the only one. Collective: every rank must call
    it.

    Args:
        features: modality -> table of the items' features, over `comm`.
        neighbours: impute cold items; None without an item-item graph.
    """
    model, hybrid = config.model, config.model.hybrid
    if not model.has_hybrid:
        return ScoreFusion({}, [], neighbours, graphs, comm, has_masked=True) if model.masked_members else None
    operator = CooccurrenceOperator(graphs, comm, config.eval.block_rows)
    scorers = {}
    if hybrid.graph_filter:
        scorers["spectral"] = graph_filter_scores(operator, hybrid.graph_filter, config.train.seed)
    for name, table in features.items() if hybrid.content_profile else ():
        scorers[name] = content_profile_scores(operator, table, hybrid.content_profile)
    profiles = list(features) if hybrid.content_profile else []
    return ScoreFusion(scorers, profiles, neighbours, graphs, comm, operator, model.masked_members > 0)
