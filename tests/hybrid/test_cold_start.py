"""Cold-start items: predictions against dense algebra and over ranks, and the tuning of their weights."""

import numpy as np
import pytest
import torch
from ranks import run_ranks
from small import small_catalog

from gtc_dist.data.catalog import CSC, Catalog
from gtc_dist.data.hashing import index_bucket
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.distributed.sharded_table import ShardedTable
from gtc_dist.evaluation.shortlist import Shortlist
from gtc_dist.graph.csc import Graphs, by_destination
from gtc_dist.hybrid import content_regression, content_space
from gtc_dist.hybrid.cold_start import (
    BY_SCALE,
    CONTENT_WEIGHT,
    EXCLUDED,
    NEIGHBOURS,
    NORM_SCALE,
    OFFSET,
    REGRESSION,
    ColdStart,
    adjusted_rows,
)
from gtc_dist.hybrid.content_regression import FOLDS, ContentRegression
from gtc_dist.hybrid.embeddings import Embeddings, SpecialColumns, unit_variance
from gtc_dist.hybrid.score_fusion import MEMBERS, ScoreFusion
from gtc_dist.hybrid.scorer import HybridScorer
from gtc_dist.hybrid.warm_neighbours import WarmNeighbours, edges_from_warm
from gtc_dist.model.build import load_features


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    return small_catalog(tmp_path_factory.mktemp("catalog") / "c", users=80, items=90, cold=9)


def loaded(catalog: Catalog, comm: Communicator) -> tuple[Graphs, dict[str, ShardedTable]]:
    return Graphs.load(catalog), load_features(catalog.modalities(), catalog, comm)


def cold_items(catalog: Catalog, comm: Communicator) -> ColdStart:
    graphs, features = loaded(catalog, comm)
    return ColdStart.build(graphs, features, comm, 7, WarmNeighbours(graphs, comm, 7))


def table(catalog: Catalog, comm: Communicator, kind: str = "items", width: int = 4) -> ShardedTable:
    return ShardedTable(kind, getattr(catalog, kind), width, comm, init_std=1.0, trainable=False)


# --- predictions ---


@pytest.mark.parametrize("directions", [256, 4])
def test_regression_predicts_out_of_fold(catalog, monkeypatch, directions):
    monkeypatch.setattr(content_regression, "DIRECTIONS", directions)
    graphs, features = loaded(catalog, Communicator())
    features["m1"].weight[5] = 0  # an item without this content
    warm = graphs.item_degree > 0
    items = table(catalog, Communicator())
    regression = ContentRegression(features, warm, 7)
    rows = regression.predict(regression.fit(items))

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
    fold = index_bucket(0, len(warm), FOLDS)
    assert set(fold) == set(range(FOLDS))
    for item in range(len(warm)):
        known = warm & ((fold != fold[item]) | ~warm[item])
        A, B = X[known], Y[known]
        want = X[item] @ np.linalg.solve(A.T @ A + penalty, A.T @ B)
        np.testing.assert_allclose(rows[item], want, rtol=1e-4, atol=1e-5)


def test_regression_is_fitted_on_a_bounded_sample(catalog, monkeypatch):
    graphs, features = loaded(catalog, Communicator())
    warm = graphs.item_degree > 0
    monkeypatch.setattr(content_space, "MAX_FITTED_ITEMS", 40)
    regression = ContentRegression(features, warm, 7)
    assert 20 < len(regression.fitted) < 60
    items = table(catalog, Communicator())
    rows = regression.predict(regression.fit(items))
    others = np.setdiff1d(np.flatnonzero(warm), regression.fitted.numpy())
    items.weight[others] = 100.0
    assert torch.equal(regression.predict(regression.fit(items)), rows)


