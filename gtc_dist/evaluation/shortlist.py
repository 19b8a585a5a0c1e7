"""Shortlists: each user's best items by each of several scorers, with the scores of all of them.

The items at the top of a weighted sum of the scorers are among these for all but extreme cases, so that one pass over
the catalog serves the choice of the weights, which then reads a few hundred items of a user.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from gtc_dist.data.catalog import CSC
from gtc_dist.distributed.sharded_table import ShardedTable, plan_lookup
from gtc_dist.evaluation.metrics import count_positives, hits
from gtc_dist.evaluation.ranking import RankingOptions, ranked_users, top_of_rows, train_positives
from gtc_dist.graph.csc import Graphs

ITEMS = 50  # of each scorer
Scorers = Mapping[str, tuple[ShardedTable, ShardedTable]]  # name -> embeddings of users and items


@dataclass(frozen=True)
class Shortlist:
    """Items of this rank's users that have a positive.

    users: int64 [n], indexes. items: int64 [n, m], indexes; -1 where a user has fewer.
    scores: scorer -> float32 [n, m]; -inf where a user has fewer items.
    hit: bool [n, m], the item is a positive of the user.
    """

    users: torch.Tensor
    items: torch.Tensor
    scores: dict[str, torch.Tensor]
    hit: torch.Tensor

    @staticmethod
    @torch.no_grad()
    def of(
        scorers: Scorers,
        graphs: Graphs,
        truth: CSC,
        options: RankingOptions,
        counted: np.ndarray | None = None,
    ) -> "Shortlist":
        """Rank a split by each scorer. Collective: every rank must call it.

        Args:
            scorers: tables row-sharded over the same ranks.
            truth: the split's items of this rank's users (`load_ground_truth`).
            counted: bool [items], only these count as positives, and users without one are left out; None: all items.
        """
        users = next(iter(scorers.values()))[0]
        rank_users = ranked_users(users, graphs, truth, options)
        rows = rank_users - users.start
        has_positive = count_positives(rows, truth, counted) > 0
        rank_users, rows = rank_users[has_positive], rows[has_positive]
        items, scores = _best_items(scorers, graphs, rank_users, options)
        hit = hits(items, rows, truth)
        if counted is not None:
            hit &= counted[np.maximum(items, 0)]
        on_device = (torch.from_numpy(each).to(users.comm.device) for each in (rank_users, items, hit))
        index, listed, found = on_device
        return Shortlist(index, listed, dict(zip(scorers, scores, strict=True)), found)


def _best_items(
    scorers: Scorers, graphs: Graphs, rank_users: np.ndarray, options: RankingOptions
) -> tuple[np.ndarray, torch.Tensor]:
    """Each user's best `ITEMS` items by each scorer, once each: int64 [n, m], -1 where there are fewer, and the scores
    of all scorers, float32 [scorers, n, m]. Collective: every rank must call it."""
    tables = list(scorers.values())
    users, items = tables[0]
    comm, device, n = users.comm, users.comm.device, len(rank_users)
    rows = torch.from_numpy(rank_users - users.start).to(device)
    index = torch.full((len(tables), n, ITEMS), -1, dtype=torch.int64, device=device)
    best = torch.full((len(tables), len(tables), n, ITEMS), float("-inf"), device=device)  # by the first, of the second
    user_block = max(options.user_block // len(tables), 1)
    for first in range(0, items.rows, options.item_block):
        last = min(first + options.item_block, items.rows)
        plan = plan_lookup(torch.arange(first, last, device=device), items.rows, comm)
        blocks = [item_table.lookup(plan).float() for _, item_table in tables]
        for start in range(0, n, user_block):
            part = slice(start, min(start + user_block, n))
            scores = [
                table.weight[rows[part]].float() @ block.T for (table, _), block in zip(tables, blocks, strict=True)
            ]
            row, column = train_positives(graphs, rank_users[part], first, last)
            for each in scores:
                each[row.to(device), column.to(device)] = float("-inf")
            for by, each in enumerate(scores):
                _, at = top_of_rows(each, ITEMS)
                found = torch.cat([best[by, :, part], torch.stack([other.gather(1, at) for other in scores])], dim=2)
                order = found[by].topk(ITEMS, dim=1).indices
                best[by, :, part] = found.gather(2, order.expand(len(tables), -1, -1))
                index[by, part] = torch.cat([index[by, part], at + first], dim=1).gather(1, order)
    index[best[:, 0] == float("-inf")] = -1
    found, order = index.transpose(0, 1).flatten(1).sort(dim=1)
    scores = best.permute(1, 2, 0, 3).flatten(2).gather(2, order.expand(len(tables), -1, -1))
    repeated = torch.zeros_like(found, dtype=torch.bool)
    repeated[:, 1:] = found[:, 1:] == found[:, :-1]
    found[repeated] = -1
    scores[:, repeated] = float("-inf")
    return found.cpu().numpy(), scores
