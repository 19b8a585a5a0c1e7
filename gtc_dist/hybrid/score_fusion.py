"""Score fusion: a weighted hybrid of the trained models and the untrained scorers.

The scorers are the masked diffusion if there is one, the trained network (its ensemble members side by side), the
low-pass graph filter and one content profile per modality. Their dot-product scores are z-scored per user (standard
deviation 1 over all items), so that weights are comparable, weighted by the user's activity and taste and the item's
popularity, and added (`conditional_logit.py` has the formula). The weights are fitted to the valid split, before
training for the untrained scorers and at every validation for all. They are stored with the checkpoint.

The network's items enter with norm one: its norms encode popularity, which has weights of its own. In all scorers but
the content profiles, cold-start items get the mean of their warm neighbours; their final embeddings are predicted
afterwards (`cold_start.py`). The effect of each scorer: docs/log.md.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import torch

from gtc_dist.distributed.collectives import Communicator
from gtc_dist.distributed.sharded_table import ShardedTable
from gtc_dist.evaluation.shortlist import Shortlist
from gtc_dist.graph.csc import Graphs
from gtc_dist.hybrid.conditional_logit import COMMON, MEAN_TERMS, Candidates, fit_weights
from gtc_dist.hybrid.embeddings import (
    Embeddings,
    SpecialColumns,
    inverse_score_std,
    item_covariance,
    row_blocks,
    unit_variance,
)
from gtc_dist.hybrid.graph_filter import CooccurrenceOperator
from gtc_dist.hybrid.pair_features import (
    EXPONENT_TERMS,
    POPULARITY,
    USER_TERMS,
    exponent_features,
    item_popularity,
    popularity_powers,
    user_features,
)
from gtc_dist.hybrid.warm_neighbours import WarmNeighbours

# The valid users' shortlists by the scorers; every rank must call it.
Shortlister = Callable[[dict[str, Embeddings]], Shortlist]

MEMBERS = "members"
MASKED = "masked"
NORM_DAMPING = "length"  # exponent p of x / |x|^p for the network's items; runs before 0.4.0 have tuned ones
NEIGHBOR_SMOOTHING = "walked"  # weight of neighbour smoothing, which runs before 0.4.0 have
INITIAL_WEIGHTS = {MASKED: 0.6, MEMBERS: 0.4}
INITIAL_UNTRAINED = 0.1
POPULARITY_PART = "popularity"  # the columns with the item's popularity
CONSTANT = 0  # column of fused embeddings that is 1 for all users: the first of their features


class ScoreFusion:
    """Untrained scorers, and the weights of all. Methods are collectives unless marked Local.

    Weights have the names of `conditional_logit.weight_names`; absent ones are 0, as in runs before 0.5.0.

    Args:
        scorers: name -> embeddings of the untrained scorers.
        profiles: names of the scorers that are content profiles.
        neighbours: None: cold items keep their rows.
        graphs: for activity, taste and popularity.
        operator: smooths users in runs before 0.4.0.
        has_masked: whether there is a masked diffusion, whose embeddings `tune` and `fuse` then get.
    """

    def __init__(
        self,
        scorers: dict[str, Embeddings],
        profiles: list[str],
        neighbours: WarmNeighbours | None,
        graphs: Graphs,
        comm: Communicator,
        operator: CooccurrenceOperator | None = None,
        has_masked: bool = False,
    ):
        self.profiles, self.neighbours, self.operator = profiles, neighbours, operator
        self.scorers = {
            name: unit_variance(embeddings if name in profiles else self._impute(embeddings))
            for name, embeddings in scorers.items()
        }
        self.counted_users, self.warm_items = graphs.counted_users, graphs.item_degree > 0
        self.popularity = item_popularity(graphs)
        self.user_features = user_features(graphs, self.popularity, comm).to(comm.device)
        self.popularity = self.popularity.to(comm.device)
        self.trained = [MEMBERS, MASKED] if has_masked else [MEMBERS]
        self.weights = self.unfitted_weights()

    def unfitted_weights(self) -> dict[str, float]:
        """Local. Weights before the first fit."""
        weights = dict.fromkeys(self.trained, 0.0) | dict.fromkeys(self.scorers, 1.0)
        # without other scorers the order of the lists needs the norms
        return weights | {NORM_DAMPING: float(len(weights) > 1)}

    def tune_untrained(self, shortlist_by: Shortlister) -> None:
        """Fit the weights of the untrained scorers, before training."""
        if self.scorers:
            self._fit(self.scorers, shortlist_by)

    def tune(self, network: Embeddings, shortlist_by: Shortlister, masked: Embeddings | None = None) -> Embeddings:
        """Fit all weights; returns the fused embeddings."""
        scorers = self._trained(network, masked) | self.scorers
        self._fit(scorers, shortlist_by)
        return self._fuse(network, scorers)

    def _fit(self, scorers: dict[str, Embeddings], shortlist_by: Shortlister) -> None:
        shortlist = shortlist_by(scorers)
        first = next(iter(scorers.values()))
        items = shortlist.items.clamp(min=0)
        candidates = replace(
            Candidates.of_scores(shortlist),
            mean_scores={name: self._mean_scores(each)[items] for name, each in scorers.items()},
            user_features=self.user_features[shortlist.users - first.users.start],
            popularity=self.popularity[items],
        )
        initial = {name: INITIAL_WEIGHTS.get(name, INITIAL_UNTRAINED) for name in scorers}
        was_fitted = all(name + MEAN_TERMS[0] in self.weights for name in scorers)
        self.weights |= fit_weights(candidates, initial, first.users.comm, self.weights if was_fitted else None)

    def fuse(self, network: Embeddings, masked: Embeddings | None = None) -> Embeddings:
        """Embeddings whose dot product is the weighted sum of all scores.

        The item columns of all but the content profiles have mean 0 over warm items, so that a user's scores do, too:
        shrinking the row of a cold item then moves it out of the lists.
        """
        return self._fuse(network, self._trained(network, masked) | self.scorers)

    def _fuse(self, network: Embeddings, scorers: dict[str, Embeddings]) -> Embeddings:
        users, items = network
        popularity = self.popularity[items.start : items.stop]
        used = {name: scorer for name, scorer in scorers.items() if self._is_used(name)}
        at = self.user_features.shape[1] if self._is_fitted else 0
        width = at + sum(scorer.items.width for scorer in used.values())
        # written in place: lists of parts to join would need the memory twice
        user_rows, item_rows = (
            table.weight.new_empty((len(table.weight), width), dtype=torch.float32) for table in network
        )
        if self._is_fitted:
            common = self._weights(COMMON).view(len(POPULARITY), -1)
            user_rows[:, :at] = self.user_features
            item_rows[:, :at] = popularity_powers(popularity) @ common
            self._centre(item_rows[:, :at], items)
        for name, scorer in used.items():
            own, mean, exponent = (
                self._weights(name + term for term in terms) for terms in (USER_TERMS, MEAN_TERMS, EXPONENT_TERMS)
            )
            columns = slice(at, at + scorer.items.width)
            rows, at = user_rows[:, columns], columns.stop
            # not a matrix product, which rounds a user's factor by how many users there are
            torch.mul(scorer.users.weight, (self.user_features * own).sum(1, keepdim=True), out=rows)
            if mean.any():
                rows += self._mean_user(scorer.users) * (self.user_features * mean).sum(1, keepdim=True)
            rows = item_rows[:, columns]
            torch.mul(scorer.items.weight, torch.exp(exponent_features(popularity) @ exponent)[:, None], out=rows)
            if self._is_fitted and name not in self.profiles:
                self._centre(rows, items)
        return Embeddings(users.with_values(user_rows), items.with_values(item_rows))

    def column_groups(self, width: int, network: int) -> dict[str, slice]:
        """Local. Columns of each part of fused embeddings of this width: `POPULARITY_PART`, if there is one, then the
        scorers that are used; the scores over the parts add up to the whole score.

        Args:
            network: width of the network's embeddings.
        """
        used = {name: scorer.items.width for name, scorer in self.scorers.items() if self._is_used(name)}
        widths = {POPULARITY_PART: self.user_features.shape[1]} if self._is_fitted else {}
        widths |= {MEMBERS: network} if self._is_used(MEMBERS) else {}
        if MASKED in self.trained and self._is_used(MASKED):
            widths[MASKED] = width - sum(widths.values()) - sum(used.values())
        groups, at = {}, 0
        for name, size in (widths | used).items():
            groups[name] = slice(at, at + size)
            at += size
        return groups

    def special_columns(self, width: int) -> SpecialColumns:
        """Local. Of fused embeddings of this width; profiles of weight 0 have no columns."""
        widths = {name: scorer.items.width for name, scorer in self.scorers.items() if self._is_used(name)}
        at, profiles = width - sum(widths.values()), {}
        for name, size in widths.items():
            if name in self.profiles:
                profiles[name] = slice(at, at + size)
            at += size
        own_profiles = {name: self.scorers[name].items.weight for name in profiles}
        if not self._is_fitted:
            return SpecialColumns(profiles, own_profiles)
        return SpecialColumns(profiles, own_profiles, CONSTANT, popularity=self.user_features.shape[1])

    @property
    def _is_fitted(self) -> bool:
        """Local. Whether the weights come from `fit_weights`, as in all runs since 0.5.0."""
        return COMMON[0] in self.weights

    def _is_used(self, scorer: str) -> bool:
        """Local."""
        return any(self.weights.get(scorer + term) for term in (*USER_TERMS, *MEAN_TERMS))

    def _weights(self, names: Iterable[str]) -> torch.Tensor:
        """Local. Weights float32 [n]; 0 where a run before 0.5.0 has none."""
        return torch.tensor([self.weights.get(name, 0.0) for name in names], device=self.popularity.device)

    def _mean_user(self, users: ShardedTable) -> torch.Tensor:
        """Mean row of the users with a train interaction, float32 [1, width]."""
        return _mean_over(users, self.counted_users)

    def _mean_scores(self, scorer: Embeddings) -> torch.Tensor:
        """Scores of all items for the mean user, float32 [items], on every rank."""
        users, items = scorer
        scores = items.weight @ self._mean_user(users)[0]
        comm = items.comm
        ranges = (comm.row_range(items.rows, rank) for rank in range(comm.size))
        return comm.all_gather(scores, [stop - start for start, stop in ranges])

    def _centre(self, rows: torch.Tensor, items: ShardedTable) -> None:
        """Subtract the mean over warm items, in place."""
        rows -= _mean_over(items.with_values(rows), self.warm_items)

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


def _mean_over(table: ShardedTable, chosen: np.ndarray) -> torch.Tensor:
    """Mean of the rows of bool [rows], float32 [1, width]. Collective: every rank must call it."""
    blocks = row_blocks(table.weight)
    is_chosen = torch.from_numpy(chosen[table.start : table.stop]).to(table.comm.device).split(len(blocks[0]) or 1)
    sums = (rows[which].double().sum(0, keepdim=True) for rows, which in zip(blocks, is_chosen, strict=True))
    return (table.comm.all_reduce(sum(sums)) / max(int(chosen.sum()), 1)).float()
