"""The untrained scorers against dense matrices."""

import numpy as np
import pytest
import torch
from small import small_catalog

from gtc_dist.distributed.collectives import Communicator
from gtc_dist.distributed.sharded_table import ShardedTable
from gtc_dist.graph.csc import Graphs, both_directions
from gtc_dist.graph.user_item_graph import build_user_item_graph
from gtc_dist.hybrid import embeddings
from gtc_dist.hybrid.content_profile import content_profile_scores
from gtc_dist.hybrid.embeddings import Embeddings
from gtc_dist.hybrid.graph_filter import CooccurrenceOperator, graph_filter_scores
from gtc_dist.hybrid.score_fusion import MEMBERS, NEIGHBOR_SMOOTHING, NORM_DAMPING, ScoreFusion
from gtc_dist.model.build import load_features

USER_EXPONENT, ITEM_EXPONENT = 0.6, 0.3


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    return small_catalog(tmp_path_factory.mktemp("catalog") / "c")


def operator_of(graphs: Graphs) -> CooccurrenceOperator:
    return CooccurrenceOperator(graphs, Communicator(), 7, USER_EXPONENT, ITEM_EXPONENT)


def dense(catalog, weight=1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """N [users, items], C [items, items] and degree^-ITEM_EXPONENT [items]."""
    users, items = catalog.interactions("train")
    R = np.zeros((catalog.users, catalog.items))
    R[users, items] = weight
    of_user, of_item = (np.where(d > 0, d, 1) ** -p for d, p in ((R.sum(1), USER_EXPONENT), (R.sum(0), ITEM_EXPONENT)))
    N = of_user[:, None] * R * of_item
    C = N.T @ N
    np.fill_diagonal(C, 0)
    return N, C, of_item


def test_operator_is_dense_cooccurrence_without_its_diagonal(catalog):
    operator = operator_of(Graphs.load(catalog))
    N, C, _ = dense(catalog)
    x = torch.randn(catalog.items, 40, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(operator.to_users(x), torch.from_numpy(N).float() @ x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(operator(x), torch.from_numpy(C).float() @ x, rtol=1e-4, atol=1e-5)


def test_graph_filter_scores_are_those_of_the_leading_eigenpairs(catalog):
    users, items = graph_filter_scores(operator_of(Graphs.load(catalog)), 3, seed=1)
    N, C, of_item = dense(catalog)
    values, Q = np.linalg.eigh(C)
    values, Q = values[::-1][:3] / values.max(), Q[:, ::-1][:, :3]
    want = N @ Q @ np.diag(values**2 + 3 * values**3) @ Q.T * of_item
    got = users.weight @ items.weight.T
    torch.testing.assert_close(got, torch.from_numpy(want).float(), rtol=1e-3, atol=1e-4 * float(np.abs(want).max()))
    assert (items.weight[-3:] == 0).all()  # no train interaction


def test_operator_and_scores_with_recency_weights_are_dense_ones(tmp_path):
    weight = np.exp2(-12 * np.random.default_rng(1).random(1000)).astype(np.float32)
    catalog = small_catalog(tmp_path / "c", weight=weight)
    operator = operator_of(Graphs.load(catalog))
    N, C, of_item = dense(catalog, weight[: catalog.manifest.interactions["train"]])
    x = torch.randn(catalog.items, 40, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(operator.to_users(x), torch.from_numpy(N).float() @ x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(operator(x), torch.from_numpy(C).float() @ x, rtol=1e-4, atol=1e-5)
    users, items = graph_filter_scores(operator, 3, seed=1)
    values, Q = np.linalg.eigh(C)
    values, Q = values[::-1][:3] / values.max(), Q[:, ::-1][:, :3]
    want = N @ Q @ np.diag(values**2 + 3 * values**3) @ Q.T * of_item
    got = users.weight @ items.weight.T
    torch.testing.assert_close(got, torch.from_numpy(want).float(), rtol=1e-3, atol=1e-3 * float(np.abs(want).max()))


def test_more_modes_than_the_graph_has(catalog):
    _, items = graph_filter_scores(operator_of(Graphs.load(catalog)), 64, seed=1)
    values = np.linalg.eigvalsh(dense(catalog)[1])
    assert items.width == (values > 1e-6 * values.max()).sum()


def test_without_two_items_of_one_user_there_is_no_mode():
    graphs = Graphs(3, 3, both_directions(*build_user_item_graph(np.arange(3), np.arange(3), 3, 3)))
    users, items = graph_filter_scores(operator_of(graphs), 4, seed=0)
    assert users.weight.shape == items.weight.shape == (3, 0)


@pytest.mark.parametrize("width", [100, 3])
def test_profile_is_the_content_of_a_users_items_and_of_those_near_them(catalog, width, monkeypatch):
    monkeypatch.setattr(embeddings, "BLOCK_VALUES", 30)  # a few rows at once
    features = load_features(catalog.modalities(), catalog, Communicator())["m0"]
    users, items = content_profile_scores(operator_of(Graphs.load(catalog)), features, width)
    raw = features.weight.double().numpy()
    V = raw - raw.mean(0)
    V /= np.linalg.norm(V, axis=1, keepdims=True)
    if width == 3:
        V = V @ np.linalg.svd(V, full_matrices=False)[2][:3].T
    N, C, _ = dense(catalog)
    one_hop, two_hop = (P @ V @ V.T for P in (N, N @ C))
    want = one_hop / one_hop.std(1, keepdims=True) + two_hop / two_hop.std(1, keepdims=True)
    torch.testing.assert_close(users.weight @ items.weight.T, torch.from_numpy(want).float(), rtol=1e-3, atol=1e-3)


def test_users_are_smoothed_over_neighbours(catalog):
    """Own and smoothed scores, both z-scored, as runs before 0.4.0 have them; cold items are not imputed."""
    graphs, comm = Graphs.load(catalog), Communicator()
    operator = operator_of(graphs)
    users = ShardedTable("u", catalog.users, 4, comm, init_std=1.0, trainable=False)
    items = ShardedTable("i", catalog.items, 4, comm, init_std=1.0, trainable=False)
    fusion = ScoreFusion({"spectral": graph_filter_scores(operator, 3, 0)}, [], None, graphs, comm, operator)
    fusion.weights |= {MEMBERS: 1.0, NORM_DAMPING: 0.0, NEIGHBOR_SMOOTHING: 0.5, "spectral": 0.0}
    joined = fusion.fuse(Embeddings(users, items))
    N, C, _ = dense(catalog)
    warm = graphs.item_degree > 0
    V = items.weight.double().numpy()
    own, smoothed = users.weight.double().numpy() @ V.T, N @ C @ (V - V[warm].mean(0)) @ V.T
    want = own / own.std(1, keepdims=True) + 0.5 * smoothed / smoothed.std(1, keepdims=True)
    want /= want.std(1, keepdims=True)
    torch.testing.assert_close(
        joined[0].weight @ joined[1].weight.T, torch.from_numpy(want).float(), rtol=1e-3, atol=1e-3
    )
