"""Total correlation of all views at once, as a contrastive lower bound.

The multilinear inner product of k views is sum_d prod_k r^k_d (Symile, Saporta et al. 2024; GTC, arXiv 2604.03014).
With each view as the anchor in turn, row i's positive is its own tuple; negative j combines row perm_k(j) of every
other view k, each with its own permutation. For N rows, log N - loss is a lower bound of the total correlation in
nats. Unit vectors of width D have products of the order D^(1 - k/2); they are scaled by D^(k/2 - 1), so that the
temperature means the same for any number of views (for two views it is the plain cosine).

The additive critic is the mean of the inner products of every two views, in place of the product of all. It bounds
the same quantity, and it asks views that are scored by inner products to agree in just those; a product of three
is large for vectors of which no two agree. For two views both are the same.

Several groups of views, such as those of ensemble members, of users and of items, are computed together, so that a
step launches the same few operations for any number of them.
"""

import torch

from gtc_dist.distributed.collectives import Communicator, all_gather_with_gradient


def draw_permutations(groups: int, views: int, rows: int, seed: int) -> torch.Tensor:
    """Permutations of the rows for each group, anchor and other view, int64 [groups, views, views - 1, rows]."""
    generator = torch.Generator().manual_seed(seed)
    count = groups * views * (views - 1)
    drawn = [torch.randperm(rows, generator=generator) for _ in range(count)]
    return torch.stack(drawn).view(groups, views, views - 1, rows)


def multilinear_product(parts: torch.Tensor) -> torch.Tensor:
    """Elementwise product over the views [..., k, n, D] -> [..., n, D]; its sum over D is the inner product."""
    product = parts[..., 0, :, :]
    for k in range(1, parts.shape[-3]):
        product = product * parts[..., k, :, :]
    return product


def pair_sum(parts: torch.Tensor) -> torch.Tensor:
    """Sum of the inner products of every two of the views [..., k, n, D] -> [..., n]."""
    return (parts.sum(-3).square().sum(-1) - parts.square().sum((-3, -1))) / 2


def total_correlation_cross_entropy(
    views: torch.Tensor,
    ids: torch.Tensor,
    scale: torch.Tensor,
    permutations: torch.Tensor,
    comm: Communicator,
    counts: list[int],
    additive: bool = False,
) -> torch.Tensor:
    """Cross-entropy summed over this rank's rows, averaged over anchors and groups, in nats; differentiable over ranks.

    Args:
        views: [n, G, S, D] of G groups, rows L2-normalised per view; n = counts[rank] rows of this rank.
        ids: int64 [n, G] item or user of each row. A negative made of the row's own id throughout is masked.
        scale: [G] learned 1 / temperature.
        permutations: int64 [G, S, S - 1, N] of all ranks' N rows, the same on every rank.
        counts: rows of each rank.
        additive: critic; False: multilinear.

    Returns:
        Scalar sum; divide by sum(counts) over all ranks for the loss of the global batch. A collective.
    """
    G, S, D = views.shape[1:]
    pool = all_gather_with_gradient(views, comm, counts)  # [N, G, S, D]
    pool_ids = comm.all_gather(ids, counts)
    first = sum(counts[: comm.rank])
    group = torch.arange(G, device=views.device)[:, None, None, None]
    each = torch.arange(S - 1, device=views.device)
    others = each + (each >= torch.arange(S, device=views.device)[:, None])  # [S, S - 1] the views beside each anchor
    drawn = pool.reshape(-1, D)[(permutations * G + group) * S + others[:, :, None]]  # [G, S, S - 1, N, D]
    by_group = views.permute(1, 2, 0, 3)  # [G, S, n, D]
    own = by_group[:, others]  # [G, S, S - 1, n, D]
    if not additive:
        factor = D ** (S / 2 - 1)
        logits = (by_group @ multilinear_product(drawn).transpose(2, 3)).float()
        positive = (by_group * multilinear_product(own)).sum(3)
    else:
        factor = 2 / (S * (S - 1))
        logits = (by_group @ drawn.sum(2).transpose(2, 3)).float()
        positive = (by_group * own.sum(2)).sum(3)
        if S > 2:  # the sum over the pairs of one view is zero
            logits = logits + pair_sum(drawn)[:, :, None]
            positive = positive + pair_sum(own)
    factor = scale[:, None, None] * factor
    logits, positive = logits * factor[..., None], positive * factor
    drawn_ids = pool_ids.reshape(-1)[permutations * G + group]  # [G, S, S - 1, N]
    same = drawn_ids[:, :, 0, None] == ids.T[:, None, :, None]
    for k in range(1, S - 1):
        same &= drawn_ids[:, :, k, None] == ids.T[:, None, :, None]
    logits = logits.masked_fill(same, float("-inf"))
    logits = torch.diagonal_scatter(logits, positive, offset=first, dim1=2, dim2=3)
    return (torch.logsumexp(logits, dim=3) - positive).sum() / (S * G)
