"""Cold-start items: embeddings predicted from content for items without a train interaction.

The id embedding of a cold item was never trained, or only as a negative. Its final embedding is predicted instead:

1. **Neighbours**: the mean of those of its k nearest items that are warm, in the item-item graph
   (`warm_neighbours.py`)
2. **Regression**: ridge regression from content to the embeddings of warm items (`content_regression.py`)

Which predictor is better depends on the catalog. Weights of both, and of an item's own content profile, are fitted to
the valid split by maximum likelihood (`conditional_logit.py`), with all warm items scored as if they were cold
(predicted without their own row). This is slightly optimistic: the embeddings of an item's neighbours still contain it
via the graph.

Finally an offset to all their scores is tuned, which decides how many cold items enter the lists: the largest whose
drop of the warm items' validation objective is at most `eval.cold_loss`, relative to lists without cold items. An
offset keeps the differences between the users' scores of an item, so that those who like it most get it. Runs before
0.9.0 have a factor instead (docs/log.md), and so have runs without score fusion, whose embeddings have no column for an
offset.

Where less than `SIMULATED_SHARE` of the items are cold (in small catalogs: fewer than `MIN_SIMULATED` items, or than
`MAX_SIMULATED_SHARE`), randomly chosen warm items simulate the rest, so that the offset also suits a few items that
arrive later. With a larger share fewer cold items are recommended than the allowed loss pays for.

Tuning ranks the valid split some more times, so the trainer tunes only epochs that become the best checkpoint.
"""

from collections.abc import Callable

import numpy as np
import torch

from gtc_dist.data.hashing import index_bucket
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.distributed.sharded_table import ShardedTable
from gtc_dist.evaluation.shortlist import Shortlist
from gtc_dist.graph.csc import Graphs
from gtc_dist.hybrid.conditional_logit import Candidates, fit_weights
from gtc_dist.hybrid.content_regression import ContentRegression
from gtc_dist.hybrid.embeddings import Embeddings, SpecialColumns
from gtc_dist.hybrid.warm_neighbours import WarmNeighbours

# From embeddings, predicted rows of the items and bool [items], the ones that get them: the validation objective,
# higher is better, as a function of a factor and an offset of these items' scores, factor 0: without them; the other
# items count. Every rank must call both.
ObjectiveByAdjustment = Callable[[Embeddings, ShardedTable, np.ndarray], Callable[[float, float], float]]

# weights of the predictors; runs before 0.5.0 have no `NEIGHBOURS`: regression 1 predicts alone, 0 neighbours alone
REGRESSION, NEIGHBOURS = "regression", "neighbours"
CONTENT_WEIGHT = "own"  # of an item's own content profile
NORM_SCALE = "lift"  # factor of the whole predicted row; 0: cold items are not recommended
OFFSET = "offset"  # added to all scores of an item
# adjustments of the scores of cold items to choose from, (factor, offset): each lists more of them than the one before
WITHOUT = (0.0, 0.0)
BY_OFFSET = (WITHOUT, *((1.0, n / 10) for n in range(-200, 201)))
BY_SCALE = (WITHOUT, *((round(1.1**n, 3), 0.0) for n in range(-12, 13)))

# of the items that are cold, or simulate cold ones, when the offset is tuned
SIMULATED_SHARE, MIN_SIMULATED, MAX_SIMULATED_SHARE = 0.01, 40, 0.1

EXCLUDED = -1e3  # score that keeps an item out of all lists


