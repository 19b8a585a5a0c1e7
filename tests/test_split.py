"""Cleaning and splitting against slow plain references, on random interactions."""

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gtc_dist.data import split

QUICK = settings(deadline=None, max_examples=80)


pairs = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), min_size=1, max_size=60)


def slow_core(edges: set[tuple], k: int) -> set[tuple]:
    while True:
        users, items = Counter(u for u, _ in edges), Counter(i for _, i in edges)
        kept = {(u, i) for u, i in edges if users[u] >= k and items[i] >= k}
        if kept == edges:
            return kept
        edges = kept


@QUICK
@given(pairs, st.integers(1, 5))
def test_k_core_is_the_fixed_point(rows, k):
    edges = sorted(set(rows))
    user, item = (np.array(c) for c in zip(*edges, strict=True))
    kept = split.k_core(user, item, k)
    assert {edges[r] for r in kept} == slow_core(set(edges), k)
    assert len(set(kept.tolist())) == len(kept)


@QUICK
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 2), st.integers(0, 9)), min_size=1))
def test_merging_keeps_the_earliest_of_each_pair_of_a_split(rows):
    user, item, codes, time = (np.array(c) for c in zip(*rows, strict=True))
    kept = split.merge_duplicates(user, item, codes, time)
    earliest: dict[tuple, int] = {}
    for u, i, s, t in rows:
        earliest[s, u, i] = min(t, earliest.get((s, u, i), t))
    assert [(int(codes[r]), int(user[r]), int(item[r]), int(time[r])) for r in kept] == [
        (*key, t) for key, t in sorted(earliest.items())
    ]


timed = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9), st.integers(0, 6)), min_size=1, max_size=60)


def columns(rows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """user, item, time of distinct pairs."""
    distinct = {(u, i): t for u, i, t in rows}
    return tuple(np.array(c) for c in zip(*((u, i, t) for (u, i), t in distinct.items()), strict=True))


@QUICK
@given(timed, st.floats(0, 0.5), st.floats(0, 0.4))
def test_global_time_orders_the_splits(rows, valid_share, test_share):
    user, item, time = columns(rows)
    codes = split.global_time(time, user, item, valid_share, test_share)
    assert np.bincount(codes, minlength=3)[1:].tolist() == [
        round(len(time) * valid_share),
        round(len(time) * test_share),
    ]
    for before, after in ((0, 1), (1, 2), (0, 2)):
        if (codes == before).any() and (codes == after).any():
            assert time[codes == before].max() <= time[codes == after].min()


@QUICK
@given(timed)
def test_leave_last_out_takes_each_users_last_two(rows):
    user, item, time = columns(rows)
    codes = split.leave_last_out(time, user, item)
    for u in set(user.tolist()):
        history = sorted((time[r], item[r], codes[r]) for r in np.flatnonzero(user == u))
        expected = {1: [0], 2: [0, 2]}.get(len(history), [0] * (len(history) - 2) + [1, 2])
        assert [code for _, _, code in history] == expected


@QUICK
@given(timed, st.floats(0, 0.5), st.floats(0, 0.4), st.integers(0, 5))
def test_ratio_keeps_every_user_in_train_and_rounds_to_a_neighbouring_count(rows, valid_share, test_share, seed):
    user, _, _ = columns(rows)
    codes = split.ratio(user, valid_share, test_share, np.random.default_rng(seed))
    assert (codes == split.ratio(user, valid_share, test_share, np.random.default_rng(seed))).all()
    for u in set(user.tolist()):
        n = np.sum(user == u)
        train, valid, test = np.bincount(codes[user == u], minlength=3)
        assert train >= 1
        assert test <= np.floor(n * test_share) + 1
        assert valid <= np.floor(n * valid_share) + 1


def test_ratio_holds_over_many_short_histories():
    user = np.repeat(np.arange(20_000), 3)
    counts = np.bincount(split.ratio(user, 0.1, 0.2, np.random.default_rng(0)))
    np.testing.assert_allclose(counts / len(user), [0.7, 0.1, 0.2], atol=0.01)
