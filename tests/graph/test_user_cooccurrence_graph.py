"""The user-user graph equals dense counts, for blocks of any size."""

import numpy as np
import pytest
from graphs import ITEMS, USERS, check_layout, dense, same, train_pairs
from hypothesis import given, settings
from hypothesis import strategies as st

from gtc_dist.data.scratch import Scratch
from gtc_dist.graph import user_cooccurrence_graph, user_item_graph


def slow_user_user(user, item, users: int, k: int, weight=1) -> np.ndarray:
    interactions = np.zeros((users, ITEMS))
    interactions[user, item] = weight
    counts = interactions @ interactions.T
    np.fill_diagonal(counts, 0)
    out = np.zeros((users, users))
    for u in range(users):
        near = sorted((v for v in range(users) if counts[u, v] > 0), key=lambda v: (-counts[u, v], v))[:k]
        if near:
            weight = np.exp(counts[u, near])
            out[u, near] = weight / weight.sum()
    return out


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.integers(1, 45), st.sampled_from([1, 7, 60, 1 << 24]), st.integers(1, 3))
def test_user_user_equals_the_top_k_of_dense_counts(seed, k, block_pairs, threads):
    user, item = train_pairs(seed)
    both = user_item_graph.build_user_item_graph(user, item, USERS, ITEMS)
    graph = user_cooccurrence_graph.build_user_cooccurrence_graph(
        *both, k, hub_cap=USERS, seed=0, threads=threads, block_pairs=block_pairs
    )
    check_layout(graph, USERS)
    assert graph.degree.max(initial=0) <= k
    np.testing.assert_allclose(dense(graph, USERS), slow_user_user(user, item, USERS, k), rtol=1e-5, atol=1e-7)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(1, 45), st.sampled_from([1, 7, 60, 1 << 24]), st.integers(1, 3))
def test_common_items_count_the_product_of_their_weights(seed, k, block_pairs, threads):
    user, item = train_pairs(seed)
    weight = np.random.default_rng(seed).random(len(user), np.float32)  # random, so that no two counts tie
    both = user_item_graph.build_user_item_graph(user, item, USERS, ITEMS, weight=weight)
    arguments = *both, k, USERS, 0, threads
    graph = user_cooccurrence_graph.build_user_cooccurrence_graph(*arguments, block_pairs=block_pairs)
    check_layout(graph, USERS)
    np.testing.assert_allclose(dense(graph, USERS), slow_user_user(user, item, USERS, k, weight), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("memory", [1, 300, 5000])
def test_weighted_user_user_with_hubs_does_not_depend_on_blocks(memory):
    user, item = train_pairs(3)
    weight = np.random.default_rng(3).random(len(user), np.float32)
    both = user_item_graph.build_user_item_graph(user, item, USERS, ITEMS, weight=weight)
    whole = user_cooccurrence_graph.build_user_cooccurrence_graph(*both, 5, 4, 0)
    with Scratch(memory_bytes=memory) as scratch:
        assert same(user_cooccurrence_graph.build_user_cooccurrence_graph(*both, 5, 4, 0, 2, scratch), whole)


@pytest.mark.parametrize("sorted_by_group", [False, True])
@pytest.mark.parametrize("k", [3, 40])
def test_user_user_of_many_users_with_few_common_items(k, sorted_by_group):
    """Most counts are 1 and most entries are skipped. With users sorted by group, low indexes are not
    evenly distributed, so rows fall back to all of their entries."""
    users, items, rng = 1500, 60, np.random.default_rng(k)
    user = np.repeat(np.arange(users), 2)
    item = np.where(rng.random(2 * users) < 0.9, user * items // users, rng.integers(0, items, 2 * users))
    user, item = np.unique(np.stack([user, item], 1), axis=0).astype(np.int32).T
    if not sorted_by_group:
        user = rng.permutation(users).astype(np.int32)[user]
    both = user_item_graph.build_user_item_graph(user, item, users, items)
    graph = user_cooccurrence_graph.build_user_cooccurrence_graph(*both, k, hub_cap=users, seed=0)
    interactions = np.zeros((users, items), np.int32)
    interactions[user, item] = 1
    counts = interactions @ interactions.T
    np.fill_diagonal(counts, 0)
    order = np.argsort(-counts, axis=1, kind="stable")[:, :k]
    for u in range(users):
        near = order[u][counts[u, order[u]] > 0]
        assert graph.indices[graph.indptr[u] : graph.indptr[u + 1]].tolist() == sorted(near.tolist())


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000), st.integers(1, 6), st.sampled_from([1, 300, 5000]), st.sampled_from([1, 50, 1 << 20]))
def test_user_user_with_hubs_does_not_depend_on_blocks(seed, hub_cap, memory, block_pairs):
    user, item = train_pairs(seed)
    whole = user_cooccurrence_graph.build_user_cooccurrence_graph(
        *user_item_graph.build_user_item_graph(user, item, USERS, ITEMS), 5, hub_cap, seed
    )
    with Scratch(memory_bytes=memory) as scratch:
        both = user_item_graph.build_user_item_graph(user, item, USERS, ITEMS, scratch)
        blocked = user_cooccurrence_graph.build_user_cooccurrence_graph(
            *both, 5, hub_cap, seed, 2, scratch, block_pairs=block_pairs
        )
        assert same(blocked, whole)


