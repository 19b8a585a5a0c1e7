"""The graphs of a catalog as the network uses them, and vectorised look-ups in a CSC graph (edges by destination)."""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from gtc_dist.config import Config
from gtc_dist.data.catalog import CSC, Catalog
from gtc_dist.errors import InputError
from gtc_dist.graph.user_item_graph import build_user_item_graph

MAX_NODES = 2**31 - 1  # users and items together: a graph's sources are 32-bit integers


@dataclass(frozen=True)
class Graphs:
    """The graphs of a catalog; the ranks on one machine share one copy.

    nodes: user-item graph in both directions over one set of nodes: users [0, users), items [users, users + items)
    item_item, user_user: None if the network does not use them
    added_users: number of users, the last ones, that came from outside (added_users.py)
    """

    users: int
    items: int
    nodes: CSC
    item_item: CSC | None = None
    user_user: CSC | None = None
    added_users: int = 0

    @staticmethod
    def load(catalog: Catalog, item_item: bool = True, user_user: bool = True) -> "Graphs":
        """Read the graphs of a catalog.

        Args:
            item_item, user_user: read this graph.

        Raises:
            InputError: more users and items than 32 bits number, or the catalog lacks a graph.
        """
        if catalog.users + catalog.items > MAX_NODES:
            raise InputError(
                f"the catalog {catalog.uri} has {catalog.users:,} users and {catalog.items:,} items; at most "
                f"{MAX_NODES:,} together are possible, because the graph numbers them with 32 bits"
            )
        wanted = {"item_item": item_item, "user_user": user_user}
        for name in wanted:
            if wanted[name] and name not in catalog.manifest.graphs:
                raise InputError(
                    f"the catalog {catalog.uri} has no graph {name}, which the configured network uses; run "
                    "python -m gtc_dist.prepare --force with this configuration"
                )
        nodes = both_directions(catalog.graph("item_user"), catalog.graph("user_item"))
        hops = [catalog.graph(name) if wanted[name] else None for name in wanted]
        return Graphs(catalog.users, catalog.items, nodes, *hops)

    @property
    def bytes(self) -> int:
        graphs = [graph for graph in (self.nodes, self.item_item, self.user_user) if graph is not None]
        sizes = sum(a.nbytes for graph in graphs for a in (graph.indptr, graph.indices, graph.weight))
        return sizes + (0 if self.nodes.weighted_degree is None else self.nodes.weighted_degree.nbytes)

    @property
    def user_degree(self) -> np.ndarray:
        """Train interactions of each user, int64 [users]."""
        return np.diff(self.nodes.indptr[: self.users + 1])

    @property
    def item_degree(self) -> np.ndarray:
        """Train interactions of each item, int64 [items]."""
        return np.diff(self.nodes.indptr[self.users :])

    @property
    def weighted_user_degree(self) -> np.ndarray:
        """Sum of the weights of each user's train interactions, float64 [users]; without weights `user_degree`."""
        degree = self.nodes.weighted_degree
        return self.user_degree if degree is None else degree[: self.users]

    @property
    def weighted_item_degree(self) -> np.ndarray:
        """Sum of the weights of each item's train interactions, float64 [items]; without weights `item_degree`."""
        degree = self.nodes.weighted_degree
        return self.item_degree if degree is None else degree[self.users :]

    @property
    def counted_users(self) -> np.ndarray:
        """Users that statistics over users are of, bool [users]: with a train interaction, and not added ones."""
        return (self.user_degree > 0) & (np.arange(self.users) < self.users - self.added_users)

    @property
    def interactions(self) -> int:
        """Number of train interactions, without those of added users."""
        return len(self.nodes.indices) - int(self.nodes.indptr[self.users])

    @cached_property
    def mean_weight(self) -> float:
        """Mean weight of the train interactions."""
        return float(self.weighted_user_degree[: self.users - self.added_users].sum()) / self.interactions

    def relative_weights(self, users: np.ndarray, items: np.ndarray) -> np.ndarray | None:
        """Weights of train interactions, float32 [n], divided by their mean over train; None: all weigh the same.

        Args:
            users, items: int64 [n], pairs that are train interactions.
        """
        degree = self.nodes.weighted_degree
        if degree is None:
            return None
        items = items + self.users
        edge_weight = self.nodes.weight[find_edges(self.nodes, users, items)]
        return (edge_weight * np.sqrt(degree[users] * degree[items]) / self.mean_weight).astype(np.float32)

    def edges_of(self, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Edge ids of train interactions (int64 [n, 2]): of the edges into their users, and into their items."""
        users, items = pairs[:, 0], pairs[:, 1] + self.users
        return find_edges(self.nodes, users, items), find_edges(self.nodes, items, users)

    def is_interacted(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Mask of train interactions between each of the users and each of the items, bool [users, items].

        The cost is linear in the users' interactions and in the result; there is no search for each pair.
        """
        distinct, column = np.unique(items, return_inverse=True)
        out = np.zeros((len(users), len(distinct)), bool)
        if len(distinct):
            indptr, edges = take_edges(self.nodes, users)
            neighbours = self.nodes.indices[edges] - self.users
            at = np.minimum(np.searchsorted(distinct, neighbours), len(distinct) - 1)
            hit = distinct[at] == neighbours
            out[np.repeat(np.arange(len(users)), np.diff(indptr))[hit], at[hit]] = True
        return out[:, column]

    def draw_negatives(self, users: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Draw one item for each user uniformly from the items without a train interaction of that user: int64 [n]."""
        rank = rng.integers(0, self.items - np.diff(self.nodes.indptr)[users])
        return kth_non_neighbour(self.nodes, users, rank + self.users) - self.users


def load_graphs(config: Config, catalog: Catalog) -> Graphs:
    """The graphs of a catalog that the configured network uses; in a final fit the user-item graph has the interactions
    of valid, too. Raises InputError if the catalog lacks one, or weights of the interactions."""
    graphs = Graphs.load(catalog, item_item=config.model.item_hop, user_user=config.model.user_hop)
    settings = config.data.weight_settings
    if settings and graphs.nodes.weighted_degree is None:
        raise InputError(
            f"{' and '.join(settings)}, but the catalog {catalog.uri} was built without it; run python -m "
            "gtc_dist.prepare --force with this configuration"
        )
    if len(config.train_splits) == 1:
        return graphs
    pairs, weight = catalog.interactions(*config.train_splits), None
    if graphs.nodes.weighted_degree is not None:
        weight = catalog.final_weights(*config.train_splits)
    both = build_user_item_graph(*pairs, catalog.users, catalog.items, weight=weight)
    return replace(graphs, nodes=both_directions(*both))


def both_directions(item_user: CSC, user_item: CSC) -> CSC:
    """Merge the two directions of the user-item graph into one graph; its nodes are the users, then the items."""
    users, edges = len(item_user.indptr) - 1, len(item_user.indices)
    degrees = item_user.weighted_degree, user_item.weighted_degree
    return CSC(
        np.concatenate([item_user.indptr, user_item.indptr[1:] + edges]),
        np.concatenate([item_user.indices + np.int32(users), user_item.indices]),
        np.concatenate([item_user.weight, user_item.weight]),
        None if degrees[0] is None else np.concatenate(degrees),
    )


def by_destination(destination: np.ndarray, source: np.ndarray, destinations: int) -> CSC:
    """A graph with weights of 1 from pairs of nodes; sources are sorted in each destination."""
    order = np.lexsort((source, destination))
    indptr = np.concatenate([[0], np.cumsum(np.bincount(destination, minlength=destinations))]).astype(np.int64)
    return CSC(indptr, source[order].astype(np.int32), np.ones(len(source), np.float32))


def take_edges(graph: CSC, destinations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """In-edges of some destinations, in the given order: indptr int64 [n + 1] and edge ids int64 [E]."""
    begin = graph.indptr[destinations]
    count = graph.indptr[destinations + 1] - begin
    indptr = np.concatenate([[0], np.cumsum(count)])
    edges = np.repeat(begin - indptr[:-1], count) + np.arange(indptr[-1])
    return indptr, edges


def find_edges(graph: CSC, destination: np.ndarray, source: np.ndarray) -> np.ndarray:
    """Edge id of each pair of nodes, int64 [n]; -1 for pairs without an edge. O(n log degree)."""
    found = _bisect_sources(graph, destination, source)
    inside = found < graph.indptr[destination + 1]
    hit = np.zeros(len(found), bool)
    hit[inside] = graph.indices[found[inside]] == source[inside]
    return np.where(hit, found, -1)


def kth_non_neighbour(graph: CSC, destination: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """For each destination, the node with index `rank` among its sorted non-neighbours: int64 [n].

    Uniform ranks in [0, nodes - degree) give exactly uniform draws from the non-neighbours, without rejection.
    """
    begin = graph.indptr[destination]
    # p_k - k is the number of non-neighbours below the k-th neighbour p_k; it is monotone in k, hence the bisection
    low, high = begin.copy(), graph.indptr[destination + 1].copy()
    while True:
        searching = low < high
        if not searching.any():
            return rank + (low - begin)
        middle = (low + high) // 2
        at = np.where(searching, middle, 0)
        below = searching & (graph.indices[at] - (at - begin) <= rank)
        low = np.where(below, middle + 1, low)
        high = np.where(searching & ~below, middle, high)


def similarity_weights(similarity: np.ndarray) -> np.ndarray:
    """Edge weights of neighbours from similarities [n, k], float32: negative ones get 0, then each row is normalised.

    A row without positive similarity is all zeros.
    """
    weight = np.maximum(similarity.astype(np.float64), 0)
    total = weight.sum(axis=1, keepdims=True)
    return (weight / np.where(total > 0, total, 1)).astype(np.float32)


def _bisect_sources(graph: CSC, destination: np.ndarray, source: np.ndarray) -> np.ndarray:
    """First edge of each destination with a source >= `source` (as bisect_left)."""
    low, high = graph.indptr[destination].copy(), graph.indptr[destination + 1].copy()
    while True:
        searching = low < high
        if not searching.any():
            return low
        middle = (low + high) // 2
        below = searching & (graph.indices[np.where(searching, middle, 0)] < source)
        low = np.where(below, middle + 1, low)
        high = np.where(searching & ~below, middle, high)
