"""Historical embeddings as control variates, so that a sampled step estimates only the change since the last refresh.

A sum over a few sampled neighbours is unbiased but noisy: with ten of each, the squared error of a batch's embeddings
is many times their squared norm, and BPR or a softmax over such scores learns margins against the noise. Propagation is
linear in its inputs, so for inputs x now and h at the last refresh

    A x = A h + A (x - h)

A h is computed layer-wise for the whole catalog at each refresh (inference/layerwise.py) and kept; A (x - h) is
estimated from the sample. The estimate stays unbiased, its noise shrinks with x - h, and its gradient is that of the
sample (VR-GCN, Chen et al. 2018, with h refreshed exactly).

The batch's own edges are excluded from A h, too, where they are paths of length one; longer paths over them stay in it.
View weights of a neighbour in the user-user hop multiply, and get their gradient from, the change since the refresh. A
refresh costs one inference of the catalog; a fixed number of them per pass over the interactions keeps the cost linear
in both. Weights change most at the start, so the first intervals are short: each as long as all before it together, up
to `every`.
"""

import torch

from gtc_dist.distributed.message_passing import weighted_sum
from gtc_dist.distributed.sharded_table import ShardedTable
from gtc_dist.graph.csc import Graphs
from gtc_dist.inference import layerwise
from gtc_dist.model.batch import HistoryRows, Subgraph
from gtc_dist.model.gtc import GTC, Tables

FIRST = 16  # the first interval is this fraction of the later ones


class HistoricalEmbeddings:
    """One rank's rows. `rows` and `refresh` are collectives.

    Args:
        every: steps between refreshes, once training is under way.
        chunk: rows that inference computes at once.
        dtype: of the stored rows. Sums are computed from the inputs as stored, so that rounding does not bias them.
    """

    def __init__(
        self,
        model: GTC,
        tables: Tables,
        features: dict[str, ShardedTable],
        graphs: Graphs,
        *,
        every: int,
        chunk: int,
        dtype: torch.dtype = torch.float16,
    ):
        self.model, self.tables, self.features, self.graphs = model, tables, features, graphs
        self.every, self.chunk, self.dtype = every, chunk, dtype
        self.steps = 0  # since the start of training
        self.clear()

    def clear(self) -> None:
        """Drop all rows; the next step refreshes."""
        self.age: int | None = None  # steps since the refresh
        self.user_inputs = self.item_inputs = self.item_nodes = self.users = self.user_hop = self.items = None

    def due(self) -> bool:
        """Whether the next step refreshes."""
        return self.age is None or self.age >= min(self.every, max(self.steps - self.age, self.every // FIRST))

    @torch.no_grad()
    def rows(self, graph: Subgraph) -> HistoryRows:
        """Historical embeddings of a batch, after a refresh if it is due."""
        if self.due():
            self.refresh()
        self.age += 1
        self.steps += 1
        lookup = graph.history
        users, items = self.users.lookup(lookup.users).float(), self.items.lookup(lookup.items).float()
        users -= weighted_sum(lookup.excluded_into_users, self.item_nodes.lookup(lookup.excluded_items).float())
        items -= weighted_sum(lookup.excluded_into_items, self.user_inputs.lookup(lookup.excluded_users).float())
        inputs = [
            table.lookup(plan).float()
            for table, plan in ((self.user_inputs, graph.user_lookup), (self.item_inputs, graph.item_lookup))
        ]
        hop = None if self.user_hop is None else self.user_hop.lookup(lookup.users).float()
        return HistoryRows(torch.cat(inputs), users, hop, items)

    @torch.no_grad()
    def refresh(self) -> None:
        """Propagate the whole catalog with the current weights."""
        self.clear()
        model, graphs = self.model, self.graphs
        self.user_inputs, self.item_inputs = layerwise.graph_inputs(
            model, self.tables, self.features, graphs, self.chunk, self.dtype
        )
        self.users, self.items = self._like(self.user_inputs), self._like(self.item_inputs)
        # nodes of the graph: the inputs, unless content views take the item-item hop first
        self.item_nodes = self._like(self.item_inputs) if model.item_hop_first else self.item_inputs
        if graphs.user_user is not None:
            self.user_hop = self._like(self.user_inputs)
        chunk = self.chunk * self.users.width // layerwise.COLUMNS
        edges = layerwise.GraphOperators(graphs, self.users, self.items, chunk)
        for columns in layerwise.column_groups(model):
            x_user, x_item = edges.input_columns(model, self.user_inputs, self.item_inputs, columns)
            if model.item_hop_first:
                self.item_nodes.weight[:, columns] = x_item.weight
            users, items = edges.propagate(x_user, x_item, model.model_config.layers)
            self.users.weight[:, columns], self.items.weight[:, columns] = users.weight, items.weight
            layerwise.apply_view_weights(users, model, self.tables.user, columns)
            for low, high, hop in edges.user_user.sums(users) if edges.user_user else ():
                self.user_hop.weight[low:high, columns] = hop
            item_hop = None if model.item_hop_first else edges.item_item
            for low, high, hop in item_hop.sums(items) if item_hop else ():
                self.items.weight[low:high, columns] = items.weight[low:high] + hop
        self.age = 0

    def _like(self, table: ShardedTable) -> ShardedTable:
        return ShardedTable(table.name, table.rows, table.width, table.comm, dtype=self.dtype, trainable=False)
