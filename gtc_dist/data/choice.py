"""Users choose items: sampling without replacement by Gumbel top-k, over all items or over drawn candidates.

P(user u takes item i) ~ popularity_i * exp(strength * <taste_u, factors_i>). Users come in groups of a common taste, so
what is common is computed once for a group and only a user's deviation for each user and item. No loop over pairs;
memory is bounded by BLOCK. Used by `synthetic.py`.
"""

from collections.abc import Iterator

import numpy as np

EXACT_ITEMS = 1 << 14  # up to so many items are all weighed for every user; beyond, candidates are drawn first
BLOCK = 1 << 22  # users x candidates weighed at once


class Pool:
    """Items to choose from.

    Args:
        items: their indexes, [N]. factors: float32 [N, K]. log_popularity: float32 [N].
        strength: of taste against popularity.
    """

    def __init__(self, items: np.ndarray, factors: np.ndarray, log_popularity: np.ndarray, strength: float):
        self.items, self.factors, self.log_popularity = items, factors, log_popularity
        self.strength = np.float32(strength)

    def choose(self, rng, taste: np.ndarray, deviation: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Items for users of one group, without replacement, by Gumbel top-k.

        With many items, candidates are first drawn from the group's distribution (with replacement) and then weighed
        by the user's deviation from it. An item's best key over its draws grows with how often it was drawn, so the
        outcome tends to the exact one as the candidates grow in number.

        Args:
            taste: of the group, [K]. deviation: of each user from it, [U, K]. count: wanted items of each user, [U].

        Returns:
            (user position, item) of the choices.
        """
        relevant = np.flatnonzero(taste)
        factors = self.factors[:, relevant]
        shared = self.log_popularity + self.strength * dot(factors, taste[relevant])
        exact = len(self.items) <= EXACT_ITEMS
        if not exact:
            cumulative = np.cumsum(np.exp(shared - shared.max(), dtype=np.float64))
        users, items = [], []
        for rows in _blocks(count, len(self.items) if exact else None):
            most = int(count[rows].max())
            own = self.strength * deviation[rows][:, relevant]
            if exact:
                candidates = np.arange(len(self.items))[None, :]
                keys = shared + dot(own, factors)
            else:
                draws = rng.random((rows.stop - rows.start, _candidates(most))) * cumulative[-1]
                candidates = np.minimum(np.searchsorted(cumulative, draws, "right"), len(cumulative) - 1)
                keys = np.einsum("uk,umk->um", own, factors[candidates])
            exponential = np.maximum(rng.standard_exponential(keys.shape, np.float32), np.float32(1e-12))
            keys = keys - np.log(exponential)  # plus Gumbel noise
            best = _descending(keys, min(most, keys.shape[1]) if exact else keys.shape[1])
            candidates = np.take_along_axis(np.broadcast_to(candidates, keys.shape), best, 1)
            new = np.ones(candidates.shape, bool) if exact else _first_occurrence(candidates)
            taken = new & (np.cumsum(new, 1) <= count[rows][:, None])
            row, column = np.nonzero(taken)
            users.append(row + rows.start)
            items.append(self.items[candidates[row, column]])
        return np.concatenate(users), np.concatenate(items)


def _candidates(wanted: int) -> int:
    """Draws for a user who wants so many different items."""
    return 64 + 8 * wanted


def _blocks(count: np.ndarray, width: int | None) -> Iterator[slice]:
    """Runs of users (sorted by count) with about BLOCK candidates; `width` of each, or by what the largest wants."""
    start = 0
    while start < len(count):
        rows = max(1, BLOCK // (width or _candidates(int(count[start]))))
        if width is None:  # the last user of the block has the most candidates
            last = min(start + rows, len(count)) - 1
            rows = max(1, BLOCK // _candidates(int(count[last])))
        stop = min(start + rows, len(count))
        yield slice(start, stop)
        start = stop


def dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Inner products of rows. Not BLAS, whose rounding may depend on its number of threads."""
    return np.einsum("ik,k->i", a, b) if b.ndim == 1 else np.einsum("ik,jk->ij", a, b)


def _descending(keys: np.ndarray, top: int) -> np.ndarray:
    """Positions of each row's `top` largest keys, largest first."""
    best = np.argpartition(-keys, top - 1, axis=1)[:, :top]
    return np.take_along_axis(best, np.argsort(-np.take_along_axis(keys, best, 1), axis=1, kind="stable"), 1)


def _first_occurrence(values: np.ndarray) -> np.ndarray:
    """Marks in each row the first place of every value."""
    order = np.argsort(values, axis=1, kind="stable")
    ordered = np.take_along_axis(values, order, 1)
    first = np.ones(values.shape, bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    out = np.empty_like(first)
    np.put_along_axis(out, order, first, 1)
    return out
