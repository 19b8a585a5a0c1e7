"""Cleaning and splitting against slow references, on random interactions."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_files import slow_core

from gtc_dist.data.scratch import Scratch
from gtc_dist.prepare import split

QUICK = settings(deadline=None, max_examples=80)


memory = st.sampled_from([1, 500, 1 << 20])  # bytes: blocks of one row, several, all


pairs = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), min_size=1, max_size=60)


@QUICK
@given(pairs, st.integers(1, 5), memory)
def test_k_core_is_the_fixed_point(rows, k, memory):
    edges = sorted(set(rows))
    user, item = (np.array(c) for c in zip(*edges, strict=True))
    row = np.arange(len(edges))
    with Scratch(memory_bytes=memory) as scratch:
        left = split.k_core([user, item, row], 8, 8, k, scratch)
    kept = row[:left].tolist()
    assert {edges[r] for r in kept} == slow_core(set(edges), k)
    assert kept == sorted(set(kept))
    assert list(zip(user[:left].tolist(), item[:left].tolist(), strict=True)) == [edges[r] for r in kept]


@QUICK
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 2), st.integers(0, 9)), min_size=1))
def test_merging_keeps_the_earliest_of_each_pair_of_a_split(rows):
    user, item, codes, time = (np.array(c) for c in zip(*rows, strict=True))
    kept = split.merge_duplicates(user, item, codes, time)
    earliest: dict[tuple, int] = {}
    for u, i, s, t in rows:
        earliest[u, s, i] = min(t, earliest.get((u, s, i), t))
    assert [(int(user[r]), int(codes[r]), int(item[r]), int(time[r])) for r in kept] == [
        (*key, t) for key, t in sorted(earliest.items())
    ]


timed = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9), st.integers(0, 6)), min_size=1, max_size=60)


def columns(rows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """user, item, time of distinct pairs."""
    distinct = {(u, i): t for u, i, t in rows}
    return tuple(np.array(c) for c in zip(*((u, i, t) for (u, i), t in distinct.items()), strict=True))


moments = st.one_of(
    st.lists(st.integers(0, 3), min_size=1, max_size=60),
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=60),
    st.lists(st.sampled_from([-1.5, -0.0, 0.0, 2e-310, 3.25]), min_size=1, max_size=60),
    st.lists(st.floats(allow_nan=False), min_size=1, max_size=60),
)


@QUICK
@given(moments, st.floats(0, 1), memory)
def test_a_time_cut_is_the_stable_sort_cut_at_a_rank(times, share, memory):
    time = np.array(times)
    rank = round(len(time) * share)
    expected = np.ones(len(time), bool)
    expected[np.argsort(time, kind="stable")[:rank]] = False
    with Scratch(memory_bytes=memory) as scratch:
        cut = split.TimeCut(time, rank, scratch)
        assert np.concatenate([cut.after(time[block]) for block in scratch.blocks(len(time), 48)]).tolist() == (
            expected.tolist()
        )


@QUICK
@given(timed)
def test_leave_last_out_takes_the_last_two_of_each_user(rows):
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
    user = np.sort(user)
    sizes = np.unique(user, return_counts=True)[1]
    codes = split.ratio(user, valid_share, test_share, split.ratio_generators([seed], len(user), len(sizes)))
    whole = [np.random.default_rng([seed])] * 3  # one stream
    assert (codes == split.ratio(user, valid_share, test_share, whole)).all()
    generators = split.ratio_generators([seed], len(user), len(sizes))  # user by user
    parts = [split.ratio(part, valid_share, test_share, generators) for part in np.split(user, np.cumsum(sizes)[:-1])]
    assert (codes == np.concatenate(parts)).all()
    for u in set(user.tolist()):
        n = np.sum(user == u)
        train, valid, test = np.bincount(codes[user == u], minlength=3)
        assert train >= 1
        assert test <= np.floor(n * test_share) + 1
        assert valid <= np.floor(n * valid_share) + 1


def test_ratio_holds_over_many_short_histories():
    user = np.repeat(np.arange(20_000), 3)
    counts = np.bincount(split.ratio(user, 0.1, 0.2, split.ratio_generators([0], len(user), 20_000)))
    np.testing.assert_allclose(counts / len(user), [0.7, 0.1, 0.2], atol=0.01)
