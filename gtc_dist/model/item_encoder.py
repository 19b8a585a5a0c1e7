"""Item side of one ensemble member: from an id row and features to the views that enter the graph.

A view is one representation of an item: its id embedding, and one content view for each modality. A content view is
either the filtered content (as in the paper), or the id embedding under a sigmoid gate that the filtered content opens
(`Variant.gated_content`): content then says which parts of what interactions taught hold for similar items too, and
users need no content preferences of their own.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from gtc_dist.config import ModelConfig, TrainConfig
from gtc_dist.model.diffusion import ContentFilter, NoiseSchedule
from gtc_dist.model.functions import SMALLEST_NORM, inner_products, mix_rows, unit_rows
from gtc_dist.model.variant import Variant

CONTENT_NORM = 0.3  # initial norm of a content view without unit rows
GATED_NORM = 1.5  # the same for a gated id embedding: with the sigmoid's half, about the norm of the id embedding
TC_TEMPERATURE = 0.2  # initial temperature of the total correlation's critic; it is learned
MAX_LOG_SCALE = 4.6  # of the critic's scale: at most 100, as in CLIP


@dataclass
class EncodedItems:
    """One member's items on their way to the graph."""

    ids: torch.Tensor  # [n, D] id embeddings
    audience: torch.Tensor | None  # [n, graph views * D] mean preference of the item's users
    content: dict[str, torch.Tensor]  # modality -> [n, D] projected content
    filtered: dict[str, torch.Tensor]  # modality -> [n, D] content after the filter
    views: torch.Tensor  # [n, views, D], not normalised

    def detached(self, rows: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor | None]:
        """Id embeddings, content and audience of some rows, without gradient."""
        content = {name: x.detach().index_select(0, rows) for name, x in self.content.items()}
        audience = None if self.audience is None else self.audience.detach().index_select(0, rows)
        return self.ids.detach().index_select(0, rows), content, audience


