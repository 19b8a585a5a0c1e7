"""Hashes of indexes: fixed values, because stored graphs, samples and the order of training depend on them."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gtc_dist.data.hashing import hash_bucket, hash_index, hash_pair, index_bucket


def test_values_never_change():
    index = np.array([0, 1, 2**32 - 1])
    assert hash_index(index).tolist() == [0, 1728126539640421828, 5604108554454132752]
    assert hash_index(index, seed=5).tolist() == [4226419021165036875, 13165108960251013269, 4636304786134443261]
    assert hash_pair(index, index[::-1], seed=3).tolist() == [
        17510034182522027440,
        3228256181603342841,
        5162781667995771317,
    ]
    assert hash_bucket(np.array([0, 1, 2**62 + 7]), 5).tolist() == [0, 4, 3]
    assert index_bucket(0, 6, 10).tolist() == [0, 4, 4, 0, 0, 9]
    assert index_bucket(2, 5, 10).tolist() == [4, 0, 0]


@given(st.integers(0, 2**32), st.integers(0, 2**31))
def test_pairs_have_different_hashes(seed, offset):
    first, second = (part.reshape(-1) + offset for part in np.meshgrid(np.arange(30), np.arange(30)))
    assert len(np.unique(hash_pair(first, second, seed))) == 900


def test_hashes_are_uniform():
    index = np.arange(100_000)
    for bits in (hash_index(index), hash_index(index, 1), hash_pair(index, index % 7)):
        counts = np.bincount((bits >> np.uint64(60)).astype(int), minlength=16)
        assert abs(counts / 6250 - 1).max() < 0.06  # four standard deviations are 0.05
    counts = np.bincount(hash_bucket(index, 7), minlength=7)
    assert abs(counts * 7 / 100_000 - 1).max() < 0.02
