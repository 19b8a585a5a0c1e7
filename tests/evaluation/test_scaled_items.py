"""Metrics by factor and offset of some items' scores, against rankings of changed embeddings."""

import numpy as np
import pytest
from ranks import run_ranks
from small import small_catalog

from gtc_dist.data.catalog import CSC, Catalog
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.distributed.sharded_table import ShardedTable
from gtc_dist.evaluation.ranking import RankingOptions, evaluate_on_items, load_ground_truth, top_k_items
from gtc_dist.evaluation.scaled_items import ScaledItems
from gtc_dist.graph.csc import Graphs

ADJUSTMENTS = ((0.0, 0.0), (0.4, 0.0), (1.0, 0.0), (2.5, 0.0), (1.0, -1.5), (0.4, 0.8))  # factor, offset


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    return small_catalog(tmp_path_factory.mktemp("catalog") / "c", users=90, items=120)


def table(name: str, rows: int, comm: Communicator) -> ShardedTable:
    return ShardedTable(name, rows, 6, comm, init_std=1.0, trainable=False)


def by_adjustment(comm: Communicator, uri: str, counts_all: bool) -> dict:
    """Metrics of each adjustment: from one object, and of embeddings with other rows; factor 0 excludes the items."""
    catalog = Catalog(uri)
    graphs, options = Graphs.load(catalog), RankingOptions(item_block=50, user_block=7)
    users, items, other = (table(n, r, comm) for n, r in (("u", 90), ("i", 120), ("other", 120)))
    users.weight[:, 5], items.weight[:, 5] = 1, 0  # a column by which items can be excluded
    truth = load_ground_truth(catalog, "valid", users.start, users.stop)
    which = np.arange(120) % 4 == 1
    counted = None if counts_all else ~which
    lists = ScaledItems(users, items, other, which, graphs, truth, options, counted)
    own = which[items.start : items.stop]
    out = {}
    for factor, offset in ADJUSTMENTS:
        rows = items.weight.clone()
        rows[own] = other.weight[own] * factor
        rows[own, 5] += -1e3 if factor == 0 else offset
        out[factor, offset] = (
            lists.metrics(factor, offset),
            evaluate_on_items(users, items.with_values(rows), graphs, truth, options, counted),
        )
    return out


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("counts_all", [True, False])
def test_one_pair_of_rankings_serves_all_adjustments(catalog, ranks, counts_all):
    for found in run_ranks(by_adjustment, ranks, catalog.uri, counts_all):
        recalls = set()
        for adjustment, (got, want) in found.items():
            assert got == pytest.approx(want), adjustment
            recalls.add(round(got["recall@20"], 6))
        assert len(recalls) > 1


@pytest.mark.parametrize("item_block", [50, 7])  # 7: some blocks have no allowed item
def test_only_allowed_items_are_listed(catalog, item_block):
    graphs, comm = Graphs.load(catalog), Communicator()
    options = RankingOptions(item_block=item_block, user_block=7)
    users, items, allowed = table("u", 90, comm), table("i", 120, comm), np.arange(120) % 30 == 22
    known = CSC(np.arange(91), np.full(90, 52, np.int32), np.ones(90, np.float32))  # of every user
    top, scores = top_k_items(users, items, graphs, np.arange(90), 10, options, allowed, known)
    for user in range(90):
        edges = slice(graphs.nodes.indptr[user], graphs.nodes.indptr[user + 1])
        own = {52, *(graphs.nodes.indices[edges] - graphs.users).tolist()}
        expected = {i: float(users.weight[user] @ items.weight[i]) for i in np.flatnonzero(allowed) if i not in own}
        best = sorted(expected, key=lambda i: -expected[i])
        assert top[user].tolist() == best + [-1] * (10 - len(best))
        assert scores[user, : len(best)] == pytest.approx([expected[i] for i in best], abs=1e-5)
        assert np.isneginf(scores[user, len(best) :]).all()
