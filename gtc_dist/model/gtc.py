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

from gtc_dist.model.batch import Batch, HistoryRows
from gtc_dist.model.collectives import World
from gtc_dist.model.correlation import total_correlation
from gtc_dist.model.diffusion import ContentFilter, Schedule
from gtc_dist.model.propagation import convolve, weighted_sum
from gtc_dist.model.table import RowTable


@dataclass
class Tables:
    """The trainable row-sharded tables."""

    user: RowTable
    item: RowTable

    @staticmethod
    def build(
        users: int, items: int, streams: int, width: int, std: float, world: World, seed: int, **options: bool
    ) -> "Tables":
        """`options`: `trainable` and `rowwise` of `RowTable`."""
        # columns: preferences, then the stream weights, which start at zero (all alike)
        per_column = torch.cat([torch.full((streams * width,), std), torch.zeros(streams)])
        return Tables(
            RowTable("user", users, streams * width + streams, world, init_std=per_column, seed=seed, **options),
            RowTable("item", items, width, world, init_std=std, seed=seed, **options),
        )

    def all(self) -> tuple[RowTable, RowTable]:
        return self.user, self.item


@dataclass(frozen=True)
class Shape:
    """What the network is built from; `model.*` and `train.w_*` of the configuration, and the catalog's widths."""

    modalities: dict[str, int]  # name -> width of its features
    width: int
    unit_rows: bool  # what enters the graph has length one
    gate: bool
    diffusion: bool
    condition: str  # item or audience
    diffusion_steps: int
    beta_start: float
    beta_end: float
    start_step: int
    ddim_steps: int
    hidden: int
    correlation: bool
    temperature: float  # of the total correlation at the start
    loss: str  # bpr or softmax
    loss_temperature: float
    w_tc: float
    w_diff: float
    w_reg: float

    @property
    def streams(self) -> list[str]:
        return ["id", *self.modalities]


CONTENT_LENGTH = 0.3  # of a content stream at the start, without unit rows


