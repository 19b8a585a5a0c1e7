"""Closed-form references of a catalog: popularity, EASE and CEASE, in the same protocol as a trained run.

    popularity  items by train interactions
    EASE        ridge regression of a user's items on each other (Steck, WWW 2019): scores X B, where
                B = -P / diag(P) with zeros on its diagonal, P = (X' D X + ridge I)^-1, X [users, items] holds the
                train interactions, and D = diag(degree^-0.5): user rows weighted by degree^-0.25
    CEASE       the same with P = (X' D X + weight C C' + ridge I)^-1 (Jeunen et al., RecSys 2020); C holds the content
                of one modality, centred, with rows of length one

Ridge, weight and modality are chosen by NDCG@20 on the valid split, one after the other: the ridge of EASE; with it
the weight for each modality; with these the ridge of CEASE. P is dense: 8 bytes x items^2, and about items^3
operations for each choice, so `MAX_ITEMS` bounds the catalog.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.linalg import lapack
from scipy.sparse import csr_array, diags_array

from gtc_dist.data.catalog import CSC, Catalog
from gtc_dist.data.feature_transform import FeatureTransform
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.evaluation.beyond_accuracy import list_spread
from gtc_dist.evaluation.item_groups import positive_groups, valid_head
from gtc_dist.evaluation.metrics import K_VALUES, flat_metrics, mean_over_users, metrics_of_groups, metrics_of_lists
from gtc_dist.evaluation.ranking import load_ground_truth
from gtc_dist.graph.csc import Graphs

MAX_ITEMS = 20_000
RIDGES = (3.0, 10.0, 30.0, 100.0, 300.0)
WEIGHTS = (1.0, 3.0, 10.0, 30.0, 100.0)
CHOSEN_BY = "ndcg@20"
USER_BLOCK = 1024  # users scored at once


@dataclass(frozen=True)
class Protocol:
    """Scoring of a catalog's splits as `gtc_dist.evaluate` does it, for scores X B that no embeddings stand for.

    interactions: X, ones at the train interactions, [users, items].
    truth: split -> its items of each user. head: bool [items], of `valid_head`.
    """

    graphs: Graphs
    interactions: csr_array
    truth: dict[str, CSC]
    head: np.ndarray

    @staticmethod
    def of(catalog: Catalog, head_items: int) -> "Protocol":
        graphs = Graphs.load(catalog, item_item=False, user_user=False)
        truth = {split: load_ground_truth(catalog, split) for split in ("valid", "test")}
        head = valid_head(truth["valid"], catalog.items, head_items, Communicator())
        return Protocol(graphs, train_matrix(graphs), truth, head)

    def metrics(self, weights: np.ndarray | None, split: str) -> dict[str, float]:
        """Metrics by their names in `flat_metrics`.

        Args:
            weights: B float64 [items, items]; None: the items' popularity, the same scores for everyone.
        """
        truth = self.truth[split]
        users = np.flatnonzero((truth.degree > 0) & (self.graphs.user_degree > 0))
        trained = self.interactions[np.flatnonzero(self.graphs.user_degree > 0)]
        same_for_all = trained.mean(axis=0) @ weights if weights is not None else self.graphs.item_degree * 1.0
        mean_list = self.lists(users, lambda rows: np.tile(same_for_all, (rows.shape[0], 1)))
        top = mean_list if weights is None else self.lists(users, lambda rows: rows @ weights)
        groups = metrics_of_groups(top, users, truth, positive_groups(self.graphs, self.head))
        groups["mean_list"] = metrics_of_lists(mean_list, users, truth)
        means = {group: mean_over_users(values, Communicator())[1] for group, values in groups.items()}
        return flat_metrics(means | list_spread(top, self.graphs, Communicator()))

    def lists(self, users: np.ndarray, score: Callable[[csr_array], np.ndarray]) -> np.ndarray:
        """Best items of each user without train positives, int64 [n, 50].

        Args:
            score: rows of X to scores of all items, in an array that may be overwritten.
        """
        top = np.empty((len(users), max(K_VALUES)), np.int64)
        for start in range(0, len(users), USER_BLOCK):
            rows = self.interactions[users[start : start + USER_BLOCK]]
            scores = score(rows)
            scores[rows.nonzero()] = -np.inf
            top[start : start + USER_BLOCK] = top_items(scores, max(K_VALUES))
        return top


def closed_form_references(catalog: Catalog, head_items: int) -> dict[str, dict]:
    """Method -> {"choice": text, "valid": {metric: value}, "test": {metric: value}}; metrics by their names in
    `flat_metrics`. Empty for more than `MAX_ITEMS` items.

    Args:
        head_items: number of items of valid that head_free metrics do not count.
    """
    if catalog.items > MAX_ITEMS:
        return {}
    protocol = Protocol.of(catalog, head_items)
    content = {name: unit_content(catalog, name) for name in catalog.modalities()}

    def regression(ridge: float, weight: float = 0.0, modality: str | None = None) -> np.ndarray:
        return item_regression(protocol.interactions, ridge, content.get(modality), weight)

    def value(*choice) -> float:
        return protocol.metrics(regression(*choice), "valid")[CHOSEN_BY]

    ridge = max(RIDGES, key=value)
    chosen: dict[str, tuple[str, np.ndarray | None]] = {
        "popularity": ("", None),
        "EASE": (f"ridge {ridge:g}", regression(ridge)),
    }
    if content:
        pairs = [(weight, name) for name in content for weight in WEIGHTS]
        weight, name = max(pairs, key=lambda pair: value(ridge, *pair))
        ridge = max(RIDGES, key=lambda ridge: value(ridge, weight, name))
        chosen["CEASE"] = (f"{name}, ridge {ridge:g}, weight {weight:g}", regression(ridge, weight, name))
    return {
        method: {"choice": choice, **{split: protocol.metrics(weights, split) for split in protocol.truth}}
        for method, (choice, weights) in chosen.items()
    }


def train_matrix(graphs: Graphs) -> csr_array:
    """Ones at the train interactions, float64 [users, items]."""
    indptr = graphs.nodes.indptr[: graphs.users + 1]
    items = graphs.nodes.indices[: indptr[-1]] - graphs.users
    return csr_array((np.ones(len(items)), items, indptr), shape=(graphs.users, graphs.items))


def unit_content(catalog: Catalog, modality: str) -> np.ndarray:
    """Raw features of a modality, centred over the items, rows of length one: float64 [items, width]. Rows of zeros
    stay. The catalog's features are standardised, which is undone."""
    features = catalog.features(modality) * FeatureTransform.load(catalog.uri, modality).scale
    centred = features - features.mean(axis=0)
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    return centred / np.where(length > 0, length, 1)


