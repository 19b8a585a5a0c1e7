"""Shortlists: the best items of each scorer with all their scores, against dense scores."""

import numpy as np
import pytest
import torch
from ranks import run_ranks
from small import small_catalog

from gtc_dist.data.catalog import Catalog
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.distributed.sharded_table import ShardedTable
from gtc_dist.evaluation import shortlist
from gtc_dist.evaluation.ranking import RankingOptions, load_ground_truth
from gtc_dist.evaluation.shortlist import Shortlist
from gtc_dist.graph.csc import Graphs
from gtc_dist.hybrid.embeddings import Embeddings


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    return small_catalog(tmp_path_factory.mktemp("catalog") / "c", users=90, items=120)


def embeddings(catalog: Catalog, name: str, comm: Communicator) -> Embeddings:
    tables = [
        ShardedTable(f"{name}-{kind}", rows, 5, comm, init_std=1.0, trainable=False)
        for kind, rows in (("users", catalog.users), ("items", catalog.items))
    ]
    return Embeddings(*tables)


def ranked(comm: Communicator, uri: str, counted: np.ndarray | None, items: int) -> tuple[dict, dict]:
    """A shortlist of valid with so many items of each scorer, and this rank's users' scores of all items by each."""
    catalog = Catalog(uri)
    scorers, graphs = {name: embeddings(catalog, name, comm) for name in "abc"}, Graphs.load(catalog)
    users = scorers["a"].users
    truth = load_ground_truth(catalog, "valid", users.start, users.stop)
    with pytest.MonkeyPatch.context() as patch:  # one rank runs in this process
        patch.setattr(shortlist, "ITEMS", items)
        found = Shortlist.of(scorers, graphs, truth, RankingOptions(item_block=50, user_block=7), counted)
    return vars(found), {name: each.users.weight for name, each in scorers.items()}


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize("items", [4, 200])
def test_it_has_the_best_items_of_each_scorer_and_all_their_scores(catalog, ranks, some, items):
    counted = np.arange(catalog.items) % 3 > 0 if some else None
    parts = run_ranks(ranked, ranks, catalog.uri, counted, items)
    trained = set(zip(*(each.tolist() for each in catalog.interactions("train")), strict=True))
    valid = {(u, i) for u, i in zip(*(each.tolist() for each in catalog.interactions("valid")), strict=True)}
    valid = {(u, i) for u, i in valid if counted is None or counted[i]}
    item_rows = {name: embeddings(catalog, name, Communicator()).items.weight for name in "abc"}
    user_rows = {name: torch.cat([rows[name] for _, rows in parts]) for name in "abc"}
    users = [u for found, _ in parts for u in found["users"].tolist()]
    assert users == sorted({u for u, _ in valid})
    for found, _ in parts:
        for row, user in enumerate(found["users"].tolist()):
            seen = torch.tensor([(user, i) in trained for i in range(catalog.items)])
            scores = {n: (item_rows[n] @ user_rows[n][user]).masked_fill(seen, float("-inf")) for n in "abc"}
            best = {i for each in scores.values() for i in each.topk(min(items, int((~seen).sum()))).indices.tolist()}
            listed = found["items"][row] >= 0
            assert sorted(found["items"][row][listed].tolist()) == sorted(best)
            for name, each in found["scores"].items():
                torch.testing.assert_close(each[row][listed], scores[name][found["items"][row][listed]])
                assert (each[row][~listed] == float("-inf")).all()
            hit = {int(i) for i in found["items"][row][found["hit"][row]]}
            assert hit == {i for u, i in valid if u == user} & best
