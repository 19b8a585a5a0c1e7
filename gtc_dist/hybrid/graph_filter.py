"""Ideal low-pass graph filter: truncated spectral collaborative filtering (GF-CF, Shen et al. 2021; PureSVD).

With R the train interactions (users x items; ones, or recency weights) and D its sums by user and by item,
N = D_u^-p R D_i^-q maps item values to users, and C = N^T N without its diagonal maps them from item to item over
common users. The diagonal (self-similarity) is removed as in EASE: it says nothing about other items, and it would
dominate for items with few users.

Only the `width` leading eigenpairs (Q, l) of C are kept, largest first, and

    user . item = (N Q (l^2 + 3 l^3) Q^T D_i^-q)[user, item]      l relative to the largest

sums paths of two and three steps from item to item, the longer ones weighted by three, through the leading modes alone.
A graph convolution of few layers is a soft version of such a filter. The first mode ranks items by their centrality
among co-interacting users, a better popularity signal than the number of interactions. Nothing is learned from a loss:
the cost is some passes over the graph, once a run.
"""

import numpy as np
import torch

from gtc_dist.distributed.collectives import Communicator
from gtc_dist.distributed.sharded_spmm import ShardedSpMM
from gtc_dist.distributed.sharded_table import ShardedTable
from gtc_dist.graph.csc import Graphs
from gtc_dist.hybrid.embeddings import Embeddings

USER_EXPONENT = 0.6  # p: a user's interactions count (their number)^-p each
ITEM_EXPONENT = 0.33  # q: the same for items; a smaller one ranks popular items higher

COLUMNS_AT_ONCE = 32  # of a matrix that the operator is applied to: bounds memory
OVERSAMPLING = 24  # columns iterated beside the wanted ones: the farther the next mode, the faster the convergence
MAX_ITERATIONS = 60  # products with C; at least `MIN_ITERATIONS`, and fewer than 60 where these exceed
MAX_EDGE_PRODUCTS = 400_000_000  # edges passed in all products together; 10 products find the modes of large catalogs
MIN_ITERATIONS = 10
TOLERANCE = 1e-5  # largest change of a leading eigenvalue in an iteration, relative to the largest eigenvalue


class CooccurrenceOperator:
    """N and C for this rank's rows. The constructor and the methods are collectives unless marked Local.

    Args:
        chunk: rows of a rank computed at once.
    """

    def __init__(
        self,
        graphs: Graphs,
        comm: Communicator,
        chunk: int,
        user_exponent: float = USER_EXPONENT,
        item_exponent: float = ITEM_EXPONENT,
    ):
        nodes = (graphs.nodes.indptr, graphs.nodes.indices, graphs.nodes.weight)
        self.edges = 2 * graphs.interactions
        users = ShardedTable("users", graphs.users, 0, comm, trainable=False)
        items = ShardedTable("items", graphs.items, 0, comm, trainable=False)
        self.users, self.items = users, items
        self.into_users = ShardedSpMM(*nodes, 0, users, items, chunk, base=graphs.users)
        self.into_items = ShardedSpMM(*nodes, graphs.users, items, users, chunk)
        self.warm = torch.from_numpy(graphs.item_degree[items.start : items.stop] > 0).to(comm.device)[:, None]
        # the graph's weights are R (degree of user * degree of item)^-1/2: these factors change the exponents
        user_degree, item_degree = graphs.weighted_user_degree, graphs.weighted_item_degree
        self.user_factor = _power(user_degree, users, 0.5 - user_exponent)
        self.item_factor = _power(item_degree, items, 0.5 - item_exponent)
        self.item_scale = _power(item_degree, items, -item_exponent)
        # the diagonal sums squares of R; these are R itself without recency weights
        squares, half = self.into_items, 0.5
        if graphs.nodes.weighted_degree is not None:
            squared = (*nodes[:2], np.square(graphs.nodes.weight))
            squares, half = ShardedSpMM(*squared, graphs.users, items, users, chunk), 1.0
        back = self._sums(squares, users, _power(user_degree, users, half - 2 * user_exponent))
        self.diagonal = back * _power(item_degree, items, half - 2 * item_exponent)

    def to_users(self, x: torch.Tensor) -> torch.Tensor:
        """N x, for x [items of this rank, b]."""
        return self._sums(self.into_users, self.items, x * self.item_factor) * self.user_factor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """C x, for x [items of this rank, b]."""
        return self._sums(self.into_items, self.users, self.to_users(x) * self.user_factor) * self.item_factor - (
            self.diagonal * x
        )

    def warm_mean(self, x: torch.Tensor) -> torch.Tensor:
        """Mean over all items with interactions, [1, b], for x [items of this rank, b]."""
        sums = self.items.comm.all_reduce(torch.cat([x.double() * self.warm, self.warm.double()], dim=1).sum(0))
        return (sums[:-1] / sums[-1].clamp(min=1))[None].to(x.dtype)

    def embeddings(self, users: torch.Tensor, items: torch.Tensor) -> Embeddings:
        """Local. Frozen tables over this rank's rows of users and items."""
        return Embeddings(self.users.with_values(users.float()), self.items.with_values(items.float()))

    @staticmethod
    def _sums(edges: ShardedSpMM, sources: ShardedTable, x: torch.Tensor) -> torch.Tensor:
        out = []
        for columns in x.float().split(COLUMNS_AT_ONCE, dim=1):
            table = sources.with_values(columns.contiguous())
            out.append(torch.cat([values for _, _, values in edges.sums(table)]))
        return torch.cat(out, dim=1)


