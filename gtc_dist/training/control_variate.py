"""The history: whole-catalog propagation of a moment ago, so that a sample estimates only what changed since.

A sum over a few sampled neighbours is right on average and far off each time: with ten of each the squared error of a
batch's embeddings is many times their squared norm, and BPR or a softmax over such scores learns margins against the
noise. Propagation is linear in what enters the graph, so for inputs x now and h then

    A x = A h + A (x - h)

A h is computed layer-wise for the whole catalog now and then (`inference`) and kept; A (x - h) is estimated from the
sample. It stays unbiased, its noise shrinks with x - h, and the gradient is that of the sample (control variates as in
VR-GCN, Chen et al. 2018, with h refreshed exactly).

The batch's own edges are left out of A h too, as far as walks of one step go; longer walks over them stay in it.
A hop neighbour's stream weights multiply, and get their gradient from, what changed since the refresh alone.
A refresh costs one inference of the catalog; so many in a pass over the interactions keep it linear in both. Weights
move most at the start, so the first intervals are short: each as long as all before it together, up to `every`.
"""

import torch

from gtc_dist.distributed.message_passing import weighted_sum
from gtc_dist.distributed.sharded_table import ShardedTable
from gtc_dist.graph.csc import Graphs
from gtc_dist.inference import layerwise
from gtc_dist.model.batch import Batch, HistoryRows
from gtc_dist.model.gtc import GTC, Tables

FIRST = 16  # the first interval is this part of the later ones


class HistoricalEmbeddings:
    """The rows of one rank.

    Args:
        every: steps from one refresh to the next, once training is under way.
        layers, chunk: of the inference.
        dtype: of what is kept. Sums are made from the inputs as they are kept, so its rounding is no error of theirs.
    """

    def __init__(
        self,
        model: GTC,
        tables: Tables,
        features: dict[str, ShardedTable],
        graphs: Graphs,
        *,
        every: int,
        layers: int,
        chunk: int,
        dtype: torch.dtype = torch.float16,
    ):
        self.model, self.tables, self.features, self.graphs = model, tables, features, graphs
        self.every, self.layers, self.chunk, self.dtype = every, layers, chunk, dtype
        self.steps = 0  # done so far
        self.clear()

    def clear(self) -> None:
        """Forget everything; the next step refreshes."""
        self.age: int | None = None  # steps since the refresh
        self.user_inputs = self.item_inputs = self.item_nodes = self.users = self.user_hop = self.items = None

    def due(self) -> bool:
        """Whether the next step refreshes."""
        return self.age is None or self.age >= min(self.every, max(self.steps - self.age, self.every // FIRST))

    @torch.no_grad()
    def rows(self, batch: Batch) -> HistoryRows:
        """The batch's rows, for the next step; refreshed first where it is time. A collective."""
        if self.due():
            self.refresh()
        self.age += 1
        self.steps += 1
        plan = batch.history
        users, items = self.users.lookup(plan.user_route).float(), self.items.lookup(plan.item_route).float()
        users -= weighted_sum(plan.left_out_of_users, self.item_nodes.lookup(plan.left_item_route).float())
        items -= weighted_sum(plan.left_out_of_items, self.user_inputs.lookup(plan.left_user_route).float())
        entering = [
            table.lookup(route).float()
            for table, route in ((self.user_inputs, batch.user_route), (self.item_inputs, batch.item_route))
        ]
        hop = None if self.user_hop is None else self.user_hop.lookup(plan.user_route).float()
        return HistoryRows(torch.cat(entering), users, hop, items)

    @torch.no_grad()
    def refresh(self) -> None:
        """Propagate the whole catalog with the weights of now. A collective."""
        self.clear()
        model, graphs = self.model, self.graphs
        self.user_inputs, self.item_inputs = layerwise.graph_inputs(
            model, self.tables, self.features, graphs, self.chunk, self.dtype
        )
        self.users, self.items = self._like(self.user_inputs), self._like(self.item_inputs)
        # what enters the graph: the inputs, but for content streams that take a hop first
        self.item_nodes = self._like(self.item_inputs) if model.hops_first else self.item_inputs
        if graphs.user_user is not None:
            self.user_hop = self._like(self.user_inputs)
        edges = layerwise.GraphOperators(
            graphs, self.users, self.items, self.chunk * self.users.width // layerwise.COLUMNS
        )
        for columns in layerwise.column_groups(model):
            x_user, x_item = edges.entering(model, self.user_inputs, self.item_inputs, columns)
            if model.hops_first:
                self.item_nodes.weight[:, columns] = x_item.weight
            users, items = edges.convolved(x_user, x_item, self.layers)
            self.users.weight[:, columns], self.items.weight[:, columns] = users.weight, items.weight
            layerwise.apply_view_weights(users, model, self.tables.user, columns)
            for low, high, hop in edges.user_user.sums(users) if edges.user_user else ():
                self.user_hop.weight[low:high, columns] = hop
            item_hop = None if model.hops_first else edges.item_item
            for low, high, hop in item_hop.sums(items) if item_hop else ():
                self.items.weight[low:high, columns] = items.weight[low:high] + hop
        self.age = 0

    def _like(self, table: ShardedTable) -> ShardedTable:
        return ShardedTable(table.name, table.rows, table.width, table.comm, dtype=self.dtype, trainable=False)
