"""Total correlation against plain loops."""

import math

import pytest
import torch
import torch.nn.functional as F

from gtc_dist.distributed.collectives import Communicator
from gtc_dist.model.total_correlation import (
    draw_permutations,
    multilinear_product,
    pair_sum,
    total_correlation_cross_entropy,
)


def by_loops(views, items, scale, permutations, additive=False):
    """The definition, one logit at a time."""
    N, S, D = views.shape

    def inner(rows):  # of one row of each view
        chosen = [views[rows[k], k].double() for k in range(S)]
        if not additive:
            return D ** (S / 2 - 1) * float(torch.stack(chosen).prod(0).sum())
        pairs = [float(chosen[a] @ chosen[b]) for a in range(S) for b in range(a)]
        return sum(pairs) / len(pairs)

    losses = []
    for anchor in range(S):
        others = [k for k in range(S) if k != anchor]
        order = dict(zip(others, permutations[anchor].tolist(), strict=True))
        for i in range(N):
            logits = []
            for j in range(N):
                rows = {k: i if j == i else order[k][j] for k in others}
                if j != i and all(items[r] == items[i] for r in rows.values()):
                    continue
                logits.append((float(scale) * inner(rows | {anchor: i}), j == i))
            top = max(value for value, _ in logits)
            total = top + math.log(sum(math.exp(value - top) for value, _ in logits))
            losses.append(total - next(value for value, own in logits if own))
    return sum(losses) / S


def of_one_group(x, ids, scale, seed):
    """The loss of views [n, S, D] alone."""
    permutations = draw_permutations(1, x.shape[1], len(x), seed)
    return total_correlation_cross_entropy(
        x[:, None], ids[:, None], scale[None], permutations, Communicator(), [len(x)]
    )


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("views", [2, 3, 6])
def test_matches_the_definition(views, additive):
    """Two groups of other views, ids, scales and permutations: the mean of their losses."""
    torch.manual_seed(0)
    x = F.normalize(torch.randn(9, 2, views, 4), dim=3)
    ids = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 1], [0, 0, 0, 1, 2, 3, 4, 5, 6]]).T
    scale, permutations = torch.tensor([3.0, 2.0]), draw_permutations(2, views, 9, seed=7)
    got = total_correlation_cross_entropy(x, ids, scale, permutations, Communicator(), [9], additive)
    want = [by_loops(x[:, g], ids[:, g], scale[g], permutations[g], additive) for g in range(2)]
    assert float(got) == pytest.approx(sum(want) / 2, rel=1e-5)


def test_gradients_are_finite_where_duplicates_are_masked():
    x = F.normalize(torch.randn(6, 2, 4), dim=2).requires_grad_()
    scale = torch.tensor(5.0, requires_grad=True)
    items = torch.zeros(6, dtype=torch.int64)  # all the same item: every negative is masked
    loss = of_one_group(x, items, scale, 0)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-5)
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(scale.grad)


def test_dependent_views_have_a_larger_bound_than_independent_ones():
    torch.manual_seed(1)
    one = F.normalize(torch.randn(256, 16).abs(), dim=1)
    dependent = torch.stack([one, one, one], dim=1)
    independent = torch.stack([one, one[torch.randperm(256)], one[torch.randperm(256)]], dim=1)
    items, scale = torch.arange(256), torch.tensor(10.0)

    def bound(x):
        loss = of_one_group(x, items, scale, 0) / 256
        return math.log(256) - float(loss)

    assert bound(dependent) > bound(independent) + 0.5
    assert bound(independent) < 0.1


def test_two_views_are_the_plain_cosine():
    a, b = F.normalize(torch.randn(2, 5, 8), dim=2)
    for product in (multilinear_product(torch.stack([a, b])).sum(1), pair_sum(torch.stack([a, b]))):
        assert torch.allclose(product, F.cosine_similarity(a, b), atol=1e-6)


def test_no_rows_at_all():
    x = torch.zeros(0, 3, 4, requires_grad=True)
    loss = of_one_group(x, torch.zeros(0), torch.tensor(1.0), 0)
    loss.backward()
    assert float(loss.detach()) == 0
