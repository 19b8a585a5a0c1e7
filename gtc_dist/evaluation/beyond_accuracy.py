"""How far lists are personal: a list that is the same for everyone, and how the lists spread over the items.

The list for everyone ranks items by the dot product with the mean embedding of all users, the best single list that the
embeddings know. What a user's own list gains over it is personalisation. Coverage and the share of popular items are
the aggregate diversity of Adomavicius and Kwon (2012) and the popularity bias of Abdollahpouri et al. (2019).
"""

import numpy as np
import torch

from gtc_dist.distributed.collectives import Communicator
from gtc_dist.distributed.sharded_table import ShardedTable
from gtc_dist.evaluation.item_groups import most_frequent
from gtc_dist.graph.csc import Graphs, by_destination, kth_non_neighbour, take_edges

TOP = 20  # places of a list that coverage and the share of popular items look at
POPULAR_PART = 100  # popular: one item in so many


def mean_lists(
    users: ShardedTable,
    items: ShardedTable,
    graphs: Graphs,
    rank_users: np.ndarray,
    k: int,
    item_block: int,
    user_block: int,
) -> np.ndarray:
    """First k items for each user of the list for everyone, without the user's own train positives: int64 [n, k], -1
    where there are fewer. Collective: every rank must call it.

    The items are scored once, not for each user: a list that is longer than k by the largest number of train positives
    is enough for every user.

    Args:
        rank_users: [n], indexes of this rank's users to rank for.
    """
    longest = users.comm.all_reduce_max(int(graphs.user_degree[rank_users].max(initial=0)))
    best = _best_items(mean_user(users, graphs, item_block), items, min(k + longest, items.rows), item_block)
    place = np.full(items.rows, -1)
    place[best] = np.arange(len(best))
    top = np.empty((len(rank_users), k), np.int64)
    for start in range(0, len(rank_users), user_block):
        block = rank_users[start : start + user_block]
        indptr, edges = take_edges(graphs.nodes, block)
        at = place[graphs.nodes.indices[edges] - graphs.users]
        row = np.repeat(np.arange(len(block)), np.diff(indptr))
        masked = by_destination(row[at >= 0], at[at >= 0], len(block))
        kept = kth_non_neighbour(masked, np.repeat(np.arange(len(block)), k), np.tile(np.arange(k), len(block)))
        listed = np.where(kept < len(best), best[np.minimum(kept, len(best) - 1)], -1)
        top[start : start + user_block] = listed.reshape(-1, k)
    return top


def list_spread(top: np.ndarray, graphs: Graphs, comm: Communicator) -> dict[str, float]:
    """Spread of the users' lists over the items. Collective: every rank must call it.

    Args:
        top: recommended items int64 [n, >= 20] of this rank's users, best first, -1: none.

    Returns:
        coverage@20: share of all items that are in the first 20 of at least one user.
        head_share@20: share of these places that the most popular hundredth of the items holds, by train interactions
        and at least one item. Both are 0 without users.
    """
    listed = top[:, :TOP]
    places = torch.from_numpy(np.bincount(listed[listed >= 0], minlength=graphs.items)).to(comm.device)
    places = comm.all_reduce(places).cpu().numpy()
    popular = most_frequent(graphs.item_degree, max(graphs.items // POPULAR_PART, 1))
    return {
        f"coverage@{TOP}": float(np.count_nonzero(places) / graphs.items),
        f"head_share@{TOP}": float(places[popular].sum() / max(places.sum(), 1)),
    }


def mean_user(users: ShardedTable, graphs: Graphs, block: int) -> torch.Tensor:
    """Mean embedding float64 [width] of all users with a train interaction."""
    trained = torch.from_numpy(graphs.counted_users[users.start : users.stop]).to(users.weight.device).double()
    total = trained.new_zeros(users.width + 1)
    for start in range(0, len(trained), block):
        part = slice(start, start + block)
        total[:-1] += trained[part] @ users.weight[part].double()
    total[-1] = trained.sum()
    users.comm.all_reduce(total)
    return total[:-1] / total[-1].clamp(min=1)


def _best_items(user: torch.Tensor, items: ShardedTable, k: int, block: int) -> np.ndarray:
    """The k items with the largest dot product with one embedding float64 [width], best first: int64 [k]. Of equal
    scores the lower index wins."""
    # float64 sums, rounded: equal rows score the same wherever they are in a block
    parts = [(rows.double() @ user).float() for rows in items.weight.split(block)]
    scores = torch.cat(parts) if parts else user.new_zeros(0).float()
    score, order = scores.sort(descending=True, stable=True)
    score, index = score[:k], order[:k] + items.start
    counts = items.comm.all_gather_int(len(index))
    score, index = (items.comm.all_gather(t, counts).cpu().numpy() for t in (score, index))
    return index[np.lexsort((index, -score))][:k]
