"""User-conditioned re-ranking: a personal content score orders the items that dot products retrieved.

Retrieval is a dot product of two embeddings, and an item's embedding cannot be filtered for each of its users. So the
content filter with `condition: user` scores pairs: the item's content is filtered with the user as a condition, and
compared with the user's preference. Each pair costs a pass of the filter, so only candidates are scored: `rerank`
orders the first N items of a user by the dot product plus `weight` times the personal score, both z-scored over the N.

The weight is tuned on the valid split for the geometric mean of `eval.metric` and NDCG@5: only the order of the first
items changes here. The hybrid weights are tuned with NDCG@20 in place of NDCG@5.
"""

from collections.abc import Iterator

import numpy as np
import torch

from gtc_dist.distributed.sharded_table import plan_lookup
from gtc_dist.errors import InputError
from gtc_dist.evaluation import ranking
from gtc_dist.evaluation.item_groups import positive_groups, tuning_positives
from gtc_dist.evaluation.metrics import K_VALUES, mean_over_users, metrics_of_groups
from gtc_dist.inference.layerwise import audience_spmm, embed_views
from gtc_dist.inference.trained_run import TrainedRun

PAIRS = 1 << 15  # scored at once
WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0)  # tried for the personal score


class PersonalFilter:
    """Personal content scores of this rank's users with any items. The constructor and the methods are collectives.

    Raises:
        InputError: the run was not trained with `condition: user`.
    """

    def __init__(self, run: TrainedRun):
        self.run, network, config = run, run.network, run.config
        if not network.is_personal:
            raise InputError(
                f"{run.uri} has no personal content score: train with train.w_diff above 0 and "
                "model.diffusion.condition=user"
            )
        network.eval()
        chunk = config.eval.block_rows
        self.users, items = embed_views(network, run.tables, run.features, run.graphs, chunk)
        self.audience = items.with_values(torch.zeros_like(items.weight))
        preferences = self.users.with_values(network.encode_users(run.tables.user.weight)[0])
        for low, high, mean in audience_spmm(run.graphs, preferences, self.audience, chunk).sums(preferences):
            self.audience.weight[low:high] = mean

    @torch.no_grad()
    def scores(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Personal content scores float32 [n, k], mean over ensemble members.

        Args:
            users: [n], indexes of this rank's users.
            items: [n, k], indexes; -1 scores as item 0.
        """
        out = np.zeros(items.shape, np.float32)
        for rows in self._row_slices(len(users), max(items.shape[1], 1)):
            out[rows] = self._score_rows(users[rows], np.maximum(items[rows], 0))
        return out

    def _row_slices(self, rows: int, pairs: int) -> Iterator[slice]:
        """Slices of `rows` rows with `pairs` pairs each; the same number on every rank."""
        step = max(PAIRS // pairs, 1)
        for n in range(self.users.comm.all_reduce_max(-(-rows // step))):
            yield slice(n * step, (n + 1) * step)

    def _score_rows(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        network, comm, tables = self.run.network, self.users.comm, self.run.tables
        unique, at = np.unique(items.reshape(-1), return_inverse=True)
        plan = plan_lookup(torch.from_numpy(unique).to(comm.device), self.audience.rows, comm)
        features = {name: table.lookup(plan) for name, table in self.run.features.items()}
        ids = network.split_members(tables.item.lookup(plan))
        audience = network.split_members(self.audience.lookup(plan))
        user_rows = self.users.weight[torch.from_numpy(users - self.users.start).to(comm.device)]
        pair_user = torch.arange(len(users), device=comm.device).repeat_interleave(items.shape[1])
        at = torch.from_numpy(at).to(comm.device)
        total = torch.zeros(len(at), device=comm.device)
        for m, user in enumerate(network.split_members(user_rows)):
            member = network.members[m]
            content = {name: x[at] for name, x in member.content(features).items()}
            total += member.personal_score(ids[m][at], content, audience[m][at], user[pair_user])
        return (total / network.n_members).view(items.shape).cpu().numpy()


def rerank(run: TrainedRun, split: str, candidates: int, users: int | None) -> dict:
    """Metrics of a split before and after re-ranking the first `candidates` items of each user. Collective: every rank
    must call it.

    The weight of the personal score is the best one on valid, by the geometric mean of the run's `eval.metric` and
    NDCG@5 over the same positives (the hybrid weights: NDCG@20).

    Args:
        users: rank about this many users of a split; None: all.
    """
    personal, embeddings = PersonalFilter(run), run.final_embeddings()
    options = run.ranking_options(users)
    groups = positive_groups(run.graphs, run.valid_head())
    selected_by, positives = tuning_positives(run.config.eval.metric, groups)

    def metrics(name: str) -> list[dict[str, dict[str, float]]]:
        """For each weight, the metrics of a split over all positives and over those of `eval.metric`."""
        table = embeddings.users
        truth = ranking.load_ground_truth(run.catalog, name, table.start, table.stop)
        rank_users = ranking.ranked_users(table, run.graphs, truth, options)
        items, dot = ranking.top_k_items(*embeddings, run.graphs, rank_users, max(candidates, *K_VALUES), options)
        scores = personal.scores(rank_users, items[:, :candidates])
        results = []
        for weight in WEIGHTS:
            top = reorder(items, dot, scores, weight)[:, : max(K_VALUES)]
            counted = {"overall": None, "selecting": positives}
            by_user = metrics_of_groups(top, rank_users - table.start, truth, counted)
            results.append({group: mean_over_users(by_user[group], table.comm)[1] for group in counted})
        return results

    valid = metrics("valid")
    selecting = [values["selecting"] for values in valid]
    best = max(range(len(WEIGHTS)), key=lambda n: (selecting[n][selected_by] * selecting[n]["ndcg@5"]) ** 0.5)
    results = valid if split == "valid" else metrics(split)
    before, after = results[0]["overall"], results[best]["overall"]
    return {"depth": candidates, "weight": WEIGHTS[best], "before": before, "after": after}


def reorder(items: np.ndarray, dot: np.ndarray, personal: np.ndarray, weight: float) -> np.ndarray:
    """Items [n, k] with the first d of each row ordered by both scores. Ties keep their order; missing items (-1) stay
    last.

    Args:
        dot: [n, k]; personal: [n, d].
    """
    candidates = personal.shape[1]
    present = items[:, :candidates] >= 0
    score = _z_score(dot[:, :candidates], present) + weight * _z_score(personal, present)
    order = np.argsort(np.where(present, -score, np.inf), axis=1, kind="stable")
    return np.concatenate([np.take_along_axis(items[:, :candidates], order, axis=1), items[:, candidates:]], axis=1)


def _z_score(scores: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Scores of each row less their mean and over their standard deviation, among present items; 0 where all are
    equal."""
    count = np.maximum(present.sum(axis=1, keepdims=True), 1)
    scores = np.where(present, scores, 0).astype(np.float64)
    centred = np.where(present, scores - scores.sum(axis=1, keepdims=True) / count, 0)
    std = np.sqrt((centred**2).sum(axis=1, keepdims=True) / count)
    return centred / np.where(std > 1e-12, std, 1)
