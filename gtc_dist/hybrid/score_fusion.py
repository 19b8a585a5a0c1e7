"""Score fusion: a weighted hybrid of the trained network and the untrained scorers.

The scorers are the trained network (its ensemble members side by side), the masked diffusion if there is one, the
low-pass graph filter and one content profile per modality. Their dot-product scores are z-scored per user (standard
deviation 1 over all items), so that weights are comparable, and added with weights that are tuned on the valid split.
The weights of the untrained scorers are tuned once, before training; a scorer that does not help gets weight 0. Those
of the trained models change as they learn: they are tuned at every validation and stored with the checkpoint.

Two more weights are tuned with it:

- `NORM_DAMPING`: item norms of the trained network encode popularity. The graph filter models popularity better, so
  norms are damped: x / |x|^p, with p tuned.
- `NEIGHBOR_SMOOTHING`: users also get the sum of the item rows one step of co-interaction away (N C of
  `graph_filter.py`, of rows less their mean), since few interactions hardly train a user's own row.

In all scorers but the content profiles, cold-start items get the mean of their warm neighbours; their final embeddings
are predicted afterwards (`cold_start.py`). The effect of each scorer: docs/log.md.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from gtc_dist.distributed.sharded_table import ShardedTable
from gtc_dist.hybrid.coordinate_search import grid_neighbours
from gtc_dist.hybrid.embeddings import Embeddings, inverse_score_std, item_covariance, unit_variance
from gtc_dist.hybrid.graph_filter import CooccurrenceOperator
from gtc_dist.hybrid.warm_neighbours import WarmNeighbours

MEMBERS = "members"
MASKED = "masked"
NORM_DAMPING = "length"
NEIGHBOR_SMOOTHING = "walked"
MEMBER_STEPS = (0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 32.0)
NORM_DAMPING_STEPS = (0.0, 0.25, 0.5, 0.75, 1.0)
NEIGHBOR_SMOOTHING_STEPS = (0.0, 0.5, 1.0, 2.0, 4.0)  # relative to a user's own row, both z-scored
UNTRAINED_STEPS = (0.0, 0.25, 0.5, 0.75, 1.0)  # relative to the first untrained scorer, whose weight is 1
# initial weights; the search is greedy, and low starts got stuck (docs/log.md)
INITIAL_WEIGHTS = {MEMBERS: 2.0, NORM_DAMPING: 1.0, NEIGHBOR_SMOOTHING: 2.0}
MASKED_WEIGHT = 4.0  # initial
MAX_ROUNDS = 3  # over all weights
# grid steps tried in each direction; 1 for other weights
SEARCH_RADIUS = {MASKED: 2, NORM_DAMPING: 2, NEIGHBOR_SMOOTHING: 2}


class ScoreFusion:
    """Untrained scorers, and the weights of all. Methods are collectives unless marked Local.

    Args:
        scorers: name -> embeddings of the untrained scorers; the weights of the others are relative to the first one.
        profiles: names of the scorers that are content profiles.
        neighbours: None: cold items keep their rows.
        operator: None: users are not smoothed.
        has_masked: whether there is a masked diffusion, whose embeddings `tune_network` and `fuse` then get.
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
        self.weights = dict.fromkeys([MEMBERS, *scorers], 1.0) | {NORM_DAMPING: 0.0, NEIGHBOR_SMOOTHING: 0.0}
        masked = {MASKED: MASKED_WEIGHT} if has_masked else {}
        self.weights |= masked
        self.initial_weights = (INITIAL_WEIGHTS if scorers else {MEMBERS: 1.0}) | masked

    def tune_untrained(self, objective: Callable[[Embeddings], float]) -> None:
        """Tune the weights of the untrained scorers, one after the other, without the network; the smallest weight wins
        a tie."""
        if not self.scorers:
            return
        first, *others = self.scorers
        self.weights = {MEMBERS: 0.0, first: 1.0} | dict.fromkeys(others, 0.0)
        for name in others:
            values = {step: objective(self._weighted_sum({}, {**self.weights, name: step})) for step in UNTRAINED_STEPS}
            self.weights[name] = max(values, key=lambda step: (values[step], -step))
        self.weights |= self.initial_weights

    def tune_network(
        self, network: Embeddings, objective: Callable[[Embeddings], float], masked: Embeddings | None = None
    ) -> None:
        """Tune the weights of the trained models, norm damping, neighbour smoothing and the weights of the content
        profiles by greedy coordinate search, from their current or initial values, whichever are better. Without
        untrained scorers only the network's weight beside the masked diffusion: each value ranks the split once."""
        values: dict[tuple, float] = {}
        damped: dict[float, DampedNetwork] = {}
        others = self._masked_scorer(masked)

        def value(weights: dict[str, float]) -> float:
            exponent, key = weights[NORM_DAMPING], tuple(weights.items())
            if key not in values:
                if exponent not in damped:
                    damped.clear()  # one at a time: as large as the network's embeddings
                    damped[exponent] = self._damp_norms(network, exponent)
                embeddings = damped[exponent].embeddings(weights[NEIGHBOR_SMOOTHING])
                values[key] = objective(self._weighted_sum({MEMBERS: embeddings} | others, weights))
            return values[key]

        grids = {MEMBERS: MEMBER_STEPS}
        if MASKED in self.weights:
            grids = dict.fromkeys((MASKED, MEMBERS) if self.scorers else (MEMBERS,), (0.0, *MEMBER_STEPS))
        if self.scorers:
            grids[NORM_DAMPING] = NORM_DAMPING_STEPS
        if self.operator is not None:
            grids[NEIGHBOR_SMOOTHING] = NEIGHBOR_SMOOTHING_STEPS
        grids |= dict.fromkeys(self.profiles, UNTRAINED_STEPS)
        # a weight that fell to 0 while its model was untrained would stay there
        self.weights = max(self.weights, self.weights | self.initial_weights, key=value)
        for _ in range(MAX_ROUNDS):
            before = dict(self.weights)
            for name, grid in grids.items():
                radius = SEARCH_RADIUS.get(name, 1)
                while (best := max(grid_neighbours(self.weights, name, grid, radius), key=value)) != self.weights:
                    self.weights = best
            if self.weights == before:
                break

    def fuse(self, network: Embeddings, masked: Embeddings | None = None) -> Embeddings:
        """Embeddings whose dot product is the weighted sum of all scores."""
        damped = self._damp_norms(network, self.weights[NORM_DAMPING])
        trained = {MEMBERS: damped.embeddings(self.weights[NEIGHBOR_SMOOTHING])} | self._masked_scorer(masked)
        return self._weighted_sum(trained, self.weights)

    def profile_columns(self, width: int) -> dict[str, slice]:
        """Local. Columns of the content profiles in fused embeddings of this width; profiles of weight 0 have none."""
        widths = {name: scorer.items.width for name, scorer in self.scorers.items() if self.weights[name]}
        at, columns = width - sum(widths.values()), {}
        for name, size in widths.items():
            if name in self.profiles:
                columns[name] = slice(at, at + size)
            at += size
        return columns

    def _damp_norms(self, network: Embeddings, exponent: float) -> "DampedNetwork":
        users, items = network
        rows = items.weight.float()
        rows = rows * rows.norm(dim=1, keepdim=True).clamp(min=1e-12) ** -exponent  # rows of zeros stay zero
        items = self._impute(Embeddings(users, items.with_values(rows))).items
        covariance = item_covariance(items)
        own = users.weight.float()
        smoothed = None
        if self.operator is not None:
            smoothed = self.operator.to_users(self.operator(rows - self.operator.warm_mean(rows)))
            smoothed = users.with_values(smoothed * inverse_score_std(smoothed, covariance))
        return DampedNetwork(users.with_values(own * inverse_score_std(own, covariance)), smoothed, items)

    def _masked_scorer(self, masked: Embeddings | None) -> dict[str, Embeddings]:
        return {} if masked is None else {MASKED: unit_variance(self._impute(masked))}

    def _impute(self, embeddings: Embeddings) -> Embeddings:
        users, items = embeddings
        return Embeddings(users, items if self.neighbours is None else self.neighbours.impute(items))

    def _weighted_sum(self, trained: dict[str, Embeddings], weights: dict[str, float]) -> Embeddings:
        """Local. Columns of the trained and the untrained scorers with a weight side by side, the users' times the
        weight."""
        scorers = {name: scorer for name, scorer in (trained | self.scorers).items() if weights[name]}
        users = torch.cat([scorer.users.weight * weights[name] for name, scorer in scorers.items()], dim=1)
        items = torch.cat([scorer.items.weight for scorer in scorers.values()], dim=1)
        first = next(iter(scorers.values()))
        return Embeddings(first.users.with_values(users), first.items.with_values(items))


@dataclass(frozen=True)
class DampedNetwork:
    """The network's embeddings with damped item norms: user rows as trained and smoothed, both z-scored, and items."""

    users: ShardedTable
    smoothed_users: ShardedTable | None
    items: ShardedTable

    def embeddings(self, smoothing: float) -> Embeddings:
        """User rows plus `smoothing` times the smoothed rows, z-scored. Collective: every rank must call it."""
        rows = self.users.weight
        if self.smoothed_users is not None:
            rows = rows + smoothing * self.smoothed_users.weight
        return unit_variance(Embeddings(self.users.with_values(rows), self.items))
