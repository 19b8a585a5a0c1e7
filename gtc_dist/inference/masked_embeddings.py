"""Embeddings of the whole catalog from the masked diffusion: nothing is masked, and no id row is dropped."""

import torch

from gtc_dist.distributed.sharded_spmm import ShardedSpMM, row_chunks
from gtc_dist.distributed.sharded_table import ShardedTable
from gtc_dist.graph.csc import Graphs
from gtc_dist.hybrid.embeddings import Embeddings
from gtc_dist.model.gtc import GTC, Tables


@torch.no_grad()
def embed_masked(
    network: GTC, tables: Tables, content: ShardedTable | None, graphs: Graphs, chunk: int
) -> Embeddings | None:
    """Embeddings of all users and items by the masked diffusion; None without one. Arguments as in `embed_catalog`, but
    content: of `masked_content`.

    Frozen tables of width members * D + 1: items have their vectors and the sum of their biases, users the scaled unit
    sums of their items' vectors and a 1. Users without a train interaction have zeros. Collective: every rank must call
    it.
    """
    if network.masked is None:
        return None
    masked, table, comm = network.masked, tables.masked_item, tables.masked_item.comm
    vectors = ShardedTable(table.name, table.rows, masked.columns, comm, trainable=False)
    for low, high in row_chunks(vectors, chunk):
        vectors.weight[low:high] = masked.vectors(table.weight[low:high, : masked.columns], content.weight[low:high])
    users = ShardedTable(table.name, graphs.users, masked.columns + 1, comm, trainable=False)
    nodes = graphs.nodes
    means = ShardedSpMM(nodes.indptr, nodes.indices, None, 0, users, vectors, chunk, base=graphs.users)
    for low, high, values in means.sums(vectors):
        known = torch.from_numpy(graphs.user_degree[users.start + low : users.start + high] > 0).to(comm.device)
        own = masked.unit(values) * masked.log_scale.exp()
        users.weight[low:high] = torch.cat([own, known[:, None].float()], dim=1)
    bias = table.weight[:, masked.columns :].sum(1, keepdim=True)
    return Embeddings(users, table.with_values(torch.cat([vectors.weight, bias], dim=1)))
