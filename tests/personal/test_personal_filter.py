"""Personal content scores: against a loop over pairs and over ranks, and re-ranking with them."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import rescore
import torch
import torch.nn.functional as F
from gtc_reference import dense, reference, setup
from ranks import run_ranks
from small import GATED, small_catalog, small_config
from steps import global_draws, loader_of, set_away_from_start, share
from trainings import fit

from gtc_dist import evaluate
from gtc_dist.checkpoint.existing_run import find_run
from gtc_dist.data import formats, storage
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.errors import InputError
from gtc_dist.graph.csc import load_graphs
from gtc_dist.inference.trained_run import TrainedRun, load_run
from gtc_dist.model import losses
from gtc_dist.model.build import build_network, load_features
from gtc_dist.model.variant import VARIANTS
from gtc_dist.personal import personal_filter
from gtc_dist.personal.personal_filter import PersonalFilter, reorder, rerank

USER = {"diffusion": {"condition": "user"}}


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    return small_catalog(tmp_path_factory.mktemp("c") / "c")


def run_of(comm: Communicator, catalog, config) -> TrainedRun:
    """A run as it is before training, but with random dense weights."""
    network, tables = build_network(config, catalog, comm)
    set_away_from_start(network)
    features, graphs = load_features(network.modalities, catalog, comm), load_graphs(config, catalog)
    return TrainedRun("untrained", "none", 0, config, catalog, graphs, network, tables, features, None)


def scores_of(comm: Communicator, catalog, config, items: np.ndarray) -> torch.Tensor:
    run = run_of(comm, catalog, config)
    own = np.arange(run.tables.user.start, run.tables.user.stop)
    return torch.from_numpy(PersonalFilter(run).scores(own, items[own]))


def some_items(catalog) -> np.ndarray:
    return np.random.default_rng(0).integers(0, catalog.items, (catalog.users, 5))


@pytest.mark.parametrize("model", [{}, GATED], ids=["paper", "gated"])
def test_scores_by_a_loop_over_pairs(catalog, model):
    variant = replace(VARIANTS[model.get("variant", "paper")], sum_views=False)  # the reference then returns all views
    config, network, tables = setup(catalog, variant, model={**USER, **model})
    items = some_items(catalog)
    want = torch.zeros(items.shape)
    M, D, gated = network.n_members, network.dim, variant.gated_content
    views, _ = reference(network, tables, catalog, config)
    views = views.view(catalog.users, M, -1, D)
    audience = (dense(catalog.graph("user_item"), catalog.users) > 0).float()
    audience = audience / audience.sum(1, keepdim=True).clamp(min=1)
    features = {n: torch.from_numpy(catalog.features(n).astype(np.float32)) for n in network.modalities}
    for m, member in enumerate(network.members):
        rows = tables.user.weight[:, : network.user_widths[0]].view(catalog.users, M, -1, D)[:, m]
        for u in range(catalog.users):
            for n, i in enumerate(items[u]):
                ids = tables.item.weight[i, m * D : (m + 1) * D]
                cosines = []
                for s, name in enumerate(network.modalities, start=1):
                    x0 = F.rms_norm(member.project[s - 1](features[name][i]), (D,))
                    liked = audience[i] @ (rows[:, 0] if gated else F.normalize(rows[:, s], dim=1))
                    liked = F.rms_norm(liked, (D,)) if gated else liked * D**0.5
                    known = F.rms_norm(ids, (D,)) if audience[i].sum() else torch.zeros(D)
                    user = views[u, m, 1 if gated else s]
                    condition = torch.cat([known, liked, F.rms_norm(user, (D,))])
                    x = member.filters[s - 1](x0[None], condition[None])[0]
                    x = ids * torch.sigmoid(x) if gated else x
                    cosines.append(F.normalize(x, dim=0) @ F.normalize(user, dim=0))
                want[u, n] += member.personal_scale.detach() * sum(cosines).detach() / len(cosines) / M
    run = TrainedRun("r", "none", 0, config, catalog, load_graphs(config, catalog), network, tables, {}, None)
    run.features = load_features(network.modalities, catalog, Communicator())
    got = PersonalFilter(run).scores(np.arange(catalog.users), items)
    np.testing.assert_allclose(got, want.detach().numpy(), rtol=1e-3, atol=1e-4)


def test_scores_are_the_same_on_two_ranks(catalog):
    config = small_config(catalog.uri, model=USER)
    items = some_items(catalog)
    alone = scores_of(Communicator(), catalog, config, items)
    together = torch.cat(run_ranks(scores_of, 2, catalog, config, items))
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_ranks_without_users_take_part(catalog, monkeypatch):
    """A rank may have fewer blocks of users than another, and blocks without a user."""
    monkeypatch.setattr(personal_filter, "PAIRS", 20)
    run = run_of(Communicator(), catalog, small_config(catalog.uri, model=USER))
    items = some_items(catalog)
    whole = PersonalFilter(run).scores(np.arange(catalog.users), items)
    longer = PersonalFilter(run)
    with torch.no_grad():
        assert longer._score_rows(np.arange(0), items[:0]).shape == (0, items.shape[1])
    longer.users.comm.all_reduce_max = lambda value: value + 2  # as if another rank had two more blocks
    np.testing.assert_array_equal(longer.scores(np.arange(catalog.users), items), whole)


@pytest.mark.parametrize("negatives", [{"mode": "uniform", "count": 2}, {"mode": "in_batch"}])
def test_a_rank_without_pairs_has_no_personal_loss(catalog, negatives):
    config, network, tables = setup(catalog, model=USER, train={"negatives": negatives, "loss": "softmax"})
    empty = share(global_draws(config, catalog), 1, [24, 0])
    if negatives["mode"] == "in_batch":
        empty = replace(empty, negatives=empty.negatives[:0])
    batch = loader_of(config, catalog, Communicator(), network).assemble(empty, np.empty((0, 2), np.int64))
    rows = tables.user.lookup(batch.subgraph.user_lookup), tables.item.lookup(batch.subgraph.item_lookup)
    assert losses.personal_ranking_loss(network, network.embed(batch.subgraph, *rows), batch).shape == (0,)


@pytest.mark.parametrize("negatives", [{"mode": "uniform", "count": 2}, {"mode": "shared", "count": 7}])
def test_the_personal_loss_trains_the_filters_alone(catalog, negatives):
    config, network, tables = setup(catalog, model=USER, train={"negatives": negatives})
    batch = loader_of(config, catalog, Communicator(), network).assemble(global_draws(config, catalog))
    rows = tables.user.lookup(batch.subgraph.user_lookup), tables.item.lookup(batch.subgraph.item_lookup)
    e = network.embed(batch.subgraph, *rows)
    names = dict(network.named_parameters())
    loss = losses.personal_ranking_loss(network, e, batch)
    gradients = torch.autograd.grad(loss.sum(), list(names.values()), allow_unused=True)
    trained = {name for name, g in zip(names, gradients, strict=True) if g is not None and bool(g.abs().sum() > 0)}
    assert trained == {name for name in names if "denoiser" in name or "personal_scale" in name}
    users, items = network.join_views(e.users), network.join_views(e.items)
    member, encoded = network.members[0], e.encoded[0]
    for n, (u, positive) in enumerate(zip(batch.users, batch.positives, strict=True)):
        pool = batch.negatives[n] if batch.negatives.dim() == 2 else batch.negatives[batch.negative_mask[n]]
        hardest = pool[(items[pool] @ users[u]).argmax()]  # by dot product
        score = {}
        for item in (positive, hardest):
            constants = encoded.detached(batch.subgraph.items_in_inputs[item[None]])
            score[int(item)] = users[u] @ items[item] + member.personal_score(*constants, e.users[u[None]])[0]
        margin = score[int(positive)] - score[int(hardest)]
        assert float(loss[n].detach()) == pytest.approx(float(F.softplus(-margin).detach()), rel=1e-4)


def test_reordering():
    items = np.array([[4, 2, 7, 1], [5, 3, -1, -1]])
    dot = np.array([[4.0, 3.0, 2.0, 1.0], [1.0, 0.5, -np.inf, -np.inf]], np.float32)
    assert reorder(items, dot, np.zeros((2, 3), np.float32), 1.0).tolist() == items.tolist()
    personal = np.array([[0.0, 0.0, 9.0], [0.0, 1.0, 5.0]], np.float32)
    assert reorder(items, dot, personal, 0.0).tolist() == items.tolist()
    assert reorder(items, dot, personal, 5.0).tolist() == [[7, 4, 2, 1], [3, 5, -1, -1]]


def test_rerank_of_a_trained_run_on_one_and_two_ranks(catalog, tmp_path, capsys):
    config = small_config(catalog.uri, str(tmp_path), model={**USER, **GATED}, train={"epochs": 3})
    run = storage.join(str(tmp_path), "small")
    storage.write_bytes(storage.join(run, "config.yaml"), config.model_dump_json().encode())
    fit(Communicator(), run, config)
    capsys.readouterr()
    evaluate.main(["--run", run, "--rerank", "20"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["rerank"]["before"] == pytest.approx(shown["overall"])
    assert shown["rerank"]["depth"] == 20
    # the first 20 items stay the first 20
    assert shown["rerank"]["after"]["recall@20"] == pytest.approx(shown["overall"]["recall@20"])
    on_valid = rerank(load_run(find_run(run)), "valid", 20, None)
    metric = {name: (on_valid[name]["recall@20"] * on_valid[name]["ndcg@5"]) for name in ("before", "after")}
    assert metric["after"] >= metric["before"]
    two = run_ranks(reranked, 2, run)
    assert two[0] == two[1]
    assert two[0]["before"] == pytest.approx(shown["rerank"]["before"], abs=1e-6)


def reranked(comm: Communicator, run: str) -> dict:
    return rerank(load_run(find_run(run), comm), "test", 20, None)


def test_a_run_without_a_filter_for_users_is_refused(catalog):
    run = run_of(Communicator(), catalog, small_config(catalog.uri))
    with pytest.raises(InputError, match=r"condition=user"):
        PersonalFilter(run)


def test_candidates_are_rescored_under_their_original_ids(catalog, tmp_path):
    config = small_config(catalog.uri, str(tmp_path), model={**USER, **GATED})
    run = storage.join(str(tmp_path), "small")
    storage.write_bytes(storage.join(run, "config.yaml"), config.model_dump_json().encode())
    fit(Communicator(), run, config)
    users, items = catalog.ids("users"), catalog.ids("items")
    who, what = np.array([7, 3, 7, 0]), np.array([1, 39, 0, 5])
    pairs = pa.table({"item": items.take(pa.array(what)), "note": list("abcd"), "user": users.take(pa.array(who))})
    formats.write_table(f"{tmp_path}/pairs.parquet", pairs)
    command = ["--run", run, "--candidates", f"{tmp_path}/pairs.parquet", "--out", f"{tmp_path}/scored.parquet"]
    rescore.main(command)
    scored = formats.read_table(f"{tmp_path}/scored.parquet")
    assert scored.select(pairs.column_names).equals(pairs)
    loaded = load_run(find_run(run))
    of_users, of_items = (table.weight for table in loaded.final_embeddings())
    want = (of_users[who] * of_items[what]).sum(1)
    assert scored["dot"].to_pylist() == pytest.approx(want.tolist(), rel=1e-5)
    one_by_one = [float(PersonalFilter(loaded).scores(who[n : n + 1], what[None, n : n + 1])[0, 0]) for n in range(4)]
    assert scored["personal"].to_pylist() == pytest.approx(one_by_one, rel=1e-4)
    with pytest.raises(InputError, match=r"scored.parquet exists"):
        rescore.main(command)
    again = [*command[:3], f"{tmp_path}/scored.parquet", "--out", f"{tmp_path}/twice.parquet"]
    with pytest.raises(InputError, match=r"scored.parquet has a column 'dot' already"):
        rescore.main(again)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"user": ["u003"]}, "no column 'item'"),
        ({"user": ["u003", "u001"], "item": [1, 1]}, "ids are no items of .*, such as 1, 1 .row 1"),
        ({"user": ["nobody"], "item": [1]}, "ids are no users of .*, such as 'nobody' .row 1"),
        ({"user": ["u003"], "item": ["x"]}, "column 'item': the items of .* have int64 ids, not string"),
        ({"user": ["u003"], "item": [[1]]}, "column 'item': the items of .* have int64 ids, not list<"),
        ({"user": [None], "item": [1]}, "ids are no users of .*, such as None .row 1"),
    ],
)
def test_candidates_that_cannot_be_scored(catalog, columns, message):
    run = run_of(Communicator(), catalog, small_config(catalog.uri, model=USER))
    columns = {name: pa.array(values, None if name == "item" else pa.string()) for name, values in columns.items()}
    with pytest.raises(InputError, match=message):
        rescore.pair_indexes(run, pa.table(columns), "pairs.parquet")
