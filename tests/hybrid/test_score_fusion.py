"""Score fusion: weights that are fitted, and embeddings whose dot product is the weighted sum."""

import numpy as np
import pytest
import torch
from ranks import run_ranks
from small import small_catalog, small_config

from gtc_dist.data.catalog import Catalog
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.distributed.sharded_table import ShardedTable
from gtc_dist.evaluation.ranking import RankingOptions, load_ground_truth
from gtc_dist.evaluation.shortlist import Shortlist
from gtc_dist.graph.csc import Graphs
from gtc_dist.hybrid.conditional_logit import Candidates, model_scores, weight_names
from gtc_dist.hybrid.embeddings import Embeddings, unit_variance
from gtc_dist.hybrid.score_fusion import MASKED, MEMBERS, NEIGHBOR_SMOOTHING, NORM_DAMPING, ScoreFusion
from gtc_dist.hybrid.scorer import build_score_fusion
from gtc_dist.hybrid.warm_neighbours import WarmNeighbours
from gtc_dist.model.build import load_features


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    return small_catalog(tmp_path_factory.mktemp("catalog") / "c")


def scores(comm: Communicator, uri: str, config) -> dict:
    catalog = Catalog(uri)
    features = load_features(catalog.modalities(), catalog, comm)
    graphs = Graphs.load(catalog)
    fusion = build_score_fusion(config, graphs, features, comm, WarmNeighbours(graphs, comm, 9))
    members = Embeddings(
        *(ShardedTable(n, r, 4, comm, init_std=1.0) for n, r in (("u", catalog.users), ("i", catalog.items)))
    )
    fusion.weights |= {MEMBERS: 0.5, NORM_DAMPING: 0.75, NEIGHBOR_SMOOTHING: 2.0, "m1": 0.0}
    users, items = fusion.fuse(members)
    return {"users": users.weight, "items": items.weight, "scorers": list(fusion.scorers)}


def test_ranks_make_the_same_scores(catalog):
    config = small_config(
        catalog.uri, model={"hybrid": {"graph_filter": 3, "content_profile": 4}}, eval={"block_rows": 9}
    )
    alone = run_ranks(scores, 1, catalog.uri, config)[0]
    together = run_ranks(scores, 3, catalog.uri, config)
    users, items = (torch.cat([part[kind] for part in together]) for kind in ("users", "items"))
    assert alone["scorers"] == ["spectral", "m0", "m1"]
    assert users.shape[1] == 4 + 3 + 4
    torch.testing.assert_close(users @ items.T, alone["users"] @ alone["items"].T, rtol=1e-3, atol=1e-3)


def pair(users: list, items: list) -> Embeddings:
    tables = []
    for name, rows in (("u", users), ("i", items)):
        table = ShardedTable(name, len(rows), len(rows[0]), Communicator(), trainable=False)
        table.weight = torch.tensor(rows)
        tables.append(table)
    return Embeddings(*tables)


def test_scores_are_standardised_per_user():
    part = pair([[2.0, 1.0], [0.0, 0.0]], [[1.0, 0.0], [3.0, 5.0], [-2.0, 1.0]])
    users, items = unit_variance(part)
    score = part[0].weight @ part[1].weight.T
    torch.testing.assert_close((users.weight @ items.weight.T)[0], score[0] / score[0].std(correction=0))
    assert (users.weight[1] == 0).all()  # all items have the same score


def dense_scores(fusion: ScoreFusion, scorers: dict[str, Embeddings], graphs: Graphs) -> torch.Tensor:
    """All users' scores of all items, by the formula of `conditional_logit.py`."""
    users, items = graphs.users, graphs.items

    def centred(values: np.ndarray, degree: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.where(degree > 0, values - values[degree > 0].mean(), 0)).float()

    popularity = centred(np.log1p(graphs.item_degree), graphs.item_degree)
    bought = [graphs.nodes.indices[slice(*graphs.nodes.indptr[u : u + 2])] - users for u in range(users)]
    taste = np.array([popularity[torch.from_numpy(each).long()].mean() if len(each) else 0 for each in bought])
    activity = centred(np.log1p(graphs.user_degree), graphs.user_degree)
    features = torch.stack([torch.ones(users), activity, centred(taste, graphs.user_degree)], dim=1)
    every = torch.ones(users, items, dtype=torch.bool)
    scores = {name: each.users.weight @ each.items.weight.T for name, each in scorers.items()}
    warm = torch.from_numpy(graphs.user_degree > 0)
    means = {name: each[warm].mean(0).expand(users, -1) for name, each in scores.items()}
    made = Candidates(scores, means, features, popularity.expand(users, -1), every, every)
    return model_scores(made, torch.tensor([fusion.weights[name] for name in weight_names(list(scorers))]))[0]


