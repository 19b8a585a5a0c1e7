"""Ranking and metrics against a slow reference; the same over several ranks."""

import math

import numpy as np
import pytest
import torch
from ranks import run_ranks
from small import small_catalog

from gtc_dist.data.catalog import Catalog
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.distributed.sharded_table import ShardedTable
from gtc_dist.evaluation import ranking
from gtc_dist.evaluation.metrics import K_VALUES, user_metrics
from gtc_dist.evaluation.ranking import RankingOptions
from gtc_dist.graph.csc import Graphs, by_destination


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    return small_catalog(tmp_path_factory.mktemp("catalog") / "c", users=80, items=70, per_user=10, cold=8)


def embeddings(comm: Communicator, catalog: Catalog) -> tuple[ShardedTable, ShardedTable]:
    generator = torch.Generator().manual_seed(0)
    tables = []
    for rows in (catalog.users, catalog.items):
        table = ShardedTable("x", rows, 6, comm, trainable=False)
        table.weight.copy_(torch.randn(rows, 6, generator=generator)[table.start : table.stop])
        tables.append(table)
    return tuple(tables)


def score(
    comm: Communicator, uri: str, item_block: int, user_block: int, users: int | None = None, seed: int = 0
) -> dict:
    catalog = Catalog(uri)
    tables = embeddings(comm, catalog)
    truth = ranking.load_ground_truth(catalog, "test", tables[0].start, tables[0].stop)
    options = RankingOptions(item_block, user_block, users, seed)
    return ranking.evaluate_split(*tables, Graphs.load(catalog), truth, options)


def reference(catalog: Catalog) -> dict:
    users, items = (t.weight.numpy() for t in embeddings(Communicator(), catalog))
    train, test = ({}, {})
    for split, store in (("train", train), ("test", test)):
        for u, i in zip(*(a.tolist() for a in catalog.interactions(split)), strict=True):
            store.setdefault(u, set()).add(i)
    warm = set().union(*train.values())
    sums: dict[str, dict[str, list[float]]] = {"overall": {}, "cold": {}}
    for u in sorted(test):
        if u not in train:
            continue
        scores = items @ users[u]
        ranked = [i for i in np.argsort(-scores, kind="stable").tolist() if i not in train[u]]
        for part, positives in (("overall", test[u]), ("cold", test[u] - warm)):
            if not positives:
                continue
            for k in K_VALUES:
                hits = [n for n, i in enumerate(ranked[:k]) if i in positives]
                ideal = sum(1 / math.log2(n + 2) for n in range(min(k, len(positives))))
                values = {
                    "recall": len(hits) / len(positives),
                    "precision": len(hits) / k,
                    "ndcg": sum(1 / math.log2(n + 2) for n in hits) / ideal,
                    "hitrate": float(bool(hits)),
                    "mrr": 1 / (hits[0] + 1) if hits else 0.0,
                }
                for name, value in values.items():
                    sums[part].setdefault(f"{name}@{k}", []).append(value)
    out = {part: {name: sum(v) / len(v) for name, v in values.items()} for part, values in sums.items()}
    return {
        "users": len(sums["overall"]["recall@5"]),
        "cold_users": len(sums["cold"]["recall@5"]),
        "overall": pytest.approx(out["overall"], abs=1e-9),
        "cold": pytest.approx(out["cold"], abs=1e-9),
    }


@pytest.mark.parametrize("blocks", [(1000, 1000), (16, 7), (1, 80)])
def test_metrics_match_the_reference_whatever_the_blocks(catalog, blocks):
    want = reference(catalog)
    assert want["cold_users"] > 0
    assert score(Communicator(), catalog.uri, *blocks) == want


def test_ranks_share_the_work_and_agree(catalog):
    want = reference(catalog)
    for result in run_ranks(score, 3, catalog.uri, 16, 7):
        assert result == want


def test_users_without_a_train_interaction_are_not_ranked(catalog):
    truth = by_destination(np.arange(catalog.users), np.zeros(catalog.users, int), catalog.users)
    graphs = Graphs.load(catalog)
    users = ranking.evaluate_split(*embeddings(Communicator(), catalog), graphs, truth)["users"]
    assert users == int((graphs.user_degree > 0).sum())


def test_a_sample_of_users_depends_on_the_seed_but_not_on_ranks(catalog):
    everyone = score(Communicator(), catalog.uri, 16, 7)["users"]
    alone = score(Communicator(), catalog.uri, 16, 7, 30)
    assert 15 <= alone["users"] <= 45 < everyone
    for result in run_ranks(score, 3, catalog.uri, 16, 7, 30):
        assert result["users"] == alone["users"]
        assert result["overall"] == pytest.approx(alone["overall"])
    assert score(Communicator(), catalog.uri, 16, 7, 30, 1)["overall"] != alone["overall"]
    assert score(Communicator(), catalog.uri, 16, 7, everyone) == score(Communicator(), catalog.uri, 16, 7)


def test_ground_truth_is_read_for_a_range_of_users(catalog):
    whole = ranking.load_ground_truth(catalog, "test")
    part = ranking.load_ground_truth(catalog, "test", 20, 50)
    for user in range(20, 50):
        items = [g.indices[g.indptr[u] : g.indptr[u + 1]].tolist() for g, u in ((whole, user), (part, user - 20))]
        assert items[0] == items[1]


def test_train_positives_and_padding_are_never_recommended(catalog):
    users, items = embeddings(Communicator(), catalog)
    graphs = Graphs.load(catalog)
    everyone = np.arange(catalog.users)
    top, _ = ranking.top_k_items(users, items, graphs, everyone, catalog.items, RankingOptions(16, 7))
    for u in everyone:
        listed = top[u][top[u] >= 0]
        assert len(listed) == catalog.items - graphs.user_degree[u]
        assert not graphs.is_interacted(np.array([u]), listed).any()


def test_popularity_ranks_by_train_interactions(catalog):
    graphs = Graphs.load(catalog)
    tables = ranking.popularity(graphs, Communicator())
    top, _ = ranking.top_k_items(*tables, graphs, np.arange(5), 10, RankingOptions(16, 7))
    for blocks in ((1, 1), (7, 3), (1000, 1000)):  # many ties, whose order must not depend on the blocks
        assert np.array_equal(ranking.top_k_items(*tables, graphs, np.arange(5), 10, RankingOptions(*blocks))[0], top)
    for u in range(5):
        degree = graphs.item_degree[top[u]]
        assert (np.diff(degree) <= 0).all()


def test_perfect_and_worst_lists():
    hit = np.zeros((2, 50), bool)
    hit[0, :3] = True
    metrics = user_metrics(hit, np.array([3, 2]))
    assert metrics["recall@5"].tolist() == [1.0, 0.0]
    assert metrics["ndcg@5"].tolist() == pytest.approx([1.0, 0.0])
    assert metrics["mrr@10"].tolist() == [1.0, 0.0]
    assert metrics["precision@5"].tolist() == [0.6, 0.0]