class ItemEncoder(nn.Module):
    """Projects, filters and gates content.

    Args:
        modalities: name -> width of its features.
        model, train: sections of the configuration.
        variant: parts of the network.
    """

    def __init__(self, modalities: dict[str, int], model: ModelConfig, train: TrainConfig, variant: Variant):
        super().__init__()
        self.modalities, self.variant = modalities, variant
        self.view_names = ["id", *modalities]
        self.n_views, self.dim = len(self.view_names), model.width
        # by number: a modality may have the name of an attribute of nn.Module
        self.project = nn.ModuleList(nn.Linear(width, self.dim) for width in modalities.values())
        if not variant.unit_rows:
            count, norm = (1, GATED_NORM) if variant.gated_content else (self.n_views - 1, CONTENT_NORM)
            self.content_length = nn.Parameter(torch.full((count,), norm))
        self.filters = nn.ModuleList()
        if train.w_diff > 0:
            schedule = NoiseSchedule(model.diffusion.steps)
            for _ in modalities:
                start_step = model.diffusion.start_step
                self.filters.append(ContentFilter(schedule, self.dim, 2 * self.dim, start_step=start_step))
        if variant.view_attention and self.n_views > 1:
            self.gate_scale = nn.Parameter(torch.ones(()))
        if train.w_tc > 0 and self.n_views > 1:
            self.log_scale = nn.Parameter(torch.tensor(1 / TC_TEMPERATURE).log().clamp(max=MAX_LOG_SCALE))

    def content(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Projected content of each modality, [n, D]; with unit mean square, so that the noise schedule and the gates
        fit it, unless its direction alone counts."""
        if not self.modalities:
            return {}
        named = zip(self.modalities, self.project, strict=True)
        projected = [project(features[name].to(project.weight.dtype)).float() for name, project in named]
        if not self.variant.unit_rows or self.filters:
            projected = F.rms_norm(torch.stack(projected, dim=1), (self.dim,)).unbind(1)
        return dict(zip(self.modalities, projected, strict=True))

    def condition(self, ids: torch.Tensor, audience: torch.Tensor, view: int) -> torch.Tensor:
        """Condition of a view's filter, [n, 2 * D]: the item's id embedding, the mean preference of its users.

        An item without interactions has the condition zero, which the denoising loss trains with pairs whose condition
        is dropped.

        Args:
            audience: [n, graph views * D]; the view's own columns are used, or the id view's where content is gated.
        """
        ids = F.rms_norm(ids, (self.dim,))
        if self.variant.gated_content:
            preference = F.rms_norm(audience[:, : self.dim], (self.dim,))
        else:
            preference = audience.view(-1, self.n_views, self.dim)[:, view] * self.dim**0.5
        without_users = (audience == 0).all(dim=1, keepdim=True)
        return torch.cat([ids.masked_fill(without_users, 0), preference], dim=1)

    def filter_content(
        self,
        ids: torch.Tensor,
        content: dict[str, torch.Tensor],
        audience: torch.Tensor | None,
    ) -> dict[str, torch.Tensor]:
        """Content of each modality after its filter, [n, D]; ids [n, D], audience as in `condition`."""
        if not self.filters:
            return content
        return {
            name: self.filters[v - 1](x0, self.condition(ids, audience, v))
            for v, (name, x0) in enumerate(content.items(), start=1)
        }

    def views(self, ids: torch.Tensor, filtered: dict[str, torch.Tensor]) -> torch.Tensor:
        """Id and content views, [n, views, D], not normalised."""
        if self.variant.gated_content:
            return torch.stack([ids, *(ids * torch.sigmoid(x) for x in filtered.values())], dim=1)
        return torch.stack([ids, *filtered.values()], dim=1)

    def view_attention(self, views: torch.Tensor) -> torch.Tensor:
        """Weight of each view, [n, views], summing to one: softmax over its mean cosine with the other views."""
        return self._attention(_cosines(views)[0])

    def _attention(self, cosines: torch.Tensor) -> torch.Tensor:
        """The same from the views' cosines [views, views, n]."""
        if not hasattr(self, "gate_scale"):
            return cosines.new_full((cosines.shape[2], self.n_views), 1 / self.n_views)
        agreement = (cosines.sum(dim=1) - cosines.diagonal().T) / (self.n_views - 1)
        # an item's weights do not depend on its place among the items, as they would in a softmax over the first
        # dimension, whose last items are computed otherwise
        return torch.softmax((self.gate_scale * agreement).T.contiguous(), dim=1)

    def graph_input(self, views: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Rows that enter the graph, [n, graph views * D]: the id view plus the attention-weighted fusion of all views,
        and each content view times its attention weight (mean one over views); all of unit views, and the first with
        norm one before its weight.

        Without unit rows the id view is the row `ids` [n, D] itself, and content has a learned norm. Where content
        gates the id: that row, and the mean of the content views by their attention weights.
        """
        if self.variant.gated_content:
            weights = self.view_attention(views)
            share = weights[:, 1:] / weights[:, 1:].sum(dim=1, keepdim=True)
            content = (views[:, 1:] * share[:, :, None]).sum(dim=1) * self.content_length
            return torch.cat([ids, content], dim=1)
        if not self.variant.unit_rows:
            weights = self.view_attention(views)
            content = unit_rows(views[:, 1:]) * self.content_length[:, None]
            fused = ids + (weights[:, 1:, None] * content).sum(dim=1)
            return torch.cat([fused[:, None], content * (self.n_views * weights)[:, 1:, None]], dim=1).flatten(1)
        # All rows are sums of an item's views, and their norms follow from the views' inner products: numbers by item,
        # where the rows themselves would pass through memory at every operator.
        cosines, inverse_norms = _cosines(views)
        weights = self._attention(cosines).T
        shares = torch.cat([weights[:1] + 1, weights[1:]])  # of the unit views in the id view plus the fusion
        norm = ((cosines * shares).sum(dim=1) * shares).sum(dim=0).clamp_min(SMALLEST_NORM**2).sqrt()
        first = shares * inverse_norms * (self.n_views * weights[0] / norm)
        others = torch.diag_embed((self.n_views * weights * inverse_norms).T)[:, 1:]
        return mix_rows(torch.cat([first.T[:, None], others], dim=1), views).flatten(1)

    @torch.no_grad()
    def diagnostics(self, encoded: EncodedItems) -> dict[str, torch.Tensor]:
        """TensorBoard diagnostics of each item, [n]: attention weight of each view, and the share of content energy
        that each filter keeps: 1 - ||x0 - x0_hat||^2 / ||x0||^2, at least 0; 1 where the filter changes nothing."""
        weights = self.view_attention(encoded.views)
        out = {f"gate/{name}": weights[:, v] for v, name in enumerate(self.view_names)}
        for name, x0 in encoded.content.items():
            removed = (x0 - encoded.filtered[name]).square().sum(1)
            out[f"kept_energy/{name}"] = (1 - removed / x0.square().sum(1).clamp(min=1e-12)).clamp(min=0)
        return out


def _cosines(views: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines of the views [n, v, D] of each item, float32 [v, v, n], 0 for views of zeros; and one over the views'
    norms, [v, n]. With items last, since operators are slow where the last dimension has a few numbers."""
    products = inner_products(views).permute(1, 2, 0).contiguous()
    inverse_norms = products.diagonal().T.clamp_min(SMALLEST_NORM**2).rsqrt()
    return products * inverse_norms * inverse_norms[:, None], inverse_norms
