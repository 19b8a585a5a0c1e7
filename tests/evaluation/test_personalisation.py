"""Metrics that tell personalisation from popularity, on a world that is small enough to compute by hand."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from ranks import run_ranks

from gtc_dist.config import EvalConfig
from gtc_dist.data.catalog import CSC
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.distributed.sharded_table import ShardedTable
from gtc_dist.evaluation import ranking
from gtc_dist.evaluation.item_groups import (
    STRATA,
    most_frequent,
    popularity_strata,
    positive_groups,
    tuning_positives,
    valid_head,
)
from gtc_dist.evaluation.metrics import flat_metrics, metric_value, personalisation_lines
from gtc_dist.graph.csc import Graphs, both_directions, by_destination

# Four users, six items. User 3 has no train interaction, item 5 is cold. Item 0 is popular.
USERS, ITEMS = 4, 6
TRAIN = [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 2), (2, 3), (1, 4)]
VALID = [(0, 4), (1, 3), (2, 4), (3, 4)]
TEST = [(0, 4), (0, 2), (1, 5), (2, 4), (3, 1)]
# scores of users: rows of the identity pick the columns of the item table below, of which each is a user's scores
SCORES = [[9, 8, 7, 1, 5, 4], [9, 1, 2, 3, 4, 8], [9, 5, 4, 3, 2, 1], [900, 100, 500, 400, 300, 200]]


def world(comm: Communicator) -> tuple[ShardedTable, ShardedTable, Graphs]:
    users, items = (ShardedTable("x", rows, USERS, comm, trainable=False) for rows in (USERS, ITEMS))
    users.weight.copy_(torch.eye(USERS)[users.start : users.stop])
    items.weight.copy_(torch.tensor(SCORES, dtype=torch.float32).T[items.start : items.stop])
    user, item = np.array(TRAIN).T
    nodes = both_directions(by_destination(user, item, USERS), by_destination(item, user, ITEMS))
    return users, items, Graphs(USERS, ITEMS, nodes)


def split(comm: Communicator, pairs: list[tuple[int, int]]) -> CSC:
    start, stop = comm.row_range(USERS)
    user, item = np.array([(u, i) for u, i in pairs if start <= u < stop], int).reshape(-1, 2).T
    return by_destination(user - start, item, stop - start)


def evaluate(comm: Communicator, head_items: int, pairs: list[tuple[int, int]] = TEST) -> dict:
    users, items, graphs = world(comm)
    head = valid_head(split(comm, VALID), ITEMS, head_items, comm)
    return ranking.evaluate_split(users, items, graphs, split(comm, pairs), head=head)


def test_by_hand():
    """Lists: user 0 [2, 4, 5, 3], user 1 [5, 3, 2], user 2 [1, 4, 5]; without users' own train items."""
    result = evaluate(Communicator(), head_items=1)
    assert result["users"] == 3
    assert result["overall"]["mrr@5"] == pytest.approx((1 + 1 + 1 / 2) / 3)
    # item 4 is the head of valid: user 2 has no positive left; user 0 keeps item 2 at rank 1, user 1 item 5 at rank 1
    assert result["head_free_users"] == 2
    assert result["head_free"]["mrr@5"] == 1.0
    assert result["head_free"]["recall@5"] == 1.0
    assert result["head_free"]["ndcg@5"] == 1.0
    # train interactions 3 2 1 1 1 0: a third of 8 is passed by item 0, two thirds by items 1 and 2
    assert result["strata"]["head"]["users"] == 0
    assert result["strata"]["middle"]["users"] == 1
    assert result["strata"]["middle"]["mrr@5"] == 1.0
    assert result["strata"]["tail"]["users"] == 2
    assert result["strata"]["tail"]["mrr@5"] == 0.5  # item 4 is second for users 0 and 2
    assert (result["cold_users"], result["cold"]["mrr@5"]) == (1, 1.0)
    # mean of users 0 to 2: 27 14 13 7 11 13, so the list for everyone is 0 1 2 5 4 3, with the tie at 13 by index
    # user 0: [2, 5, 4, 3], user 1: [2, 5, 3], user 2: [1, 5, 4]
    assert result["mean_list"]["mrr@5"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    ndcg = 1 / np.log2([2, 3, 4])  # gains at ranks 1 to 3
    own = (1 + 1 + ndcg[1]) / 3
    same = ((ndcg[0] + ndcg[2]) / (ndcg[0] + ndcg[1]) + ndcg[1] + ndcg[2]) / 3
    assert result["personal_gain"] == pytest.approx({"recall@20": 0.0, "ndcg@20": own - same})
    # all items but item 0, which every ranked user has, are in a list; it is the most popular hundredth
    assert result["coverage@20"] == pytest.approx(5 / 6)
    assert result["head_share@20"] == 0.0


def test_share_of_popular_items():
    """Users 2 and 3 make item 3 the most popular one; users 0 and 1 have it in their lists of five items each."""
    users, items, _ = world(Communicator())
    user, item = np.array([(0, 1), (1, 4), (2, 3), (3, 3)]).T
    nodes = both_directions(by_destination(user, item, USERS), by_destination(item, user, ITEMS))
    truth = split(Communicator(), [(0, 2), (1, 2)])
    result = ranking.evaluate_split(users, items, Graphs(USERS, ITEMS, nodes), truth)
    assert result["head_share@20"] == pytest.approx(2 / 10)
    assert result["coverage@20"] == 1.0


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("pairs", [TEST, [(2, 4)], [(3, 1)]], ids=["all", "one rank has no user", "nobody is ranked"])
def test_ranks_agree(ranks, pairs):
    alone = flat_metrics(evaluate(Communicator(), 1, pairs))
    for result in run_ranks(evaluate, ranks, 1, pairs):
        assert flat_metrics(result) == pytest.approx(alone, abs=1e-12)
        assert result["users"] == len({u for u, _ in pairs} - {3})


def test_no_head_leaves_all_positives():
    result = evaluate(Communicator(), head_items=0)
    assert result["head_free"] == result["overall"]
    assert result["head_free_users"] == result["users"]
    result = evaluate(Communicator(), head_items=ITEMS)
    assert result["head_free_users"] == 0
    assert set(result["head_free"].values()) == {0.0}


def test_the_head_is_that_of_valid_with_ties_by_index():
    assert np.flatnonzero(valid_head(split(Communicator(), VALID), ITEMS, 2, Communicator())).tolist() == [3, 4]
    assert np.flatnonzero(most_frequent(np.array([1, 2, 2, 2]), 2)).tolist() == [1, 2]


@pytest.mark.parametrize("seed", range(20))
def test_strata_hold_thirds_of_the_interactions(seed):
    degree = np.random.default_rng(seed).geometric(0.2, 50) - 1
    strata = popularity_strata(degree)
    assert np.array_equal(sum(strata.values()).astype(int), (degree > 0).astype(int))  # warm items, each once
    held = np.cumsum([degree[strata[name]].sum() for name in STRATA])
    largest = [degree[strata[name]].min() for name in STRATA]
    for n, part in enumerate((1 / 3, 2 / 3)):
        assert held[n] >= part * degree.sum() > held[n] - largest[n]  # the fewest items that reach it
        assert degree[strata[STRATA[n]]].min() >= degree[strata[STRATA[n + 1]]].max()


def test_strata_without_interactions_are_empty():
    assert not any(mask.any() for mask in popularity_strata(np.zeros(3, np.int64)).values())


def test_every_metric_can_be_named():
    """The configuration takes exactly the names of a result."""
    result = evaluate(Communicator(), 1)
    flat = flat_metrics(result)
    assert len(flat) == 7 * 20 + 4
    for name in flat:
        assert EvalConfig(metric=name).metric == name
        assert metric_value(result, name) == flat[name]
    assert metric_value(result, "ndcg@20") == result["overall"]["ndcg@20"]
    assert metric_value(result, "strata/tail/mrr@5") == 0.5
    for name in ("users", "overall/ndcg@20", "strata/ndcg@20", "head/ndcg@20", "coverage@10", "personal_gain/mrr@20"):
        assert name not in flat
        with pytest.raises(ValidationError, match=r"strata/tail/.*coverage@20"):
            EvalConfig(metric=name)


def test_weights_are_tuned_for_the_positives_of_the_metric():
    groups = positive_groups(world(Communicator())[2], most_frequent(np.array([0, 0, 0, 0, 1, 0]), 1))
    warm = np.array([1, 1, 1, 1, 1, 0], bool)

    def positives(metric: str, counted: np.ndarray | None = None) -> tuple[str, list[int] | None]:
        name, mask = tuning_positives(metric, groups, counted)
        return name, None if mask is None else np.flatnonzero(mask).tolist()

    assert positives("recall@20") == ("recall@20", None)
    assert positives("recall@20", warm) == ("recall@20", [0, 1, 2, 3, 4])
    assert positives("head_free/ndcg@20") == ("ndcg@20", [0, 1, 2, 3, 5])
    assert positives("head_free/ndcg@20", warm) == ("ndcg@20", [0, 1, 2, 3])
    assert positives("strata/tail/recall@5") == ("recall@5", [3, 4])
    assert positives("cold/recall@20") == ("recall@20", [5])
    assert positives("cold/recall@20", warm) == ("recall@20", [0, 1, 2, 3, 4])  # protects warm items as ever
    assert positives("personal_gain/recall@20") == ("recall@20", None)
    assert positives("coverage@20") == ("ndcg@20", None)


def test_the_mean_list_is_long_enough_for_a_user_with_many_items():
    """A user who has the first 60 of 120 items in train gets the next 50 of the list for everyone."""
    comm, users, items = Communicator(), 2, 120
    tables = [ShardedTable("x", rows, 1, comm, trainable=False) for rows in (users, items)]
    tables[0].weight.fill_(1)
    tables[1].weight[:, 0] = torch.arange(items, 0, -1)
    user, item = np.concatenate([np.zeros(60, int), [1]]), np.concatenate([np.arange(60), [5]])
    graphs = Graphs(users, items, both_directions(by_destination(user, item, 2), by_destination(item, user, items)))
    truth = by_destination(np.array([0, 0, 1]), np.array([109, 110, 50]), 2)
    result = ranking.evaluate_split(*tables, graphs, truth)
    assert result["mean_list"]["recall@50"] == (0.5 + 1.0) / 2  # the lists end with items 109 and 50
    assert result["mean_list"] == result["overall"]


def test_results_of_older_runs_have_no_such_lines():
    result = evaluate(Communicator(), 1)
    assert len(personalisation_lines(result)) == 2
    assert personalisation_lines({"users": 3, "overall": result["overall"], "cold_users": 0, "cold": {}}) == []


def test_groups_are_disjoint_where_they_should_be():
    graphs = world(Communicator())[2]
    groups = positive_groups(graphs, np.zeros(ITEMS, bool))
    parts = [groups["cold"], *(groups[f"strata/{name}"] for name in STRATA)]
    assert np.array_equal(sum(part.astype(int) for part in parts), np.ones(ITEMS, int))
