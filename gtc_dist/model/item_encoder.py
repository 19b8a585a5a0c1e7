"""The item side of one member: its content, filter and gate, from an id row and features to what enters the graph.

A stream is one view of an item: its id, and one for each modality. What a content stream carries is either the filtered
content itself (`vector`, as in the paper) or the id embedding under a gate that the filtered content opens (`gate`: a
sigmoid, as MGCN has it, Yu et al., ACM MM 2023), which lets content say which parts of what was learned from
interactions hold for its neighbours too, and needs no preference of a user's own.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from gtc_dist.model.diffusion import ContentFilter, Schedule

CONTENT_LENGTH = 0.3  # of a content stream at the start, without unit rows
GATED_LENGTH = 1.5  # the same where it is a gated id: with the sigmoid's half, about the length of the id
PERSONAL_SCALE = 5.0  # of the personal content score, a mean cosine, at the start
MOST_LOG_SCALE = 4.6  # of the total correlation: at most 100, as CLIP has it


@dataclass(frozen=True)
class Shape:
    """What the network is built from; `model.*` and `train.w_*` of the configuration, and the catalog's widths."""

    modalities: dict[str, int]  # name -> width of its features
    members: int
    width: int
    unit_rows: bool  # what enters the graph has length one
    content: str  # vector or gate
    join: str  # concat or sum
    gate: bool
    diffusion: bool
    diffusion_trained: bool
    condition: str  # item, audience or user
    condition_dropout: float  # in the denoising loss
    diffusion_steps: int
    beta_start: float
    beta_end: float
    start_step: int
    ddim_steps: int
    hidden: int
    item_hop: bool
    correlation: bool
    correlation_of: str  # inputs or outputs
    critic: str  # multilinear or additive
    temperature: float  # of the total correlation at the start
    learn_temperature: bool
    loss: str  # bpr or softmax
    loss_temperature: float
    w_tc: float
    w_diff: float
    w_personal: float
    w_reg: float

    @property
    def streams(self) -> list[str]:
        return ["id", *self.modalities]

    @property
    def graph_streams(self) -> list[str]:
        """Those that go through the graph: all, or, where content gates the id, the id and the content of all."""
        return self.streams if self.content == "vector" or not self.modalities else ["id", "content"]


@dataclass
class EncodedItems:
    """One member's way from id rows and features to the graph."""

    ids: torch.Tensor  # [n, D]
    audience: torch.Tensor | None  # [n, graph streams * D] mean of the users' preferences
    content: dict[str, torch.Tensor]  # modality -> [n, D]
    filtered: dict[str, torch.Tensor]  # modality -> [n, D]
    streams: torch.Tensor  # [n, S, D]

    def constants(self, rows: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor | None]:
        """Ids, content and audience of some rows, without a gradient."""
        content = {name: x.detach().index_select(0, rows) for name, x in self.content.items()}
        audience = None if self.audience is None else self.audience.detach().index_select(0, rows)
        return self.ids.detach().index_select(0, rows), content, audience


