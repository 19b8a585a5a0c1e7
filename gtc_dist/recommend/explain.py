"""Why items are in a user's list: what each part of the model adds to the score, and which items of the user are near.

The columns of the final embeddings belong to the parts of the score (`ScoreFusion.column_groups`), so the dot products
over the parts add up to the score. Near are the user's train items with the largest cosine, without the columns of
popularity, as in lists of similar items.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch.nn.functional import normalize

from gtc_dist.distributed.sharded_table import ShardedTable, plan_lookup
from gtc_dist.graph.csc import Graphs, take_edges
from gtc_dist.hybrid.embeddings import Embeddings
from gtc_dist.hybrid.score_fusion import MASKED, MEMBERS
from gtc_dist.inference.trained_run import TrainedRun

NEAREST = 3  # items of the user's own
BLOCK_USERS, BLOCK_ITEMS = 256, 1 << 15  # users, and their train items, looked at at once
TITLES = {MEMBERS: "network", MASKED: "masked_diffusion", "spectral": "graph_filter"}
PART = "score_"  # columns with the summands of the score: PART and the name of the part
OWN = "nearest_own"  # column with the items of the user's own


@dataclass(frozen=True)
class Explanation:
    """Of lists of k items for n users.

    parts: name -> what the part adds to the score, float32 [n, k]
    own: the user's train items that are nearest to the listed one, nearest first, int64 [n, k, NEAREST]; -1: no more
    cosine: their cosine with it, float32 [n, k, NEAREST]
    """

    parts: dict[str, np.ndarray]
    own: np.ndarray
    cosine: np.ndarray

    def columns(
        self, row: np.ndarray, place: np.ndarray, ids: pa.Array, titles: pa.Array | None
    ) -> dict[str, pa.Array]:
        """Columns for a table of lists: `score_PART` for each part, and `nearest_own`, a list of structs with item_id,
        cosine and, with titles, title.

        Args:
            row, place: user and position of each row of the table.
            ids, titles: by item index.
        """
        own, cosine = self.own[row, place], self.cosine[row, place]
        known = own >= 0
        item = pa.array(own[known])
        fields = {"item_id": ids.take(item), "cosine": pa.array(cosine[known])}
        fields |= {} if titles is None else {"title": titles.take(item)}
        ends = np.concatenate([[0], np.cumsum(known.sum(axis=1))]).astype(np.int32)
        structs = pa.StructArray.from_arrays(list(fields.values()), list(fields))
        parts = {PART + name: pa.array(values[row, place]) for name, values in self.parts.items()}
        return parts | {OWN: pa.ListArray.from_arrays(pa.array(ends), structs)}


def named_parts(run: TrainedRun, width: int) -> dict[str, slice]:
    """Columns of final embeddings of this width by the part of the score: `popularity`, `network`, `masked_diffusion`,
    `graph_filter`, `content_MODALITY`, those that the run has."""
    groups = run.scorer.column_groups(width, run.network.out_width)
    profiles = run.scorer.special_columns(width).profiles
    return {f"content_{name}" if name in profiles else TITLES.get(name, name): at for name, at in groups.items()}


@torch.no_grad()
def explain_lists(
    embeddings: Embeddings,
    graphs: Graphs,
    parts: dict[str, slice],
    popularity: int,
    users: np.ndarray,
    listed: np.ndarray,
) -> Explanation:
    """Explanation of the lists of this rank's users. Collective: every rank must call it.

    Args:
        embeddings: final ones.
        parts: of `named_parts`.
        popularity: number of leading columns that hold an item's popularity.
        users: int64 [n], indexes.
        listed: int64 [n, k], item indexes, -1: none.
    """
    shape, comm = (*listed.shape, NEAREST), embeddings.users.comm
    values = {name: np.zeros(listed.shape, np.float32) for name in parts}
    own, cosine = np.full(shape, -1), np.full(shape, -np.inf, np.float32)
    blocks = user_blocks(graphs.user_degree[users])
    blocks += [slice(0, 0)] * (comm.all_reduce_max(len(blocks)) - len(blocks))
    for block in blocks:
        indptr, edges = take_edges(graphs.nodes, users[block])
        owned = graphs.nodes.indices[edges].astype(np.int64) - graphs.users
        rows, of_listed, of_owned = item_rows(embeddings.items, listed[block], owned)
        of_users = embeddings.users.weight[torch.from_numpy(users[block] - embeddings.users.start).to(rows.device)]
        for name, at in parts.items():
            scores = torch.einsum("nc,nkc->nk", of_users[:, at].float(), rows[:, at][of_listed])
            values[name][block] = scores.cpu().numpy()
        unit = normalize(rows[:, popularity:], dim=1)
        for n, user in enumerate(range(block.start, block.stop)):
            mine = slice(int(indptr[n]), int(indptr[n + 1]))
            near = (unit[of_listed[n]] @ unit[of_owned[mine]].T).cpu().numpy()
            near[listed[user][:, None] == owned[mine][None]] = -np.inf  # the item itself, where it may be listed
            order = np.argsort(-near, axis=1, kind="stable")[:, :NEAREST]
            found = np.take_along_axis(near, order, 1)
            own[user, :, : order.shape[1]] = np.where(found > -np.inf, owned[mine][order], -1)
            cosine[user, :, : order.shape[1]] = found
    return Explanation(values, own, cosine)


def user_blocks(degree: np.ndarray) -> list[slice]:
    """Consecutive users in blocks of at most BLOCK_USERS users and, but for a single one, BLOCK_ITEMS train items."""
    blocks, first, items = [], 0, 0
    for n, count in enumerate(degree.tolist()):
        if n > first and (n - first == BLOCK_USERS or items + count > BLOCK_ITEMS):
            blocks.append(slice(first, n))
            first, items = n, 0
        items += count
    return [*blocks, slice(first, len(degree))] if len(degree) else []


def item_rows(
    items: ShardedTable, listed: np.ndarray, owned: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows float32 [m, width] of listed and owned items, and where the rows of each are. Collective: every rank must
    call it. Places without an item (-1) get the row of another one."""
    wanted = np.concatenate([np.maximum(listed, 0).reshape(-1), owned])
    unique, at = np.unique(wanted, return_inverse=True)
    device = items.comm.device
    rows = items.lookup(plan_lookup(torch.from_numpy(unique).to(device), items.rows, items.comm, trained=False)).float()
    at = torch.from_numpy(at).to(device)
    return rows, at[: listed.size].view(listed.shape), at[listed.size :]
