"""Personal content scores: an item's content, filtered for one user, as a second look at what dot products found.

Retrieval is a dot product of two embeddings, and no embedding of an item can be filtered for each of its users. So the
filter of `condition: user` is asked about pairs: `PersonalFilter.scores` takes the item's content through it with the user as
its condition, and compares what is left with what the user prefers. That costs a pass of the filter a pair, hence
candidates: `rerank` orders a user's first N again by the dot product plus `weight` times the personal score, both in
standard deviations over the N.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from gtc_dist.distributed.sharded_table import plan_lookup
from gtc_dist.errors import InputError
from gtc_dist.evaluation import ranking
from gtc_dist.evaluation.ranking import K_VALUES
from gtc_dist.inference.layerwise import audience_spmm, embed_streams
from gtc_dist.inference.trained_run import TrainedRun

PAIRS = 1 << 15  # scored at once
WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0)  # tried for the personal score


class PersonalFilter:
    """Scores of pairs by a run's filter; this rank's users, items of all ranks. A collective to make, and to use.

    Raises:
        InputError: the run was not trained with `condition: user`.
    """

    def __init__(self, run: TrainedRun):
        self.run, network, config = run, run.network, run.config
        if not network.is_personal:
            raise InputError(
                f"{run.uri} has no personal content score: train with model.diffusion.enabled=true and "
                "model.diffusion.condition=user"
            )
        network.eval()
        layers, chunk = config.model.layers, config.eval.chunk
        self.users, streams = embed_streams(network, run.tables, run.features, run.graphs, layers, chunk)
        self.audience = streams.holding(torch.zeros_like(streams.weight))
        entering = self.users.holding(network.users_in(run.tables.user.weight)[0])
        for low, high, mean in audience_spmm(run.graphs, entering, self.audience, chunk).sums(entering):
            self.audience.weight[low:high] = mean

    @torch.no_grad()
    def scores(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Personal content scores float32 [n, k], mean over members.

        Args:
            users: [n] catalog indexes of this rank's users; items: [n, k] indexes; -1 scores as item 0.
        """
        out = np.zeros(items.shape, np.float32)
        for rows in self._blocks(len(users), max(items.shape[1], 1)):
            out[rows] = self._block(users[rows], np.maximum(items[rows], 0))
        return out

    def _blocks(self, rows: int, pairs: int) -> Iterator[slice]:
        """Rows at a time; as many times on every rank."""
        step = max(PAIRS // pairs, 1)
        for n in range(self.users.comm.all_reduce_max(-(-rows // step))):
            yield slice(n * step, (n + 1) * step)

    def _block(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        network, comm, tables = self.run.network, self.users.comm, self.run.tables
        unique, at = np.unique(items.reshape(-1), return_inverse=True)
        route = plan_lookup(torch.from_numpy(unique).to(comm.device), self.audience.rows, comm)
        features = {name: table.lookup(route) for name, table in self.run.features.items()}
        ids, audience = network.split(tables.item.lookup(route)), network.split(self.audience.lookup(route))
        own = self.users.weight[torch.from_numpy(users - self.users.start).to(comm.device)]
        who = torch.arange(len(users), device=comm.device).repeat_interleave(items.shape[1])
        at = torch.from_numpy(at).to(comm.device)
        total = torch.zeros(len(at), device=comm.device)
        for m, user in enumerate(network.split(own)):
            member = network.members[m]
            content = {name: x[at] for name, x in member.content(features).items()}
            total += member.personal(ids[m][at], content, audience[m][at], user[who])
        return (total / network.M).view(items.shape).cpu().numpy()


@dataclass
class Candidates:
    """A split's users of this rank, their best items and what these score, [n, k]."""

    users: np.ndarray
    items: np.ndarray
    dot: np.ndarray
    personal: np.ndarray


def rerank(run: TrainedRun, split: str, depth: int, users: int | None) -> dict:
    """Metrics of a split before and after the first `depth` of each user are ordered again, with the weight of the
    personal score that has the best valid metric (the run's `eval.metric` and NDCG@5, geometric mean). A collective.

    Args:
        users: rank about so many users of a split, None for all.
    """
    personal, embeddings = PersonalFilter(run), run.embed()
    options = run.ranking_options(users)

    def metrics(name: str) -> list[dict[str, float]]:
        own = embeddings[0]
        truth = ranking.load_ground_truth(run.catalog, name, own.start, own.stop)
        mine = ranking.ranked_users(own, run.graphs, truth, options)
        items, dot = ranking.top_k_items(*embeddings, run.graphs, mine, max(depth, *K_VALUES), options)
        scores = personal.scores(mine, items[:, :depth])
        results = []
        for weight in WEIGHTS:
            top = reordered(items, dot, scores, weight)[:, : max(K_VALUES)]
            overall, _ = ranking.metrics_of_lists(top, mine - own.start, run.graphs, truth)
            results.append(ranking.mean_over_users(overall, own.comm)[1])
        return results

    valid = metrics("valid")
    of = run.config.eval.metric
    best = max(range(len(WEIGHTS)), key=lambda n: (valid[n][of] * valid[n]["ndcg@5"]) ** 0.5)
    results = valid if split == "valid" else metrics(split)
    return {"depth": depth, "weight": WEIGHTS[best], "before": results[0], "after": results[best]}


def reordered(items: np.ndarray, dot: np.ndarray, personal: np.ndarray, weight: float) -> np.ndarray:
    """Items [n, k] with the first d of each row ordered by both scores; dot [n, k], personal [n, d]. Of equal ones the
    order stays; missing items (-1) stay behind."""
    depth = personal.shape[1]
    there = items[:, :depth] >= 0
    score = _standard(dot[:, :depth], there) + weight * _standard(personal, there)
    order = np.argsort(np.where(there, -score, np.inf), axis=1, kind="stable")
    return np.concatenate([np.take_along_axis(items[:, :depth], order, axis=1), items[:, depth:]], axis=1)


def _standard(scores: np.ndarray, there: np.ndarray) -> np.ndarray:
    """Scores less their mean over those that are there, in their standard deviations; 0 where all are alike."""
    count = np.maximum(there.sum(axis=1, keepdims=True), 1)
    scores = np.where(there, scores, 0).astype(np.float64)
    centred = np.where(there, scores - scores.sum(axis=1, keepdims=True) / count, 0)
    spread = np.sqrt((centred**2).sum(axis=1, keepdims=True) / count)
    return centred / np.where(spread > 1e-12, spread, 1)
