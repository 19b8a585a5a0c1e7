"""Paired bootstrap over users: does one run rank better than another, beyond the choice of users in the split?

Both runs rank for the same users, so the difficulty of a user cancels out: the interval is that of the mean difference
(Efron and Tibshirani 1993, percentile method). It does not cover the variance between training seeds.
"""

import numpy as np
from scipy.stats import bootstrap

RESAMPLES = 2000
LEVEL = 0.95
BATCH_VALUES = 1 << 22  # resampled users held at once: bounds memory


def paired_bootstrap(
    ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], seed: int = 0
) -> dict[str, dict[str, float]]:
    """Mean difference of each metric with its confidence interval.

    Args:
        ours, theirs: metric -> float64 [users], the same users in the same order.

    Returns:
        metric -> {"difference": ours less theirs, "low": ..., "high": ... of the 95 % interval, "standard_error": of
        the difference, 0 for fewer than two users}.
    """
    names = list(ours)
    difference = np.stack([ours[name] - theirs[name] for name in names], axis=1)
    users = len(difference)
    centre = difference.mean(axis=0) if users else np.zeros(len(names))
    low = high = centre
    error = np.zeros(len(names))
    if users > 1:
        error = difference.std(axis=0, ddof=1) / users**0.5

        def mean_difference(sample: np.ndarray, axis: int) -> np.ndarray:
            """Means [metrics, resamples] over the users of each resample [resamples, users]."""
            counts = np.apply_along_axis(np.bincount, axis, sample.astype(np.int64), minlength=users)
            return (counts @ difference / users).T

        low, high = bootstrap(
            (np.arange(users),),
            mean_difference,
            n_resamples=RESAMPLES,
            batch=max(BATCH_VALUES // users, 1),
            vectorized=True,
            confidence_level=LEVEL,
            method="percentile",
            rng=np.random.default_rng(seed),
        ).confidence_interval
    columns = {"difference": centre, "low": low, "high": high, "standard_error": error}
    return {name: {key: float(column[k]) for key, column in columns.items()} for k, name in enumerate(names)}
