"""Simulated users choose items: sampling without replacement by Gumbel top-k.

P(user u takes item i) ~ popularity_i * exp(strength * <taste_u, factors_i>). All users of a group share a taste, so the
group's part of the score is computed once; only a user's deviation is computed per user and item. For many items,
candidates are drawn from the group's distribution first. There is no Python loop over pairs.

Memory beside the arrays that a `ChoicePool` refers to: 16 bytes per item of the pool, and the pairs of one block.
"""

from collections.abc import Iterator

import numpy as np

EXACT_CHOICE_ITEMS = 1 << 14  # up to this many items, every user weighs all; beyond, candidates are drawn first
DRAWS, DRAWS_EACH = 1024, 32  # candidates per user, plus candidates per item to choose
PAIR_BLOCK = 1 << 18  # (user, candidate) pairs weighed at once; must keep a block below 65,536 users
GATHER_ITEMS = 1 << 16  # items whose factors are gathered at once


class ChoicePool:
    """Items to choose from.

    Args:
        items: int64 [N], the pool's items as rows of the other two arrays; None: all rows.
        factors: float32 [all items, K], not copied.
        log_popularity: float32 [all items].
        strength: strength of taste relative to popularity.
    """

    def __init__(self, items: np.ndarray | None, factors: np.ndarray, log_popularity: np.ndarray, strength: float):
        self.items, self.factors, self.log_popularity = items, factors, log_popularity
        self.strength = np.float32(strength)
        self.size = len(factors) if items is None else len(items)

    def choose(self, rng, taste: np.ndarray, deviation: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Draw items for the users of one group, without replacement, by Gumbel top-k.

        Args:
            taste: [K], of the group.
            deviation: [U, K], of each user from the group's taste.
            count: [U], items to choose for each user, ascending.

        Returns:
            User positions [choices] and items [choices].
        """
        relevant = np.flatnonzero(taste)
        shared = self._shared(taste, relevant)
        draw = self._weigh_all if self.size <= EXACT_CHOICE_ITEMS else self._draw_candidates
        users, items = zip(*draw(rng, shared, relevant, deviation, count), strict=True)
        chosen = np.concatenate(items)
        return np.concatenate(users), chosen if self.items is None else self.items[chosen]

    def _shared(self, taste: np.ndarray, relevant: np.ndarray) -> np.ndarray:
        """The group's part of the score, log(popularity) + strength * <taste, factors>: float32 [N]."""
        shared = np.empty(self.size, np.float32)
        for start in range(0, self.size, GATHER_ITEMS):
            slab = slice(start, start + GATHER_ITEMS)
            rows = slab if self.items is None else self.items[slab]
            affinity = self.strength * dot_rows(self.factors[rows][:, relevant], taste[relevant])
            shared[slab] = self.log_popularity[rows] + affinity
        return shared

    def _weigh_all(self, rng, shared, relevant, deviation, count) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Exact choices among all items of the pool: the largest scores plus Gumbel noise."""
        factors = (self.factors if self.items is None else self.factors[self.items])[:, relevant]
        for rows in _blocks(np.full(len(count), self.size)):
            personal = self.strength * deviation[rows][:, relevant]
            keys = shared + dot_rows(personal, factors) + _gumbel(rng, (len(personal), self.size))
            best = _descending(keys, min(int(count[rows].max()), self.size))
            row, column = np.nonzero(np.arange(best.shape[1]) < count[rows][:, None])
            yield row + rows.start, best[row, column]

    def _draw_candidates(self, rng, shared, relevant, deviation, count) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Choices among candidates that are drawn from the group's distribution, with replacement.

        Candidates are weighed by the user's deviation from the group. The maximum of m Gumbel variables is a Gumbel
        variable plus log(m), so a candidate that was drawn m times gets log(m) added. The distribution converges to the
        exact one as the number of candidates grows.
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
            personal = self.strength * deviation[rows]
            item = candidate if self.items is None else self.items[candidate]
            keys = np.einsum("ek,ek->e", personal[row][:, relevant], self.factors[item][:, relevant])
            keys += np.log(times) + _gumbel(rng, len(keys))
            best = np.argsort(-keys)
            best = best[np.argsort(row[best].astype(np.uint16), kind="stable")]  # by user, then by falling key
            place = np.arange(len(row)) - np.searchsorted(row, row)
            taken = place < count[rows][row]
            yield row[taken] + rows.start, candidate[best[taken]]


def _blocks(width: np.ndarray) -> Iterator[slice]:
    """Consecutive users with about PAIR_BLOCK pairs together, given the number of pairs of each user."""
    ends = np.cumsum(width)
    start = 0
    while start < len(ends):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + PAIR_BLOCK, "right")))
        yield slice(start, stop)
        start = stop


def dot_rows(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Inner products of rows. Without BLAS, whose rounding may depend on its number of threads."""
    return np.einsum("ik,k->i", a, b) if b.ndim == 1 else np.einsum("ik,jk->ij", a, b)


def _gumbel(rng, shape) -> np.ndarray:
    return -np.log(np.maximum(rng.standard_exponential(shape, np.float32), np.float32(1e-12)))


def _search(cumulative: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Items at values in [0, total weight] of a cumulative distribution. Sorting the values makes it 5 times faster."""
    order = np.argsort(values)
    found = np.empty(len(values), np.int64)
    found[order] = np.searchsorted(cumulative, values[order], "right")
    return np.minimum(found, len(cumulative) - 1)


def _descending(keys: np.ndarray, top: int) -> np.ndarray:
    """Columns of each row's `top` largest keys, largest first."""
    best = np.argpartition(-keys, top - 1, axis=1)[:, :top]
    return np.take_along_axis(best, np.argsort(-np.take_along_axis(keys, best, 1), axis=1, kind="stable"), 1)
