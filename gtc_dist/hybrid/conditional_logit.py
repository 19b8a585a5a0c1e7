"""Fusion weights by maximum likelihood: a conditional logit model of the valid interactions.

Among the items of a user's shortlist, the model gives item i the probability softmax_i(score), where

    score(u, i) = sum over scorers k of  exp(p_k z_i) * [s_k(u, i) * (w_k + a_k z_u) + m_k(i) * (b_k + d_k z_u)]
                  + q_1 z_i + q_2 z_i^2

s_k(u, i) is the score of scorer k and m_k(i) its mean over users. z_u is the user's activity and z_i the item's
popularity: log(1 + train interactions), less the mean over warm users or items; 0 for cold items. Each scorer so has
five weights: of its own score (w), of that times activity (a), of the mean user's score (b), of that times activity
(d), and the exponent of popularity (p). The last two weights, of popularity alone, are common.

The sum is a dot product: activity and mean scores change user rows, exponents scale item rows, and popularity is one
more column (`score_fusion.py`). In the mean over three catalogs, with weights fitted on two thirds of the valid users
and ranking the others, this gives 9 % more NDCG@20 than the best weights w_k alone (docs/log.md).

Many weights are safe because the likelihood is smooth: unlike Recall@20, which a search on a grid would maximise, it
counts by how much a positive misses the top of the list.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from gtc_dist.distributed.collectives import Communicator
from gtc_dist.evaluation.shortlist import Shortlist
from gtc_dist.hybrid.embeddings import BLOCK_VALUES

# weights of one scorer, by what follows its name
OWN, ACTIVITY, MEAN, MEAN_ACTIVITY, EXPONENT = TERMS = ("", "/activity", "/mean", "/mean_activity", "/popularity")
POPULARITY = ("popularity", "popularity_squared")  # weights common to all scorers

PENALTY = 30.0  # of squared differences from the initial weights, in positives' log-likelihood
MAX_STEPS = 30
MIN_GAIN = 1e-5  # mean log-likelihood of a positive that one more step must gain


@dataclass(frozen=True)
class Candidates:
    """Shortlists of this rank's users, m items each.

    scores: scorer -> float32 [n, m]. mean_scores: scorer -> float32 [n, m], of the mean user.
    activity: float32 [n], z_u. popularity: float32 [n, m], z_i.
    listed: bool [n, m], False where a user has fewer items. hit: bool [n, m], listed positives of the user.
    """

    scores: dict[str, torch.Tensor]
    mean_scores: dict[str, torch.Tensor]
    activity: torch.Tensor
    popularity: torch.Tensor
    listed: torch.Tensor
    hit: torch.Tensor

    @staticmethod
    def of_scores(shortlist: Shortlist) -> "Candidates":
        """Candidates without mean scores, activity and popularity, whose weights then stay 0."""
        listed = shortlist.items >= 0
        scores = {name: each.masked_fill(~listed, 0) for name, each in shortlist.scores.items()}
        nothing = torch.zeros(listed.shape, device=listed.device)
        return Candidates(scores, dict.fromkeys(scores, nothing), nothing[:, 0], nothing, listed, shortlist.hit)

    def users(self, chosen: torch.Tensor | slice) -> "Candidates":
        """The shortlists of some users."""
        parts = ({name: rows[chosen] for name, rows in each.items()} for each in (self.scores, self.mean_scores))
        return Candidates(*parts, *(each[chosen] for each in (self.activity, self.popularity, self.listed, self.hit)))


def weight_names(scorers: Sequence[str]) -> list[str]:
    """Names of all weights, in the order of the columns of `derivatives`."""
    return [name + term for name in scorers for term in TERMS] + list(POPULARITY)


def fit_weights(
    candidates: Candidates, initial: Mapping[str, float], comm: Communicator, penalty: float = PENALTY
) -> dict[str, float]:
    """Weights of maximum penalised likelihood: Gauss-Newton steps, halved until the likelihood grows. Collective: every
    rank must call it.

    The result does not depend on earlier weights. All ranks take the same steps, since they decide by summed values.

    Args:
        initial: scorer -> weight w_k at the start, towards which the penalty draws; the other weights start at 0.
    """
    names = weight_names(list(candidates.scores))
    positives = candidates.hit.sum(1)
    candidates = candidates.users(positives > 0)
    total = max(float(comm.all_reduce(positives.sum().double())), 1.0)
    start = torch.tensor([initial.get(name, 0.0) for name in names], dtype=torch.float64)

    def evaluate(weights: torch.Tensor) -> tuple[float, torch.Tensor, torch.Tensor]:
        sums = comm.all_reduce(_likelihood(candidates, weights)).cpu()
        moved = weights - start
        loss, gradient, curvature = sums[0], sums[1 : len(names) + 1], sums[len(names) + 1 :]
        curvature = curvature.view(len(names), -1) + penalty * torch.eye(len(names), dtype=torch.float64)
        return float(loss + penalty / 2 * moved @ moved), gradient + penalty * moved, curvature

    weights, (loss, gradient, curvature) = start, evaluate(start)
    for _ in range(MAX_STEPS):
        step = torch.linalg.solve(curvature, gradient)
        tried = evaluate(weights - step)
        while not tried[0] <= loss and float(step.abs().max()) > 1e-6:
            step = step / 2
            tried = evaluate(weights - step)
        gain = loss - tried[0]
        if not gain > 0:
            break
        weights, (loss, gradient, curvature) = weights - step, tried
        if gain < MIN_GAIN * total:
            break
    return dict(zip(names, weights.tolist(), strict=True))


def _likelihood(candidates: Candidates, weights: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of the hits, its gradient [w] and the Gauss-Newton matrix [w, w], float64 [1 + w + w²].
    Every user must have a hit."""
    n, m = candidates.hit.shape
    size = len(weights)
    loss, gradient, curvature = (
        torch.zeros(shape, dtype=torch.float64, device=candidates.hit.device) for shape in ((), size, (size, size))
    )
    users = max(BLOCK_VALUES // (m * size), 1)  # at once
    for start in range(0, n, users):
        block = candidates.users(slice(start, start + users))
        scores, slopes = model_scores(block, weights)
        log_share = scores.masked_fill(~block.listed, float("-inf")).log_softmax(1)
        loss -= log_share[block.hit].sum().double()
        hits = block.hit.sum(1, keepdim=True).float()
        share = log_share.exp() * hits
        expected = (share[:, None] @ slopes).squeeze(1)
        gradient += (expected.sum(0) - slopes[block.hit].sum(0)).double()
        flat = slopes.flatten(0, 1)
        curvature += (flat.T @ (flat * share.flatten()[:, None]) - expected.T @ (expected / hits)).double()
    return torch.cat([loss[None], gradient, curvature.flatten()])


def model_scores(candidates: Candidates, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores [n, m] and their derivatives by each weight [n, m, w], in the order of `weight_names`."""
    weights = weights.float().tolist()
    activity, popularity = candidates.activity[:, None], candidates.popularity
    scores, slopes = torch.zeros_like(popularity), []
    for at, name in enumerate(candidates.scores):
        own, by_activity, mean, mean_by_activity, exponent = weights[len(TERMS) * at : len(TERMS) * (at + 1)]
        factor = torch.exp(exponent * popularity)
        score, mean_score = candidates.scores[name] * factor, candidates.mean_scores[name] * factor
        part = score * (own + by_activity * activity) + mean_score * (mean + mean_by_activity * activity)
        scores += part
        slopes += [score, score * activity, mean_score, mean_score * activity, part * popularity]
    slopes += [popularity, popularity**2]
    scores += weights[-2] * popularity + weights[-1] * popularity**2
    return scores, torch.stack(slopes, dim=2)
