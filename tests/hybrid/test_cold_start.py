"""Cold items: what content says of them, against dense algebra and over ranks, and how their weights are chosen."""

import numpy as np
import pytest
import torch
from ranks import run_ranks
from small import small_catalog, small_config

from gtc_dist.data.catalog import CSC, Catalog
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.distributed.sharded_table import ShardedTable
from gtc_dist.graph.csc import Graphs, by_destination
from gtc_dist.hybrid import content_regression
from gtc_dist.hybrid.cold_start import (
    CONTENT_WEIGHT,
    NORM_SCALE,
    NORM_SCALE_STEPS,
    REGRESSION,
    ColdStart,
    WarmNeighbours,
    warm_neighbours,
)
from gtc_dist.hybrid.content_regression import FOLDS, ContentRegression, numbered
from gtc_dist.hybrid.score_fusion import MEMBERS, ScoreFusion
from gtc_dist.hybrid.scorer import HybridScorer
from gtc_dist.model.build import load_features, network_shape


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    return small_catalog(tmp_path_factory.mktemp("catalog") / "c", users=80, items=90, cold=9)


def loaded(catalog: Catalog, comm: Communicator) -> tuple[Graphs, dict[str, ShardedTable]]:
    return Graphs.load(catalog), load_features(network_shape(small_config(catalog.uri), catalog), catalog, comm)


def cold_items(catalog: Catalog, comm: Communicator) -> ColdStart:
    graphs, features = loaded(catalog, comm)
    return ColdStart.of(graphs, features, comm, 7, WarmNeighbours(graphs, comm, 7))


def table(catalog: Catalog, comm: Communicator, kind: str = "items", width: int = 4) -> ShardedTable:
    return ShardedTable(kind, getattr(catalog, kind), width, comm, init_std=1.0, trainable=False)


# --- what content says ---


@pytest.mark.parametrize("directions", [256, 4])
def test_regression_tells_an_item_by_all_warm_ones_but_its_fold(catalog, monkeypatch, directions):
    monkeypatch.setattr(content_regression, "DIRECTIONS", directions)
    graphs, features = loaded(catalog, Communicator())
    features["m1"].weight[5] = 0  # an item without this content
    warm = graphs.item_degree > 0
    items = table(catalog, Communicator())
    told = ContentRegression(features, warm, 7)
    rows = told.told(told.fit(items))

    parts = []
    for feature in features.values():
        raw = feature.weight.double().numpy()
        unit = raw - raw[warm].mean(0)
        unit /= np.linalg.norm(unit, axis=1, keepdims=True)
        if directions < unit.shape[1]:
            unit = unit @ np.linalg.svd(unit[warm], full_matrices=False)[2][:directions].T
        unit[(raw == 0).all(1)] = 0
        parts.append(unit)
    X, Y = np.hstack([*parts, np.ones((len(warm), 1))]), items.weight.double().numpy()
    penalty = (X[warm, :-1] ** 2).sum() / (X.shape[1] - 1) * np.eye(X.shape[1])
    fold = numbered(0, len(warm), FOLDS)
    assert set(fold) == set(range(FOLDS))
    for item in range(len(warm)):
        known = warm & ((fold != fold[item]) | ~warm[item])
        A, B = X[known], Y[known]
        want = X[item] @ np.linalg.solve(A.T @ A + penalty, A.T @ B)
        np.testing.assert_allclose(rows[item], want, rtol=1e-4, atol=1e-5)


def test_regression_is_fitted_to_so_many_items_at_most(catalog, monkeypatch):
    graphs, features = loaded(catalog, Communicator())
    warm = graphs.item_degree > 0
    monkeypatch.setattr(content_regression, "MOST_ITEMS", 40)
    told = ContentRegression(features, warm, 7)
    assert 20 < len(told.fitted) < 60
    items = table(catalog, Communicator())
    rows = told.told(told.fit(items))
    others = np.setdiff1d(np.flatnonzero(warm), told.fitted.numpy())
    items.weight[others] = 100.0
    assert torch.equal(told.told(told.fit(items)), rows)


