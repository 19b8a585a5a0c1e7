"""Score fusion: a weighted hybrid of the trained models and the untrained scorers.

The scorers are the masked diffusion if there is one, the trained network (its ensemble members side by side), the
low-pass graph filter and one content profile per modality. Their dot-product scores are z-scored per user (standard
deviation 1 over all items), so that weights are comparable, and added. The weights are tuned on the valid split by
coordinate search, before training for the untrained scorers and at every validation for all; a scorer that does not
help gets weight 0. They are stored with the checkpoint.

The network's items enter with norm one: its norms encode popularity, which the other scorers model better. In all
scorers but the content profiles, cold-start items get the mean of their warm neighbours; their final embeddings are
predicted afterwards (`cold_start.py`). The effect of each scorer: docs/log.md.
"""

from collections.abc import Callable

import torch

from gtc_dist.hybrid.coordinate_search import coordinate_search
from gtc_dist.hybrid.embeddings import Embeddings, inverse_score_std, item_covariance, unit_variance
from gtc_dist.hybrid.graph_filter import CooccurrenceOperator
from gtc_dist.hybrid.warm_neighbours import WarmNeighbours

# Scorers by name -> a function of the weights of their sum, whose value tuning maximises. It never gets weights that
# are all 0. Both calls are collectives.
FusionObjective = Callable[[dict[str, Embeddings]], Callable[[dict[str, float]], float]]

MEMBERS = "members"
MASKED = "masked"
NORM_DAMPING = "length"  # exponent p of x / |x|^p for the network's items; runs before 0.4.0 have tuned ones
NEIGHBOR_SMOOTHING = "walked"  # weight of neighbour smoothing, which runs before 0.4.0 have
GRID = (0.0, *(2 ** (-n / 2) for n in range(12, -1, -1)))  # of a weight; the largest weight is 1
RADIUS = 3  # grid steps tried in each direction
INITIAL_WEIGHTS = {MASKED: 1.0, MEMBERS: 0.5}
INITIAL_UNTRAINED = 0.25
MAX_ROUNDS = 4  # over all weights


class ScoreFusion:
    """Untrained scorers, and the weights of all. Methods are collectives unless marked Local.

    Args:
        scorers: name -> embeddings of the untrained scorers.
        profiles: names of the scorers that are content profiles.
        neighbours: None: cold items keep their rows.
        operator: smooths users in runs before 0.4.0.
        has_masked: whether there is a masked diffusion, whose embeddings `tune` and `fuse` then get.
    """

    def __init__(
        self,
        scorers: dict[str, Embeddings],
        profiles: list[str],
        neighbours: WarmNeighbours | None,
        operator: CooccurrenceOperator | None = None,
        has_masked: bool = False,
    ):
        self.profiles, self.neighbours, self.operator = profiles, neighbours, operator
        self.scorers = {
            name: unit_variance(embeddings if name in profiles else self._impute(embeddings))
            for name, embeddings in scorers.items()
        }
        self.weights = {MEMBERS: 0.0} | ({MASKED: 0.0} if has_masked else {}) | dict.fromkeys(scorers, 1.0)
        # without other scorers the order of the lists needs the norms
        self.weights[NORM_DAMPING] = float(has_masked or bool(scorers))
        initial = INITIAL_WEIGHTS | dict.fromkeys(scorers, INITIAL_UNTRAINED)
        self.initial_weights = {name: initial[name] for name in self.weights if name in initial}

    def tune_untrained(self, objective: FusionObjective) -> None:
        """Tune the weights of the untrained scorers, before training."""
        if self.scorers:
            self._search(objective(self.scorers), [dict.fromkeys(self.scorers, 1.0)])

    def tune(self, network: Embeddings, objective: FusionObjective, masked: Embeddings | None = None) -> None:
        """Tune all weights: from their current values, from the initial ones, since a weight that fell to 0 while its
        model was untrained might stay there, and from those of the trained models alone."""
        value = objective(self._trained(network, masked) | self.scorers)
        current = {name: self.weights[name] for name in self.initial_weights}
        trained_alone = self.initial_weights | dict.fromkeys(self.scorers, 0.0)
        self._search(value, [current, self.initial_weights, trained_alone])

    def _search(self, value: Callable[[dict[str, float]], float], starts: list[dict[str, float]]) -> None:
        """Set the weights to the best found by coordinate search; on a tie the first start's remain."""
        values: dict[tuple, float] = {}

        def cached(weights: dict[str, float]) -> float:
            key = tuple(weights.values())
            if key not in values:
                values[key] = value(weights) if any(key) else float("-inf")
            return values[key]

        found = [start if any(start.values()) else self.initial_weights for start in starts]
        self.weights |= max([coordinate_search(start, GRID, RADIUS, MAX_ROUNDS, cached) for start in found], key=cached)

    def fuse(self, network: Embeddings, masked: Embeddings | None = None) -> Embeddings:
        """Embeddings whose dot product is the weighted sum of all scores."""
        scorers = {n: each for n, each in (self._trained(network, masked) | self.scorers).items() if self.weights[n]}
        users = torch.cat([scorer.users.weight * self.weights[name] for name, scorer in scorers.items()], dim=1)
        items = torch.cat([scorer.items.weight for scorer in scorers.values()], dim=1)
        return Embeddings(network.users.with_values(users), network.items.with_values(items))

    def profile_columns(self, width: int) -> dict[str, slice]:
        """Local. Columns of the content profiles in fused embeddings of this width; profiles of weight 0 have none."""
        widths = {name: scorer.items.width for name, scorer in self.scorers.items() if self.weights[name]}
        at, columns = width - sum(widths.values()), {}
        for name, size in widths.items():
            if name in self.profiles:
                columns[name] = slice(at, at + size)
            at += size
        return columns

    def _trained(self, network: Embeddings, masked: Embeddings | None) -> dict[str, Embeddings]:
        """The trained models' scorers, z-scored."""
        users, items = network
        rows = items.weight.float()
        rows = rows * rows.norm(dim=1, keepdim=True).clamp(min=1e-12) ** -self.weights[NORM_DAMPING]  # zeros stay zero
        damped = self._impute(Embeddings(users, items.with_values(rows)))
        if smoothing := self.weights.get(NEIGHBOR_SMOOTHING):
            own, covariance = users.weight.float(), item_covariance(damped.items)
            near = self.operator.to_users(self.operator(rows - self.operator.warm_mean(rows)))
            own = own * inverse_score_std(own, covariance) + smoothing * near * inverse_score_std(near, covariance)
            damped = Embeddings(users.with_values(own), damped.items)
        trained = {MEMBERS: unit_variance(damped)}
        return trained if masked is None else trained | {MASKED: unit_variance(self._impute(masked))}

    def _impute(self, embeddings: Embeddings) -> Embeddings:
        users, items = embeddings
        return Embeddings(users, items if self.neighbours is None else self.neighbours.impute(items))
