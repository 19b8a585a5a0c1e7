"""GTC: content filter, gate, graph convolution over streams, and the loss (arXiv 2604.03014).

    item id rows ───────────────┐
    features ─ project ─ filter ┴─ streams [n, S, D] ─ gate ─┐
    user preference rows [n, S, D], L2-normalised ───────────┴─ x + Ax + A^2 x ─ concat ─ hops ─ dot product

The network knows neither where rows live nor how the graph was sampled: it gets rows, and a `Batch` of blocks and
positions. The whole graph is one block used by every layer; a sampled mini-batch has one block a layer.

Tables (row-sharded, outside this module): `item` [items, D], the id embedding; `user` [users, S * D + S], preferences
per stream and the user's stream weights. Everything here is dense and goes through DDP.
"""

from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import nn

from gtc_dist.model.collectives import World
from gtc_dist.model.correlation import total_correlation
from gtc_dist.model.diffusion import ContentFilter, Schedule
from gtc_dist.model.propagation import Block, convolve, weighted_sum
from gtc_dist.model.table import Route, RowTable


@dataclass
class Batch:
    """What one step needs. "in" users and items are those whose rows are looked up; "seed" ones those that the
    convolution gives an output for (seed users first, then seed items)."""

    # rows
    user_route: Route  # of the in-users
    item_route: Route  # of the in-items
    features: dict[str, torch.Tensor]  # modality -> [in-items, d]
    # graph
    audience: Block | None  # in-users -> in-items, weights sum to one: mean preference of an item's users
    input_nodes: (
        torch.Tensor | None
    )  # [sources of the first block], rows of cat(in-users, in-items); None: all in order
    blocks: list[Block]
    seed_users: int
    seed_items: int
    user_hop: Block | None  # seed users -> batch users
    item_hop: Block | None  # seed items -> batch items
    user_rows: torch.Tensor  # [u] the batch's users among the seed users
    item_rows: torch.Tensor  # [i] the batch's items among the seed items
    # pairs; positions in user_rows and item_rows
    users: torch.Tensor  # [B]
    positives: torch.Tensor  # [B]
    negatives: torch.Tensor  # [B, K], or [P] shared by the batch
    negative_mask: torch.Tensor | None  # [B, P] False where a shared negative is the user's train positive
    # ego rows of the pairs; positions among the in-users and in-items
    ego_users: torch.Tensor  # [u]
    ego_items: torch.Tensor  # [i]
    item_ids: torch.Tensor  # [i] catalog index of the batch's items
    # randomness of the diffusion loss, and the seed of the total correlation's permutations (alike on every rank)
    timesteps: torch.Tensor  # int64 [B]
    noise: torch.Tensor  # [modalities, B, D]
    permutation_seed: int
    # sizes over ranks
    counts: list[int]  # pairs of each rank
    correlation_counts: list[int]  # rows of each rank in the total correlation

    def to(self, device: torch.device) -> "Batch":
        return replace(self, **{f.name: _move(getattr(self, f.name), device) for f in fields(self)})


