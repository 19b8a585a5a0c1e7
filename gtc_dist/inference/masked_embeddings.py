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
    masked, table, comm, width = network.masked, tables.masked_item, tables.masked_item.comm, network.masked.columns
    users, items = (
        ShardedTable(table.name, rows, width + 1, comm, trainable=False) for rows in (graphs.users, graphs.items)
    )
    for low, high in row_chunks(items, chunk):
        ids, bias = table.weight[low:high].split([width, masked.members], dim=1)
        items.weight[low:high, :width] = masked.vectors(ids, content.weight[low:high])
        items.weight[low:high, width] = bias.sum(1)
    nodes = graphs.nodes
    means = ShardedSpMM(nodes.indptr, nodes.indices, None, 0, users, items, chunk, base=graphs.users)
    for low, high, values in means.sums(items):
        users.weight[low:high, :width] = masked.unit(values[:, :width]) * masked.log_scale.exp()
        known = torch.from_numpy(graphs.user_degree[users.start + low : users.start + high] > 0)
        users.weight[low:high, width] = known.to(comm.device).float()
    return Embeddings(users, items)