def told_by_ranks(comm: Communicator, uri: str) -> dict:
    catalog = Catalog(uri)
    cold = cold_items(catalog, comm)
    pair = table(catalog, comm, "users"), table(catalog, comm)
    profiles = {"m0": slice(2, 4)}
    cold.weights |= {REGRESSION: 1.0, CONTENT_WEIGHT: 2.0, NORM_SCALE: 1.1}
    out = {"regression": cold.filled(pair, profiles)[1].weight}
    cold.weights |= {REGRESSION: 0.0}
    return out | {"neighbours": cold.filled(pair, profiles)[1].weight}


def test_ranks_tell_the_same(catalog):
    alone = run_ranks(told_by_ranks, 1, catalog.uri)[0]
    together = run_ranks(told_by_ranks, 3, catalog.uri)
    warm = Graphs.load(catalog).item_degree > 0
    rows = table(catalog, Communicator()).weight
    for form, want in alone.items():
        torch.testing.assert_close(torch.cat([part[form] for part in together]), want, rtol=1e-4, atol=1e-5)
        assert torch.equal(want[warm], rows[warm])
        torch.testing.assert_close(want[~warm, 2:], 2.2 * rows[~warm, 2:])
        assert not torch.allclose(want[~warm, :2], rows[~warm, :2])


def test_cold_items_have_what_their_warm_neighbours_have(catalog):
    graphs = Graphs.load(catalog)
    items = table(catalog, Communicator())
    filled = WarmNeighbours(graphs, Communicator(), 7).filled(items).weight
    warm = graphs.item_degree > 0
    assert not warm.all()
    assert torch.equal(filled[warm], items.weight[warm])
    hop = graphs.item_item
    for item in np.flatnonzero(~warm):
        edges = slice(hop.indptr[item], hop.indptr[item + 1])
        near = hop.indices[edges]
        weight = hop.weight[edges] * warm[near]
        want = (torch.from_numpy(weight / weight.sum())[:, None] * items.weight[near]).sum(0)
        torch.testing.assert_close(filled[item], want)