def test_user_user_reports_its_progress_and_frees_its_scratch():
    user, item = train_pairs(2)
    seen = []
    with Scratch() as scratch:
        both = user_item_graph.build_user_item_graph(user, item, USERS, ITEMS, scratch)
        before = len(list(scratch.path.iterdir()))
        user_cooccurrence_graph.build_user_cooccurrence_graph(
            *both, 3, 10, 0, 1, scratch, lambda *done: seen.append(done), block_pairs=50
        )
        assert len(list(scratch.path.iterdir())) == before + 2
    assert len(seen) > 1
    assert seen == sorted(seen)
    assert seen[-1] == (USERS, USERS)


def test_user_user_without_common_items_is_empty():
    user = np.arange(5, dtype=np.int32)
    graph = user_cooccurrence_graph.build_user_cooccurrence_graph(
        *user_item_graph.build_user_item_graph(user, user, 6, 6), 3, hub_cap=10, seed=0
    )
    assert graph.indptr.tolist() == [0] * 7
    assert len(graph.indices) == 0


def test_a_hub_counts_only_for_a_sample_of_its_users():
    """All users have item 0; users 0 and 1 also share item 1, which is not a hub."""
    users, cap = 30, 4
    user = np.r_[np.arange(users), 0, 1].astype(np.int32)
    item = np.r_[np.zeros(users), 1, 1].astype(np.int32)
    both = user_item_graph.build_user_item_graph(user, item, users, 2)

    def neighbours(seed: int) -> list[set[int]]:
        graph = user_cooccurrence_graph.build_user_cooccurrence_graph(*both, users, cap, seed)
        return [set(graph.indices[graph.indptr[u] : graph.indptr[u + 1]].tolist()) for u in range(users)]

    found = neighbours(3)
    assert found == neighbours(3)
    sampled = {u for u in range(users) if found[u] - {0, 1} or (u > 1 and found[u])}
    assert len(sampled | {u for u in (0, 1) if len(found[u]) > 1}) == cap
    assert 1 in found[0]
    assert 0 in found[1]
    assert any(neighbours(seed) != found for seed in range(4, 10))


@pytest.mark.parametrize("memory", [1, 1 << 20])
def test_hub_cap_is_exact_for_each_item(memory):
    user, item = train_pairs(1)
    both = user_item_graph.build_user_item_graph(user, item, USERS, ITEMS)
    with Scratch(memory_bytes=memory) as scratch:
        common = user_cooccurrence_graph._CommonItems(*both, hub_cap=3, seed=0, scratch=scratch)
        capped = common.by_user(slice(0, USERS))
        assert (common.by_item != capped.T).nnz == 0  # both directions have the same sample
    degree = np.bincount(item, minlength=ITEMS)
    assert degree.max() > 3
    assert np.asarray(capped.sum(axis=0)).ravel().tolist() == np.minimum(degree, 3).tolist()
    kept_users, kept_items = capped.nonzero()
    assert set(zip(kept_users.tolist(), kept_items.tolist(), strict=True)) <= set(
        zip(user.tolist(), item.tolist(), strict=True)
    )


def test_all_users_of_a_hub_are_equally_likely_in_its_sample():
    users, cap = 60, 15
    both = user_item_graph.build_user_item_graph(np.arange(users, dtype=np.int32), np.zeros(users, np.int32), users, 1)
    hits = np.zeros(users)
    for seed in range(400):
        with Scratch() as scratch:
            hits += (
                user_cooccurrence_graph._CommonItems(*both, cap, seed, scratch).by_user(slice(0, users)).toarray()[:, 0]
            )
    assert hits.sum() == 400 * cap
    assert abs(hits - 100).max() < 5 * np.sqrt(400 * 0.25 * 0.75)
