"""GTC: content filter, view attention, graph convolution over views, and the loss (arXiv 2604.03014).

    item id rows ───────────────┐
    features ─ project ─ filter ┴ views ─ attention ─┐
    user preference rows ────────────────────────────┴ [item hop] ─ x + Ax + A^2 x ─ [item hop] ─ user's view weights
                                                       ─ [user hop] ─ join views ─ dot product

The item-item hop comes before the convolution where content gates the id (`gated`), after it otherwise.

The network knows neither where rows live nor how the graph was sampled: it gets rows, and a `Batch` with a subgraph.
The whole graph is one block that every layer uses; a sampled mini-batch has one block per layer.

Tables (row-sharded, outside this module): `item` [items, members * D], id embeddings; `user` [users, preferences + view
weights], preferences of each member (one per view, or, where content gates the id, one) and weights of its views;
`masked_item` of the masked diffusion (masked_diffusion.py), a second model that is trained beside the ensemble. All
else is dense and goes through DDP. In the graph a node has members * graph views * D columns; member m has the columns
[m * graph views * D, (m + 1) * graph views * D).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from gtc_dist.config import ModelConfig, TrainConfig
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.distributed.message_passing import Block, convolve, weighted_sum
from gtc_dist.distributed.sharded_table import ShardedTable
from gtc_dist.errors import InputError
from gtc_dist.model import losses
from gtc_dist.model.batch import Batch, HistoryRows, Subgraph
from gtc_dist.model.functions import unit_rows
from gtc_dist.model.item_encoder import MAX_LOG_SCALE, EncodedItems, ItemEncoder
from gtc_dist.model.masked_diffusion import DENSE_LR, MASKED_TABLE, TABLE_LR, MaskedDiffusion
from gtc_dist.model.variant import VARIANTS, Variant


@dataclass
class Tables:
    """The trainable row-sharded tables."""

    user: ShardedTable
    item: ShardedTable
    masked_item: ShardedTable | None = None  # of the masked diffusion

    @staticmethod
    def build(network: "GTC", users: int, items: int, comm: Communicator, seed: int, **options: bool) -> "Tables":
        """`options`: `trainable` and `rowwise_second_moment` of `ShardedTable`."""
        std = network.variant.init_std
        preferences, weights = network.user_widths
        per_column = torch.cat([torch.full((preferences,), std), torch.zeros(weights)])  # equal view weights at first
        width = network.n_members * network.dim
        tables = Tables(
            ShardedTable("user", users, preferences + weights, comm, init_std=per_column, seed=seed, **options),
            ShardedTable("item", items, width, comm, init_std=std, seed=seed, **options),
        )
        if network.masked is not None:
            std = network.masked.initial_std
            tables.masked_item = ShardedTable(
                MASKED_TABLE, items, len(std), comm, init_std=std, seed=seed, learning_rate=TABLE_LR, **options
            )
        return tables

    def all(self) -> tuple[ShardedTable, ...]:
        return tuple(table for table in (self.user, self.item, self.masked_item) if table is not None)


@dataclass
class BatchEmbeddings:
    """Embeddings of a batch before views are joined."""

    users: torch.Tensor  # [u, node views * D]
    items: torch.Tensor  # [i, node views * D]
    encoded: list[EncodedItems]  # of each member, the input items


class GTC(nn.Module):
    """The dense part of the model: an ensemble of `model.members` networks.

    Args:
        modalities: name -> width of its features.
        model, train: sections of the configuration.
        comm: the ranks, for the total correlation over the global batch.
        variant: parts of the network; None: those of `model.variant`.
    """

    def __init__(
        self,
        modalities: dict[str, int],
        model: ModelConfig,
        train: TrainConfig,
        comm: Communicator,
        variant: Variant | None = None,
    ):
        super().__init__()
        self.modalities, self.model_config, self.train_config, self.comm = modalities, model, train, comm
        self.variant = variant or VARIANTS[model.variant]
        self.view_names = ["id", *modalities]
        self.n_views, self.dim, self.n_members = len(self.view_names), model.width, model.members
        # graph views: all views, or, where content gates the id, the id and the mean of the content views
        self.n_graph_views = 2 if self.variant.gated_content and modalities else self.n_views
        self.n_node_views = self.n_members * self.n_graph_views  # of a graph node, over all members
        self.members = nn.ModuleList(ItemEncoder(modalities, model, train, self.variant) for _ in range(self.n_members))
        if not self.variant.unit_rows and not self.variant.gated_content:
            # preference that all users share; only in combinations of parts that no model.variant has
            self.common = nn.Parameter(torch.zeros(self.n_node_views * self.dim))
        self.masked = None
        if model.masked_members:
            self.masked = MaskedDiffusion(modalities, model.masked_members, train.precision == "bf16")

    @property
    def has_filter(self) -> bool:
        return self.train_config.w_diff > 0

    @property
    def user_widths(self) -> tuple[int, int]:
        """Columns of a user's row: preferences, view weights."""
        preferences = self.n_members if self.variant.gated_content else self.n_node_views
        return preferences * self.dim, self.n_node_views

    @property
    def term_weights(self) -> dict[str, float]:
        """Weights of the loss terms that have one; the others enter as they are."""
        train = self.train_config
        return {"tc": train.w_tc, "diffusion": train.w_diff, "l2": train.w_reg}

    @property
    def out_width(self) -> int:
        """Columns of an embedding."""
        return (self.n_members if self.variant.sum_views else self.n_node_views) * self.dim

    @property
    def has_total_correlation(self) -> bool:
        return self.train_config.w_tc > 0 and self.n_views > 1

    @property
    def tc_shape(self) -> tuple[int, int]:
        """Groups of views whose total correlation is computed together, and views of each; no group without it."""
        if not self.has_total_correlation:
            return 0, 0
        if self.variant.correlates_outputs:
            return 2 * self.n_members, self.n_graph_views  # users and items
        return self.n_members, self.n_views

    @property
    def tc_temperature(self) -> float | None:
        """Temperature of the total correlation's critic, geometric mean over members."""
        if not self.has_total_correlation:
            return None
        return sum(-member.log_scale for member in self.members).div(self.n_members).exp().item()

    @torch.no_grad()
    def clamp_parameters(self) -> None:
        """Keep the critic's scales within their bound; called after each optimizer step."""
        for member in self.members if self.has_total_correlation else ():
            member.log_scale.clamp_(max=MAX_LOG_SCALE)

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Local. Set the dense weights to those of a checkpoint.

        Raises:
            InputError: weights of a masked diffusion of version 0.3.0, which has another form.
        """
        if "masked.maps.0" in state:
            raise InputError(
                "this run's masked diffusion has the form of version 0.3.0; use that version for it, or train again"
            )
        self.load_state_dict(state)

    def parameter_groups(self) -> list[dict]:
        """Parameters for the optimizer; those of the masked diffusion have their own learning rate."""
        others = [parameter for name, parameter in self.named_parameters() if not name.startswith("masked.")]
        groups: list[dict] = [{"params": others}]
        if self.masked is not None:
            groups.append({"params": list(self.masked.parameters()), "lr": DENSE_LR})
        return groups

    # --- embeddings -------------------------------------------------------------------------------------------------

    def encode_users(self, preference: torch.Tensor) -> torch.Tensor:
        """What enters the graph, [n, node views * D], from the first columns of users' rows (`user_widths`).

        Preferences are L2-normalised, or, without unit rows, a shared preference plus the user's own, which starts
        small and grows with the user's interactions. Where content gates the id, users have no preference of their own
        in the content view: it comes from their items.
        """
        if self.variant.gated_content:
            preference = F.pad(preference.reshape(-1, self.n_members, 1, self.dim), (0, 0, 0, self.n_graph_views - 1))
        elif self.variant.unit_rows:
            preference = unit_rows(preference.reshape(-1, self.n_node_views, self.dim))
        else:
            preference = preference + self.common
        return preference.reshape(-1, self.n_node_views * self.dim)

    def view_weights(self, weight: torch.Tensor) -> torch.Tensor:
        """View weights [n, node views], mean one over a member's views, from the last columns of users' rows."""
        shares = torch.softmax(weight.reshape(-1, self.n_members, self.n_graph_views), dim=2)
        return (shares * self.n_graph_views).view(-1, self.n_node_views)

    def split_members(self, columns: torch.Tensor) -> list[torch.Tensor]:
        """Columns of each member."""
        return list(columns.view(-1, self.n_members, columns.shape[1] // self.n_members).unbind(1))

    def encode_items(
        self, rows: torch.Tensor, features: dict[str, torch.Tensor], audience: torch.Tensor | None
    ) -> tuple[torch.Tensor, list[EncodedItems]]:
        """Item rows -> what enters the graph, [n, node views * D], and each member's encoded items.

        Args:
            rows: [n, members * D]; features: modality -> [n, d]; audience: mean preference of the items' users
                [n, node views * D], or None.
        """
        audiences = [None] * self.n_members if audience is None else self.split_members(audience)
        inputs, encoded = [], []
        for member, ids, liked in zip(self.members, self.split_members(rows), audiences, strict=True):
            content = member.content(features)
            filtered = member.filter_content(ids, content, liked)
            views = member.views(ids, filtered)
            inputs.append(member.graph_input(views, ids))
            encoded.append(EncodedItems(ids, liked, content, filtered, views))
        return (inputs[0] if self.n_members == 1 else torch.cat(inputs, dim=1)), encoded

    @property
    def item_hop_first(self) -> bool:
        """Whether the item-item hop comes before the convolution: where content gates the id, an item's content view is
        that of its neighbours. Otherwise the hop is added to what leaves the graph."""
        return self.variant.gated_content and self.model_config.item_hop

    def is_content(self, view: int) -> bool:
        """Whether a view in the graph, by its number below `n_node_views`, is a content view."""
        return view % self.n_graph_views > 0

    def apply_input_hop(self, items: torch.Tensor, hop: Block) -> torch.Tensor:
        """Item inputs after the item-item hop, for its destinations, which are the first of its sources `items`
        [n, node views * D]: their own id views, and their neighbours' content views."""
        items = items.view(-1, self.n_members, self.n_graph_views, self.dim)
        content = weighted_sum(hop, items[:, :, 1:].flatten(1))
        content = content.view(-1, self.n_members, self.n_graph_views - 1, self.dim)
        return torch.cat([items[: len(content), :, :1], content], dim=2).flatten(1)

    def join_views(self, views: torch.Tensor) -> torch.Tensor:
        """Embeddings [n, out_width] of views [n, node views * D]."""
        if not self.variant.sum_views:
            return views
        summed = views.view(-1, self.n_members, self.n_graph_views, self.dim).sum(2)
        return summed.view(-1, self.n_members * self.dim)

    def weigh_views(self, propagated: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Propagated user views [n, node views * D] times the user's view weights [n, node views]."""
        return (propagated.view(-1, self.n_node_views, self.dim) * weights[:, :, None]).flatten(1)

    # --- one step ---------------------------------------------------------------------------------------------------

    def embed(
        self, graph: Subgraph, user_rows: torch.Tensor, item_rows: torch.Tensor, history: HistoryRows | None = None
    ) -> BatchEmbeddings:
        """Embeddings of the batch's users and items.

        Args:
            user_rows: [input users, sum(user_widths)], item_rows: [input items, members * D], from the tables.
            history: historical embeddings; the blocks then carry the change since, to which they are added.
        """
        preference, weight = user_rows.split(self.user_widths, dim=1)
        preference = self.encode_users(preference)
        blocks, audience = graph.without_excluded()
        if audience is not None:
            audience = weighted_sum(audience, preference)
        item_inputs, encoded = self.encode_items(item_rows, graph.features, audience)
        if history is not None:
            inputs = history.inputs.split([len(preference), len(item_inputs)])
            preference, item_inputs = preference - inputs[0], item_inputs - inputs[1]
        if graph.input_hop is not None:
            item_inputs = self.apply_input_hop(item_inputs, graph.input_hop)
        nodes = torch.cat([preference, item_inputs])
        if graph.input_nodes is not None:
            nodes = nodes.index_select(0, graph.input_nodes)
        seeds = convolve(blocks, nodes, graph.n_seed_users + graph.n_seed_items)
        users, items = seeds.split([graph.n_seed_users, graph.n_seed_items])
        out_users, out_items = users.index_select(0, graph.users_in_seeds), items.index_select(0, graph.items_in_seeds)
        if graph.item_hop is not None:
            out_items = out_items + weighted_sum(graph.item_hop, items)
        if history is not None:
            out_users, out_items = out_users + history.users, out_items + history.items
        out_users = self.weigh_views(out_users, self.view_weights(weight.index_select(0, graph.users_in_inputs)))
        if graph.user_hop is not None:
            weights = self.view_weights(weight[: graph.n_seed_users])  # seed users are the first input users
            out_users = out_users + weighted_sum(graph.user_hop, self.weigh_views(users, weights))
            if history is not None:
                out_users = out_users + history.user_hop
        return BatchEmbeddings(out_users, out_items, encoded)

    def forward(
        self,
        batch: Batch,
        user_rows: torch.Tensor,
        item_rows: torch.Tensor,
        masked_rows: torch.Tensor | None = None,
        history: HistoryRows | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss and its terms, each the mean over members.

        Each rank's loss is scaled so that the mean over ranks is the loss of the global batch, also where ranks have
        different numbers of pairs. A collective if there is a total-correlation loss.

        Returns:
            (loss, terms): terms are detached sums over this rank, divided by the global counts, so that their sum over
            ranks is the value of the global batch.
        """
        train = self.train_config
        e = self.embed(batch.subgraph, user_rows, item_rows, history)
        total = max(sum(batch.counts), 1)
        ranking = losses.ranking_loss(self, self.join_views(e.users), self.join_views(e.items), batch)
        if batch.recency_weight is not None:
            ranking = ranking * batch.recency_weight
        terms = {train.loss: ranking.sum() / total}
        if self.has_total_correlation:
            terms["tc"] = losses.total_correlation_loss(self, e, batch)
        if self.has_filter:
            terms["diffusion"] = losses.denoising_loss(self, e, batch).sum() / total
        terms["l2"] = losses.l2_loss(self, user_rows, item_rows, batch) / total
        if self.masked is not None:
            terms["masked"] = self.masked(batch.masked, masked_rows)
        weights = self.term_weights
        weighted = [value * weights[name] if name in weights else value for name, value in terms.items()]
        loss = sum(weighted[1:], weighted[0])
        if self.comm.size > 1:
            loss = loss * self.comm.size
        return loss, {name: value.detach() for name, value in terms.items()}

    def diagnostics(self, encoded: list[EncodedItems]) -> dict[str, torch.Tensor]:
        """`ItemEncoder.diagnostics` of each item, mean over members."""
        each = [member.diagnostics(items) for member, items in zip(self.members, encoded, strict=True)]
        return {name: sum(one[name] for one in each) / self.n_members for name in each[0]}
