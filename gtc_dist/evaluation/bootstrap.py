"""Paired bootstrap over users: whether one run ranks better than another beyond the luck of who is in the split.

Both runs rank for the same users, so what makes a user easy or hard cancels out: the interval is that of the mean
difference (Efron and Tibshirani 1993; percentiles). It says nothing of what another seed of training would give.
"""

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95


def paired(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], seed: int = 0) -> dict[str, dict[str, float]]:
    """Mean difference of each metric, with its interval.

    Args:
        ours, theirs: metric -> float64 [users], the same users in the same order.

    Returns:
        metric -> {"difference": ours less theirs, "low": ..., "high": ... of the 95 % interval}.
    """
    names = list(ours)
    difference = np.stack([ours[name] - theirs[name] for name in names], axis=1)
    users = len(difference)
    if not users:
        return {name: {"difference": 0.0, "low": 0.0, "high": 0.0} for name in names}
    rng = np.random.default_rng(seed)
    means = np.empty((RESAMPLES, len(names)))
    for n in range(RESAMPLES):
        times = np.bincount(rng.integers(0, users, users), minlength=users)
        means[n] = times @ difference / users
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    centre = difference.mean(axis=0)
    return {
        name: {"difference": float(centre[k]), "low": float(low[k]), "high": float(high[k])}
        for k, name in enumerate(names)
    }
