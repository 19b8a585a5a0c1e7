"""Fusion weights by maximum likelihood: a conditional logit model of the valid interactions.

Among the items of a user's shortlist, the model gives item i the probability softmax_i(score), where

    score(u, i) = sum over scorers k of  exp(C_k e(i)) * [s_k(u, i) * A_k f(u) + m_k(i) * B_k f(u)]  +  f(u)' G g(i)

s_k(u, i) is the score of scorer k and m_k(i) its mean over users. f(u) = (1, activity, taste) and the powers e(i), g(i)
of popularity are those of `pair_features.py`. A, B, C and G are the weights: how much a scorer counts for active users,
and for users of popular items; the same for the scorer's mean list; how much it counts for popular items; and what
popularity itself counts for these users.

The sum is a dot product: A and B change user rows, C scales item rows, and G adds three columns (`score_fusion.py`).
What each kind of weight gains on users that it was not fitted to: docs/log.md.

Many weights are safe because the likelihood is smooth: unlike Recall@20, which a search on a grid would maximise, it
counts by how much a positive misses the top of the list.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from gtc_dist.distributed.collectives import Communicator
from gtc_dist.evaluation.shortlist import Shortlist
from gtc_dist.hybrid.embeddings import BLOCK_VALUES
from gtc_dist.hybrid.pair_features import (
    EXPONENT_TERMS,
    POPULARITY,
    USER_TERMS,
    exponent_features,
    popularity_powers,
)

MEAN_TERMS = tuple("/mean" + term for term in USER_TERMS)
SCORER_TERMS = (*USER_TERMS, *MEAN_TERMS, *EXPONENT_TERMS)  # rows A_k, B_k and C_k, by what follows the scorer's name
COMMON = tuple(name + term for name in POPULARITY for term in USER_TERMS)  # G, by rows of g

PENALTY = 30.0  # of squared differences from the initial weights, in positives' log-likelihood
MAX_STEPS, MAX_HALVINGS = 30, 20
MIN_GAIN = 1e-5  # mean log-likelihood of a positive that one more step must gain


@dataclass(frozen=True)
class Candidates:
    """Shortlists of this rank's users, m items each.

    scores: scorer -> float32 [n, m]. mean_scores: scorer -> float32 [n, m], of the mean user.
    user_features: float32 [n, 3], f. popularity: float32 [n, m], of the items.
    listed: bool [n, m], False where a user has fewer items. hit: bool [n, m], listed positives of the user.
    """

    scores: dict[str, torch.Tensor]
    mean_scores: dict[str, torch.Tensor]
    user_features: torch.Tensor
    popularity: torch.Tensor
    listed: torch.Tensor
    hit: torch.Tensor

    @staticmethod
    def of_scores(shortlist: Shortlist) -> "Candidates":
        """Candidates without mean scores, activity, taste and popularity, whose weights then stay 0."""
        listed = shortlist.items >= 0
        scores = {name: each.masked_fill(~listed, 0) for name, each in shortlist.scores.items()}
        nothing = torch.zeros(listed.shape, device=listed.device)
        features = torch.eye(len(USER_TERMS), device=listed.device)[:1].expand(len(listed), -1)
        return Candidates(scores, dict.fromkeys(scores, nothing), features, nothing, listed, shortlist.hit)

    def users(self, chosen: torch.Tensor | slice) -> "Candidates":
        """The shortlists of some users."""
        parts = ({name: rows[chosen] for name, rows in each.items()} for each in (self.scores, self.mean_scores))
        others = (self.user_features, self.popularity, self.listed, self.hit)
        return Candidates(*parts, *(each[chosen] for each in others))


def weight_names(scorers: Sequence[str]) -> list[str]:
    """Names of all weights, in the order of the derivatives of `model_scores`."""
    return [name + term for name in scorers for term in SCORER_TERMS] + list(COMMON)


def fit_weights(
    candidates: Candidates,
    initial: Mapping[str, float],
    comm: Communicator,
    start: Mapping[str, float] | None = None,
    penalty: float = PENALTY,
) -> dict[str, float]:
    """Weights of maximum penalised likelihood: Gauss-Newton steps, halved until the likelihood grows. Collective: every
    rank must call it. All ranks take the same steps, since they decide by summed values.

    Args:
        initial: scorer -> weight of its score, towards which the penalty draws; 0 for the other weights.
        start: weights near the result, such as those of the last fit, which save steps; None: the initial ones.
    """
    names = weight_names(list(candidates.scores))
    positives = candidates.hit.sum(1)
    candidates = candidates.users(positives > 0)
    total = max(float(comm.all_reduce(positives.sum().double())), 1.0)
    centre = torch.tensor([initial.get(name, 0.0) for name in names], dtype=torch.float64)

    def evaluate(weights: torch.Tensor) -> tuple[float, torch.Tensor, torch.Tensor]:
        sums = comm.all_reduce(_likelihood(candidates, weights)).cpu()
        moved = weights - centre
        loss, gradient, curvature = sums[0], sums[1 : len(names) + 1], sums[len(names) + 1 :]
        curvature = curvature.view(len(names), -1) + penalty * torch.eye(len(names), dtype=torch.float64)
        return float(loss + penalty / 2 * moved @ moved), gradient + penalty * moved, curvature

    weights = centre if start is None else torch.tensor([start[name] for name in names], dtype=torch.float64)
    loss, gradient, curvature = evaluate(weights)
    for _ in range(MAX_STEPS):
        step = torch.linalg.solve(curvature, gradient)
        for _ in range(MAX_HALVINGS):
            tried = evaluate(weights - step)
            if tried[0] <= loss:
                break
            step = step / 2
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
    features, exponents = candidates.user_features, exponent_features(candidates.popularity)
    powers, weights = popularity_powers(candidates.popularity), weights.float().to(features.device)
    of_scorers, common = weights.split([len(weights) - len(COMMON), len(COMMON)])
    sizes = [len(USER_TERMS), len(MEAN_TERMS), len(EXPONENT_TERMS)]
    scores, slopes = (powers * (features @ common.view(len(POPULARITY), -1).T)[:, None]).sum(2), []
    for name, row in zip(candidates.scores, of_scorers.view(-1, len(SCORER_TERMS)), strict=True):
        own, mean, exponent = row.split(sizes)
        factor = torch.exp(exponents @ exponent)
        score, mean_score = candidates.scores[name] * factor, candidates.mean_scores[name] * factor
        part = score * (features @ own)[:, None] + mean_score * (features @ mean)[:, None]
        scores = scores + part
        slopes += [each[:, :, None] * features[:, None] for each in (score, mean_score)]
        slopes.append(part[:, :, None] * exponents)
    slopes.append((powers[:, :, :, None] * features[:, None, None]).flatten(2))
    return scores, torch.cat(slopes, dim=2)