class ItemEncoder(nn.Module):
    """The streams of items: project, filter, gate."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.S, self.D = len(shape.streams), shape.width
        # by number: a modality may be called what a module has as an attribute ("items")
        self.project = nn.ModuleList(nn.Linear(dim, self.D) for dim in shape.modalities.values())
        if not shape.unit_rows:
            lengths = (1, GATED_LENGTH) if shape.content == "gate" else (self.S - 1, CONTENT_LENGTH)
            self.content_length = nn.Parameter(torch.full((lengths[0],), lengths[1]))
        self.filters = nn.ModuleList()
        if shape.diffusion:
            schedule = Schedule(shape.diffusion_steps, shape.beta_start, shape.beta_end)
            condition = self.D * (1 + ("item", "audience", "user").index(shape.condition))
            for _ in shape.modalities:
                path = (shape.start_step, shape.ddim_steps)
                self.filters.append(ContentFilter(schedule, self.D, condition, shape.hidden, *path))
            self.filters.requires_grad_(shape.diffusion_trained)
            if shape.condition == "user":
                self.personal_scale = nn.Parameter(torch.tensor(PERSONAL_SCALE))
        if shape.gate and self.S > 1:
            self.gate_scale = nn.Parameter(torch.ones(()))
        if shape.correlation and self.S > 1:
            scale = torch.tensor(1 / shape.temperature).log().clamp(max=MOST_LOG_SCALE)
            self.log_scale = nn.Parameter(scale, requires_grad=shape.learn_temperature)

    def content(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Projected content of each modality, [n, D] with unit mean square, so that the noise schedule fits it."""
        return {
            name: F.rms_norm(project(features[name].to(project.weight.dtype)), (self.D,))
            for name, project in zip(self.shape.modalities, self.project, strict=True)
        }

    def condition(
        self,
        ids: torch.Tensor,
        audience: torch.Tensor | None,
        stream: int,
        user: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What the filter of a stream knows: the item's id embedding, the mean preference of its users, and the user.

        An item that nobody interacted with is known by its content alone: its condition is zero, which the denoising
        loss trains with the pairs whose condition is left out.

        Args:
            audience: [n, graph streams * D], of which the stream's own is used, or the id's where users have no other.
            user: [n, graph streams * D], what leaves the graph for one user each; None: nobody in particular.
        """
        ids = F.rms_norm(ids, (self.D,))
        if self.shape.condition == "item":
            return ids
        if self.shape.content == "gate":
            liked = F.rms_norm(audience[:, : self.D], (self.D,))
        else:
            liked = audience.view(-1, self.S, self.D)[:, stream] * self.D**0.5
        known = (audience != 0).any(dim=1, keepdim=True)
        parts = [torch.where(known, ids, 0), liked]
        if self.shape.condition == "user":
            parts.append(torch.zeros_like(ids) if user is None else F.rms_norm(self.of_stream(user, stream), (self.D,)))
        return torch.cat(parts, dim=1)

    def of_stream(self, user: torch.Tensor, stream: int) -> torch.Tensor:
        """A user's columns [n, D] for a content stream, of [n, graph streams * D]; gated contents share theirs."""
        return user.view(len(user), user.shape[1] // self.D, self.D)[:, 1 if self.shape.content == "gate" else stream]

    def filtered(
        self,
        ids: torch.Tensor,
        content: dict[str, torch.Tensor],
        audience: torch.Tensor | None,
        user: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Content of each modality after its filter, [n, D]; ids [n, D], audience and user as in `condition`."""
        if not self.filters:
            return content
        return {
            name: self.filters[s - 1](x0, self.condition(ids, audience, s, user))
            for s, (name, x0) in enumerate(content.items(), start=1)
        }

    def personal(
        self, ids: torch.Tensor, content: dict[str, torch.Tensor], audience: torch.Tensor, user: torch.Tensor
    ) -> torch.Tensor:
        """Personal content scores of pairs, [n]: the item's content, filtered for the user, against what the user
        prefers in it: mean cosine over modalities, times a learned scale. Arguments as in `filtered`."""
        streams = self.streams(ids, self.filtered(ids, content, audience, user))[:, 1:]
        liked = torch.stack([self.of_stream(user, s) for s in range(1, self.S)], dim=1)
        return self.personal_scale * F.cosine_similarity(streams, liked, dim=2).mean(dim=1)

    def streams(self, ids: torch.Tensor, filtered: dict[str, torch.Tensor]) -> torch.Tensor:
        """Id and content streams, [n, S, D]: L2-normalised, or as they are where content gates the id."""
        if self.shape.content == "gate":
            return torch.stack([ids, *(ids * torch.sigmoid(x) for x in filtered.values())], dim=1)
        return F.normalize(torch.stack([ids, *filtered.values()], dim=1), dim=2)

    def gates(self, streams: torch.Tensor) -> torch.Tensor:
        """Share of each stream, [n, S], summing to one: softmax over its mean cosine with the other streams."""
        if not hasattr(self, "gate_scale"):
            return streams.new_full(streams.shape[:2], 1 / self.S)
        unit = F.normalize(streams, dim=2) if self.shape.content == "gate" else streams
        total = unit.sum(dim=1, keepdim=True)
        agreement = (unit * (total - unit)).sum(dim=2) / (self.S - 1)
        return torch.softmax(self.gate_scale * agreement, dim=1)

    def items_in(self, streams: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """What enters the graph for items, [n, graph streams * D]: the id stream plus the gated fusion of all, and
        each content stream times its gate (mean one over streams).

        Without unit rows the id stream is the row `ids` [n, D] as it is, and content has a learned length. Where
        content gates the id, that row, and the mean of the content streams by their gates.
        """
        gates = self.gates(streams)
        if self.shape.content == "gate":
            share = gates[:, 1:] / gates[:, 1:].sum(dim=1, keepdim=True)
            content = (streams[:, 1:] * share[:, :, None]).sum(dim=1) * self.content_length
            return torch.cat([ids, content], dim=1)
        if not self.shape.unit_rows:
            content = streams[:, 1:] * self.content_length[:, None]
            joined = ids + (gates[:, 1:, None] * content).sum(dim=1)
            return torch.cat([joined[:, None], content * (self.S * gates)[:, 1:, None]], dim=1).flatten(1)
        fused = (gates[:, :, None] * streams).sum(dim=1)
        ids = F.normalize(streams[:, 0] + fused, dim=1)
        parts = torch.cat([ids[:, None], streams[:, 1:]], dim=1) * (self.S * gates)[:, :, None]
        return parts.flatten(1)

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