def fusion_of(catalog: Catalog, comm: Communicator) -> tuple[ScoreFusion, Embeddings, Embeddings, Graphs]:
    """Untrained scorers, and random embeddings in place of the trained ones."""
    model = {"masked_members": 2, "hybrid": {"graph_filter": 3, "content_profile": 4}}
    config = small_config(catalog.uri, model=model, eval={"block_rows": 9})
    graphs, features = Graphs.load(catalog), load_features(catalog.modalities(), catalog, comm)
    fusion = build_score_fusion(config, graphs, features, comm, WarmNeighbours(graphs, comm, 9))
    tables = [
        ShardedTable(f"{name}{kind}", getattr(catalog, kind), 4, comm, init_std=1.0, trainable=False)
        for name in ("network", "masked")
        for kind in ("users", "items")
    ]
    return fusion, Embeddings(*tables[:2]), Embeddings(*tables[2:]), graphs


def test_the_dot_product_is_the_model_but_for_a_constant_of_each_user(catalog):
    fusion, network, masked, graphs = fusion_of(catalog, Communicator())
    rng = np.random.default_rng(0)
    scorers = fusion._trained(network, masked) | fusion.scorers
    assert list(scorers) == [MEMBERS, MASKED, "spectral", "m0", "m1"]
    fusion.weights |= {name: 0.3 * float(rng.normal()) for name in weight_names(list(scorers))}
    users, items = fusion.fuse(network, masked)
    found, expected = users.weight @ items.weight.T, dense_scores(fusion, scorers, graphs)
    torch.testing.assert_close(
        found - found.mean(1, keepdim=True), expected - expected.mean(1, keepdim=True), rtol=1e-4, atol=1e-4
    )
    warm, columns = torch.from_numpy(graphs.item_degree > 0), fusion.special_columns(items.width).profiles
    others = torch.ones(items.width, dtype=torch.bool)
    for name, at in columns.items():
        torch.testing.assert_close(items.weight[~warm, at], fusion.scorers[name].items.weight[~warm])
        others[at] = False
    torch.testing.assert_close(items.weight[warm][:, others].mean(0), torch.zeros(int(others.sum())), atol=1e-5, rtol=0)


@pytest.mark.parametrize("unused", [(), (MEMBERS, "m0"), (MASKED,)])
def test_column_groups_hold_the_scores_of_their_scorers(catalog, unused):
    """The reference of each: a fusion in which the others have no weight."""
    fusion, network, masked, _ = fusion_of(catalog, Communicator())
    rng = np.random.default_rng(0)
    names = [MEMBERS, MASKED, *fusion.scorers]
    drawn = {
        name: 0.3 * float(rng.normal()) * (not name.startswith(unused or "-")) for name in sorted(weight_names(names))
    }
    fusion.weights |= drawn
    users, items = fusion.fuse(network, masked)
    groups = fusion.column_groups(items.width, network.items.width)
    assert list(groups) == ["popularity", *(name for name in names if name not in unused)]
    at = 0
    for name, columns in groups.items():
        assert columns.start == at < columns.stop
        at = columns.stop
        fusion.weights |= dict.fromkeys(drawn, 0.0)
        part = [name] if name in names else ["popularity"]
        fusion.weights |= {weight: drawn[weight] for weight in drawn if weight.startswith(tuple(part))}
        own_users, own_items = fusion.fuse(network, masked)
        found = users.weight[:, columns] @ items.weight[:, columns].T
        torch.testing.assert_close(found, own_users.weight @ own_items.weight.T)
    assert at == items.width


def tuned(comm: Communicator, uri: str) -> dict:
    catalog = Catalog(uri)
    fusion, network, masked, graphs = fusion_of(catalog, comm)
    truth = load_ground_truth(catalog, "valid", network.users.start, network.users.stop)

    def shortlist(scorers: dict[str, Embeddings]) -> Shortlist:
        return Shortlist.of(scorers, graphs, truth, RankingOptions(item_block=11, user_block=20))

    fusion.tune_untrained(shortlist)
    untrained = dict(fusion.weights)
    fusion.tune(network, shortlist, masked)
    users, items = fusion.fuse(network, masked)
    return {"untrained": untrained, "all": fusion.weights, "users": users.weight, "items": items.weight}


def test_ranks_tune_the_same_weights(catalog):
    alone, together = run_ranks(tuned, 1, catalog.uri)[0], run_ranks(tuned, 3, catalog.uri)
    for kind in ("untrained", "all"):
        assert together[0][kind] == together[1][kind]
        assert together[0][kind] == pytest.approx(alone[kind], abs=2e-2)  # directions of the graph filter differ
    assert alone["untrained"]["spectral"] != alone["all"]["spectral"]
    users, items = (torch.cat([part[kind] for part in together]) for kind in ("users", "items"))
    torch.testing.assert_close(users @ items.T, alone["users"] @ alone["items"].T, rtol=0.05, atol=0.05)


def test_scorers_that_know_the_taste_get_weight_and_random_ones_none(tmp_path):
    catalog = small_catalog(tmp_path / "c", users=400, items=60)
    found = tuned(Communicator(), catalog.uri)["all"]
    assert min(found["m0"], found["m1"]) > 0.2
    assert max(abs(found[MEMBERS]), abs(found[MASKED])) < 0.15
