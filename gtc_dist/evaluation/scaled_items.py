"""Metrics of a split as a function of a factor and an offset on the scores of some items, from two rankings.

All lists hold the best of the other items and the best of the scaled ones, in an order that factor and offset decide,
so each kind is ranked once.
"""

import numpy as np
import torch

from gtc_dist.data.catalog import CSC
from gtc_dist.distributed.sharded_table import ShardedTable
from gtc_dist.evaluation.metrics import K_VALUES, means_of_groups
from gtc_dist.evaluation.ranking import RankingOptions, ranked_users, top_k_items
from gtc_dist.graph.csc import Graphs


class ScaledItems:
    """The lists of this rank's users. The constructor and `metrics` are collectives.

    Args:
        users, items: embeddings, row-sharded.
        scaled: the items' embeddings before scaling; only rows `which` are read.
        which: bool [items], the items whose scores are scaled.
        counted: bool [items], only these count as positives; None: all.
    """

    @torch.no_grad()
    def __init__(
        self,
        users: ShardedTable,
        items: ShardedTable,
        scaled: ShardedTable,
        which: np.ndarray,
        graphs: Graphs,
        truth: CSC,
        options: RankingOptions,
        counted: np.ndarray | None,
    ):
        self.truth, self.counted, self.comm, self.block = truth, counted, users.comm, options.user_block
        rank_users = ranked_users(users, graphs, truth, options)
        self.rows, most = rank_users - users.start, max(K_VALUES)
        self.others = top_k_items(users, items, graphs, rank_users, most, options, allowed=~which)
        self.scaled = top_k_items(users, scaled, graphs, rank_users, most, options, allowed=which)

    def metrics(self, factor: float, offset: float = 0.0) -> dict[str, float]:
        """Metrics with scores of the items times this factor plus the offset; factor 0: without these items."""
        (items, scores), (more, raw) = self.others, self.scaled
        if factor:
            items, scores = (
                np.concatenate([items, more], axis=1),
                np.concatenate([scores, raw * factor + offset], axis=1),
            )
            order = np.lexsort((items, -scores), axis=1)[:, : max(K_VALUES)]  # of equal scores the lower index first
            items = np.take_along_axis(items, order, axis=1)
        return means_of_groups(items, self.rows, self.truth, {"": self.counted}, self.comm, self.block)[""][1]
