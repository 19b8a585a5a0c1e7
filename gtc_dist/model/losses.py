"""Loss terms of a batch, as functions of the network and its embeddings; each the mean over ensemble members."""

import torch
import torch.nn.functional as F

from gtc_dist.model.batch import Batch
from gtc_dist.model.functions import unit_rows
from gtc_dist.model.total_correlation import total_correlation_cross_entropy

CONDITION_DROPOUT = 0.1  # share of pairs whose condition the denoising loss drops, so that cold items are covered


def ranking_loss(network, users: torch.Tensor, items: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Ranking loss of each pair against its negatives, [B].

    bpr: Bayesian personalised ranking (Rendle et al. 2009), averaged over the negatives. softmax: cross-entropy of the
    positive among itself and the negatives, which weighs the hardest negatives most. Scores are divided by a
    temperature. A pair's own negatives are split over the members; shared ones are used by every member. In-batch
    negatives are importance-weighted.

    Args:
        users: [u, members * W], items: [i, members * W] joined embeddings.
    """
    members, train = network.n_members, network.train_config
    width = network.out_width // members
    user = users.index_select(0, batch.users).view(-1, members, width) / train.temperature
    positive = items.index_select(0, batch.positives).view(-1, members, width)
    score = (user * positive).sum(2, keepdim=True)  # [B, members, 1]
    if batch.negatives.dim() == 2:
        split = batch.negatives.view(len(user), members, batch.negatives.shape[1] // members)
        if members > 1:
            split = split * members + torch.arange(members, device=user.device)[:, None]  # rows of one member
        rows = items.view(-1, width).index_select(0, split.reshape(-1)).view(*split.shape, width)
        negative, mask = (user[:, :, None] * rows).sum(3), None  # [B, members, K / members]
    else:
        rows = items.index_select(0, batch.negatives).view(-1, members, width)
        negative, mask = torch.einsum("bmd,pmd->bmp", user, rows).float(), batch.negative_mask[:, None]
    weight = batch.negative_weight
    if train.loss == "bpr":
        pairs = F.softplus(negative - score)
        if mask is None:
            return pairs.mean((1, 2))
        weights = mask if weight is None else mask * weight
        return ((pairs * weights).sum(2) / weights.sum(2).clamp(min=1e-12)).mean(1)
    if weight is not None:
        negative = negative + weight.log()
    if mask is not None:
        negative = negative.masked_fill(~mask, float("-inf"))
    logits = torch.cat([score, negative], dim=2)
    return (torch.logsumexp(logits, dim=2) - logits[:, :, 0]).mean(1)


def total_correlation_loss(network, e, batch: Batch) -> torch.Tensor:
    """Total-correlation loss of the global batch, this rank's share. A collective.

    Of the items' views that enter the graph; or, with `Variant.correlates_outputs`, of the views that leave it, of
    users and of items in equal parts, since these are scored.
    """
    counts, shape = batch.tc_counts, (-1, network.n_members, network.n_graph_views, network.dim)
    chosen = slice(0, counts[network.comm.rank])
    items, users = batch.positives[chosen], batch.users[chosen]
    sides = [batch.item_ids.index_select(0, items)]
    if network.variant.correlates_outputs:
        views = [e.items.index_select(0, items).view(shape), e.users.index_select(0, users).view(shape)]
        views = torch.stack(views, dim=2).flatten(1, 2)  # groups: a member's items, its users, the next member's items
        sides.append(batch.user_ids.index_select(0, users))
    else:
        rows = batch.subgraph.items_in_inputs.index_select(0, items)
        views = torch.stack([encoded.views.index_select(0, rows) for encoded in e.encoded], dim=1)
    ids = torch.stack(sides, dim=1).repeat(1, network.n_members)
    scale = torch.stack([member.log_scale for member in network.members]).exp().repeat_interleave(len(sides))
    args = (unit_rows(views), ids, scale, batch.permutations, network.comm, counts)
    loss = total_correlation_cross_entropy(*args, additive=network.variant.additive_critic)
    return loss / max(sum(counts), 1)


def denoising_loss(network, e, batch: Batch) -> torch.Tensor:
    """Denoising loss of the positives, mean over modalities, [B].

    Content and condition are constants here: with a gradient into the content, shrinking it to a point would be the
    cheapest way to a low loss. Some pairs' conditions are dropped, as in the training of classifier-free guidance (Ho
    and Salimans 2022), so that the filter also works without them.
    """
    inputs = batch.subgraph.items_in_inputs.index_select(0, batch.positives)
    drop_condition = (batch.dropout[0] < CONDITION_DROPOUT)[:, None]
    losses = []
    for member, encoded in zip(network.members, e.encoded, strict=True):
        ids, content, audience = encoded.detached(inputs)
        ids = ids.masked_fill(drop_condition, 0)
        audience = None if audience is None else audience.masked_fill(drop_condition, 0)
        for v, x0 in enumerate(content.values(), start=1):
            condition = member.condition(ids, audience, v)
            losses.append(member.filters[v - 1].loss(x0, condition, batch.timesteps, batch.noise[v - 1]))
    return torch.stack(losses).mean(0)


def l2_loss(network, user_rows: torch.Tensor, item_rows: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Half the squared norms of the looked-up rows of each pair, and the mean over its negatives, summed over pairs."""
    graph = batch.subgraph
    users = user_rows.index_select(0, graph.users_in_inputs).square().sum(1)
    items = item_rows.index_select(0, graph.items_in_inputs).square().sum(1)
    # no dot products, which autocast would round
    total = (users * batch.user_share).sum() + (items * batch.item_share).sum()
    return total * (0.5 / network.n_members)
