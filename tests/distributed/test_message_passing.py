"""Blocks and light graph convolution against dense matrices."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from gtc_dist.distributed import message_passing
from gtc_dist.distributed.message_passing import Block, convolve, weighted_sum


def random_block(rng, destinations, sources, density=0.2) -> tuple[Block, torch.Tensor]:
    matrix = sp.random(destinations, sources, density, format="csr", random_state=rng, dtype=np.float32)
    block = Block.build(matrix.indptr, matrix.indices, matrix.data, sources)
    return block, torch.from_numpy(matrix.toarray())


@pytest.mark.parametrize("most", [2**31 - 1, 10])
def test_weighted_sum_and_its_gradient_match_the_dense_product(monkeypatch, most):
    """Also with the 64-bit indices of graphs with more edges than 32 bits number."""
    monkeypatch.setattr(message_passing, "MAX_INT32_EDGES", most)
    block, dense = random_block(np.random.default_rng(0), 13, 29)
    assert {t.dtype for t in (block.indptr, block.indices, block.t_indptr, block.t_indices)} == {
        torch.int32 if most > 10 else torch.int64
    }
    x = torch.randn(29, 6, requires_grad=True)
    y = weighted_sum(block, x)
    torch.testing.assert_close(y, dense @ x)
    upstream = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, x, upstream)
    torch.testing.assert_close(grad, dense.T @ upstream)


@pytest.mark.parametrize("layers", [0, 1, 2, 3])
def test_convolution_is_the_sum_of_matrix_powers(layers):
    block, dense = random_block(np.random.default_rng(1), 17, 17)
    x = torch.randn(17, 4)
    want = sum(torch.linalg.matrix_power(dense, k) @ x for k in range(layers + 1))
    torch.testing.assert_close(convolve([block] * layers, x, 17), want)


def test_a_shrinking_chain_of_blocks_keeps_the_targets_first():
    rng = np.random.default_rng(2)
    outer, dense_outer = random_block(rng, 9, 20)
    inner, dense_inner = random_block(rng, 4, 9)
    x = torch.randn(20, 3)
    x.requires_grad_()
    want = x[:4] + (dense_outer @ x)[:4] + dense_inner @ (dense_outer @ x)
    got = convolve([outer, inner], x, 4)
    torch.testing.assert_close(got, want)
    upstream = torch.randn_like(got)
    (grad,) = torch.autograd.grad(got, x, upstream)
    (expected,) = torch.autograd.grad(want, x, upstream)
    torch.testing.assert_close(grad, expected)


def test_blocks_that_do_not_follow_each_other_are_refused():
    rng = np.random.default_rng(4)
    (outer, _), (inner, _) = random_block(rng, 9, 20), random_block(rng, 4, 8)
    with pytest.raises(ValueError, match="do not follow"):
        convolve([outer, inner], torch.zeros(20, 3), 4)


def test_blocks_without_edges_rows_or_sources():
    empty = Block.build(np.zeros(4, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32), 5)
    x = torch.randn(5, 2, requires_grad=True)
    y = weighted_sum(empty, x)
    assert y.shape == (3, 2)
    y.sum().backward()
    assert not x.grad.any()
    nothing = Block.build(np.zeros(1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32), 0)
    assert weighted_sum(nothing, torch.zeros(0, 2)).shape == (0, 2)


def test_wrong_number_of_source_rows_is_refused():
    block, _ = random_block(np.random.default_rng(3), 3, 5)
    with pytest.raises(ValueError, match="5 sources"):
        weighted_sum(block, torch.zeros(4, 2))
