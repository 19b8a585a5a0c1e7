"""From what the network embeds to what is ranked and exported: parts blended, cold items told by their content."""

from dataclasses import dataclass
from functools import partial

import torch

from gtc_dist.config import Config
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.distributed.sharded_table import ShardedTable
from gtc_dist.graph.csc import Graphs
from gtc_dist.hybrid.cold_start import CONTENT_WEIGHT, ColdStart, Objective, WarmNeighbours
from gtc_dist.hybrid.coordinate_search import Embeddings
from gtc_dist.hybrid.score_fusion import ScoreFusion
from gtc_dist.model.build import build_blend

OLD = "cold"  # among a blend's weights: of cold items' profiles, in runs of before these had weights of their own


@dataclass
class HybridScorer:
    """What comes after the network, and the weights that are chosen for it on the valid split.

    blend: None: there are no untrained parts. cold: None: nothing is known of an item but its interactions.
    """

    blend: ScoreFusion | None
    cold: ColdStart | None

    @staticmethod
    def of(config: Config, graphs: Graphs, features: dict[str, ShardedTable], comm: Communicator) -> "HybridScorer":
        """A collective.

        Args:
            features: of the modalities, over `comm`.
        """
        chunk = config.eval.chunk
        neighbours = None if graphs.item_item is None else WarmNeighbours(graphs, comm, chunk)
        blend = build_blend(config, graphs, features, comm, neighbours)
        return HybridScorer(blend, ColdStart.of(graphs, features, comm, chunk, neighbours, config.eval.cold_loss))

    def start(self, worth: Objective) -> None:
        """What is chosen before training. A collective."""
        if self.blend is not None:
            self.blend.choose(partial(worth, counted=None))

    def choose_blend(self, embeddings: Embeddings, worth: Objective) -> Embeddings:
        """Choose the weights of the parts anew, from the last ones on; returns what they make of embeddings, before
        `filled`. A collective.

        Args:
            embeddings: of users and items, as the network has them.
        """
        if self.blend is not None:
            self.blend.choose_members(embeddings, partial(worth, counted=None))
        return self.blended(embeddings)

    def choose_cold(self, blended: Embeddings, worth: Objective) -> None:
        """Choose what cold items get anew, from the last choice on. A collective."""
        if self.cold is not None:
            self.cold.choose(blended, self.profiles(blended[1].width), worth)

    def filled(self, blended: Embeddings) -> Embeddings:
        """The final embeddings, of blended ones. A collective."""
        return blended if self.cold is None else self.cold.filled(blended, self.profiles(blended[1].width))

    @torch.no_grad()
    def __call__(self, embeddings: Embeddings) -> Embeddings:
        """The final embeddings of what the network has. A collective."""
        return self.filled(self.blended(embeddings))

    def blended(self, embeddings: Embeddings) -> Embeddings:
        """What the parts make of what the network has. A collective."""
        return embeddings if self.blend is None else self.blend.joined(embeddings)

    def profiles(self, width: int) -> dict[str, slice]:
        """Columns of final embeddings of this width that hold the items' own content profiles, by modality."""
        return {} if self.blend is None else self.blend.profile_columns(width)

    def state(self) -> dict[str, dict[str, float]]:
        """All weights, by part."""
        return {name: dict(part.weights) for name, part in (("blend", self.blend), ("cold", self.cold)) if part}

    def load(self, saved: dict) -> None:
        """Take up the weights that `state` gave, which stand among other things in a checkpoint."""
        if self.blend is not None:
            self.blend.weights |= {name: weight for name, weight in saved["blend"].items() if name != OLD}
        if self.cold is not None:
            before = {CONTENT_WEIGHT: (saved.get("blend") or {}).get(OLD, 1.0)}
            self.cold.weights = self.cold.start() | saved.get("cold", before)