class GTC(nn.Module):
    """The dense part of the model.

    Args:
        shape: sizes and switches.
        world: the ranks, for the total correlation over the global batch.
    """

    def __init__(self, shape: Shape, world: World):
        super().__init__()
        self.shape, self.world = shape, world
        self.S, self.D = 1 + len(shape.modalities), shape.width
        # by number: a modality may be called what a module has as an attribute ("items")
        self.project = nn.ModuleList(nn.Linear(dim, self.D) for dim in shape.modalities.values())
        if not shape.unit_rows:
            self.common = nn.Parameter(torch.zeros(self.S * self.D))  # what all users prefer
            self.content_length = nn.Parameter(torch.full((self.S - 1,), CONTENT_LENGTH))
        self.filters = nn.ModuleList()
        if shape.diffusion:
            schedule = Schedule(shape.diffusion_steps, shape.beta_start, shape.beta_end)
            condition = self.D * (2 if shape.condition == "audience" else 1)
            for _ in shape.modalities:
                path = (shape.start_step, shape.ddim_steps)
                self.filters.append(ContentFilter(schedule, self.D, condition, shape.hidden, *path))
        if shape.gate and self.S > 1:
            self.gate_scale = nn.Parameter(torch.ones(()))
        if shape.correlation and self.S > 1:
            self.log_scale = nn.Parameter(torch.tensor(1 / shape.temperature).log())

    @property
    def needs_audience(self) -> bool:
        return bool(self.filters) and self.shape.condition == "audience"

    # --- embeddings -------------------------------------------------------------------------------------------------

    def users_in(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """User rows [n, S * D + S] -> preferences [n, S, D] and stream weights [n, S] with mean one.

        Preferences are L2-normalised, or, without unit rows, what all users prefer and the user's own on top of it,
        which starts small and grows with what the user did.
        """
        preference, weight = rows.split([self.S * self.D, self.S], dim=1)
        if self.shape.unit_rows:
            preference = F.normalize(preference.reshape(-1, self.S, self.D), dim=2)
        else:
            preference = (preference + self.common).view(-1, self.S, self.D)
        return preference, self.stream_weights(weight)

    def stream_weights(self, weight: torch.Tensor) -> torch.Tensor:
        """[n, S] with mean one, of what the table holds."""
        return torch.softmax(weight, dim=1) * self.S

    def content(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Projected content of each modality, [n, D] with unit mean square, so that the noise schedule fits it."""
        return {
            name: F.rms_norm(project(features[name].to(project.weight.dtype)), (self.D,))
            for name, project in zip(self.shape.modalities, self.project, strict=True)
        }

    def condition(self, ids: torch.Tensor, audience: torch.Tensor | None, stream: int) -> torch.Tensor:
        """What the filter of a stream knows of an item: its id embedding, and the mean preference of its users."""
        ids = F.rms_norm(ids, (self.D,))
        if self.shape.condition == "item":
            return ids
        return torch.cat([ids, audience.view(-1, self.S, self.D)[:, stream] * self.D**0.5], dim=1)

    def filtered(
        self, ids: torch.Tensor, content: dict[str, torch.Tensor], audience: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """Content of each modality after its filter, [n, D]; ids [n, D], audience [n, S * D] or None."""
        if not self.filters:
            return content
        return {
            name: self.filters[s - 1](x0, self.condition(ids, audience, s))
            for s, (name, x0) in enumerate(content.items(), start=1)
        }

    def streams(self, ids: torch.Tensor, filtered: dict[str, torch.Tensor]) -> torch.Tensor:
        """L2-normalised id and filtered content streams, [n, S, D]."""
        return F.normalize(torch.stack([ids, *filtered.values()], dim=1), dim=2)

    def gates(self, streams: torch.Tensor) -> torch.Tensor:
        """Share of each stream, [n, S], summing to one: softmax over its mean cosine with the other streams."""
        if not hasattr(self, "gate_scale"):
            return streams.new_full(streams.shape[:2], 1 / self.S)
        total = streams.sum(dim=1, keepdim=True)
        agreement = (streams * (total - streams)).sum(dim=2) / (self.S - 1)
        return torch.softmax(self.gate_scale * agreement, dim=1)

    def items_in(self, streams: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """What enters the graph for items, [n, S * D]: the id stream plus the gated fusion of all, and each content
        stream times its gate (mean one over streams).

        Without unit rows the id stream is the row `ids` [n, D] as it is, and content has a learned length.
        """
        gates = self.gates(streams)
        if not self.shape.unit_rows:
            content = streams[:, 1:] * self.content_length[:, None]
            joined = ids + (gates[:, 1:, None] * content).sum(dim=1)
            return torch.cat([joined[:, None], content * (self.S * gates)[:, 1:, None]], dim=1).flatten(1)
        fused = (gates[:, :, None] * streams).sum(dim=1)
        ids = F.normalize(streams[:, 0] + fused, dim=1)
        parts = torch.cat([ids[:, None], streams[:, 1:]], dim=1) * (self.S * gates)[:, :, None]
        return parts.flatten(1)

    def users_out(self, propagated: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Propagated user streams [n, S * D] times the user's stream weights [n, S]."""
        return (propagated.view(-1, self.S, self.D) * weights[:, :, None]).flatten(1)

    # --- one step ---------------------------------------------------------------------------------------------------

    def embed(
        self, batch: Batch, user_rows: torch.Tensor, item_rows: torch.Tensor, history: HistoryRows | None = None
    ) -> dict[str, torch.Tensor]:
        """Embeddings of the batch's users [u, S * D] and items [i, S * D], with what the losses need on the way.

        Args:
            user_rows: [in-users, S * D + S], item_rows: [in-items, D], from the tables.
            history: with it, the blocks carry what changed since, and the sums of then are added.
        """
        preference, weights = self.users_in(user_rows)
        preference = preference.flatten(1)
        content = self.content(batch.features)
        audience = None
        if batch.audience is not None:
            audience = weighted_sum(batch.audience, preference)
        streams = self.streams(item_rows, self.filtered(item_rows, content, audience))
        nodes = torch.cat([preference, self.items_in(streams, item_rows)])
        if history is not None:
            nodes = nodes - history.inputs
        if batch.input_nodes is not None:
            nodes = nodes.index_select(0, batch.input_nodes)
        seeds = convolve(batch.blocks, nodes, batch.seed_users + batch.seed_items)
        # seed users come first among the in-users (sampled) or are all of them (full)
        users, items = seeds.split([batch.seed_users, batch.seed_items])
        weights = weights[: batch.seed_users]
        out_users, out_items = users.index_select(0, batch.user_rows), items.index_select(0, batch.item_rows)
        if history is not None:
            out_users, out_items = out_users + history.users, out_items + history.items
        out_users = self.users_out(out_users, weights.index_select(0, batch.user_rows))
        if batch.user_hop is not None:
            out_users = out_users + weighted_sum(batch.user_hop, self.users_out(users, weights))
            if history is not None:
                out_users = out_users + history.user_hop
        if batch.item_hop is not None:
            out_items = out_items + weighted_sum(batch.item_hop, items)
        return {"users": out_users, "items": out_items, "streams": streams, "content": content, "audience": audience}

    def forward(
        self, batch: Batch, user_rows: torch.Tensor, item_rows: torch.Tensor, history: HistoryRows | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss and its parts.

        Each rank's loss is scaled so that the mean over ranks is the loss of the global batch, also where ranks have
        different numbers of pairs.

        Returns:
            (loss, parts): parts are detached sums over this rank, already divided by the global counts, so that their
            sum over ranks is the global value.
        """
        e = self.embed(batch, user_rows, item_rows, history)
        total = max(sum(batch.counts), 1)
        ego_items = batch.ego_items[batch.positives]
        parts = {self.shape.loss: (self._ranking(e["users"], e["items"], batch) * batch.pair_weights).sum() / total}
        if hasattr(self, "log_scale"):
            parts["tc"] = self._correlation(e["streams"], batch)
        if self.filters:
            parts["diffusion"] = self._diffusion(item_rows, e, ego_items, batch).sum() / total
        parts["l2"] = self._l2(user_rows, item_rows, batch) / total
        weights = {self.shape.loss: 1.0, "tc": self.shape.w_tc, "diffusion": self.shape.w_diff, "l2": self.shape.w_reg}
        loss = self.world.size * sum(weights[name] * value for name, value in parts.items())
        return loss, {name: value.detach() for name, value in parts.items()}

    def _ranking(self, users: torch.Tensor, items: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Loss of each pair against its negatives, [B].

        bpr: Bayesian personalised ranking (Rendle et al. 2009), averaged over the negatives. softmax: cross-entropy of
        the positive among itself and the negatives; the hardest weigh most. Both of scores over a temperature.
        """
        user, positive = users.index_select(0, batch.users), items.index_select(0, batch.positives)
        user = user / self.shape.loss_temperature
        score = (user * positive).sum(1, keepdim=True)
        if batch.negatives.dim() == 2:
            negative, mask = (user[:, None] * items[batch.negatives]).sum(2), None
        else:
            negative, mask = user @ items.index_select(0, batch.negatives).T, batch.negative_mask
        if self.shape.loss == "softmax":
            if mask is not None:
                negative = negative.masked_fill(~mask, float("-inf"))
            logits = torch.cat([score, negative], dim=1)
            return torch.logsumexp(logits, dim=1) - logits[:, 0]
        loss = F.softplus(negative - score)
        return loss.mean(1) if mask is None else (loss * mask).sum(1) / mask.sum(1).clamp(min=1)

    def _correlation(self, streams: torch.Tensor, batch: Batch) -> torch.Tensor:
        chosen = batch.positives[: batch.correlation_counts[self.world.rank]]
        rows = batch.ego_items[chosen]
        total = max(sum(batch.correlation_counts), 1)
        ids = batch.item_ids[chosen]
        generator = torch.Generator().manual_seed(batch.permutation_seed)
        scale = self.log_scale.clamp(max=4.6).exp()  # at most 100, as CLIP has it
        counts = batch.correlation_counts
        return total_correlation(streams.index_select(0, rows), ids, scale, generator, self.world, counts) / total

    def _diffusion(self, item_rows: torch.Tensor, e: dict, ego_items: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Denoising loss of the positives, averaged over modalities, [B]. Content and condition are constants here:
        with a gradient into the content, shrinking it to a point would be the cheapest way to a low loss."""
        audience = None if e["audience"] is None else e["audience"].detach().index_select(0, ego_items)
        losses = []
        for s, x0 in enumerate(e["content"].values(), start=1):
            condition = self.condition(item_rows.detach().index_select(0, ego_items), audience, s)
            x0 = x0.detach().index_select(0, ego_items)
            losses.append(self.filters[s - 1].loss(x0, condition, batch.timesteps, batch.noise[s - 1]))
        return torch.stack(losses).mean(0)

    def _l2(self, user_rows: torch.Tensor, item_rows: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Half the squared norms of the looked-up rows of each pair and its first negatives, summed over pairs."""
        user = user_rows.index_select(0, batch.ego_users[batch.users]).square().sum()
        positive = item_rows.index_select(0, batch.ego_items[batch.positives]).square().sum()
        negative = item_rows.index_select(0, batch.ego_items[batch.negatives.reshape(-1)]).square().sum()
        share = len(batch.users) / max(batch.negatives.numel(), 1)
        return 0.5 * (user + positive + share * negative)

    # --- what is watched --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def watch(
        self, streams: torch.Tensor, content: dict[str, torch.Tensor], filtered: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """For each item [n]: gate share of each stream, and the share of content energy that each filter keeps.

        Kept energy is 1 - ||x0 - x0_hat||^2 / ||x0||^2, at least 0: 1 where the filter changes nothing.
        """
        gates = self.gates(streams)
        out = {f"gate/{name}": gates[:, s] for s, name in enumerate(self.shape.streams)}
        for name, x0 in content.items():
            removed = (x0 - filtered[name]).square().sum(1)
            out[f"kept_energy/{name}"] = (1 - removed / x0.square().sum(1).clamp(min=1e-12)).clamp(min=0)
        return out
