"""The user-item graph equals dense matrices, for blocks of any size."""

import numpy as np
import pytest
from graphs import ITEMS, USERS, check_layout, dense, same, train_pairs
from hypothesis import given, settings
from hypothesis import strategies as st

from gtc_dist.data.scratch import Scratch
from gtc_dist.graph import user_item_graph


@pytest.mark.parametrize("seed", range(3))
def test_user_item_is_the_normalised_adjacency(seed):
    user, item = train_pairs(seed)
    adjacency = np.zeros((USERS, ITEMS))
    adjacency[user, item] = 1
    degrees = np.sqrt(np.outer(adjacency.sum(1), adjacency.sum(0)))
    expected = np.divide(adjacency, degrees, out=np.zeros_like(adjacency), where=adjacency > 0)
    item_user, user_item = user_item_graph.build_user_item_graph(user, item, USERS, ITEMS)
    check_layout(item_user, USERS)
    check_layout(user_item, ITEMS)
    np.testing.assert_allclose(dense(item_user, ITEMS), expected, rtol=1e-6)
    np.testing.assert_allclose(dense(user_item, USERS), expected.T, rtol=1e-6)


def test_weights_are_divided_by_roots_of_their_sums():
    """By hand: user 0 has items 0 and 1 with weights 1 and 1/4, user 1 has item 0 with weight 1/2."""
    user, item, weight = np.int32([1, 0, 0]), np.int32([0, 1, 0]), np.float32([0.5, 0.25, 1])
    item_user, user_item = user_item_graph.build_user_item_graph(user, item, 2, 2, weight=weight)
    assert item_user.weighted_degree.tolist() == [1.25, 0.5]
    assert user_item.weighted_degree.tolist() == [1.5, 0.25]
    assert item_user.degree.tolist() == user_item.degree.tolist() == [2, 1]
    expected = np.array([[1 / (1.25 * 1.5) ** 0.5, 0.25 / (1.25 * 0.25) ** 0.5], [0.5 / (0.5 * 1.5) ** 0.5, 0]])
    np.testing.assert_allclose(dense(item_user, 2), expected, rtol=1e-6)
    np.testing.assert_allclose(dense(user_item, 2), expected.T, rtol=1e-6)


@pytest.mark.parametrize("memory", [1, 200, 3000])
def test_weighted_user_item_is_the_same_in_blocks_of_any_size(memory):
    user, item = train_pairs(5)
    weight = np.random.default_rng(0).random(len(user), np.float32)
    expected = user_item_graph.build_user_item_graph(user, item, USERS, ITEMS, weight=weight)
    with Scratch(memory_bytes=memory) as scratch:
        graphs = user_item_graph.build_user_item_graph(user, item, USERS, ITEMS, scratch, weight)
        for graph, whole in zip(graphs, expected, strict=True):
            assert same(graph, whole)
            assert np.array_equal(graph.weighted_degree, whole.weighted_degree)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.sampled_from([1, 200, 3000, 1 << 20]))
def test_user_item_is_the_same_in_blocks_of_any_size(seed, memory):
    user, item = train_pairs(seed)
    expected = user_item_graph.build_user_item_graph(user, item, USERS, ITEMS)
    with Scratch(memory_bytes=memory) as scratch:
        for graph, whole in zip(
            user_item_graph.build_user_item_graph(user, item, USERS, ITEMS, scratch), expected, strict=True
        ):
            check_layout(graph, USERS if whole is expected[0] else ITEMS)
            assert same(graph, whole)


def test_user_item_reads_mapped_arrays_and_frees_the_sorted_copies(tmp_path):
    user, item = train_pairs(4)
    np.save(tmp_path / "user.npy", user)
    np.save(tmp_path / "item.npy", item)
    mapped = [np.load(tmp_path / name, mmap_mode="r") for name in ("user.npy", "item.npy")]
    with Scratch(memory_bytes=1000) as scratch:
        graphs = user_item_graph.build_user_item_graph(*mapped, USERS, ITEMS, scratch)
        for graph, whole in zip(graphs, user_item_graph.build_user_item_graph(user, item, USERS, ITEMS), strict=True):
            assert same(graph, whole)
            assert isinstance(graph.indices, np.memmap)
        assert len(list(scratch.path.iterdir())) == 4  # indices and weights of both


def test_user_item_without_interactions():
    none = np.zeros(0, np.int32)
    for graph, destinations in zip(user_item_graph.build_user_item_graph(none, none, 3, 2), (3, 2), strict=True):
        check_layout(graph, destinations)


@given(st.lists(st.integers(0, 9), max_size=30), st.integers(1, 25), st.integers(1, 8))
def test_edge_ranges_cover_all_destinations_within_the_limits(degrees, max_edges, max_destinations):
    ends = np.concatenate([[0], np.cumsum(degrees, dtype=np.int64)])
    found = user_item_graph.edge_ranges(ends, max_edges, max_destinations)
    assert [n for part in found for n in range(part.start, part.stop)] == list(range(len(degrees)))
    for part in found:
        assert part.stop - part.start <= max_destinations
        assert part.stop - part.start == 1 or ends[part.stop] - ends[part.start] <= max_edges