def _power(degree: np.ndarray, table: ShardedTable, exponent: float) -> torch.Tensor:
    """degree^exponent of this rank's rows, [n, 1]. Rows without edges get 1; no edge multiplies it."""
    degree = degree[table.start : table.stop].astype(np.float64)
    power = np.where(degree > 0, degree, 1) ** exponent
    return torch.from_numpy(power.astype(np.float32)).to(table.comm.device)[:, None]


@torch.no_grad()
def graph_filter_scores(operator: CooccurrenceOperator, width: int, seed: int) -> Embeddings:
    """Tables of users [users, k] and items [items, k], k <= width modes. Rows without a train interaction are zero.
    Collective: every rank must call it."""
    values, modes = _leading_modes(operator, width, seed)
    users = operator.to_users(modes) * (values**2 + 3 * values**3)
    return operator.embeddings(users, modes * operator.item_scale)


def _leading_modes(operator: CooccurrenceOperator, width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positive leading eigenvalues of C relative to the largest, [k <= width], and this rank's rows of their
    eigenvectors [n, k], by block power iteration with Rayleigh-Ritz projection."""
    comm, rows = operator.items.comm, operator.items.rows
    block = min(width + OVERSAMPLING, rows)
    start = ShardedTable("spectral", rows, block, comm, init_std=1.0, seed=seed, trainable=False)
    # One product first zeroes the rows of items without edges, which would otherwise count in the Gram matrix.
    x = _orthonormal(operator(start.weight), comm)
    previous = None
    for _ in range(min(MAX_ITERATIONS, max(MIN_ITERATIONS, MAX_EDGE_PRODUCTS // max(operator.edges, 1)))):
        if not x.shape[1]:  # no two items share a user
            return x.new_zeros(0), x
        image = operator(x)
        values, rotation = torch.linalg.eigh(_gram(x, image, comm))
        values, rotation = values.flip(0)[:width], rotation.flip(1)[:, :width]
        modes = x @ rotation.float()
        comparable = previous is not None and len(previous) == len(values)
        if comparable and (values - previous).abs().max().item() <= TOLERANCE * values.abs().max().item():
            break
        previous, x = values, _orthonormal(image, comm)
    kept = values > 1e-6 * values.abs().max()
    return (values[kept] / values[0]).float(), modes[:, kept]


def _gram(x: torch.Tensor, y: torch.Tensor, comm: Communicator) -> torch.Tensor:
    """Symmetric part of x^T y over all ranks' rows, float64, the same bits on every rank."""
    product = comm.all_reduce(x.double().T @ y.double())
    return (product + product.T) / 2


def _orthonormal(x: torch.Tensor, comm: Communicator) -> torch.Tensor:
    """Orthonormal basis over all ranks' rows of the columns of x [n, b]; as many columns as are independent."""
    for _ in range(2):  # the second pass removes the rounding error of the first
        if not x.shape[1]:
            break
        values, vectors = torch.linalg.eigh(_gram(x, x, comm))
        kept = values > 1e-9 * values.max().clamp(min=1e-30)
        x = (x.double() @ (vectors[:, kept] * values[kept].rsqrt())).float()
    return x
