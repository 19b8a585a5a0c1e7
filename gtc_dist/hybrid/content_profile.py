"""Content-based scorer: users are profiled by the content of their items (Rocchio), one scorer per modality.

An item's vector is its place in the modality's `ContentSpace`. A user's profile is the weighted sum of the vectors of
the user's items (one hop, N of `graph_filter.py`) plus that of the items one step of co-interaction away (two hops,
N C), both z-scored per user. Nothing is learned, and an item needs no interaction to be scored, so this scorer ranks
cold-start items.
"""

import torch

from gtc_dist.distributed.sharded_table import ShardedTable
from gtc_dist.hybrid.content_space import ContentSpace
from gtc_dist.hybrid.embeddings import Embeddings, inverse_score_std, item_covariance
from gtc_dist.hybrid.graph_filter import CooccurrenceOperator


@torch.no_grad()
def content_profile_scores(operator: CooccurrenceOperator, features: ShardedTable, width: int) -> Embeddings:
    """Tables of users [users, k] and items [items, k], k = min(width, features' width). Collective: every rank must
    call it."""
    space = ContentSpace.fit({features.name: features}, width)
    # missing_as_zero=False, as in version 0.1, whose results docs/log.md has: all items without a vector share one
    # direction, that of minus the mean
    items = space.apply({features.name: features.weight}, missing_as_zero=False)
    one_hop = operator.to_users(items)
    two_hop = operator.to_users(operator(items))
    covariance = item_covariance(operator.items.with_values(items))
    users = one_hop * inverse_score_std(one_hop, covariance) + two_hop * inverse_score_std(two_hop, covariance)
    return operator.embeddings(users, items)
