"""The graphs against dense matrices."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gtc_dist.data.catalog import CSC
from gtc_dist.graph import build

USERS, ITEMS = 40, 25


def train_pairs(seed: int, users: int = USERS, items: int = ITEMS, count: int = 150) -> tuple[np.ndarray, np.ndarray]:
    """Distinct pairs in random order; some users and items have none, and low items are popular."""
    rng = np.random.default_rng(seed)
    item = np.minimum(rng.geometric(0.15, count), items - 1).astype(np.int32)
    pairs = np.unique(np.stack([rng.integers(0, users, count), item], 1), axis=0)
    pairs = pairs[rng.permutation(len(pairs))].astype(np.int32)
    return pairs[:, 0], pairs[:, 1]


def dense(graph: CSC, sources: int) -> np.ndarray:
    """[destinations, sources] weights."""
    out = np.zeros((len(graph.indptr) - 1, sources))
    for destination in range(len(out)):
        edges = slice(graph.indptr[destination], graph.indptr[destination + 1])
        out[destination, graph.indices[edges]] = graph.weight[edges]
    return out


def check_layout(graph: CSC, destinations: int) -> None:
    assert (graph.indptr.dtype, graph.indices.dtype, graph.weight.dtype) == (np.int64, np.int32, np.float32)
    assert len(graph.indptr) == destinations + 1
    assert graph.indptr[0] == 0
    assert graph.indptr[-1] == len(graph.indices) == len(graph.weight)
    for destination in range(destinations):
        sources = graph.indices[graph.indptr[destination] : graph.indptr[destination + 1]]
        assert (np.diff(sources) > 0).all()  # sorted, none twice


def slow_user_user(user, item, users: int, k: int) -> np.ndarray:
    interactions = np.zeros((users, ITEMS))
    interactions[user, item] = 1
    counts = interactions @ interactions.T
    np.fill_diagonal(counts, 0)
    out = np.zeros((users, users))
    for u in range(users):
        near = sorted((v for v in range(users) if counts[u, v] > 0), key=lambda v: (-counts[u, v], v))[:k]
        if near:
            weight = np.exp(counts[u, near])
            out[u, near] = weight / weight.sum()
    return out


def slow_item_item(features: dict, weights: dict, k: int) -> np.ndarray:
    """Dense cosines, the item itself left out, ties to the lower index."""
    items = len(next(iter(features.values())))
    similarity = np.zeros((items, items))
    for name, matrix in features.items():
        x = matrix.astype(np.float64)
        length = np.linalg.norm(x, axis=1, keepdims=True)
        x = np.divide(x, length, out=np.zeros_like(x), where=length > 0)
        similarity += weights[name] / sum(weights.values()) * (x @ x.T)
    out = np.zeros((items, items))
    for i in range(items):
        near = sorted((j for j in range(items) if j != i), key=lambda j: (-similarity[i, j], j))[:k]
        weight = np.maximum(similarity[i, near], 0)
        out[i, near] = weight / weight.sum() if weight.sum() > 0 else 1 / len(near)
    return out


@pytest.mark.parametrize("seed", range(3))
def test_user_item_is_the_normalised_adjacency(seed):
    user, item = train_pairs(seed)
    adjacency = np.zeros((USERS, ITEMS))
    adjacency[user, item] = 1
    degrees = np.sqrt(np.outer(adjacency.sum(1), adjacency.sum(0)))
    expected = np.divide(adjacency, degrees, out=np.zeros_like(adjacency), where=adjacency > 0)
    item_user, user_item = build.user_item(user, item, USERS, ITEMS)
    check_layout(item_user, USERS)
    check_layout(user_item, ITEMS)
    np.testing.assert_allclose(dense(item_user, ITEMS), expected, rtol=1e-6)
    np.testing.assert_allclose(dense(user_item, USERS), expected.T, rtol=1e-6)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.integers(1, 45), st.sampled_from([1, 7, 60, 1 << 24]))
def test_user_user_is_the_top_of_the_dense_counts(seed, k, pairs_at_once):
    user, item = train_pairs(seed)
    item_user, _ = build.user_item(user, item, USERS, ITEMS)
    graph = build.user_user(item_user, ITEMS, k, hub_cap=USERS, seed=0, pairs_at_once=pairs_at_once)
    check_layout(graph, USERS)
    assert graph.degree.max(initial=0) <= k
    np.testing.assert_allclose(dense(graph, USERS), slow_user_user(user, item, USERS, k), rtol=1e-5, atol=1e-7)


def test_user_user_without_shared_items_is_empty():
    user = np.arange(5, dtype=np.int32)
    item_user, _ = build.user_item(user, user, 6, 6)
    graph = build.user_user(item_user, 6, 3, hub_cap=10, seed=0)
    assert graph.indptr.tolist() == [0] * 7
    assert len(graph.indices) == 0


def test_a_hub_counts_for_a_sample_of_its_users_only():
    """Everyone has item 0; users 0 and 1 also share item 1, which is no hub."""
    users, cap = 30, 4
    user = np.r_[np.arange(users), 0, 1].astype(np.int32)
    item = np.r_[np.zeros(users), 1, 1].astype(np.int32)
    item_user, _ = build.user_item(user, item, users, 2)

    def neighbours(seed: int) -> list[set[int]]:
        graph = build.user_user(item_user, 2, users, cap, seed)
        return [set(graph.indices[graph.indptr[u] : graph.indptr[u + 1]].tolist()) for u in range(users)]

    found = neighbours(3)
    assert found == neighbours(3)
    sampled = {u for u in range(users) if found[u] - {0, 1} or (u > 1 and found[u])}
    assert len(sampled | {u for u in (0, 1) if len(found[u]) > 1}) == cap
    assert 1 in found[0]
    assert 0 in found[1]
    assert any(neighbours(seed) != found for seed in range(4, 10))


def test_hub_cap_is_exact_for_each_item():
    user, item = train_pairs(1)
    item_user, _ = build.user_item(user, item, USERS, ITEMS)
    capped = build._cap_hubs(item_user, ITEMS, hub_cap=3, seed=0)
    degree = np.bincount(item, minlength=ITEMS)
    assert degree.max() > 3
    assert np.asarray(capped.sum(axis=0)).ravel().tolist() == np.minimum(degree, 3).tolist()
    kept_users, kept_items = capped.nonzero()
    assert set(zip(kept_users.tolist(), kept_items.tolist(), strict=True)) <= set(
        zip(user.tolist(), item.tolist(), strict=True)
    )


@pytest.mark.parametrize("k", [1, 4, 24, 100])
def test_item_item_is_the_top_of_the_dense_cosines(k):
    rng = np.random.default_rng(k)
    features = {
        "a": rng.normal(size=(ITEMS, 6)).astype(np.float16),
        "b": rng.normal(size=(ITEMS, 3)).astype(np.float16),
    }
    features["b"][3] = 0  # an item without a vector in one modality
    weights = {"a": 1.0, "b": 2.5}
    graph = build.item_item(features, weights, k, threads=1)
    check_layout(graph, ITEMS)
    assert (graph.degree == min(k, ITEMS - 1)).all()
    np.testing.assert_allclose(dense(graph, ITEMS), slow_item_item(features, weights, k), atol=2e-5)


def test_item_item_weight_zero_leaves_a_modality_out():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, ITEMS, 5)).astype(np.float16)
    both = build.item_item({"a": a, "b": b}, {"a": 1.0, "b": 0.0}, 4, threads=1)
    alone = build.item_item({"a": a}, {"a": 1.0}, 4, threads=1)
    assert both.indices.tolist() == alone.indices.tolist()
    np.testing.assert_allclose(both.weight, alone.weight, atol=1e-5)


def test_item_item_among_more_twins_than_neighbours():
    """An item is never its own neighbour, also where many items are alike and it does not find itself."""
    features = {"a": np.ones((50, 4), np.float16)}
    graph = build.item_item(features, {"a": 1.0}, 3, threads=1)
    check_layout(graph, 50)
    own = np.repeat(np.arange(50), 3)
    assert (graph.indices != own).all()
    np.testing.assert_allclose(graph.weight, 1 / 3, rtol=1e-6)


def test_item_item_without_any_similarity_is_uniform():
    """Zeros (no vector) and opposed vectors: rows still add to one, with no NaN."""
    features = {"a": np.array([[0, 0], [1, 0], [-1, 0], [0, 0]], np.float16)}
    graph = build.item_item(features, {"a": 1.0}, 2, threads=1)
    check_layout(graph, 4)
    weights = dense(graph, 4)
    np.testing.assert_allclose(weights.sum(axis=1), 1)
    np.testing.assert_allclose(weights[0].max(), 0.5)


@pytest.mark.parametrize("items", [1, 2, 3])
def test_item_item_of_a_tiny_catalog(items):
    graph = build.item_item({"a": np.eye(items, 4).astype(np.float16)}, {"a": 1.0}, 10, threads=1)
    check_layout(graph, items)
    assert (graph.degree == items - 1).all()


def test_item_item_is_the_same_again_and_with_other_threads():
    features = {"a": np.random.default_rng(5).normal(size=(300, 8)).astype(np.float16)}
    runs = [build.item_item(features, {"a": 1.0}, 5, threads=t) for t in (1, 1, 2)]
    for other in runs[1:]:
        assert np.array_equal(runs[0].indices, other.indices)
        assert np.array_equal(runs[0].weight, other.weight)