class ColdStart:
    """Predicts the final embeddings of cold items. Methods are collectives unless marked Local.

    Args:
        cold: bool [items], over all ranks.
        neighbours: None without an item-item graph.
        regression: None without content features.
        allowed_loss: largest relative drop of the warm items' objective accepted for recommending cold items.
    """

    def __init__(
        self,
        cold: np.ndarray,
        neighbours: WarmNeighbours | None,
        regression: ContentRegression | None,
        allowed_loss: float,
    ):
        self.cold, self.neighbours, self.regression, self.allowed_loss = cold, neighbours, regression, allowed_loss
        self.weights = self.initial_weights()
        # cold items, and warm ones that simulate them when the offset is tuned (chosen by a hash of the index)
        share = max(SIMULATED_SHARE, min(MIN_SIMULATED / len(cold), MAX_SIMULATED_SHARE))
        self.simulated_cold = cold | (index_bucket(0, len(cold), 10_000) < 10_000 * (share - cold.mean()))

    @staticmethod
    def build(
        graphs: Graphs,
        features: dict[str, ShardedTable],
        comm: Communicator,
        chunk: int,
        neighbours: WarmNeighbours | None,
        allowed_loss: float = 0.01,
    ) -> "ColdStart | None":
        """Local. None without an item-item graph and without content features."""
        cold = graphs.item_degree == 0
        regression = ContentRegression(features, ~cold, chunk) if features and not cold.all() else None
        no_predictor = neighbours is None and regression is None
        return None if no_predictor else ColdStart(cold, neighbours, regression, allowed_loss)

    def initial_weights(self) -> dict[str, float]:
        """Local. Weights before tuning."""
        present = {REGRESSION: self.regression is not None, NEIGHBOURS: self.neighbours is not None}
        shares = {name: is_present / max(sum(present.values()), 1) for name, is_present in present.items()}
        return {**shares, CONTENT_WEIGHT: 1.0, NORM_SCALE: 1.0, OFFSET: 0.0}

    def load(self, saved: dict[str, float]) -> None:
        """Local. Set the weights to those of a checkpoint; initial ones where it has none."""
        one_predictor = {NEIGHBOURS: 1 - saved[REGRESSION]} if REGRESSION in saved else {}
        self.weights = self.initial_weights() | one_predictor | saved

    def impute(self, embeddings: Embeddings, columns: SpecialColumns) -> Embeddings:
        """Embeddings with the rows of cold items replaced by their predictions.

        Args:
            columns: of these embeddings.
        """
        if not self.cold.any():
            return embeddings
        users, items = embeddings
        rows = torch.from_numpy(np.flatnonzero(self.cold[items.start : items.stop])).to(items.comm.device)
        predicted = items.weight.new_zeros((len(rows), items.width), dtype=torch.float32)
        if self.weights[REGRESSION]:
            predicted += self.weights[REGRESSION] * self.regression.predict(self.regression.fit(items), rows)
        if self.weights[NEIGHBOURS]:
            predicted += self.weights[NEIGHBOURS] * self.neighbours.of_cold(items)
        self._set_profiles(predicted, columns, rows)
        adjusted = adjusted_rows(predicted, self.weights, columns.constant)
        return Embeddings(users, items.with_values(items.weight.float().index_copy(0, rows, adjusted)))

    def tune(
        self,
        embeddings: Embeddings,
        columns: SpecialColumns,
        shortlist_by: Callable[[dict[str, Embeddings]], Shortlist],
        objective: ObjectiveByAdjustment,
    ) -> None:
        """Fit the weights of the predictions, then tune how many cold items are listed."""
        users, items = embeddings
        scorers = {}
        if self.regression is not None:
            rows = self.regression.predict(self.regression.fit(items))
            scorers[REGRESSION] = Embeddings(users, items.with_values(_without_profiles(rows, columns)))
        if self.neighbours is not None:
            rows = self.neighbours.of_all(items)
            scorers[NEIGHBOURS] = Embeddings(users, items.with_values(_without_profiles(rows, columns)))
        if columns.profiles:
            of_users = torch.cat([users.weight[:, at] for at in columns.profiles.values()], dim=1)
            own = torch.cat([columns.own_profiles[name] for name in columns.profiles], dim=1)
            scorers[CONTENT_WEIGHT] = Embeddings(users.with_values(of_users), items.with_values(own))
        candidates = Candidates.of_scores(shortlist_by(scorers))
        fitted = fit_weights(candidates, {name: self.initial_weights()[name] for name in scorers}, users.comm)
        self.weights |= {name: fitted[name] for name in scorers}
        predicted, *others = (
            scorers[name].items.weight.mul_(self.weights[name]) for name in scorers if name != CONTENT_WEIGHT
        )
        for rows in others:
            predicted += rows
        self._set_profiles(predicted, columns)
        adjustments = BY_SCALE if columns.constant is None else BY_OFFSET
        self._tune_adjustment(objective(embeddings, items.with_values(predicted), self.simulated_cold), adjustments)

    def _tune_adjustment(
        self, objective: Callable[[float, float], float], adjustments: tuple[tuple[float, float], ...]
    ) -> None:
        """Take the last of the adjustments within the allowed metric drop, by bisection."""
        least = (1 - self.allowed_loss) * objective(*adjustments[0])
        if not least > 0:
            return  # no warm item is recommended correctly, so there is no drop to measure
        within, beyond = 0, len(adjustments)
        while beyond - within > 1:
            middle = (within + beyond) // 2
            if objective(*adjustments[middle]) >= least:
                within = middle
            else:
                beyond = middle
        self.weights |= dict(zip((NORM_SCALE, OFFSET), adjustments[within], strict=True))

    def _set_profiles(
        self, predicted: torch.Tensor, columns: SpecialColumns, rows: torch.Tensor | slice = slice(None)
    ) -> None:
        """Local. Write the weighted profiles of the items `rows` into their columns of `predicted`, in place."""
        for name, at in columns.profiles.items():
            torch.mul(columns.own_profiles[name][rows], self.weights[CONTENT_WEIGHT], out=predicted[:, at])


def adjusted_rows(predicted: torch.Tensor, weights: dict[str, float], constant: int | None) -> torch.Tensor:
    """Predicted rows times their factor, with their offset. Factor 0 keeps the items out of the lists.

    Args:
        constant: of `SpecialColumns`; None in runs before 0.5.0, whose lists hold positive scores.
    """
    adjusted = predicted * weights[NORM_SCALE]
    if constant is not None:
        adjusted[:, constant] = adjusted[:, constant] + weights[OFFSET] if weights[NORM_SCALE] else EXCLUDED
    return adjusted


def _without_profiles(rows: torch.Tensor, columns: SpecialColumns) -> torch.Tensor:
    """Rows with zeros in the columns of the content profiles, in place."""
    for at in columns.profiles.values():
        rows[:, at] = 0
    return rows