def _move(value, device):
    if isinstance(value, list) and value and isinstance(value[0], Block):
        # layers that share one block go on sharing it
        moved = {id(block): block.to(device) for block in value}
        return [moved[id(block)] for block in value]
    if isinstance(value, dict):
        return {key: tensor.to(device, non_blocking=True) for key, tensor in value.items()}
    return value.to(device) if isinstance(value, torch.Tensor | Block | Route) else value


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
    temperature: float
    w_tc: float
    w_diff: float
    w_reg: float

    @property
    def streams(self) -> list[str]:
        return ["id", *self.modalities]


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
        """User rows [n, S * D + S] -> L2-normalised preferences [n, S, D] and stream weights [n, S] with mean one."""
        preference, weight = rows.split([self.S * self.D, self.S], dim=1)
        preference = F.normalize(preference.reshape(-1, self.S, self.D), dim=2)
        return preference, torch.softmax(weight, dim=1) * self.S

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

    def items_in(self, streams: torch.Tensor) -> torch.Tensor:
        """What enters the graph for items, [n, S * D]: the id stream plus the gated fusion of all, and each content
        stream times its gate (mean one over streams)."""
        gates = self.gates(streams)
        fused = (gates[:, :, None] * streams).sum(dim=1)
        ids = F.normalize(streams[:, 0] + fused, dim=1)
        parts = torch.cat([ids[:, None], streams[:, 1:]], dim=1) * (self.S * gates)[:, :, None]
        return parts.flatten(1)

    def users_out(self, propagated: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Propagated user streams [n, S * D] times the user's stream weights [n, S]."""
        return (propagated.view(-1, self.S, self.D) * weights[:, :, None]).flatten(1)

    # --- one step ---------------------------------------------------------------------------------------------------

    def embed(self, batch: Batch, user_rows: torch.Tensor, item_rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Embeddings of the batch's users [u, S * D] and items [i, S * D], with what the losses need on the way.

        Args:
            user_rows: [in-users, S * D + S], item_rows: [in-items, D], from the tables.
        """
        preference, weights = self.users_in(user_rows)
        preference = preference.flatten(1)
        content = self.content(batch.features)
        audience = None
        if batch.audience is not None:
            audience = weighted_sum(batch.audience, preference)
        streams = self.streams(item_rows, self.filtered(item_rows, content, audience))
        nodes = torch.cat([preference, self.items_in(streams)])
        if batch.input_nodes is not None:
            nodes = nodes[batch.input_nodes]
        seeds = convolve(batch.blocks, nodes, batch.seed_users + batch.seed_items)
        # seed users come first among the in-users (sampled) or are all of them (full)
        users, items = seeds.split([batch.seed_users, batch.seed_items])
        users = self.users_out(users, weights[: batch.seed_users])
        out_users, out_items = users[batch.user_rows], items[batch.item_rows]
        if batch.user_hop is not None:
            out_users = out_users + weighted_sum(batch.user_hop, users)
        if batch.item_hop is not None:
            out_items = out_items + weighted_sum(batch.item_hop, items)
        return {"users": out_users, "items": out_items, "streams": streams, "content": content, "audience": audience}

    def forward(
        self, batch: Batch, user_rows: torch.Tensor, item_rows: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss and its parts.

        Each rank's loss is scaled so that the mean over ranks is the loss of the global batch, also where ranks have
        different numbers of pairs.

        Returns:
            (loss, parts): parts are detached sums over this rank, already divided by the global counts, so that their
            sum over ranks is the global value.
        """
        e = self.embed(batch, user_rows, item_rows)
        total = max(sum(batch.counts), 1)
        ego_items = batch.ego_items[batch.positives]
        parts = {"bpr": self._bpr(e["users"], e["items"], batch).sum() / total}
        if hasattr(self, "log_scale"):
            parts["tc"] = self._correlation(e["streams"], batch)
        if self.filters:
            parts["diffusion"] = self._diffusion(item_rows, e, ego_items, batch).sum() / total
        parts["l2"] = self._l2(user_rows, item_rows, batch) / total
        weights = {"bpr": 1.0, "tc": self.shape.w_tc, "diffusion": self.shape.w_diff, "l2": self.shape.w_reg}
        loss = self.world.size * sum(weights[name] * value for name, value in parts.items())
        return loss, {name: value.detach() for name, value in parts.items()}

    def _bpr(self, users: torch.Tensor, items: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Bayesian personalised ranking (Rendle et al. 2009) of each pair, averaged over its negatives, [B]."""
        user, positive = users[batch.users], items[batch.positives]
        score = (user * positive).sum(1, keepdim=True)
        if batch.negatives.dim() == 2:
            return F.softplus((user[:, None] * items[batch.negatives]).sum(2) - score).mean(1)
        loss = F.softplus(user @ items[batch.negatives].T - score) * batch.negative_mask
        return loss.sum(1) / batch.negative_mask.sum(1).clamp(min=1)

    def _correlation(self, streams: torch.Tensor, batch: Batch) -> torch.Tensor:
        chosen = batch.positives[: batch.correlation_counts[self.world.rank]]
        rows = batch.ego_items[chosen]
        total = max(sum(batch.correlation_counts), 1)
        ids = batch.item_ids[chosen]
        generator = torch.Generator().manual_seed(batch.permutation_seed)
        scale = self.log_scale.clamp(max=4.6).exp()  # at most 100, as CLIP has it
        counts = batch.correlation_counts
        return total_correlation(streams[rows], ids, scale, generator, self.world, counts) / total

    def _diffusion(self, item_rows: torch.Tensor, e: dict, ego_items: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Denoising loss of the positives, averaged over modalities, [B]. Content and condition are constants here:
        with a gradient into the content, shrinking it to a point would be the cheapest way to a low loss."""
        audience = None if e["audience"] is None else e["audience"][ego_items].detach()
        losses = []
        for s, x0 in enumerate(e["content"].values(), start=1):
            condition = self.condition(item_rows[ego_items].detach(), audience, s)
            x0 = x0[ego_items].detach()
            losses.append(self.filters[s - 1].loss(x0, condition, batch.timesteps, batch.noise[s - 1]))
        return torch.stack(losses).mean(0)

    def _l2(self, user_rows: torch.Tensor, item_rows: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Half the squared norms of the looked-up rows of each pair and its first negatives, summed over pairs."""
        user = user_rows[batch.ego_users[batch.users]].square().sum()
        positive = item_rows[batch.ego_items[batch.positives]].square().sum()
        negative = item_rows[batch.ego_items[batch.negatives]].square().sum()
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
