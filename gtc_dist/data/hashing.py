"""Deterministic hashes of indexes: pseudo-random choices that are the same on every rank and in every order of work.

A choice by hash (is this user in the sample, which rank trains on this interaction) needs no shared random stream and
no communication. Stored graphs, validation samples and the order of training depend on these formulas: changing a
constant changes results. All are multiplicative hashes modulo 2^64, finished as far as their use needs well-mixed bits.
"""

import numpy as np

GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd (Fibonacci hashing)


def hash_index(index: np.ndarray, seed: int = 0) -> np.ndarray:
    """64 mixed bits for each index below 2^32: uint64 [n]."""
    mixed = (index.astype(np.uint64) + np.uint64((seed % 2**32) << 32)) * GOLDEN_RATIO
    return (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)


def hash_pair(first: np.ndarray, second: np.ndarray, seed: int = 0) -> np.ndarray:
    """64 mixed bits for each pair of indexes below 2^32: uint64 [n], different for different pairs.

    Finaliser of splitmix64 (Steele et al. 2014), a bijection of 64-bit integers.
    """
    mixed = first.astype(np.uint64) << np.uint64(32) | second.astype(np.uint64)
    mixed ^= np.random.SeedSequence(seed).generate_state(1, np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


def hash_bucket(key: np.ndarray, buckets: int) -> np.ndarray:
    """Bucket of each 64-bit key by Fibonacci hashing, from the upper 31 bits: int64 [n], in [0, buckets)."""
    return (((key.astype(np.uint64) * GOLDEN_RATIO) >> np.uint64(33)) % np.uint64(buckets)).astype(np.int64)


def index_bucket(start: int, stop: int, buckets: int) -> np.ndarray:
    """Bucket of each index from `start` to `stop`, from the upper 32 bits of `hash_index`: int64 [n], in [0, buckets).

    `hash_bucket` is for keys beyond the 2^32 of `hash_index`, and its single multiplication gives consecutive keys
    regularly spaced buckets: good enough to balance ranks, but not to draw folds and samples of items.
    """
    return ((hash_index(np.arange(start, stop)) >> np.uint64(32)) % np.uint64(buckets)).astype(np.int64)