def test_neighbours_that_are_not_similar_do_not_count():
    graph = by_destination(np.array([0, 0, 0, 1, 1, 1]), np.array([1, 2, 3, 0, 2, 3]), 4)
    graph = CSC(graph.indptr, graph.indices, np.array([0, 0, 0, 0.5, 0, 0.5], np.float32))  # into 0, then into 1
    warm = np.array([False, False, True, True])
    for start, stop in ((0, 4), (1, 4), (0, 1), (2, 4)):
        near = warm_neighbours(graph, warm, np.ones(stop - start, bool), start)
        assert near.indptr.tolist() == [min(2 * n, 2 * max(2 - start, 0)) for n in range(stop - start + 1)]
        assert near.indices.tolist() == [2, 3] * (len(near.indices) // 2)
        assert near.weight.tolist() == [0, 0, 0, 1][2 * start : 2 * max(min(stop, 2), start)]
    assert warm_neighbours(graph, warm, np.array([False, True, True, True])).indptr.tolist() == [0, 0, 2, 2, 2]


# --- how it is chosen ---


def nearness(wanted: torch.Tensor):
    """Worth that only the directions of the items' rows decide."""
    return lambda pair, counted: 1 + float(torch.cosine_similarity(pair[1].weight, wanted, dim=1).mean())


def test_the_form_that_tells_warm_items_best_is_chosen(catalog):
    cold = cold_items(catalog, Communicator())
    users, items = table(catalog, Communicator(), "users"), table(catalog, Communicator())
    by_map = cold.regression.told(cold.regression.fit(items))
    by_near = cold.neighbours.of_all(items)
    for wanted, form in ((by_map, 1.0), (by_near, 0.0), (by_map, 1.0)):
        cold.choose((users, items), {}, nearness(wanted))
        assert cold.weights[REGRESSION] == form
        assert cold.weights[CONTENT_WEIGHT] == 1  # there is no profile
    profiles = {"m0": slice(2, 4)}
    wanted = torch.cat([by_near[:, :2], 4 * items.weight[:, 2:]], dim=1)
    cold.choose((users, items), profiles, nearness(wanted))
    assert (cold.weights[REGRESSION], cold.weights[CONTENT_WEIGHT]) == (0.0, 4.0)


def test_cold_rows_are_as_long_as_costs_little(catalog):
    """Worth falls with the length of the rows of cold items and of those that stand for more; only others count."""
    cold = cold_items(catalog, Communicator())
    users, items = table(catalog, Communicator(), "users"), table(catalog, Communicator())
    by_near, by_map = cold.neighbours.of_all(items), cold.regression.told(cold.regression.fit(items))
    lacking = cold.lacking
    assert (cold.cold <= lacking).all()

    def worth(each):
        def value(pair, counted):
            if counted is None:
                return 1.0
            assert np.array_equal(counted, ~lacking)
            told = {0.0: by_near, 1.0: by_map}[cold.weights[REGRESSION]][lacking]
            return 1 - each * float(pair[1].weight[lacking].norm() / told.norm())

        return value

    for each, lift in ((0.0071, 1.331), (0.012, 0.826), (0.0099, 1.0), (0.0, NORM_SCALE_STEPS[-1]), (5.0, 0.0)):
        cold.choose((users, items), {}, worth(each))
        assert cold.weights[NORM_SCALE] == lift
    filled = cold.filled((users, items), {})[1].weight
    assert (filled[cold.cold] == 0).all()
    cold.choose((users, items), {}, lambda pair, counted: 0.0)  # nothing is found: nothing to choose by
    assert cold.weights[NORM_SCALE] == 0
    assert torch.equal(filled[~cold.cold], items.weight[~cold.cold])


def test_a_run_of_before_lengths_goes_on_with_what_it_has(catalog):
    users, items = table(catalog, Communicator(), "users"), table(catalog, Communicator())
    blend = ScoreFusion({"m0": (users, items)}, ["m0"], None)
    final = HybridScorer(blend, cold_items(catalog, Communicator()))
    final.load({"network": {}, "blend": {MEMBERS: 2.0, "cold": 3.5}})
    assert final.state()["cold"] == {REGRESSION: 0.0, CONTENT_WEIGHT: 3.5, NORM_SCALE: 1.0}
    pair = final((users, items))
    profile = pair[1].weight[final.cold.cold, 4:]
    torch.testing.assert_close(profile, 3.5 * items.weight[final.cold.cold])
    final.choose_cold(blend.joined((users, items)), lambda pair, counted: 1.0)  # nothing is better
    assert final.cold.weights[CONTENT_WEIGHT] == 3.5


@pytest.mark.parametrize(("few", "more"), [(0, 100), (40, 60), (200, 0)])
def test_warm_items_stand_for_as_many_cold_ones_as_are_missing(few, more):
    cold = np.arange(1000) < few
    stands = ColdStart(cold, None, None, 0.01).lacking
    assert stands[:few].all()
    assert stands[few:].sum() == pytest.approx(more, abs=25 if more else 0)


def test_without_an_item_graph_or_content_there_is_less_to_choose(catalog):
    graphs, features = loaded(catalog, Communicator())
    cold = ColdStart.of(graphs, features, Communicator(), 7, None)
    users, items = table(catalog, Communicator(), "users"), table(catalog, Communicator())
    cold.choose((users, items), {}, nearness(torch.randn(catalog.items, 4)))
    assert cold.weights[REGRESSION] == 1
    cold = ColdStart.of(graphs, {}, Communicator(), 7, WarmNeighbours(graphs, Communicator(), 7))
    cold.choose((users, items), {}, nearness(torch.randn(catalog.items, 4)))
    assert cold.weights[REGRESSION] == 0
    assert ColdStart.of(graphs, {}, Communicator(), 7, None) is None
