"""Users that come to a graph from outside: edges lead into them, none from them.

So everything about items, and about the other users, stays as it is, bit for bit, and statistics over users leave them
out (`Graphs.counted_users`): what a new user gets does not depend on which others come along.
"""

from dataclasses import replace

import numpy as np

from gtc_dist.data.catalog import CSC
from gtc_dist.graph.csc import Graphs


def add_users(graphs: Graphs, indptr: np.ndarray, items: np.ndarray, weight: np.ndarray | None) -> Graphs:
    """The graphs with n more users behind the others.

    Args:
        indptr: int64 [n + 1], first interaction of each new user. items: int32 [E], sorted within a user.
        weight: float32 [E], of the interactions, in catalogs whose interactions weigh differently; None: 1 each.
    """
    degree = np.diff(indptr).astype(np.float64)
    own = np.ones(len(items)) if weight is None else weight.astype(np.float64)
    if weight is not None:
        degree = np.bincount(np.repeat(np.arange(len(degree)), np.diff(indptr)), own, len(degree))
    of_items = graphs.weighted_item_degree.astype(np.float64)[items]
    norm = np.sqrt(np.repeat(degree, np.diff(indptr)) * np.where(of_items > 0, of_items, 1))
    nodes, first, n = graphs.nodes, int(graphs.nodes.indptr[graphs.users]), len(degree)
    indices = np.where(nodes.indices >= graphs.users, nodes.indices + np.int32(n), nodes.indices)
    together = CSC(
        np.concatenate([nodes.indptr[: graphs.users], indptr + first, nodes.indptr[graphs.users + 1 :] + indptr[-1]]),
        np.concatenate([indices[:first], items + np.int32(graphs.users + n), indices[first:]]),
        np.concatenate([nodes.weight[:first], (own / norm).astype(np.float32), nodes.weight[first:]]),
        None if nodes.weighted_degree is None else np.insert(nodes.weighted_degree, graphs.users, degree),
    )
    hop = graphs.user_user
    if hop is not None:  # nobody is near them there
        hop = replace(hop, indptr=np.concatenate([hop.indptr, np.full(n, hop.indptr[-1])]))
    return replace(graphs, users=graphs.users + n, nodes=together, user_user=hop, added_users=graphs.added_users + n)
