"""Shortlists: metrics of weighted sums of scorers, against the ranking of all items."""

import numpy as np
import pytest
import torch
from ranks import run_ranks
from small import small_catalog

from gtc_dist.data.catalog import Catalog
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.distributed.sharded_table import ShardedTable
from gtc_dist.evaluation import shortlist
from gtc_dist.evaluation.ranking import RankingOptions, evaluate_on_items, load_ground_truth
from gtc_dist.evaluation.shortlist import Shortlist
from gtc_dist.graph.csc import Graphs
from gtc_dist.hybrid.embeddings import Embeddings

WEIGHTS = {"a": 1.0, "b": 0.3, "c": 0.0}


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    return small_catalog(tmp_path_factory.mktemp("catalog") / "c", users=90, items=120)


def embeddings(catalog: Catalog, name: str, comm: Communicator) -> Embeddings:
    tables = [
        ShardedTable(f"{name}-{kind}", rows, 5, comm, init_std=1.0, trainable=False)
        for kind, rows in (("users", catalog.users), ("items", catalog.items))
    ]
    return Embeddings(*tables)


def both(comm: Communicator, uri: str, counted: np.ndarray | None, items: int) -> tuple[dict, dict]:
    """Metrics by a shortlist with so many items of each scorer, and by ranking all."""
    catalog = Catalog(uri)
    scorers, graphs = {name: embeddings(catalog, name, comm) for name in WEIGHTS}, Graphs.load(catalog)
    options = RankingOptions(item_block=50, user_block=7)
    users = scorers["a"].users
    truth = load_ground_truth(catalog, "valid", users.start, users.stop)
    with pytest.MonkeyPatch.context() as patch:  # one rank runs in this process
        patch.setattr(shortlist, "ITEMS", items)
        found = Shortlist.of(scorers, graphs, truth, options, counted).metrics(WEIGHTS)
    used = [(each, WEIGHTS[name]) for name, each in scorers.items()]
    rows = torch.cat([each.users.weight * weight for each, weight in used], dim=1)
    columns = torch.cat([each.items.weight for each, _ in used], dim=1)
    tables = users.with_values(rows), used[0][0].items.with_values(columns)
    return found, evaluate_on_items(*tables, graphs, truth, options, counted)


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("some", [False, True])
def test_long_shortlists_rank_as_all_items_do(catalog, ranks, some):
    counted = np.arange(catalog.items) % 3 > 0 if some else None
    for found, expected in run_ranks(both, ranks, catalog.uri, counted, 200):
        assert found == pytest.approx(expected)
        assert found["recall@20"] > 0


def test_the_top_is_among_a_few_items_of_each_scorer(catalog):
    found, expected = run_ranks(both, 1, catalog.uri, None, 40)[0]
    assert found["ndcg@5"] == pytest.approx(expected["ndcg@5"])
    fewer, _ = run_ranks(both, 1, catalog.uri, None, 3)[0]
    assert fewer["recall@50"] < expected["recall@50"]
