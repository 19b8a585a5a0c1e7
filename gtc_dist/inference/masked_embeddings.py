"""Embeddings of the whole catalog from the masked diffusion: nothing is masked, and no id row is dropped."""

import torch

from gtc_dist.distributed.sharded_spmm import ShardedSpMM, row_chunks
from gtc_dist.distributed.sharded_table import ShardedTable
from gtc_dist.graph.csc import Graphs
from gtc_dist.hybrid.embeddings import Embeddings
from gtc_dist.model.gtc import GTC, Tables


@torch.no_grad()
def embed_masked(
    network: GTC, tables: Tables, features: dict[str, ShardedTable], graphs: Graphs, chunk: int
) -> Embeddings | None:
    """Embeddings of all users and items by the masked diffusion; None without one. Arguments as in `embed_catalog`.

    Frozen tables of width members * D + 1: items have their vectors and the sum of their biases, users the scaled unit
    sums of their items' vectors and a 1. Users without a train interaction have zeros. Collective: every rank must call
    it.
    """
    if network.masked is None:
        return None
    masked, table, comm = network.masked, tables.masked_item, tables.masked_item.comm
    vectors = ShardedTable(table.name, table.rows, masked.columns, comm, trainable=False)
    for low, high in row_chunks(vectors, chunk):
        content = {name: rows.weight[low:high] for name, rows in features.items()}
        vectors.weight[low:high] = masked.own_vectors(table.weight[low:high], content)
    vectors = vectors.with_values(unit_vectors(network, vectors, graphs, chunk))
    users = ShardedTable(table.name, graphs.users, masked.columns + 1, comm, trainable=False)
    nodes = graphs.nodes
    means = ShardedSpMM(nodes.indptr, nodes.indices, None, 0, users, vectors, chunk, base=graphs.users)
    for low, high, values in means.sums(vectors):
        known = torch.from_numpy(graphs.user_degree[users.start + low : users.start + high] > 0).to(comm.device)
        own = masked.unit(values) * masked.log_scale.exp()
        users.weight[low:high] = torch.cat([own, known[:, None].float()], dim=1)
    bias = table.weight[:, masked.columns :].sum(1, keepdim=True)
    return Embeddings(users, table.with_values(torch.cat([vectors.weight, bias], dim=1)))


def unit_vectors(network: GTC, own: ShardedTable, graphs: Graphs, chunk: int) -> torch.Tensor:
    """Unit vectors of this rank's items after the item-item hop, from their own vectors. Collective: every rank must
    call it."""
    hop = graphs.item_item
    if hop is None:
        return network.masked.unit(own.weight)
    operator = ShardedSpMM(hop.indptr, hop.indices, hop.weight, 0, own, own, chunk)
    return network.masked.smooth(own.weight, torch.cat([values for _, _, values in operator.sums(own)]))
