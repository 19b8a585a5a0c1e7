"""Users choose items: sampling without replacement by Gumbel top-k, over all items or over drawn candidates.

P(user u takes item i) ~ popularity_i * exp(strength * <taste_u, factors_i>). Users come in groups of a common taste, so
what is common is computed once for a group and only a user's deviation for each user and item. No loop over pairs.

Memory beside the arrays that a `Pool` refers to: 16 bytes an item while a group chooses, and BLOCK. Used by
`synthetic.py`.
"""

from collections.abc import Iterator

import numpy as np

EXACT_ITEMS = 1 << 14  # up to so many items are all weighed for every user; beyond, candidates are drawn first
DRAWS, DRAWS_EACH = 1024, 32  # candidates of a user, and more for each wanted item
PAIR_BLOCK = 1 << 18  # pairs of a user and a candidate weighed at once; of fewer than 65,536 users
SLAB = 1 << 16  # items whose factors are gathered at once


class Pool:
    """Items to choose from.

    Args:
        items: their indexes, [N], among the rows of the other two; None for all.
        factors: float32 [items of the catalog, K], not copied. log_popularity: float32 [items of the catalog].
        strength: of taste against popularity.
    """

    def __init__(self, items: np.ndarray | None, factors: np.ndarray, log_popularity: np.ndarray, strength: float):
        self.items, self.factors, self.log_popularity = items, factors, log_popularity
        self.strength = np.float32(strength)
        self.size = len(factors) if items is None else len(items)

    def choose(self, rng, taste: np.ndarray, deviation: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Items for users of one group, without replacement, by Gumbel top-k.

        Args:
            taste: of the group, [K]. deviation: of each user from it, [U, K]. count: wanted items of each user, [U],
                ascending.

        Returns:
            (user position, item) of the choices.
        """
        relevant = np.flatnonzero(taste)
        shared = self._shared(taste, relevant)
        draw = self._weigh_all if self.size <= EXACT_ITEMS else self._draw_candidates
        users, items = zip(*draw(rng, shared, relevant, deviation, count), strict=True)
        chosen = np.concatenate(items)
        return np.concatenate(users), chosen if self.items is None else self.items[chosen]

    def _shared(self, taste: np.ndarray, relevant: np.ndarray) -> np.ndarray:
        """log(popularity) + strength * <taste, factors> of all items of the pool, float32 [N]."""
        shared = np.empty(self.size, np.float32)
        for start in range(0, self.size, SLAB):
            slab = slice(start, start + SLAB)
            rows = slab if self.items is None else self.items[slab]
            liking = self.strength * dot_rows(self.factors[rows][:, relevant], taste[relevant])
            shared[slab] = self.log_popularity[rows] + liking
        return shared

    def _weigh_all(self, rng, shared, relevant, deviation, count) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Choices among all items, exactly: the largest of weight plus Gumbel noise."""
        factors = (self.factors if self.items is None else self.factors[self.items])[:, relevant]
        for rows in _blocks(np.full(len(count), self.size)):
            own = self.strength * deviation[rows][:, relevant]
            keys = shared + dot_rows(own, factors) + _gumbel(rng, (len(own), self.size))
            best = _descending(keys, min(int(count[rows].max()), self.size))
            row, column = np.nonzero(np.arange(best.shape[1]) < count[rows][:, None])
            yield row + rows.start, best[row, column]

    def _draw_candidates(self, rng, shared, relevant, deviation, count) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Choices among candidates that are drawn from the group's distribution, with replacement.

        They are weighed by the user's deviation from the group. The largest of m Gumbel keys is one Gumbel key plus
        log(m), so a candidate that was drawn m times gets log(m); the outcome tends to the exact one as the candidates
        grow in number.
        """
        cumulative = np.subtract(shared, shared.max(), dtype=np.float64)
        np.cumsum(np.exp(cumulative, out=cumulative), out=cumulative)
        draws = DRAWS + DRAWS_EACH * count
        for rows in _blocks(draws):
            drawn = np.repeat(np.arange(rows.stop - rows.start), draws[rows])
            pairs = np.sort(drawn * self.size + _search(cumulative, rng.random(len(drawn)) * cumulative[-1]))
            first = np.flatnonzero(np.diff(pairs, prepend=-1))
            row, candidate = np.divmod(pairs[first], self.size)
            times = np.diff(first, append=len(pairs)).astype(np.float32)
            own = self.strength * deviation[rows]
            item = candidate if self.items is None else self.items[candidate]
            keys = np.einsum("ek,ek->e", own[row][:, relevant], self.factors[item][:, relevant])
            keys += np.log(times) + _gumbel(rng, len(keys))
            best = np.argsort(-keys)
            best = best[np.argsort(row[best].astype(np.uint16), kind="stable")]  # by user, and in each by key
            place = np.arange(len(row)) - np.searchsorted(row, row)
            taken = place < count[rows][row]
            yield row[taken] + rows.start, candidate[best[taken]]


def _blocks(width: np.ndarray) -> Iterator[slice]:
    """Runs of users with about BLOCK pairs, given the pairs of each user."""
    ends = np.cumsum(width)
    start = 0
    while start < len(ends):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + PAIR_BLOCK, "right")))
        yield slice(start, stop)
        start = stop


def dot_rows(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Inner products of rows. Not BLAS, whose rounding may depend on its number of threads."""
    return np.einsum("ik,k->i", a, b) if b.ndim == 1 else np.einsum("ik,jk->ij", a, b)


def _gumbel(rng, shape) -> np.ndarray:
    return -np.log(np.maximum(rng.standard_exponential(shape, np.float32), np.float32(1e-12)))


def _search(cumulative: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Items that values in [0, sum of weights] fall on. In sorted order the caches help: 5 times faster."""
    order = np.argsort(values)
    found = np.empty(len(values), np.int64)
    found[order] = np.searchsorted(cumulative, values[order], "right")
    return np.minimum(found, len(cumulative) - 1)


def _descending(keys: np.ndarray, top: int) -> np.ndarray:
    """Positions of each row's `top` largest keys, largest first."""
    best = np.argpartition(-keys, top - 1, axis=1)[:, :top]
    return np.take_along_axis(best, np.argsort(-np.take_along_axis(keys, best, 1), axis=1, kind="stable"), 1)
