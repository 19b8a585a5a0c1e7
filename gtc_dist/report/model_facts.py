"""What the parts of a run's model do, and lists of a few users: from the best checkpoint, on its catalog.

How far the lists of each part alone, and those without the content filter, differ from the final ones is measured over
a seeded sample of the users of valid; of test for a final fit, which is trained on valid, too.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from gtc_dist.checkpoint.existing_run import RunRef
from gtc_dist.data.catalog import Catalog
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.evaluation import ranking
from gtc_dist.evaluation.metrics import K_VALUES, metrics_of_lists
from gtc_dist.graph.csc import Graphs, take_edges
from gtc_dist.hybrid.embeddings import Embeddings
from gtc_dist.hybrid.score_fusion import MASKED, MEMBERS, NEIGHBOR_SMOOTHING
from gtc_dist.inference.layerwise import embed_catalog
from gtc_dist.inference.masked_content import masked_content
from gtc_dist.inference.masked_embeddings import embed_masked
from gtc_dist.inference.trained_run import TrainedRun, load_run
from gtc_dist.recommend import lists
from gtc_dist.recommend.item_choice import catalog_item_ids

SAMPLE = 512  # users, about, whose lists are compared
COMPARED = 20  # items of a compared list
UNTRAINED, POPULARITY_ALONE = "untrained scorers together", "popularity alone"
GROUPS = ("few", "some", "many")  # thirds of the sampled users by train interactions
MOST_DIFFERENT = 5
SHOWN_ITEMS = 10  # of a user's list, and of what the user has


@dataclass(frozen=True)
class ListQuestion:
    """Whose lists a report shows.

    users: int64 [n], indexes; None: three, with few, with some and with many train interactions.
    titles: by item index; None: ids alone.
    """

    users: np.ndarray | None
    titles: pa.Array | None


def model_facts(comm: Communicator, graphs: Graphs | None, run_ref: RunRef, question: ListQuestion) -> dict:
    """Facts for the report. Collective: every rank must call it.

    Returns:
        split: whose users are compared; users: their number; groups: [[name, users, least, most train interactions]]
        parts: [{name, weight, recall@20 and ndcg@20 of the split, overlap: with the final lists, by_group: [overlap]}]
        filter: as a part, the lists without the content filter, or None
        most_different: [{user, train, overlap}], users whose final list differs most from that of the part `reference`,
            the untrained scorers or, without these, popularity; filter_most_different: from that without the filter
        lists: [{user, train, has: [item], gets: [item]}], items {id, title}
    """
    run = load_run(run_ref, comm, graphs)
    final = run.final_embeddings()
    comparison = _Comparison(run, final)
    parts = [comparison.part(name, weight, embeddings) for name, weight, embeddings in embeddings_of_parts(run)]
    without_filter = embeddings_without_filter(run)
    names, without = [part["name"] for part in parts], "without the content filter"
    one_untrained = 1 if run.scorer.has_untrained else 0  # the last but popularity
    reference = UNTRAINED if UNTRAINED in names else names[-1 - one_untrained]
    return {
        "split": comparison.split,
        "users": comparison.users,
        "groups": comparison.groups,
        "parts": parts,
        "filter": None if without_filter is None else comparison.part(without, None, without_filter),
        "reference": reference,
        "most_different": comparison.most_different(reference),
        "filter_most_different": [] if without_filter is None else comparison.most_different(without),
        "lists": user_lists(run, final, question),
    }


def embeddings_of_parts(run: TrainedRun) -> Iterator[tuple[str, float | None, Embeddings]]:
    """Each part alone, by its own scores: name, weight in score fusion, embeddings. Collective: every rank must take
    all."""
    fusion = run.scorer.fusion
    if fusion is not None:
        network, masked = trained_embeddings(run)
        parts = {MEMBERS: network} | ({} if masked is None else {MASKED: masked}) | fusion.scorers
        for name, embeddings in parts.items():
            yield part_title(name), float(fusion.weights.get(name, 0.0)), embeddings
        if len(fusion.scorers) > 1:
            yield UNTRAINED, None, summed_scorers(list(fusion.scorers.values()))
    yield POPULARITY_ALONE, None, Embeddings(*ranking.popularity(run.graphs, run.tables.user.comm))


def summed_scorers(scorers: list[Embeddings]) -> Embeddings:
    """Embeddings whose dot product is the sum of the scorers' scores."""
    users, items = scorers[0]
    columns = [[getattr(each, kind).weight.float() for each in scorers] for kind in ("users", "items")]
    return Embeddings(
        *(table.with_values(torch.cat(c, dim=1)) for table, c in zip((users, items), columns, strict=True))
    )


def part_title(name: str) -> str:
    """A scorer of the fusion, or a weight of popularity, in words."""
    if name.startswith("popularity"):
        return name.replace("_", " ")
    known = {MEMBERS: "network", MASKED: "masked diffusion", NEIGHBOR_SMOOTHING: "neighbour smoothing"}
    return (known | {"spectral": "graph filter"}).get(name, f"content: {name}")


def trained_embeddings(run: TrainedRun) -> tuple[Embeddings, Embeddings | None]:
    """Embeddings of the trained models before score fusion. Collective: every rank must call it."""
    models, chunk = (run.network, run.tables), run.config.eval.block_rows
    content = masked_content(run.network.masked, run.features, run.graphs, chunk)
    return embed_catalog(*models, run.features, run.graphs, chunk), embed_masked(*models, content, run.graphs, chunk)


