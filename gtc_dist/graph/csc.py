"""The graphs of a catalog as training uses them, and vectorised look-ups in a graph stored by destination (CSC)."""

from dataclasses import dataclass

import numpy as np

from gtc_dist.data.catalog import CSC, Catalog
from gtc_dist.errors import InputError

MOST_EDGES = 2**31 - 1  # of a graph: DGL's samplers and blocks index by 32 bits
REDRAWS = 16  # of a negative that is a train interaction


@dataclass(frozen=True)
class Graphs:
    """The graphs of a catalog; the ranks of a node share one copy.

    nodes: the user-item graph in both directions over one set of nodes: users [0, users), items [users, users + items)
    item_item, user_user: None where a run does without
    """

    users: int
    items: int
    nodes: CSC
    item_item: CSC | None = None
    user_user: CSC | None = None

    @staticmethod
    def load(catalog: Catalog, item_item: bool = True, user_user: bool = True) -> "Graphs":
        interactions = catalog.manifest.interactions["train"]
        if 2 * interactions > MOST_EDGES:
            raise InputError(
                f"the catalog {catalog.uri} has {interactions:,} train interactions; at most {MOST_EDGES // 2:,} can "
                "be trained on, since each is two edges of a graph that is indexed by 32 bits"
            )
        nodes = both_directions(catalog.graph("item_user"), catalog.graph("user_item"))
        hops = [
            catalog.graph(name) if wanted else None
            for name, wanted in (("item_item", item_item), ("user_user", user_user))
        ]
        return Graphs(catalog.users, catalog.items, nodes, *hops)

    @property
    def bytes(self) -> int:
        graphs = [graph for graph in (self.nodes, self.item_item, self.user_user) if graph is not None]
        return sum(a.nbytes for graph in graphs for a in (graph.indptr, graph.indices, graph.weight))

    @property
    def user_degree(self) -> np.ndarray:
        """Train interactions of each user, int64 [users]."""
        return np.diff(self.nodes.indptr[: self.users + 1])

    @property
    def item_degree(self) -> np.ndarray:
        """Train interactions of each item, int64 [items]."""
        return np.diff(self.nodes.indptr[self.users :])

    def crossed(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Whether each of the users has a train interaction with each of the items, bool [users, items]. Costs the
        users' interactions and the result, not a search for each pair."""
        which, column = np.unique(items, return_inverse=True)
        out = np.zeros((len(users), len(which)), bool)
        if len(which):
            indptr, edges = take(self.nodes, users)
            theirs = self.nodes.indices[edges] - self.users
            at = np.minimum(np.searchsorted(which, theirs), len(which) - 1)
            hit = which[at] == theirs
            out[np.repeat(np.arange(len(users)), np.diff(indptr))[hit], at[hit]] = True
        return out[:, column]

    def draw_negatives(
        self, users: np.ndarray, rng: np.random.Generator, share: np.ndarray | None = None
    ) -> np.ndarray:
        """One item for each user among those that are no train interaction of it, int64 [n].

        Args:
            share: float64 [items], increasing to 1: an item's part of it is its chance; None: all alike. A user who
                drew its own interactions `REDRAWS` times gets one of the others, all alike.
        """
        if share is None:
            rank = rng.integers(0, self.items - np.diff(self.nodes.indptr)[users])
            return absent_source(self.nodes, users, rank + self.users) - self.users
        drawn, open_ = np.empty(len(users), np.int64), np.arange(len(users))
        for _ in range(REDRAWS):
            items = np.minimum(np.searchsorted(share, rng.random(len(open_)), side="right"), self.items - 1)
            drawn[open_] = items
            open_ = open_[edge_of(self.nodes, users[open_], items + self.users) >= 0]
        drawn[open_] = self.draw_negatives(users[open_], rng)
        return drawn


def both_directions(item_user: CSC, user_item: CSC) -> CSC:
    """The user-item graph over the nodes users, then items, from its two directions."""
    users, edges = len(item_user.indptr) - 1, len(item_user.indices)
    return CSC(
        np.concatenate([item_user.indptr, user_item.indptr[1:] + edges]),
        np.concatenate([item_user.indices + np.int32(users), user_item.indices]),
        np.concatenate([item_user.weight, user_item.weight]),
    )


def by_destination(destination: np.ndarray, source: np.ndarray, destinations: int) -> CSC:
    """An unweighted graph from pairs; sources sorted in each destination."""
    order = np.lexsort((source, destination))
    indptr = np.concatenate([[0], np.cumsum(np.bincount(destination, minlength=destinations))]).astype(np.int64)
    return CSC(indptr, source[order].astype(np.int32), np.ones(len(source), np.float32))


def take(graph: CSC, destinations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The edges of some destinations: (indptr int64 [n + 1], edge ids int64 [E]), in the given order."""
    begin = graph.indptr[destinations]
    count = graph.indptr[destinations + 1] - begin
    indptr = np.concatenate([[0], np.cumsum(count)])
    edges = np.repeat(begin - indptr[:-1], count) + np.arange(indptr[-1])
    return indptr, edges


def edge_of(graph: CSC, destination: np.ndarray, source: np.ndarray) -> np.ndarray:
    """Edge id of each pair, int64 [n]; -1 where there is no such edge. O(n log degree)."""
    found = _bisect(graph, destination, source)
    inside = found < graph.indptr[destination + 1]
    hit = np.zeros(len(found), bool)
    hit[inside] = graph.indices[found[inside]] == source[inside]
    return np.where(hit, found, -1)


def absent_source(graph: CSC, destination: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """The rank-th smallest source that is no neighbour of each destination, int64 [n].

    Uniform ranks in [0, sources - degree) give uniform draws from the non-neighbours, exactly and without rejection.
    """
    begin = graph.indptr[destination]
    # p_k - k counts the absent sources below the k-th neighbour p_k; it never falls, so it can be bisected
    low, high = begin.copy(), graph.indptr[destination + 1].copy()
    while True:
        open_ = low < high
        if not open_.any():
            return rank + (low - begin)
        middle = (low + high) // 2
        at = np.where(open_, middle, 0)
        below = open_ & (graph.indices[at] - (at - begin) <= rank)
        low = np.where(below, middle + 1, low)
        high = np.where(open_ & ~below, middle, high)


def _bisect(graph: CSC, destination: np.ndarray, source: np.ndarray) -> np.ndarray:
    """First edge of each destination whose source is not below `source` (bisect_left)."""
    low, high = graph.indptr[destination].copy(), graph.indptr[destination + 1].copy()
    while True:
        open_ = low < high
        if not open_.any():
            return low
        middle = (low + high) // 2
        below = open_ & (graph.indices[np.where(open_, middle, 0)] < source)
        low = np.where(below, middle + 1, low)
        high = np.where(open_ & ~below, middle, high)
