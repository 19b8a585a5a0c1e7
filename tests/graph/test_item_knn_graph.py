"""The item-item graph: exact search equals dense cosines, approximate search is close to exact search."""

import numpy as np
import pytest
from graphs import ITEMS, check_layout, dense, same

from gtc_dist.data.scratch import Scratch
from gtc_dist.graph import item_knn_graph


def slow_item_item(features: dict, weights: dict, k: int) -> np.ndarray:
    """Top k of dense cosines without the item itself, ties to the lower index."""
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


@pytest.mark.parametrize("k", [1, 4, 24, 100])
def test_item_item_equals_the_top_k_of_dense_cosines(k):
    rng = np.random.default_rng(k)
    features = {
        "a": rng.normal(size=(ITEMS, 6)).astype(np.float16),
        "b": rng.normal(size=(ITEMS, 3)).astype(np.float16),
    }
    features["b"][3] = 0  # an item without a vector in one modality
    weights = {"a": 1.0, "b": 2.5}
    graph = item_knn_graph.build_item_knn_graph(features, weights, k, threads=1)
    check_layout(graph, ITEMS)
    assert (graph.degree == min(k, ITEMS - 1)).all()
    np.testing.assert_allclose(dense(graph, ITEMS), slow_item_item(features, weights, k), atol=2e-5)


def test_item_item_weight_zero_excludes_a_modality():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, ITEMS, 5)).astype(np.float16)
    both = item_knn_graph.build_item_knn_graph({"a": a, "b": b}, {"a": 1.0, "b": 0.0}, 4, threads=1)
    alone = item_knn_graph.build_item_knn_graph({"a": a}, {"a": 1.0}, 4, threads=1)
    assert both.indices.tolist() == alone.indices.tolist()
    np.testing.assert_allclose(both.weight, alone.weight, atol=1e-5)


def test_item_item_with_more_duplicates_than_neighbours():
    """An item is never its own neighbour, even if the search returns k + 1 duplicates without the item itself."""
    features = {"a": np.ones((50, 4), np.float16)}
    graph = item_knn_graph.build_item_knn_graph(features, {"a": 1.0}, 3, threads=1)
    check_layout(graph, 50)
    own = np.repeat(np.arange(50), 3)
    assert (graph.indices != own).all()
    np.testing.assert_allclose(graph.weight, 1 / 3, rtol=1e-6)


def test_an_item_without_similar_items_has_only_zero_weights():
    """Zeros (no vector) and negative cosines give weights of zero, without NaN."""
    features = {"a": np.array([[0, 0], [1, 0], [-1, 0], [0, 0], [1, 1]], np.float16)}
    graph = item_knn_graph.build_item_knn_graph(features, {"a": 1.0}, 2, threads=1)
    check_layout(graph, 5)
    weights = dense(graph, 5)
    assert weights.sum(axis=1).tolist() == [0, 1, 0, 0, 1]
    assert weights[1, 4] == weights[4, 1] == 1


@pytest.mark.parametrize("items", [1, 2, 3])
def test_item_item_of_a_tiny_catalog(items):
    graph = item_knn_graph.build_item_knn_graph({"a": np.eye(items, 4).astype(np.float16)}, {"a": 1.0}, 10, threads=1)
    check_layout(graph, items)
    assert (graph.degree == items - 1).all()


def test_item_item_is_reproducible_with_any_number_of_threads():
    features = {"a": np.random.default_rng(5).normal(size=(300, 8)).astype(np.float16)}
    runs = [item_knn_graph.build_item_knn_graph(features, {"a": 1.0}, 5, threads=t) for t in (1, 1, 2)]
    for other in runs[1:]:
        assert np.array_equal(runs[0].indices, other.indices)
        assert np.array_equal(runs[0].weight, other.weight)


def clustered(items: int, groups: int = 40, widths: tuple[int, int] = (48, 32)) -> dict[str, np.ndarray]:
    """Content of two modalities around common cluster centres."""
    rng = np.random.default_rng(groups)
    group = rng.integers(0, groups, items)
    out = {}
    for name, width in zip("ab", widths, strict=True):
        centres = rng.normal(size=(groups, width))
        out[name] = (centres[group] + 0.5 * rng.normal(size=(items, width))).astype(np.float16)
    return out


WEIGHTS = {"a": 1.0, "b": 0.5}


