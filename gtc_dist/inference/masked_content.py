"""Content of the items as the masked diffusion takes it: made once, before training, and again from the stored
projection for inference."""

import torch

from gtc_dist.distributed.sharded_spmm import ShardedSpMM, row_chunks
from gtc_dist.distributed.sharded_table import ShardedTable
from gtc_dist.graph.csc import Graphs
from gtc_dist.hybrid.content_space import ContentSpace, ModalityMap
from gtc_dist.model.masked_diffusion import CONTENT_WIDTH, NEIGHBOUR_WEIGHT, MaskedDiffusion


@torch.no_grad()
def fit_projection(masked: MaskedDiffusion, features: dict[str, ShardedTable]) -> None:
    """Store the mean and the leading principal directions of each modality in the network, whose checkpoints then have
    them: another machine might find other signs. Collective: every rank must call it."""
    for number, modality in enumerate(ContentSpace.fit(features, CONTENT_WIDTH).maps.values()):
        masked.get_buffer(f"content_mean_{number}").copy_(modality.mean)
        if modality.directions is not None:
            masked.get_buffer(f"content_directions_{number}").copy_(modality.directions)


@torch.no_grad()
def masked_content(
    masked: MaskedDiffusion | None, features: dict[str, ShardedTable], graphs: Graphs, chunk: int
) -> ShardedTable | None:
    """Frozen float16 table [items, sum of `content_widths`]: unit rows of each modality in its principal directions,
    plus `NEIGHBOUR_WEIGHT` times their mean over the item's neighbours in the item-item graph. An item without features
    of a modality has zeros there, before its neighbours are added. None without a masked diffusion. Collective: every
    rank must call it.

    Args:
        features: modality -> table of the items' features, over the network's ranks.
        chunk: rows of this rank computed at once.
    """
    if masked is None:
        return None
    comm, width, space = next(iter(features.values())).comm, sum(masked.content_widths.values()), _space(masked)
    own = ShardedTable("content", graphs.items, width, comm, trainable=False)
    for low, high in row_chunks(own, chunk):
        rows = {name: table.weight[low:high] for name, table in features.items()}
        own.weight[low:high] = space.apply(rows, missing_as_zero=True)
    if (hop := graphs.item_item) is None:
        return own.with_values(own.weight.half())
    content = ShardedTable("content", graphs.items, width, comm, dtype=torch.float16, trainable=False)
    operator = ShardedSpMM(hop.indptr, hop.indices, hop.weight, 0, own, own, chunk)
    for low, high, neighbours in operator.sums(own):
        content.weight[low:high] = own.weight[low:high] + NEIGHBOUR_WEIGHT * neighbours
    return content


def _space(masked: MaskedDiffusion) -> ContentSpace:
    """The stored projection."""
    maps = {}
    for number, (name, width) in enumerate(masked.content_widths.items()):
        mean = masked.get_buffer(f"content_mean_{number}")
        directions = masked.get_buffer(f"content_directions_{number}") if width < len(mean) else None
        maps[name] = ModalityMap(mean, directions)
    return ContentSpace(maps)
