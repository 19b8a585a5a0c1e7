"""Inverted lists that suit the users, against a search by hand and lists by direction."""

import faiss
import numpy as np
import pytest

from gtc_dist.embedding_formats.inverted_lists import InvertedLists, list_count

DIM, ITEMS, LISTS = 24, 4000, 60


@pytest.fixture(scope="module")
def rows() -> tuple[np.ndarray, np.ndarray]:
    """(users, items) in eight directions; norms of items differ as those of popular items do, and all users share one
    large column."""
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((8, DIM))
    users = rng.standard_normal((600, 8)) @ directions + 0.1 * rng.standard_normal((600, DIM))
    items = rng.standard_normal((ITEMS, 8)) @ directions / DIM + 0.3 * rng.standard_normal((ITEMS, DIM))
    items *= np.exp(1.0 * rng.standard_normal((ITEMS, 1)))
    users[:, 0] = 3
    return users.astype(np.float32), items.astype(np.float32)


def recall(index, queries: np.ndarray, items: np.ndarray, ids: np.ndarray) -> float:
    best = ids[np.argsort(-(queries.astype(np.float64) @ items.T), axis=1)[:, :20]]
    found = index.search(queries, 20)[1]
    return float(np.mean([len(set(a) & set(b)) / 20 for a, b in zip(found.tolist(), best.tolist(), strict=True)]))


def filled(users: np.ndarray, items: np.ndarray, ids: np.ndarray):
    builder = InvertedLists(items[:3000], users, LISTS)
    for first in range(0, len(items), 700):
        builder.add(items[first : first + 700], ids[first : first + 700])
    return builder.finish()


def test_a_search_of_all_lists_is_exact(rows):
    users, items = rows
    ids = np.random.default_rng(1).permutation(ITEMS).astype(np.int64) * 3
    index = faiss.deserialize_index(faiss.serialize_index(filled(users[100:], items, ids)))
    assert index.ntotal == ITEMS
    index.nprobe = LISTS
    assert recall(index, users[:100], items, ids) == pytest.approx(1, abs=1e-3)


def test_a_few_lists_hold_more_of_the_best_items_than_lists_by_direction(rows):
    users, items = rows
    ids = np.arange(ITEMS)
    by_direction = faiss.index_factory(DIM, f"IVF{LISTS},Flat", faiss.METRIC_INNER_PRODUCT)
    by_direction.train(items)
    by_direction.add(items)
    index = filled(users[100:], items, ids)
    index.nprobe = by_direction.nprobe = 6
    assert recall(index, users[:100], items, ids) > recall(by_direction, users[:100], items, ids) + 0.1


def test_the_quantizer_has_the_mean_item_of_each_list(rows):
    users, items = rows
    index = filled(users, items, np.arange(ITEMS))
    means = index.quantizer.reconstruct_n(0, LISTS)
    for number in range(LISTS):
        size = index.invlists.list_size(number)
        inside = faiss.rev_swig_ptr(index.invlists.get_ids(number), size) if size else np.empty(0, np.int64)
        want = items[inside].mean(axis=0) if size else np.zeros(DIM)
        np.testing.assert_allclose(means[number], want, atol=1e-5)


def test_without_users_items_are_grouped_as_they_are(rows):
    index = filled(np.empty((0, DIM), np.float32), rows[1], np.arange(ITEMS))
    index.nprobe = LISTS
    assert recall(index, rows[0][:20], rows[1], np.arange(ITEMS)) == pytest.approx(1, abs=1e-3)


def test_the_number_of_lists():
    assert [list_count(n) for n in (0, 1, 640, 1_000_000)] == [1, 1, 10, 4000]
