"""The paired bootstrap: coverage of its interval, and pairing of the users."""

import numpy as np
import pytest

from gtc_dist.evaluation.bootstrap import paired_bootstrap


def test_the_interval_is_that_of_the_mean_difference():
    """Against the normal approximation, for many users."""
    rng = np.random.default_rng(0)
    theirs = rng.random(4000)
    ours = theirs + rng.normal(0.02, 0.3, 4000)
    result = paired_bootstrap({"a": ours}, {"a": theirs})["a"]
    difference = ours - theirs
    half = 1.96 * difference.std() / np.sqrt(4000)
    assert result["difference"] == pytest.approx(difference.mean())
    assert result["standard_error"] == pytest.approx(difference.std(ddof=1) / np.sqrt(4000))
    assert result["low"] == pytest.approx(difference.mean() - half, abs=0.1 * half)
    assert result["high"] == pytest.approx(difference.mean() + half, abs=0.1 * half)


def test_coverage_is_that_of_the_level():
    covered = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        theirs = rng.random(300)
        result = paired_bootstrap({"a": theirs + rng.normal(0.1, 1, 300)}, {"a": theirs}, seed)["a"]
        covered += result["low"] <= 0.1 <= result["high"]
    assert 88 <= covered <= 99


def test_difficulty_of_a_user_cancels_out():
    hard = np.random.default_rng(1).random(500)
    result = paired_bootstrap({"a": hard + 0.01}, {"a": hard})["a"]
    assert result["low"] == pytest.approx(0.01)
    assert result["high"] == pytest.approx(0.01)


def test_metrics_keep_their_names_without_users():
    ours = {"b": np.zeros(0), "a": np.zeros(0)}
    zero = {"difference": 0.0, "low": 0.0, "high": 0.0, "standard_error": 0.0}
    assert paired_bootstrap(ours, ours) == dict.fromkeys(("b", "a"), zero)


def test_one_user_has_an_interval_of_no_width():
    result = paired_bootstrap({"a": np.array([0.5])}, {"a": np.array([0.25])})
    assert result == {"a": {"difference": 0.25, "low": 0.25, "high": 0.25, "standard_error": 0.0}}