def predictions_of_rank(comm: Communicator, uri: str) -> dict:
    catalog = Catalog(uri)
    cold = cold_items(catalog, comm)
    pair = table(catalog, comm, "users"), table(catalog, comm)
    columns = SpecialColumns({"m0": slice(2, 4)}, {"m0": pair[1].weight[:, 2:]})
    cold.weights |= {REGRESSION: 1.0, NEIGHBOURS: 0.0, CONTENT_WEIGHT: 2.0, NORM_SCALE: 1.1}
    out = {"regression": cold.impute(pair, columns)[1].weight}
    cold.weights |= {REGRESSION: 0.3, NEIGHBOURS: 0.7}
    out["both"] = cold.impute(pair, columns)[1].weight
    cold.weights |= {REGRESSION: 0.0, NEIGHBOURS: 1.0}
    return out | {"neighbours": cold.impute(pair, columns)[1].weight}


def test_ranks_predict_the_same(catalog):
    alone = run_ranks(predictions_of_rank, 1, catalog.uri)[0]
    together = run_ranks(predictions_of_rank, 3, catalog.uri)
    warm = Graphs.load(catalog).item_degree > 0
    rows = table(catalog, Communicator()).weight
    for form, want in alone.items():
        torch.testing.assert_close(torch.cat([part[form] for part in together]), want, rtol=1e-4, atol=1e-5)
        assert torch.equal(want[warm], rows[warm])
        torch.testing.assert_close(want[~warm, 2:], 2.2 * rows[~warm, 2:])
        assert not torch.allclose(want[~warm, :2], rows[~warm, :2])
    mean = 0.3 * alone["regression"] + 0.7 * alone["neighbours"]
    torch.testing.assert_close(alone["both"][~warm], mean[~warm], rtol=1e-4, atol=1e-5)


def test_cold_items_get_the_mean_of_their_warm_neighbours(catalog):
    graphs = Graphs.load(catalog)
    items = table(catalog, Communicator())
    imputed = WarmNeighbours(graphs, Communicator(), 7).impute(items).weight
    warm = graphs.item_degree > 0
    assert not warm.all()
    assert torch.equal(imputed[warm], items.weight[warm])
    hop = graphs.item_item
    for item in np.flatnonzero(~warm):
        edges = slice(hop.indptr[item], hop.indptr[item + 1])
        near = hop.indices[edges]
        weight = hop.weight[edges] * warm[near]
        want = (torch.from_numpy(weight / weight.sum())[:, None] * items.weight[near]).sum(0)
        torch.testing.assert_close(imputed[item], want)


