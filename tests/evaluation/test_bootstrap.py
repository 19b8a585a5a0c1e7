"""The paired bootstrap: its interval holds what it should, and it uses that users are paired."""

import numpy as np
import pytest

from gtc_dist.evaluation import bootstrap


def test_the_interval_is_that_of_the_mean_difference():
    """Against the normal approximation, for many users."""
    rng = np.random.default_rng(0)
    theirs = rng.random(4000)
    ours = theirs + rng.normal(0.02, 0.3, 4000)
    told = bootstrap.paired({"a": ours}, {"a": theirs})["a"]
    difference = ours - theirs
    half = 1.96 * difference.std() / np.sqrt(4000)
    assert told["difference"] == pytest.approx(difference.mean())
    assert told["low"] == pytest.approx(difference.mean() - half, abs=0.1 * half)
    assert told["high"] == pytest.approx(difference.mean() + half, abs=0.1 * half)


def test_it_covers_the_truth_as_often_as_it_says():
    covered = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        theirs = rng.random(300)
        told = bootstrap.paired({"a": theirs + rng.normal(0.1, 1, 300)}, {"a": theirs}, seed)["a"]
        covered += told["low"] <= 0.1 <= told["high"]
    assert 88 <= covered <= 99


def test_what_both_find_hard_cancels_out():
    hard = np.random.default_rng(1).random(500)
    told = bootstrap.paired({"a": hard + 0.01}, {"a": hard})["a"]
    assert told["low"] == pytest.approx(0.01)
    assert told["high"] == pytest.approx(0.01)


def test_metrics_keep_their_names_and_nobody_gives_nothing():
    ours = {"b": np.zeros(0), "a": np.zeros(0)}
    assert bootstrap.paired(ours, ours) == {n: {"difference": 0.0, "low": 0.0, "high": 0.0} for n in ("b", "a")}
