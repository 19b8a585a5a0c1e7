"""Functions with a backward pass of their own against autograd."""

import pytest
import torch
import torch.nn.functional as F

from gtc_dist.model.functions import inner_products, log_partition, mix_rows, unit_rows


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).requires_grad_()


def gradients(value: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    weights = torch.randn(value.shape, generator=torch.Generator().manual_seed(9))
    return list(torch.autograd.grad((value * weights).sum(), inputs))


def test_unit_rows_have_norm_one_and_the_gradient_of_the_division():
    x = random(5, 3, 8)
    unit = unit_rows(x)
    torch.testing.assert_close(unit.norm(dim=2), torch.ones(5, 3))
    torch.testing.assert_close(gradients(unit, [x]), gradients(x / x.norm(dim=2, keepdim=True), [x]))


def test_a_row_of_zeros_stays_zeros():
    x = torch.zeros(2, 4)
    x[1, 0] = 3
    assert unit_rows(x).tolist() == [[0, 0, 0, 0], [1, 0, 0, 0]]


@pytest.mark.parametrize("with_offset", [False, True])
@pytest.mark.parametrize("users", [6, 0])
def test_log_partition_is_the_log_of_the_sum_over_items(users, with_offset):
    inputs = [random(2, users, 8, seed=1), random(2, 11, 8, seed=2), random(2, 11, seed=3)]
    user, item, bias = inputs
    offset = random(users, 11, seed=4).detach() if with_offset else None
    scores = torch.baddbmm(bias[:, None], user, item.transpose(1, 2)) - (0 if offset is None else offset)
    value, expected = log_partition(user, item, bias, offset), torch.logsumexp(scores, dim=2)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradients(value, inputs), gradients(expected, inputs))


def test_log_partition_holds_for_scores_whose_exponential_overflows():
    inputs = [random(1, 4, 8, seed=1, scale=40), random(1, 9, 8, seed=2, scale=40), random(1, 9, seed=3)]
    scores = torch.baddbmm(inputs[2][:, None], inputs[0], inputs[1].transpose(1, 2))
    assert scores.max() > 1000
    value, expected = log_partition(*inputs), torch.logsumexp(scores, dim=2)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradients(value, inputs), gradients(expected, inputs))


def test_log_partition_in_bfloat16_is_that_of_rounded_inputs():
    inputs = [F.normalize(random(2, 6, 8, seed=1), dim=2), F.normalize(random(2, 11, 8, seed=2), dim=2)]
    bias = random(2, 11, seed=3)
    value = log_partition(*inputs, bias, dtype=torch.bfloat16)
    assert value.dtype == torch.float32
    scores = torch.baddbmm(bias[:, None], inputs[0], inputs[1].transpose(1, 2))
    torch.testing.assert_close(value, torch.logsumexp(scores, dim=2), atol=1e-2, rtol=1e-2)
    found, expected = (gradients(each, [*inputs, bias]) for each in (value, torch.logsumexp(scores, dim=2)))
    torch.testing.assert_close(found, expected, atol=3e-2, rtol=3e-2)


def test_products_of_small_matrices_have_their_gradients_and_stay_float32():
    """Also with gradients that are not contiguous, and under autocast."""
    x = torch.randn(5, 3, 4, dtype=torch.float64, requires_grad=True)
    mix = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(inner_products(x), torch.einsum("nvd,nwd->nvw", x, x))
    torch.testing.assert_close(mix_rows(mix, x), torch.einsum("nwv,nvd->nwd", mix, x))
    assert torch.autograd.gradcheck(lambda x: inner_products(x).permute(1, 2, 0), x)
    assert torch.autograd.gradcheck(lambda mix, x: mix_rows(mix, x).permute(2, 0, 1), (mix, x))
    rows, weights = torch.randn(50, 3, 8), torch.randn(50, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        found = inner_products(rows), mix_rows(weights, rows)
    for values, want in zip(found, (inner_products(rows), mix_rows(weights, rows)), strict=True):
        assert torch.equal(values, want)
