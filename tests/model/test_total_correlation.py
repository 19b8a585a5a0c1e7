"""Total correlation against plain loops."""

import math

import pytest
import torch
import torch.nn.functional as F

from gtc_dist.distributed.collectives import Communicator
from gtc_dist.model.total_correlation import multilinear_product, total_correlation_cross_entropy


def by_loops(views, items, scale, seed):
    """The definition, one logit at a time."""
    N, S, D = views.shape
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for anchor in range(S):
        others = [k for k in range(S) if k != anchor]
        order = {k: torch.randperm(N, generator=generator).tolist() for k in others}
        for i in range(N):
            logits = []
            for j in range(N):
                rows = {k: i if j == i else order[k][j] for k in others}
                if j != i and all(items[r] == items[i] for r in rows.values()):
                    continue
                product = sum(
                    float(views[i, anchor, d]) * math.prod(float(views[rows[k], k, d]) for k in others)
                    for d in range(D)
                )
                logits.append((float(scale) * D ** (S / 2 - 1) * product, j == i))
            top = max(value for value, _ in logits)
            total = top + math.log(sum(math.exp(value - top) for value, _ in logits))
            losses.append(total - next(value for value, own in logits if own))
    return sum(losses) / S


@pytest.mark.parametrize("views", [2, 3, 6])
def test_matches_the_definition(views):
    torch.manual_seed(0)
    x = F.normalize(torch.randn(9, views, 4), dim=2)
    items = torch.tensor([0, 1, 2, 3, 4, 5, 6, 0, 1])
    scale = torch.tensor(3.0)
    got = total_correlation_cross_entropy(x, items, scale, torch.Generator().manual_seed(7), Communicator(), [9])
    assert float(got) == pytest.approx(by_loops(x, items, scale, 7), rel=1e-5)


def test_gradients_are_finite_where_duplicates_are_masked():
    x = F.normalize(torch.randn(6, 2, 4), dim=2).requires_grad_()
    scale = torch.tensor(5.0, requires_grad=True)
    items = torch.zeros(6, dtype=torch.int64)  # all the same item: every negative is masked
    loss = total_correlation_cross_entropy(x, items, scale, torch.Generator().manual_seed(0), Communicator(), [6])
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
        loss = (
            total_correlation_cross_entropy(x, items, scale, torch.Generator().manual_seed(0), Communicator(), [256])
            / 256
        )
        return math.log(256) - float(loss)

    assert bound(dependent) > bound(independent) + 0.5
    assert bound(independent) < 0.1


def test_two_views_are_the_plain_cosine():
    a, b = F.normalize(torch.randn(2, 5, 8), dim=2)
    assert torch.allclose(multilinear_product([a, b]).sum(1), F.cosine_similarity(a, b), atol=1e-6)


def test_no_rows_at_all():
    x = torch.zeros(0, 3, 4, requires_grad=True)
    loss = total_correlation_cross_entropy(x, torch.zeros(0), torch.tensor(1.0), torch.Generator(), Communicator(), [0])
    loss.backward()
    assert float(loss.detach()) == 0
