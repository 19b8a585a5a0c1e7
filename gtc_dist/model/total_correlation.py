"""Total correlation of all views at once, as a contrastive lower bound.

The multilinear inner product of k views is sum_d prod_k r^k_d (Symile, Saporta et al. 2024; GTC, arXiv 2604.03014).
With each view as the anchor in turn, row i's positive is its own tuple; negative j combines row perm_k(j) of every
other view k, each with its own permutation. For N rows, log N - loss is a lower bound of the total correlation in
nats. Unit vectors of width D have products of the order D^(1 - k/2); they are scaled by D^(k/2 - 1), so that the
temperature means the same for any number of views (for two views it is the plain cosine).

The additive critic is the mean of the inner products of every two views, in place of the product of all. It bounds
the same quantity, and it asks views that are scored by inner products to agree in just those; a product of three
is large for vectors of which no two agree. For two views both are the same.
"""

import torch

from gtc_dist.distributed.collectives import Communicator, all_gather_with_gradient


def multilinear_product(parts: list[torch.Tensor]) -> torch.Tensor:
    """Elementwise product of the views in `parts`, each [n, D] -> [n, D]; its sum over d is the inner product."""
    product = parts[0]
    for part in parts[1:]:
        product = product * part
    return product


def pair_sum(parts: list[torch.Tensor]) -> torch.Tensor:
    """Sum of the inner products of every two of the views in `parts`, each [n, D] -> [n]."""
    total = sum(parts)
    return (total.square().sum(1) - sum(part.square().sum(1) for part in parts)) / 2


def total_correlation_cross_entropy(
    views: torch.Tensor,
    ids: torch.Tensor,
    scale: torch.Tensor,
    generator: torch.Generator,
    comm: Communicator,
    counts: list[int],
    additive: bool = False,
) -> torch.Tensor:
    """Cross-entropy summed over this rank's rows, averaged over anchors, in nats; differentiable over ranks.

    Args:
        views: [n, S, D], rows L2-normalised per view; n = counts[rank] rows of this rank.
        ids: int64 [n] item or user of each row. A negative made of the row's own id throughout is masked.
        scale: learned 1 / temperature, scalar.
        generator: CPU generator in the same state on every rank; draws the permutations.
        counts: rows of each rank.
        additive: critic; False: multilinear.

    Returns:
        Scalar sum; divide by sum(counts) over all ranks for the loss of the global batch. A collective.
    """
    _, S, D = views.shape
    pool = all_gather_with_gradient(views, comm, counts)  # [N, S, D]
    pool_ids = comm.all_gather(ids, counts)
    N, first = len(pool), sum(counts[: comm.rank])
    rows = torch.arange(len(views), device=views.device)
    total = views.new_zeros(())
    for anchor in range(S):
        others = [k for k in range(S) if k != anchor]
        order = [torch.randperm(N, generator=generator).to(views.device) for _ in others]
        drawn = [pool[p, k] for p, k in zip(order, others, strict=True)]
        own = [views[:, k] for k in others]
        if not additive:
            factor = scale * D ** (S / 2 - 1)
            logits = factor * (views[:, anchor] @ multilinear_product(drawn).T)
            positive = factor * (views[:, anchor] * multilinear_product(own)).sum(1)
        else:
            factor = scale * 2 / (S * (S - 1))
            logits = factor * (views[:, anchor] @ sum(drawn).T + pair_sum(drawn))
            positive = factor * ((views[:, anchor] * sum(own)).sum(1) + pair_sum(own))
        same = torch.ones_like(logits, dtype=torch.bool)
        for p in order:
            same &= pool_ids[p][None, :] == ids[:, None]
        logits = logits.masked_fill(same, float("-inf"))
        logits[rows, first + rows] = positive
        total = total + torch.nn.functional.cross_entropy(logits, first + rows, reduction="sum")
    return total / S