def item_regression(
    interactions: csr_array, ridge: float, content: np.ndarray | None = None, weight: float = 0.0
) -> np.ndarray:
    """Weights B of EASE, or of CEASE if there is `content`: float64 [items, items], zeros on the diagonal.

    Args:
        interactions: ones at the train interactions, [users, items].
        content: [items, width], see `unit_content`.
    """
    degree = np.maximum(interactions.sum(axis=1), 1)
    gram = (interactions.T @ diags_array(degree**-0.5) @ interactions).toarray(order="F")
    if content is not None:
        gram += weight * (content @ content.T)
    gram[np.diag_indices_from(gram)] += ridge
    factor, failed = lapack.dpotrf(gram, lower=1, overwrite_a=1)
    inverse, failed_too = lapack.dpotri(factor, lower=1, overwrite_c=1)  # its lower triangle
    if failed or failed_too:
        raise np.linalg.LinAlgError(f"the item Gram matrix with ridge {ridge} is not positive definite")
    weights = np.tril(inverse) + np.tril(inverse, -1).T
    weights /= -np.diag(weights).copy()
    np.fill_diagonal(weights, 0)
    return weights


def top_items(scores: np.ndarray, k: int) -> np.ndarray:
    """The k best columns of each row of scores [n, columns], int64 [n, k], best first; -1 where a row has no score
    above -inf left. Of equal scores the lower index comes first."""
    n, width = len(scores), min(k, scores.shape[1])
    least = np.partition(scores, -width, axis=1)[:, -width, None]
    above, tied = scores > least, scores == least
    kept = above | (tied & (np.cumsum(tied, axis=1) <= width - above.sum(axis=1, keepdims=True)))
    index = np.nonzero(kept)[1].reshape(n, width)
    value = np.take_along_axis(scores, index, axis=1)
    order = np.argsort(-value, axis=1, kind="stable")
    top = np.full((n, k), -1, np.int64)
    top[:, :width] = np.take_along_axis(np.where(value > -np.inf, index, -1), order, axis=1)
    return top