def embeddings_without_filter(run: TrainedRun) -> Embeddings | None:
    """Final embeddings where content enters the network as it is; None for a run without a filter. Collective: every
    rank must call it."""
    if not run.network.has_filter:
        return None
    filters = [member.filters for member in run.network.members]
    for member in run.network.members:
        member.filters = nn.ModuleList()
    try:
        return run.scorer(*trained_embeddings(run))
    finally:
        for member, own in zip(run.network.members, filters, strict=True):
            member.filters = own


class _Comparison:
    """Lists of a sample of the users, by final embeddings and by others. Methods are collectives."""

    def __init__(self, run: TrainedRun, final: Embeddings):
        self.run, self.comm = run, final.users.comm
        self.options = run.ranking_options(SAMPLE)
        self.split = "test" if "valid" in run.config.train_splits else "valid"
        self.truth = ranking.load_ground_truth(run.catalog, self.split, final.users.start, final.users.stop)
        self.mine = ranking.ranked_users(final.users, run.graphs, self.truth, self.options)
        self.top = self._lists(final)
        self.indexes = self._all(self.mine)
        self.users = len(self.indexes)
        self.degree = run.graphs.user_degree[self.indexes]
        thirds = np.quantile(self.degree, (1 / 3, 2 / 3))
        self.group = np.searchsorted(thirds, self.degree, side="left")
        inside = [self.degree[self.group == n] for n in range(len(GROUPS))]
        self.groups = [
            [name, len(each), int(each.min()), int(each.max())]
            for name, each in zip(GROUPS, inside, strict=True)
            if len(each)
        ]
        self.overlaps: dict[str, np.ndarray] = {}

    def part(self, name: str, weight: float | None, embeddings: Embeddings) -> dict:
        """How the lists of other embeddings rank the split, and how many items they share with the final ones."""
        top = self._lists(embeddings)
        both = [
            len(np.intersect1d(a[a >= 0], b)) / COMPARED
            for a, b in zip(top[:, :COMPARED], self.top[:, :COMPARED], strict=True)
        ]
        overlap = self.overlaps[name] = self._all(np.array(both, np.float64))
        metrics = metrics_of_lists(top, self.mine - embeddings.users.start, self.truth)
        means = {key: float(self._all(metrics[key]).mean()) for key in ("recall@20", "ndcg@20")}
        by_group = [float(overlap[self.group == n].mean()) for n in range(len(GROUPS)) if (self.group == n).any()]
        return {"name": name, "weight": weight, **means, "overlap": float(overlap.mean()), "by_group": by_group}

    def most_different(self, name: str) -> list[dict]:
        order = np.argsort(self.overlaps[name], kind="stable")[:MOST_DIFFERENT]
        found = zip(self.indexes[order].tolist(), self.degree[order].tolist(), self.overlaps[name][order], strict=True)
        return [
            {"user": user_id(self.run.catalog, user), "train": train, "overlap": float(overlap)}
            for user, train, overlap in found
        ]

    def _lists(self, embeddings: Embeddings) -> np.ndarray:
        return ranking.top_k_items(*embeddings, self.run.graphs, self.mine, max(K_VALUES), self.options)[0]

    def _all(self, values: np.ndarray) -> np.ndarray:
        """Values of this rank's users, of all ranks."""
        parts = self.comm.all_gather_json(values.tolist())
        return np.array([value for part in parts for value in part], values.dtype)


def user_lists(run: TrainedRun, final: Embeddings, question: ListQuestion) -> list[dict]:
    """What some users have and get. Collective: every rank must call it."""
    chosen = typical_users(run.graphs.user_degree) if question.users is None else question.users
    embeddings, found = lists.with_mean_user(run, final), []
    ids = catalog_item_ids(run.catalog)
    for _, table in lists.lists_of(run, embeddings, np.sort(chosen), SHOWN_ITEMS, titles=question.titles):
        by_user: dict[str, list[dict]] = {}
        for row in table.to_pylist():
            item = {"id": str(row["item_id"]), "title": row.get("title"), "score": row["score"]}
            by_user.setdefault(str(row["user_id"]), []).append(item)
        for index in chosen[(chosen >= final.users.start) & (chosen < final.users.stop)].tolist():
            _, edges = take_edges(run.graphs.nodes, np.array([index]))
            own = np.sort(run.graphs.nodes.indices[edges] - run.graphs.users)
            user = user_id(run.catalog, index)
            shown = [int(item) for item in own[:SHOWN_ITEMS]]
            titles = [None if question.titles is None else question.titles[item].as_py() for item in shown]
            has = [{"id": str(ids[item].as_py()), "title": title} for item, title in zip(shown, titles, strict=True)]
            found.append({"user": user, "train": len(own), "has": has, "gets": by_user.get(user, [])})
    gathered = [entry for part in final.users.comm.all_gather_json(found) for entry in part]
    return sorted(gathered, key=lambda entry: entry["train"])


def user_id(catalog: Catalog, index: int) -> str:
    return str(catalog.ids("users", index, index + 1)[0].as_py())


def typical_users(degree: np.ndarray) -> np.ndarray:
    """Indexes of three users with train interactions: with few, with a median number, with many; fewer where there are
    fewer users."""
    order = np.argsort(degree, kind="stable")
    order = order[degree[order] > 0]
    places = [int(share * (len(order) - 1)) for share in (0.2, 0.5, 0.9)]
    return np.unique(order[places]) if len(order) else order