def approximate(content: dict, k: int = 10, probes: int = 8, **options):
    options = {"search": "approximate", "probes": probes, "threads": 1} | options
    return item_knn_graph.build_item_knn_graph(content, WEIGHTS, k, **options)


def test_auto_search_is_exact_for_few_items():
    assert not item_knn_graph.is_approximate("auto", item_knn_graph.EXACT_ITEMS)
    assert item_knn_graph.is_approximate("auto", item_knn_graph.EXACT_ITEMS + 1)
    assert item_knn_graph.is_approximate("approximate", 3)
    assert not item_knn_graph.is_approximate("exact", 1 << 40)


def test_exact_search_in_several_blocks():
    """More items than one block, with duplicates in different blocks: ties go to the lower index."""
    items = item_knn_graph.ITEM_BLOCK + 300
    content = {"a": np.random.default_rng(0).integers(-2, 3, (items, 6)).astype(np.float16)}
    graph = item_knn_graph.build_item_knn_graph(content, {"a": 1.0}, 5, threads=1, search="exact")
    check_layout(graph, items)
    x = content["a"].astype(np.float64)
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)
    for i in np.r_[0:50, items - 50 : items]:
        similarity = x @ x[i]
        similarity[i] = -2
        near = np.argsort(-np.round(similarity, 5), kind="stable")[:5]
        found = graph.indices[graph.indptr[i] : graph.indptr[i + 1]]
        np.testing.assert_allclose(np.sort(similarity[found]), np.sort(similarity[near]), atol=1e-6)
    assert item_knn_graph.graph_recall(graph, content, {"a": 1.0}, 1) == 1.0


def test_approximate_search_is_exact_when_all_lists_are_searched():
    content = clustered(3000, widths=(10, 6))  # narrow enough for the projection to keep all directions
    exact = item_knn_graph.build_item_knn_graph(content, WEIGHTS, 10, threads=1)
    graph = approximate(content, probes=3000 // item_knn_graph.LIST_ITEMS)
    check_layout(graph, 3000)
    assert np.array_equal(graph.indices, exact.indices)
    np.testing.assert_allclose(graph.weight, exact.weight, atol=1e-6)
    assert item_knn_graph.graph_recall(graph, content, WEIGHTS, 1) == 1.0


def test_approximate_search_finds_most_and_more_with_more_probes():
    content = clustered(10_000, groups=10, widths=(10, 6))
    exact = item_knn_graph.build_item_knn_graph(content, WEIGHTS, 10, threads=1)
    recalls = []
    for probes in (1, 3, 12):
        graph = approximate(content, probes=probes)
        check_layout(graph, 10_000)
        same_edges = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(*_rows(graph, exact, 10), strict=True)])
        recalls.append(item_knn_graph.graph_recall(graph, content, WEIGHTS, 1, sample=10_000))
        assert recalls[-1] == pytest.approx(same_edges, abs=0.002)  # equals the overlap with the exact graph
        sampled = item_knn_graph.graph_recall(graph, content, WEIGHTS, 1, sample=1000)
        assert sampled == pytest.approx(recalls[-1], abs=0.03)
    assert recalls == sorted(recalls)
    assert recalls[0] < 0.95
    assert recalls[-1] > 0.98


def _rows(*graphs_and_k):
    *graphs, k = graphs_and_k
    return [graph.indices.reshape(-1, k).tolist() for graph in graphs]


def test_approximate_search_is_reproducible_with_any_memory_and_threads():
    content = clustered(9000, groups=10, widths=(10, 6))
    first = approximate(content, probes=2)
    assert same(first, approximate(content, probes=2))
    assert same(first, approximate(content, probes=2, threads=2))
    for memory in (1 << 17, 1 << 22):
        with Scratch(memory_bytes=memory) as scratch:
            assert same(first, approximate(content, probes=2, scratch=scratch))
    other = approximate(content, probes=2, seed=1)
    assert not np.array_equal(first.indices, other.indices)  # other lists, so other neighbours are missed


