"""Ranking and metrics against a slow reference; the same over several ranks."""

import collections
import functools
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
from gtc_dist.evaluation.item_groups import valid_head
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


HEAD_ITEMS = 4


def score(
    comm: Communicator, uri: str, item_block: int, user_block: int, users: int | None = None, seed: int = 0
) -> dict:
    catalog = Catalog(uri)
    tables = embeddings(comm, catalog)
    valid, test = (ranking.load_ground_truth(catalog, s, tables[0].start, tables[0].stop) for s in ("valid", "test"))
    options = RankingOptions(item_block, user_block, users, seed)
    head = valid_head(valid, catalog.items, HEAD_ITEMS, comm)
    return ranking.evaluate_split(*tables, Graphs.load(catalog), test, options, head)


def reference(catalog: Catalog) -> dict:
    """Everything that `evaluate_split` returns, from plain dictionaries and complete rankings."""
    users, items = (t.weight.double().numpy() for t in embeddings(Communicator(), catalog))
    train, valid, test = ({}, {}, {})
    for split, store in (("train", train), ("valid", valid), ("test", test)):
        for u, i in zip(*(a.tolist() for a in catalog.interactions(split)), strict=True):
            store.setdefault(u, set()).add(i)
    groups = reference_groups(train, valid, catalog.items)
    ranked = {u: complete_ranking(items @ users[u], train[u]) for u in sorted(test) if u in train}
    mean_scores = items @ np.mean([users[u] for u in train], axis=0)
    same_for_all = {u: complete_ranking(mean_scores, train[u]) for u in ranked}
    out = {name: reference_means(ranked, test, group) for name, group in groups.items()}
    _, mean_list = reference_means(same_for_all, test, groups["overall"])
    recommended = [i for order in ranked.values() for i in order[:20]]
    popular = by_count(train, catalog.items)[: max(catalog.items // 100, 1)]
    gain = {name: out["overall"][1][name] - mean_list[name] for name in ("recall@20", "ndcg@20")}
    close = functools.partial(pytest.approx, abs=1e-9)
    return {
        "users": out["overall"][0],
        "overall": close(out["overall"][1]),
        "cold_users": out["cold"][0],
        "cold": close(out["cold"][1]),
        "head_free_users": out["head_free"][0],
        "head_free": close(out["head_free"][1]),
        "strata": {name: close({"users": out[name][0], **out[name][1]}) for name in ("head", "middle", "tail")},
        "mean_list": close(mean_list),
        "personal_gain": close(gain),
        "coverage@20": close(len(set(recommended)) / catalog.items),
        "head_share@20": close(sum(i in popular for i in recommended) / len(recommended)),
    }


def by_count(split: dict[int, set[int]], items: int) -> list[int]:
    """Items by interactions of a split, ties by index."""
    count = collections.Counter(i for listed in split.values() for i in listed)
    return sorted(range(items), key=lambda i: (-count[i], i))


def reference_groups(train: dict, valid: dict, items: int) -> dict[str, set[int]]:
    """Items that count as positives."""
    count = collections.Counter(i for listed in train.values() for i in listed)
    order = [i for i in by_count(train, items) if count[i]]
    strata, total, passed = {"head": set(), "middle": set(), "tail": set()}, sum(count.values()), 0
    for i in order:
        strata["head" if passed < total / 3 else "middle" if passed < 2 * total / 3 else "tail"].add(i)
        passed += count[i]
    everything = set(range(items))
    head_free = everything - set(by_count(valid, items)[:HEAD_ITEMS])
    return {"overall": everything, "cold": everything - set(count), "head_free": head_free, **strata}


def complete_ranking(scores: np.ndarray, masked: set[int]) -> list[int]:
    return [i for i in np.argsort(-scores, kind="stable").tolist() if i not in masked]


def reference_means(ranked: dict[int, list[int]], truth: dict, counted: set[int]) -> tuple[int, dict[str, float]]:
    """Number of users with a positive, and the means of all metrics over them."""
    sums: dict[str, list[float]] = {}
    for u, order in ranked.items():
        positives = truth[u] & counted
        if not positives:
            continue
        for k in K_VALUES:
            hits = [n for n, i in enumerate(order[:k]) if i in positives]
            ideal = sum(1 / math.log2(n + 2) for n in range(min(k, len(positives))))
            values = {
                "recall": len(hits) / len(positives),
                "precision": len(hits) / k,
                "ndcg": sum(1 / math.log2(n + 2) for n in hits) / ideal,
                "hitrate": float(bool(hits)),
                "mrr": 1 / (hits[0] + 1) if hits else 0.0,
            }
            for name, value in values.items():
                sums.setdefault(f"{name}@{k}", []).append(value)
    return len(sums["recall@5"]), {name: sum(v) / len(v) for name, v in sums.items()}


@pytest.mark.parametrize("blocks", [(1000, 1000), (16, 7), (1, 80)])
def test_metrics_match_the_reference_whatever_the_blocks(catalog, blocks):
    want = reference(catalog)
    assert 0 < want["cold_users"] < want["head_free_users"] < want["users"]
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


@pytest.mark.parametrize("columns", [5, 320, 327, 1000])
def test_the_best_of_long_rows(columns):
    """Also of rows with equal scores, and with fewer scores than are wanted."""
    generator = torch.Generator().manual_seed(columns)
    for scores in (
        torch.randn(40, columns, generator=generator),
        torch.randint(0, 30, (40, columns), generator=generator).float(),
        torch.full((40, columns), float("-inf")).index_fill(1, torch.tensor([0, columns // 2, columns - 1]), 2.0),
    ):
        best, at = ranking.top_of_rows(scores, 10)
        np.testing.assert_array_equal(best, scores.topk(min(10, columns), dim=1).values)
        np.testing.assert_array_equal(best, scores.gather(1, at))
        assert all(len(set(row)) == len(row) for row in at.tolist())
