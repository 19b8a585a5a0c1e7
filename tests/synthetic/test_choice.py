"""Choices of items: both methods draw from the same distribution, items are distinct, any pool works."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gtc_dist.synthetic import choice


def test_drawn_candidates_give_the_same_distribution_as_weighing_all(monkeypatch):
    """With many candidates per chosen item, choices follow popularity * exp(strength * taste)."""
    items, k, users = 60, 4, 4000
    rng = np.random.default_rng(0)
    factors = rng.standard_normal((items, k)).astype(np.float32)
    pool = choice.ChoicePool(np.arange(items), factors, -np.log(np.arange(1, items + 1, dtype=np.float32)), 1.0)
    taste, own = np.float32([1, -0.5, 0, 0]), np.float32([0.4, 0.3, 0, 0])
    exact = np.exp(pool.log_popularity + factors @ (taste + own))
    exact /= exact.sum()
    for wanted in (1, 6):
        shares = []
        for limit in (choice.EXACT_CHOICE_ITEMS, 0):
            monkeypatch.setattr(choice, "EXACT_CHOICE_ITEMS", limit)
            args = (taste, np.tile(own, (users, 1)), np.full(users, wanted))
            _, item = pool.choose(np.random.default_rng(1), *args)
            shares.append(np.bincount(item, minlength=items) / users)
        if wanted == 1:
            for share in shares:
                assert np.abs(share - exact).sum() < 0.15  # 60 cells of 4,000 draws: about 0.08 by chance
        else:
            assert np.abs(shares[0] - shares[1]).sum() < 0.4  # six times the draws, both random: about 0.25


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 30), st.booleans(), st.integers(0, 5))
def test_choices_are_distinct_and_as_many_as_asked_for(items, users, exact, seed):
    rng = np.random.default_rng(seed)
    factors = rng.standard_normal((3 * items, 2)).astype(np.float32)
    pool = choice.ChoicePool(np.arange(items) * 3, factors, np.zeros(3 * items), 1.0)
    wanted = np.sort(rng.integers(1, items + 1, users))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "EXACT_CHOICE_ITEMS", 1 << 14 if exact else 0)
        patch.setattr(choice, "PAIR_BLOCK", 100)
        user, item = pool.choose(rng, np.float32([1, 0]), np.zeros((users, 2), np.float32), wanted)
    assert len(set(zip(user.tolist(), item.tolist(), strict=True))) == len(user)
    assert set(item.tolist()) <= set(pool.items.tolist())
    taken = np.bincount(user, minlength=users)
    assert (taken <= wanted).all()
    if exact:
        assert (taken == wanted).all()


@pytest.mark.parametrize("exact", [True, False], ids=["all weighed", "candidates"])
def test_items_outside_the_pool_have_no_influence(exact, monkeypatch):
    """A pool of some rows of the arrays chooses like a pool over only these rows."""
    rng = np.random.default_rng(0)
    factors, popularity = rng.standard_normal((100, 4)).astype(np.float32), rng.random(100, np.float32)
    members = np.sort(rng.permutation(100)[:40])
    wanted = np.arange(1, 31)
    monkeypatch.setattr(choice, "EXACT_CHOICE_ITEMS", 1 << 14 if exact else 0)
    monkeypatch.setattr(choice, "GATHER_ITEMS", 16)
    args = (np.float32([1, 0, -1, 0]), rng.standard_normal((30, 4), np.float32), wanted)
    user, item = choice.ChoicePool(members, factors, popularity, 1.0).choose(np.random.default_rng(1), *args)
    alone = choice.ChoicePool(None, factors[members], popularity[members], 1.0)
    user_alone, item_alone = alone.choose(np.random.default_rng(1), *args)
    assert (user == user_alone).all()
    assert (item == members[item_alone]).all()