def test_approximate_search_reads_mapped_content_and_reports_progress(tmp_path):
    content = clustered(9000)
    mapped, seen = {}, []
    for name, matrix in content.items():
        np.save(tmp_path / f"{name}.npy", matrix)
        mapped[name] = np.load(tmp_path / f"{name}.npy", mmap_mode="r")
    with Scratch() as scratch:
        graph = approximate(mapped, scratch=scratch, progress=lambda *done: seen.append(done))
        assert isinstance(graph.indices, np.memmap)
        assert same(graph, approximate(content))
        assert item_knn_graph.graph_recall(graph, mapped, WEIGHTS, 1, scratch=scratch) > 0.9
    assert seen == [(item_knn_graph.ITEM_BLOCK, 9000), (9000, 9000)]


def test_approximate_search_of_items_without_a_vector():
    """As in exact search, their neighbours are the lowest indexes, with weights of zero."""
    content = clustered(2000, widths=(10, 6))
    without = [0, 3, 700, 1999]
    for matrix in content.values():
        matrix[without] = 0
    content["a"][5] = 0  # has a vector in the other modality
    exact = item_knn_graph.build_item_knn_graph(content, WEIGHTS, 4, threads=1)
    graph = approximate(content, k=4)
    check_layout(graph, 2000)
    found, expected = graph.indices.reshape(-1, 4), exact.indices.reshape(-1, 4)
    assert found[without].tolist() == [[1, 2, 3, 4], [0, 1, 2, 4], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert found[without].tolist() == expected[without].tolist()
    assert not np.isin(np.delete(found, without, axis=0), without).any()
    assert (graph.weight.reshape(-1, 4)[without] == 0).all()
    np.testing.assert_allclose(graph.weight, exact.weight, atol=1e-6)


@pytest.mark.parametrize("items", [1, 2, 3, 12])
@pytest.mark.parametrize("empty", [0, 1, 12])
def test_approximate_search_of_a_tiny_catalog(items, empty):
    content = {name: matrix[:items] for name, matrix in clustered(12).items()}
    for matrix in content.values():
        matrix[:empty] = 0
    graph = approximate(content, k=10)
    check_layout(graph, items)
    assert (graph.degree == min(10, items - 1)).all()
    sums = dense(graph, items).sum(axis=1)
    assert (sums[:empty] == 0).all()
    assert (np.isclose(sums, 0) | np.isclose(sums, 1)).all()
    exact = item_knn_graph.build_item_knn_graph(content, WEIGHTS, 10, threads=1)
    np.testing.assert_allclose(dense(graph, items), dense(exact, items), atol=1e-6)


def test_approximate_search_with_many_duplicates():
    """Duplicates fill whole lists: an item finds its duplicates, never itself."""
    content = clustered(2000)
    for matrix in content.values():
        matrix[500:1700] = matrix[500]
    graph = approximate(content, k=5, probes=2)
    check_layout(graph, 2000)
    found = graph.indices.reshape(-1, 5)
    assert (found != np.arange(2000)[:, None]).all()
    assert ((found[500:1700] >= 500) & (found[500:1700] < 1700)).all()
    np.testing.assert_allclose(graph.weight.reshape(-1, 5)[500:1700], 0.2, rtol=1e-5)


@pytest.mark.parametrize("items", [1, 300, 10**5, 10**6, 33 * 10**6, 10**9])
def test_lists_grow_with_the_catalog_and_are_sampled(items):
    lists, size = item_knn_graph.lists_and_sample(items)
    assert 1 <= lists <= size <= items
    assert size >= min(item_knn_graph.LEAST_LIST_SAMPLE * lists, items)
    assert lists <= 8 * items**0.5


def test_approximate_search_of_more_lists_than_the_sample_had(monkeypatch):
    """As from 33 M items on, where a sample of fixed size had fewer items than there were lists."""
    monkeypatch.setattr(item_knn_graph, "LIST_ITEMS", 4)
    monkeypatch.setattr(item_knn_graph, "MIN_SAMPLE", 50)
    monkeypatch.setattr(item_knn_graph, "MAX_SAMPLE", 50)
    features = {"a": np.random.default_rng(0).normal(size=(600, 8)).astype(np.float16)}
    options = {"search": "approximate", "probes": 60}
    graph = item_knn_graph.build_item_knn_graph(features, {"a": 1.0}, 5, 1, **options)
    check_layout(graph, 600)
    assert item_knn_graph.lists_and_sample(600)[0] > 50
    assert item_knn_graph.graph_recall(graph, features, {"a": 1.0}, 1) > 0.9
