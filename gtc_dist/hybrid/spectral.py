"""The spectral part of an embedding: an ideal low-pass filter of the co-interaction graph.

Of the operator C of `walk.py` only the `width` leading eigenpairs (Q, l) are kept, largest first, and

    user . item = (N Q (l^2 + 3 l^3) Q^T D_i^-q)[user, item]      l relative to the largest

is walks of two and three steps from item to item, the longer ones counting thrice, through the leading modes alone. A
graph convolution of few layers is a soft version of such a filter (GF-CF, Shen et al. 2021, relates the two). The
first mode ranks items by how central they are among co-interacting users, which tells more than how often they were
taken. Nothing is learned from a loss: it costs some passes over the graph, once a run.
"""

import torch

from gtc_dist.distributed.collectives import Communicator
from gtc_dist.distributed.sharded_table import ShardedTable
from gtc_dist.hybrid.graph_filter import CooccurrenceOperator, pair

OVERSAMPLE = 24  # columns that are iterated beside the wanted ones: the further the next mode, the faster it settles
ITERATIONS = 60  # at most, of C over the block
SETTLED = 1e-5  # change of the leading eigenvalues in an iteration, of the largest


@torch.no_grad()
def graph_filter_scores(walk: CooccurrenceOperator, width: int, seed: int) -> tuple[ShardedTable, ShardedTable]:
    """Tables of users [users, k] and items [items, k], k <= width modes; rows without a train interaction are zero. A
    collective."""
    values, modes = _leading_modes(walk, width, seed)
    return pair(walk, walk.to_users(modes) * (values**2 + 3 * values**3), modes * walk.item_scale)


def _leading_modes(walk: CooccurrenceOperator, width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues of C relative to the largest, positive ones only, [k <= width], and this rank's rows of their
    eigenvectors [n, k]: block power iteration with Rayleigh-Ritz. A collective."""
    comm, rows = walk.items.comm, walk.items.rows
    block = min(width + OVERSAMPLE, rows)
    # Starting where the edges are: rows without any would never leave zero, but count in the Gram matrix.
    start = ShardedTable("spectral", rows, block, comm, init_std=1.0, seed=seed, trainable=False)
    x = _orthonormal(walk(start.weight), comm)
    previous = None
    for _ in range(ITERATIONS):
        if not x.shape[1]:  # no two items share a user
            return x.new_zeros(0), x
        image = walk(x)
        values, rotation = torch.linalg.eigh(_gram(x, image, comm))
        values, rotation = values.flip(0)[:width], rotation.flip(1)[:, :width]
        modes = x @ rotation.float()
        comparable = previous is not None and len(previous) == len(values)
        if comparable and (values - previous).abs().max().item() <= SETTLED * values.abs().max().item():
            break
        previous, x = values, _orthonormal(image, comm)
    kept = values > 1e-6 * values.abs().max()
    return (values[kept] / values[0]).float(), modes[:, kept]


def _gram(x: torch.Tensor, y: torch.Tensor, comm: Communicator) -> torch.Tensor:
    """Symmetric part of x^T y over all ranks' rows, float64, the same bits on every rank."""
    product = comm.all_reduce(x.double().T @ y.double())
    return (product + product.T) / 2


def _orthonormal(x: torch.Tensor, comm: Communicator) -> torch.Tensor:
    """Columns that span those of x [n, b] and are orthonormal over all ranks; as many as x has independent ones."""
    for _ in range(2):  # the second time takes away what rounding left
        if not x.shape[1]:
            break
        values, vectors = torch.linalg.eigh(_gram(x, x, comm))
        kept = values > 1e-9 * values.max().clamp(min=1e-30)
        x = (x.double() @ (vectors[:, kept] * values[kept].rsqrt())).float()
    return x
