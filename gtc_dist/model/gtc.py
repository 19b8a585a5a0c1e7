"""GTC: content filter, gate, graph convolution over streams, and the loss (arXiv 2604.03014).

    item id rows ───────────────┐
    features ─ project ─ filter ┴─ streams [n, S, D] ─ gate ─┐
    user preference rows [n, S, D], L2-normalised ───────────┴─ x + Ax + A^2 x ─ concat ─ hops ─ dot product

The network knows neither where rows live nor how the graph was sampled: it gets rows, and a `Batch` of blocks and
positions. The whole graph is one block used by every layer; a sampled mini-batch has one block a layer.

Tables (row-sharded, outside this module): `item` [items, D], the id embedding; `user` [users, S * D + S], preferences
per stream and the user's stream weights. Everything here is dense and goes through DDP.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from gtc_dist.distributed.collectives import Communicator
from gtc_dist.distributed.message_passing import Block, convolve, weighted_sum
from gtc_dist.distributed.sharded_table import ShardedTable
from gtc_dist.model.batch import Batch, HistoryRows
from gtc_dist.model.item_encoder import MOST_LOG_SCALE, EncodedItems, ItemEncoder, Shape
from gtc_dist.model.total_correlation import total_correlation

USER_DROPOUT = 0.5  # share of the denoising loss's pairs without their user: embeddings are made without one


@dataclass
class Tables:
    """The trainable row-sharded tables."""

    user: ShardedTable
    item: ShardedTable

    @staticmethod
    def build(
        network: "GTC", users: int, items: int, std: float, comm: Communicator, seed: int, **options: bool
    ) -> "Tables":
        """`options`: `trainable` and `rowwise` of `ShardedTable`."""
        # columns: preferences, then the stream weights, which start at zero (all alike)
        preferences, weights = network.user_widths
        per_column = torch.cat([torch.full((preferences,), std), torch.zeros(weights)])
        width = network.M * network.D
        return Tables(
            ShardedTable("user", users, preferences + weights, comm, init_std=per_column, seed=seed, **options),
            ShardedTable("item", items, width, comm, init_std=std, seed=seed, **options),
        )

    def all(self) -> tuple[ShardedTable, ShardedTable]:
        return self.user, self.item


class GTC(nn.Module):
    """The dense part of the model.

    Args:
        shape: sizes and switches.
        world: the ranks, for the total correlation over the global batch.
    """

    def __init__(self, shape: Shape, comm: Communicator):
        super().__init__()
        self.shape, self.comm = shape, comm
        self.S, self.G, self.D = len(shape.streams), len(shape.graph_streams), shape.width
        self.M = shape.members
        self.T = self.M * self.G  # streams of all members in the graph
        self.members = nn.ModuleList(ItemEncoder(shape) for _ in range(self.M))
        if not shape.unit_rows and shape.content == "vector":
            self.common = nn.Parameter(torch.zeros(self.T * self.D))  # what all users prefer

    @property
    def needs_audience(self) -> bool:
        return self.shape.diffusion and self.shape.condition in ("audience", "user")

    @property
    def is_personal(self) -> bool:
        """Whether pairs have a personal content score beside the dot product."""
        return self.shape.diffusion and self.shape.condition == "user"

    @property
    def user_widths(self) -> tuple[int, int]:
        """Columns of a user's row: preferences, stream weights."""
        return (self.M if self.shape.content == "gate" else self.T) * self.D, self.T

    @property
    def out_width(self) -> int:
        """Columns of an embedding."""
        return (self.M if self.shape.join == "sum" else self.T) * self.D

    @property
    def correlates(self) -> bool:
        return self.shape.correlation and self.S > 1

    @property
    def correlation_temperature(self) -> float | None:
        """Of the total correlation, geometric mean over members."""
        if not self.correlates:
            return None
        return sum(-member.log_scale for member in self.members).div(self.M).exp().item()

    @torch.no_grad()
    def keep_bounds(self) -> None:
        """After a step: the total correlation's scales stay within their bound."""
        for member in self.members if self.correlates else ():
            member.log_scale.clamp_(max=MOST_LOG_SCALE)

    # --- embeddings -------------------------------------------------------------------------------------------------

    def users_in(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """User rows -> what enters the graph [n, T * D], and stream weights [n, T] with mean one over a member's.

        Preferences are L2-normalised, or, without unit rows, what all users prefer and the user's own on top of it,
        which starts small and grows with what the user did. Where content gates the id, users have no preference of
        their own in the content streams: theirs come from their items.
        """
        preference, weight = rows.split(self.user_widths, dim=1)
        if self.shape.content == "gate":
            preference = F.pad(preference.reshape(-1, self.M, 1, self.D), (0, 0, 0, self.G - 1))
        elif self.shape.unit_rows:
            preference = F.normalize(preference.reshape(-1, self.T, self.D), dim=2)
        else:
            preference = preference + self.common
        return preference.reshape(-1, self.T * self.D), self.stream_weights(weight)

    def stream_weights(self, weight: torch.Tensor) -> torch.Tensor:
        """[n, T] with mean one over a member's streams, of what the table holds."""
        return (torch.softmax(weight.reshape(-1, self.M, self.G), dim=2) * self.G).view(-1, self.T)

    def split(self, columns: torch.Tensor) -> list[torch.Tensor]:
        """Each member's part of the columns of all."""
        return list(columns.view(-1, self.M, columns.shape[1] // self.M).unbind(1))

    def items_in(
        self, rows: torch.Tensor, features: dict[str, torch.Tensor], audience: torch.Tensor | None
    ) -> tuple[torch.Tensor, list[EncodedItems]]:
        """What enters the graph for items, [n, T * D], and on the way to it, for each member.

        Args:
            rows: [n, M * D]; features: modality -> [n, d]; audience: mean of the users' [n, T * D], or None.
        """
        audiences = [None] * self.M if audience is None else self.split(audience)
        nodes, ways = [], []
        for member, ids, liked in zip(self.members, self.split(rows), audiences, strict=True):
            content = member.content(features)
            filtered = member.filtered(ids, content, liked)
            streams = member.streams(ids, filtered)
            nodes.append(member.items_in(streams, ids))
            ways.append(EncodedItems(ids, liked, content, filtered, streams))
        return (nodes[0] if self.M == 1 else torch.cat(nodes, dim=1)), ways

    @property
    def hops_first(self) -> bool:
        """Whether the hop over the item-item graph is of what enters the graph: where content gates the id, an item's
        content stream is that of its neighbours. Otherwise it is added to what leaves the graph."""
        return self.shape.content == "gate" and self.shape.item_hop

    def is_content(self, stream: int) -> bool:
        """Whether a stream in the graph, by its number below T, is of content."""
        return stream % self.G > 0

    def hop_inputs(self, items: torch.Tensor, hop: Block) -> torch.Tensor:
        """What enters the graph for the hop's destinations, which are the first of its sources `items` [n, T * D]:
        the id streams as they are, the content streams of the neighbours."""
        items = items.view(-1, self.M, self.G, self.D)
        content = weighted_sum(hop, items[:, :, 1:].flatten(1)).view(-1, self.M, self.G - 1, self.D)
        return torch.cat([items[: len(content), :, :1], content], dim=2).flatten(1)

    def joined(self, streams: torch.Tensor) -> torch.Tensor:
        """Embeddings [n, out_width] of streams [n, T * D]."""
        if self.shape.join == "concat":
            return streams
        return streams.view(-1, self.M, self.G, self.D).sum(2).view(-1, self.M * self.D)

    def users_out(self, propagated: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Propagated user streams [n, T * D] times the user's stream weights [n, T]."""
        return (propagated.view(-1, self.T, self.D) * weights[:, :, None]).flatten(1)

    # --- one step ---------------------------------------------------------------------------------------------------

    def embed(
        self, batch: Batch, user_rows: torch.Tensor, item_rows: torch.Tensor, history: HistoryRows | None = None
    ) -> dict[str, torch.Tensor | list[EncodedItems]]:
        """Streams of the batch's users [u, T * D] and items [i, T * D], with what the losses need on the way.

        Args:
            user_rows: [in-users, sum(user_widths)], item_rows: [in-items, M * D], from the tables.
            history: with it, the blocks carry what changed since, and the sums of then are added.
        """
        preference, weights = self.users_in(user_rows)
        audience = None
        if batch.audience is not None:
            audience = weighted_sum(batch.audience, preference)
        items_in, ways = self.items_in(item_rows, batch.features, audience)
        if history is not None:
            inputs = history.inputs.split([len(preference), len(items_in)])
            preference, items_in = preference - inputs[0], items_in - inputs[1]
        if batch.input_hop is not None:
            items_in = self.hop_inputs(items_in, batch.input_hop)
        nodes = torch.cat([preference, items_in])
        if batch.input_nodes is not None:
            nodes = nodes.index_select(0, batch.input_nodes)
        seeds = convolve(batch.blocks, nodes, batch.seed_users + batch.seed_items)
        # seed users come first among the in-users (sampled) or are all of them (full)
        users, items = seeds.split([batch.seed_users, batch.seed_items])
        weights = weights[: batch.seed_users]
        out_users, out_items = users.index_select(0, batch.user_rows), items.index_select(0, batch.item_rows)
        if batch.item_hop is not None:
            out_items = out_items + weighted_sum(batch.item_hop, items)
        if history is not None:
            out_users, out_items = out_users + history.users, out_items + history.items
        out_users = self.users_out(out_users, weights.index_select(0, batch.user_rows))
        if batch.user_hop is not None:
            out_users = out_users + weighted_sum(batch.user_hop, self.users_out(users, weights))
            if history is not None:
                out_users = out_users + history.user_hop
        return {"users": out_users, "items": out_items, "ways": ways}

    def forward(
        self, batch: Batch, user_rows: torch.Tensor, item_rows: torch.Tensor, history: HistoryRows | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss and its parts, each the mean over members.

        Each rank's loss is scaled so that the mean over ranks is the loss of the global batch, also where ranks have
        different numbers of pairs.

        Returns:
            (loss, parts): parts are detached sums over this rank, already divided by the global counts, so that their
            sum over ranks is the global value.
        """
        e = self.embed(batch, user_rows, item_rows, history)
        total = max(sum(batch.counts), 1)
        ranking = self._ranking(self.joined(e["users"]), self.joined(e["items"]), batch)
        parts = {self.shape.loss: (ranking * batch.pair_weights).sum() / total}
        if self.correlates:
            parts["tc"] = self._correlation(e, batch)
        if self.shape.diffusion:
            parts["diffusion"] = self._diffusion(e, batch).sum() / total
        if self.is_personal:
            parts["personal"] = (self._personal(e, batch) * batch.pair_weights).sum() / total
        parts["l2"] = self._l2(user_rows, item_rows, batch) / total
        shape = self.shape
        weights = {shape.loss: 1.0, "tc": shape.w_tc, "diffusion": shape.w_diff, "l2": shape.w_reg}
        weights["personal"] = shape.w_personal
        loss = self.comm.size * sum(weights[name] * value for name, value in parts.items())
        return loss, {name: value.detach() for name, value in parts.items()}

    def _ranking(self, users: torch.Tensor, items: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Loss of each pair against its negatives, mean over members, [B].

        bpr: Bayesian personalised ranking (Rendle et al. 2009), averaged over the negatives. softmax: cross-entropy of
        the positive among itself and the negatives; the hardest weigh most. Both of scores over a temperature.
        Negatives of a pair are dealt to the members, shared ones are everyone's. A negative counts as often as the
        items that it stands for.
        """
        M, W = self.M, self.out_width // self.M
        user = users.index_select(0, batch.users).view(-1, M, W) / self.shape.loss_temperature
        positive = items.index_select(0, batch.positives).view(-1, M, W)
        score = (user * positive).sum(2).T[:, :, None]  # [M, B, 1]
        if batch.negatives.dim() == 2:
            dealt = batch.negatives.view(len(user), M, batch.negatives.shape[1] // M)
            dealt = dealt * M + torch.arange(M, device=user.device)[:, None]  # rows of one member
            rows = items.view(-1, W).index_select(0, dealt.reshape(-1)).view(*dealt.shape, W)
            negative, mask = (user[:, :, None] * rows).sum(3).transpose(0, 1), None
        else:
            rows = items.index_select(0, batch.negatives).view(-1, M, W)
            negative, mask = user.transpose(0, 1) @ rows.permute(1, 2, 0), batch.negative_mask
        loss = torch.zeros(())
        weight = batch.negative_weight
        if "bpr" in self.shape.loss:
            pairs = F.softplus(negative - score)
            if mask is None:
                loss = pairs.mean(2)
            else:
                counted = mask if weight is None else mask * weight
                loss = (pairs * counted).sum(2) / counted.sum(1).clamp(min=1e-12)
        if "softmax" in self.shape.loss:
            if weight is not None:
                negative = negative + weight.log()
            if mask is not None:
                negative = negative.masked_fill(~mask, float("-inf"))
            logits = torch.cat([score, negative], dim=2)
            loss = loss + torch.logsumexp(logits, dim=2) - logits[:, :, 0]
        return loss.mean(0)

    def _correlation(self, e: dict, batch: Batch) -> torch.Tensor:
        """Loss of the total correlation for the global batch, this rank's share, mean over members.

        inputs: of the items' streams as they enter the graph. outputs: of the streams as they leave it, of users and
        of items in equal parts, as they are scored.
        """
        counts = batch.correlation_counts
        chosen = slice(0, counts[self.comm.rank])
        items, users = batch.positives[chosen], batch.users[chosen]
        generator = torch.Generator().manual_seed(batch.permutation_seed)
        of_items, of_users = self.split(e["items"]), self.split(e["users"])
        losses = []
        for m, (member, way) in enumerate(zip(self.members, e["ways"], strict=True)):
            scale = member.log_scale.exp()
            if self.shape.correlation_of == "inputs":
                sides = [(way.streams.index_select(0, batch.ego_items[items]), batch.item_ids[items])]
            else:
                sides = [
                    (of_items[m].index_select(0, items).view(-1, self.G, self.D), batch.item_ids[items]),
                    (of_users[m].index_select(0, users).view(-1, self.G, self.D), batch.user_ids[users]),
                ]
            for streams, ids in sides:
                streams = F.normalize(streams, dim=2)
                args = (streams, ids, scale, generator, self.comm, counts, self.shape.critic)
                losses.append(total_correlation(*args))
        return torch.stack(losses).mean() / max(sum(counts), 1)

    def _diffusion(self, e: dict, batch: Batch) -> torch.Tensor:
        """Denoising loss of the positives, averaged over members and modalities, [B]. Content and condition are
        constants here: with a gradient into the content, shrinking it to a point would be the cheapest way to a low
        loss. Some pairs' conditions are left out, and some pairs' users (classifier-free guidance's training, Ho and
        Salimans 2022), so that the filter also works without."""
        ego = batch.ego_items[batch.positives]
        known = (batch.dropout[0] >= self.shape.condition_dropout)[:, None]
        named = (batch.dropout[1] >= USER_DROPOUT)[:, None]
        users = self.split(e["users"].detach().index_select(0, batch.users))
        losses = []
        for member, way, user in zip(self.members, e["ways"], users, strict=True):
            ids, content, audience = way.constants(ego)
            ids = torch.where(known, ids, 0)
            audience = None if audience is None else torch.where(known, audience, 0)
            for s, x0 in enumerate(content.values(), start=1):
                condition = member.condition(ids, audience, s, torch.where(named, user, 0))
                losses.append(member.filters[s - 1].loss(x0, condition, batch.timesteps, batch.noise[s - 1]))
        return torch.stack(losses).mean(0)

    def _personal(self, e: dict, batch: Batch) -> torch.Tensor:
        """BPR of dot product plus personal content score, of each pair against the negative with the largest dot
        product, [B]: it learns what dot products miss among the items that they find. It trains the filters alone;
        what is looked for by dot products does not change for it."""
        streams, items = e["users"].detach().index_select(0, batch.users), e["items"].detach()
        user, of_items = self.joined(streams) / self.shape.loss_temperature, self.joined(items)
        if batch.negatives.dim() == 2:
            dots = (user[:, None] * of_items[batch.negatives]).sum(2)
            hardest = dots.argmax(1, keepdim=True)
            negatives, counted = batch.negatives.gather(1, hardest)[:, 0], 1.0
        else:
            dots = (user @ of_items[batch.negatives].T).masked_fill(~batch.negative_mask, float("-inf"))
            hardest = dots.argmax(1, keepdim=True) if len(dots) else dots.new_zeros(0, 1, dtype=torch.int64)
            negatives, counted = batch.negatives[hardest[:, 0]], batch.negative_mask.gather(1, hardest)[:, 0]
        apart = (user * of_items[batch.positives]).sum(1) - dots.gather(1, hardest)[:, 0]
        apart = torch.where(apart.isfinite(), apart, 0) / self.M
        users = self.split(streams)
        for member, way, user in zip(self.members, e["ways"], users, strict=True):
            positive, negative = (
                member.personal(*way.constants(batch.ego_items[items]), user) for items in (batch.positives, negatives)
            )
            apart = apart + (positive - negative) / self.M
        return F.softplus(-apart) * counted

    def _l2(self, user_rows: torch.Tensor, item_rows: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Half the squared norms of the looked-up rows of each pair and its first negatives, summed over pairs, mean
        over members."""
        user = user_rows.index_select(0, batch.ego_users[batch.users]).square().sum()
        positive = item_rows.index_select(0, batch.ego_items[batch.positives]).square().sum()
        negative = item_rows.index_select(0, batch.ego_items[batch.negatives.reshape(-1)]).square().sum()
        share = len(batch.users) / max(batch.negatives.numel(), 1)
        return 0.5 * (user + positive + share * negative) / self.M

    # --- what is watched --------------------------------------------------------------------------------------------

    def watch(self, ways: list[EncodedItems]) -> dict[str, torch.Tensor]:
        """What `ItemEncoder.watch` tells of each item, mean over members."""
        told = [m.watch(way.streams, way.content, way.filtered) for m, way in zip(self.members, ways, strict=True)]
        return {name: sum(one[name] for one in told) / self.M for name in told[0]}