def test_neighbours_without_similarity_have_no_weight():
    graph = by_destination(np.array([0, 0, 0, 1, 1, 1]), np.array([1, 2, 3, 0, 2, 3]), 4)
    graph = CSC(graph.indptr, graph.indices, np.array([0, 0, 0, 0.5, 0, 0.5], np.float32))  # into 0, then into 1
    warm = np.array([False, False, True, True])
    for start, stop in ((0, 4), (1, 4), (0, 1), (2, 4)):
        near = edges_from_warm(graph, warm, np.ones(stop - start, bool), start)
        assert near.indptr.tolist() == [min(2 * n, 2 * max(2 - start, 0)) for n in range(stop - start + 1)]
        assert near.indices.tolist() == [2, 3] * (len(near.indices) // 2)
        assert near.weight.tolist() == [0, 0, 0, 1][2 * start : 2 * max(min(stop, 2), start)]
    assert edges_from_warm(graph, warm, np.array([False, True, True, True])).indptr.tolist() == [0, 0, 2, 2, 2]


# --- tuning ---


def taste(users: ShardedTable, wanted: torch.Tensor):
    """Shortlists of all items, where each user takes the items that score best with these item rows."""

    def shortlist(scorers: dict[str, Embeddings]) -> Shortlist:
        scores = {name: each.users.weight @ each.items.weight.T for name, each in scorers.items()}
        hit = torch.zeros(len(users.weight), len(wanted), dtype=torch.bool)
        hit.scatter_(1, (users.weight @ wanted.T).topk(5, dim=1).indices, True)
        every = torch.arange(len(wanted)).expand(len(hit), -1)
        return Shortlist(torch.arange(len(hit)), every, scores, hit)

    return shortlist


def indifferent(pair: Embeddings, predicted: ShardedTable, which: np.ndarray):
    """Objective that does not fall, however many cold items are listed."""
    return lambda factor, offset: 1.0


def test_weights_are_those_of_the_predictors_that_rank_like_the_users(catalog):
    cold = cold_items(catalog, Communicator())
    users, items = table(catalog, Communicator(), "users"), table(catalog, Communicator())
    by_regression = cold.regression.predict(cold.regression.fit(items))
    by_neighbours = cold.neighbours.of_all(items)
    by_regression /= by_regression.std()  # what users do does not depend on the norm
    for wanted, (better, worse) in (
        (by_regression, (REGRESSION, NEIGHBOURS)),
        (by_neighbours, (NEIGHBOURS, REGRESSION)),
        (by_regression, (REGRESSION, NEIGHBOURS)),
    ):
        cold.tune((users, items), SpecialColumns(), taste(users, wanted), indifferent)
        assert cold.weights[better] > 2 * abs(cold.weights[worse])
        assert cold.weights[CONTENT_WEIGHT] == 1  # there is no profile
    own = 3 * items.weight[:, 2:]  # not as they are in the fused rows of warm items
    columns = SpecialColumns({"m0": slice(2, 4)}, {"m0": own})
    cold.tune((users, items), columns, taste(users, torch.cat([by_neighbours[:, :2], own], dim=1)), indifferent)
    assert cold.weights[CONTENT_WEIGHT] > 0.3
    high = cold.weights[CONTENT_WEIGHT]
    cold.tune((users, items), columns, taste(users, torch.cat([by_neighbours[:, :2], 0 * own], dim=1)), indifferent)
    assert abs(cold.weights[CONTENT_WEIGHT]) < high / 3


def test_factor_and_offset_are_the_largest_within_the_allowed_loss(catalog):
    """The objective falls with the scores of cold items and of warm ones that simulate them; only others count."""
    cold = cold_items(catalog, Communicator())
    users, items = table(catalog, Communicator(), "users"), table(catalog, Communicator())
    by_neighbours, by_regression = cold.neighbours.of_all(items), cold.regression.predict(cold.regression.fit(items))
    simulated = cold.simulated_cold
    assert (cold.cold <= simulated).all()

    def objective(each):
        def of(pair, predicted, which):
            assert np.array_equal(which, simulated)
            assert pair[1] is items
            wanted = cold.weights[REGRESSION] * by_regression + cold.weights[NEIGHBOURS] * by_neighbours
            torch.testing.assert_close(predicted.weight, wanted)
            return lambda factor, offset: 1 - each * factor * np.exp(offset)

        return of

    def tuned(each, columns) -> tuple[float, float]:
        cold.tune((users, items), columns, taste(users, by_neighbours), objective(each))
        return cold.weights[NORM_SCALE], cold.weights[OFFSET]

    constant = SpecialColumns(constant=0)
    for each, offset in ((0.0071, 0.3), (0.012, -0.2), (0.0099, 0.0), (0.0, 20.0)):
        assert tuned(each, constant) == (1.0, offset)
    assert tuned(1e8, constant) == (0.0, 0.0)
    for each, scale in ((0.0071, 1.331), (0.012, 0.826), (0.0099, 1.0), (0.0, BY_SCALE[-1][0]), (5.0, 0.0)):
        assert tuned(each, SpecialColumns()) == (scale, 0.0)
    imputed = cold.impute((users, items), SpecialColumns())[1].weight
    assert (imputed[cold.cold] == 0).all()
    cold.tune(
        (users, items), SpecialColumns(), taste(users, by_neighbours), lambda *_: lambda factor, offset: 0.0
    )  # no warm item is found: no drop to measure
    assert cold.weights[NORM_SCALE] == 0
    assert torch.equal(imputed[~cold.cold], items.weight[~cold.cold])


def test_offset_and_exclusion_use_the_constant_column():
    rows = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    users = torch.cat([torch.ones(5, 1), torch.randn(5, 3, generator=torch.Generator().manual_seed(1))], dim=1)
    adjustment = {NORM_SCALE: 1.5, OFFSET: -0.7}
    torch.testing.assert_close(users @ adjusted_rows(rows, adjustment, 0).T, 1.5 * users @ rows.T - 0.7)
    assert (users @ adjusted_rows(rows, adjustment | {NORM_SCALE: 0.0}, 0).T < EXCLUDED / 10).all()
    assert torch.equal(adjusted_rows(rows, {NORM_SCALE: 1.5, OFFSET: 0.0}, None), 1.5 * rows)
    assert (adjusted_rows(rows, {NORM_SCALE: 0.0, OFFSET: 0.0}, None) == 0).all()


def test_weights_are_restored_from_a_checkpoint(catalog):
    users, items = table(catalog, Communicator(), "users"), table(catalog, Communicator())
    members = Embeddings(users, items)

    def fusion_of() -> ScoreFusion:
        return ScoreFusion({"m0": members}, ["m0"], None, Graphs.load(catalog), Communicator())

    saved = HybridScorer(
        ScoreFusion({"m0": members}, ["m0"], None, Graphs.load(catalog), Communicator()),
        cold_items(catalog, Communicator()),
    )
    saved.fusion.weights[MEMBERS] = 2.0
    saved.cold_start.weights |= {REGRESSION: 0.0, NEIGHBOURS: 0.8, CONTENT_WEIGHT: 3.5, OFFSET: -0.4}
    scorer = HybridScorer(
        ScoreFusion({"m0": members}, ["m0"], None, Graphs.load(catalog), Communicator()),
        cold_items(catalog, Communicator()),
    )
    scorer.load({"network": {}, **saved.state()})
    assert scorer.state() == saved.state()
    cold = scorer.cold_start.cold
    profile = scorer(members).items.weight[cold, 4:]
    torch.testing.assert_close(profile, 3.5 * unit_variance(members).items.weight[cold])


def test_runs_before_0_5_chose_one_predictor(catalog):
    cold = cold_items(catalog, Communicator())
    for regression in (0.0, 1.0):
        cold.load({REGRESSION: regression, CONTENT_WEIGHT: 2.0, NORM_SCALE: 1.1})
        assert cold.weights == {
            REGRESSION: regression,
            NEIGHBOURS: 1 - regression,
            CONTENT_WEIGHT: 2.0,
            NORM_SCALE: 1.1,
            OFFSET: 0.0,
        }


@pytest.mark.parametrize(("few", "more"), [(0, 100), (40, 60), (200, 0)])
def test_warm_items_simulate_the_cold_ones_that_are_missing(few, more):
    cold = np.arange(10_000) < few
    simulated = ColdStart(cold, None, None, 0.01).simulated_cold
    assert simulated[:few].all()
    assert simulated[few:].sum() == pytest.approx(more, abs=25 if more else 0)


@pytest.mark.parametrize(("items", "count"), [(500, 40), (60, 6)])
def test_a_small_catalog_simulates_several_cold_items_and_keeps_most_warm(items, count):
    simulated = ColdStart(np.zeros(items, bool), None, None, 0.01).simulated_cold
    assert simulated.sum() == pytest.approx(count, abs=15 if items == 500 else 5)
    assert simulated.sum() > 1


def test_without_an_item_graph_or_content_there_is_one_predictor_or_none(catalog):
    graphs, features = loaded(catalog, Communicator())
    cold = ColdStart.build(graphs, features, Communicator(), 7, None)
    users, items = table(catalog, Communicator(), "users"), table(catalog, Communicator())
    random = taste(users, torch.randn(catalog.items, 4))
    cold.tune((users, items), SpecialColumns(), random, indifferent)
    assert cold.weights[NEIGHBOURS] == 0 < abs(cold.weights[REGRESSION])
    cold = ColdStart.build(graphs, {}, Communicator(), 7, WarmNeighbours(graphs, Communicator(), 7))
    cold.tune((users, items), SpecialColumns(), random, indifferent)
    assert cold.weights[REGRESSION] == 0 < abs(cold.weights[NEIGHBOURS])
    assert ColdStart.build(graphs, {}, Communicator(), 7, None) is None
