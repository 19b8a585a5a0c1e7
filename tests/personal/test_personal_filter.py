"""Personal content scores: against a loop over pairs, over ranks, and what reranking does with them."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from small import GATED, small_catalog, small_config
from steps import global_draws, loader_of, set_away_from_start, share
from test_gtc import dense, reference, setup
from test_trainer import fit

from gtc_dist import evaluate
from gtc_dist.data import formats, storage
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.errors import InputError
from gtc_dist.inference.trained_run import TrainedRun, find_run, load_run
from gtc_dist.model.build import build_network, load_features, load_graphs
from gtc_dist.personal import personal_filter as personal_scores
from gtc_dist.personal.personal_filter import PersonalFilter, reordered, rerank

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import planted
import rescore

USER = {"diffusion": {"condition": "user"}}


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    return small_catalog(tmp_path_factory.mktemp("c") / "c")


def run_of(comm: Communicator, catalog, config) -> TrainedRun:
    """A run as it is before training, but with random dense weights."""
    network, tables = build_network(config, catalog, comm)
    set_away_from_start(network)
    features, graphs = load_features(network.shape, catalog, comm), load_graphs(config, catalog)
    return TrainedRun("untrained", "none", 0, config, catalog, graphs, network, tables, features, None)


def scores_of(comm: Communicator, catalog, config, items: np.ndarray) -> torch.Tensor:
    run = run_of(comm, catalog, config)
    own = np.arange(run.tables.user.start, run.tables.user.stop)
    return torch.from_numpy(PersonalFilter(run).scores(own, items[own]))


def some_items(catalog) -> np.ndarray:
    return np.random.default_rng(0).integers(0, catalog.items, (catalog.users, 5))


@pytest.mark.parametrize("model", [{}, GATED], ids=["vector", "gate"])
def test_scores_by_a_loop_over_pairs(catalog, model):
    config, network, tables = setup(catalog, model={**USER, **model})
    items = some_items(catalog)
    want = torch.zeros(items.shape)
    shape, M, D = network.shape, network.M, network.D
    gated = shape.content == "gate"
    unjoined = config.model_copy(update={"model": config.model.model_copy(update={"join": "concat"})})
    streams, _ = reference(network, tables, catalog, unjoined)
    streams = streams.view(catalog.users, M, -1, D)
    audience = (dense(catalog.graph("user_item"), catalog.users) > 0).float()
    audience = audience / audience.sum(1, keepdim=True).clamp(min=1)
    features = {n: torch.from_numpy(catalog.features(n).astype(np.float32)) for n in shape.modalities}
    for m, member in enumerate(network.members):
        rows = tables.user.weight[:, : network.user_widths[0]].view(catalog.users, M, -1, D)[:, m]
        for u in range(catalog.users):
            for n, i in enumerate(items[u]):
                ids = tables.item.weight[i, m * D : (m + 1) * D]
                cosines = []
                for s, name in enumerate(shape.modalities, start=1):
                    x0 = F.rms_norm(member.project[s - 1](features[name][i]), (D,))
                    liked = audience[i] @ (rows[:, 0] if gated else F.normalize(rows[:, s], dim=1))
                    liked = F.rms_norm(liked, (D,)) if gated else liked * D**0.5
                    known = F.rms_norm(ids, (D,)) if audience[i].sum() else torch.zeros(D)
                    user = streams[u, m, 1 if gated else s]
                    condition = torch.cat([known, liked, F.rms_norm(user, (D,))])
                    x = member.filters[s - 1](x0[None], condition[None])[0]
                    x = ids * torch.sigmoid(x) if gated else x
                    cosines.append(F.normalize(x, dim=0) @ F.normalize(user, dim=0))
                want[u, n] += member.personal_scale.detach() * sum(cosines).detach() / len(cosines) / M
    run = TrainedRun("r", "none", 0, config, catalog, load_graphs(config, catalog), network, tables, {}, None)
    run.features = load_features(shape, catalog, Communicator())
    got = PersonalFilter(run).scores(np.arange(catalog.users), items)
    np.testing.assert_allclose(got, want.detach().numpy(), rtol=1e-3, atol=1e-4)


def test_scores_are_alike_on_two_ranks(catalog):
    config = small_config(catalog.uri, model=USER)
    items = some_items(catalog)
    alone = scores_of(Communicator(), catalog, config, items)
    together = torch.cat(run_ranks(scores_of, 2, catalog, config, items))
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_ranks_without_users_take_part(catalog, monkeypatch):
    """A block at a time, of which one rank has more than another; and one without a user."""
    monkeypatch.setattr(personal_scores, "PAIRS", 20)
    run = run_of(Communicator(), catalog, small_config(catalog.uri, model=USER))
    items = some_items(catalog)
    whole = PersonalFilter(run).scores(np.arange(catalog.users), items)
    own = PersonalFilter(run)
    with torch.no_grad():
        assert own._block(np.arange(0), items[:0]).shape == (0, items.shape[1])
    own.users.comm.max = lambda value: value + 2  # blocks of a rank that has more
    np.testing.assert_array_equal(own.scores(np.arange(catalog.users), items), whole)


@pytest.mark.parametrize("negatives", [{"mode": "uniform", "count": 2}, {"mode": "in_batch"}])
def test_a_rank_without_pairs_has_no_personal_loss(catalog, negatives):
    config, network, tables = setup(catalog, model=USER, train={"negatives": negatives, "loss": "softmax"})
    empty = share(global_draws(config, catalog), 1, [24, 0])
    if negatives["mode"] == "in_batch":
        empty = replace(empty, negatives=empty.negatives[:0])
    batch = loader_of(config, catalog, Communicator(), network).assemble(empty, np.empty((0, 2), np.int64))
    rows = tables.user.lookup(batch.user_route), tables.item.lookup(batch.item_route)
    assert network._personal(network.embed(batch, *rows), batch).shape == (0,)


@pytest.mark.parametrize("negatives", [{"mode": "uniform", "count": 2}, {"mode": "shared", "count": 7}])
def test_the_personal_loss_trains_the_filters_alone(catalog, negatives):
    config, network, tables = setup(catalog, model=USER, train={"negatives": negatives})
    batch = loader_of(config, catalog, Communicator(), network).assemble(global_draws(config, catalog))
    rows = tables.user.lookup(batch.user_route), tables.item.lookup(batch.item_route)
    e = network.embed(batch, *rows)
    names = dict(network.named_parameters())
    loss = network._personal(e, batch)
    gradients = torch.autograd.grad(loss.sum(), list(names.values()), allow_unused=True)
    trained = {name for name, g in zip(names, gradients, strict=True) if g is not None and bool(g.abs().sum() > 0)}
    assert trained == {name for name in names if "denoiser" in name or "personal_scale" in name}
    users, items, member, way = network.joined(e["users"]), network.joined(e["items"]), network.members[0], e["ways"][0]
    for n, (u, positive) in enumerate(zip(batch.users, batch.positives, strict=True)):
        pool = batch.negatives[n] if batch.negatives.dim() == 2 else batch.negatives[batch.negative_mask[n]]
        hardest = pool[(items[pool] @ users[u]).argmax()]  # by dot product
        score = {}
        for item in (positive, hardest):
            ids, content, audience = way.constants(batch.ego_items[item[None]])
            score[int(item)] = users[u] @ items[item] + member.personal(ids, content, audience, e["users"][u[None]])[0]
        apart = score[int(positive)] - score[int(hardest)]
        assert float(loss[n].detach()) == pytest.approx(float(F.softplus(-apart).detach()), rel=1e-4)


def test_reordering():
    items = np.array([[4, 2, 7, 1], [5, 3, -1, -1]])
    dot = np.array([[4.0, 3.0, 2.0, 1.0], [1.0, 0.5, -np.inf, -np.inf]], np.float32)
    assert reordered(items, dot, np.zeros((2, 3), np.float32), 1.0).tolist() == items.tolist()
    personal = np.array([[0.0, 0.0, 9.0], [0.0, 1.0, 5.0]], np.float32)
    assert reordered(items, dot, personal, 0.0).tolist() == items.tolist()
    assert reordered(items, dot, personal, 5.0).tolist() == [[7, 4, 2, 1], [3, 5, -1, -1]]


def test_rerank_of_a_trained_run_on_one_and_two_ranks(catalog, tmp_path, capsys):
    config = small_config(catalog.uri, str(tmp_path), model={**USER, **GATED}, train={"epochs": 3})
    run = storage.join(str(tmp_path), "small")
    storage.write_bytes(storage.join(run, "config.yaml"), config.model_dump_json().encode())
    fit(Communicator(), catalog.uri, run, config)
    capsys.readouterr()
    evaluate.main(["--run", run, "--rerank", "20"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["rerank"]["before"] == pytest.approx(shown["overall"])
    assert shown["rerank"]["depth"] == 20
    # what is among the first 20 stays there
    assert shown["rerank"]["after"]["recall@20"] == pytest.approx(shown["overall"]["recall@20"])
    on_valid = rerank(load_run(find_run(run)), "valid", 20, None)
    metric = {name: (on_valid[name]["recall@20"] * on_valid[name]["ndcg@5"]) for name in ("before", "after")}
    assert metric["after"] >= metric["before"]
    two = run_ranks(reranked, 2, run)
    assert two[0] == two[1]
    assert two[0]["before"] == pytest.approx(shown["rerank"]["before"], abs=1e-6)


def reranked(comm: Communicator, run: str) -> dict:
    return rerank(load_run(find_run(run), comm), "test", 20, None)


def test_a_run_without_a_filter_for_users_says_so(catalog):
    run = run_of(Communicator(), catalog, small_config(catalog.uri))
    with pytest.raises(InputError, match=r"condition=user"):
        PersonalFilter(run)


def test_candidates_are_rescored_under_their_original_ids(catalog, tmp_path):
    config = small_config(catalog.uri, str(tmp_path), model={**USER, **GATED})
    run = storage.join(str(tmp_path), "small")
    storage.write_bytes(storage.join(run, "config.yaml"), config.model_dump_json().encode())
    fit(Communicator(), catalog.uri, run, config)
    users, items = catalog.ids("users"), catalog.ids("items")
    who, what = np.array([7, 3, 7, 0]), np.array([1, 39, 0, 5])
    pairs = pa.table({"item": items.take(pa.array(what)), "note": list("abcd"), "user": users.take(pa.array(who))})
    formats.write_table(f"{tmp_path}/pairs.parquet", pairs)
    command = ["--run", run, "--candidates", f"{tmp_path}/pairs.parquet", "--out", f"{tmp_path}/scored.parquet"]
    rescore.main(command)
    scored = formats.read_table(f"{tmp_path}/scored.parquet")
    assert scored.select(pairs.column_names).equals(pairs)
    loaded = load_run(find_run(run))
    of_users, of_items = (table.weight for table in loaded.embed())
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
        ({"user": ["u003", "u001"], "item": [1, 1]}, "row 0 has the item 1, which"),
        ({"user": ["nobody"], "item": [1]}, "row 0 has the user 'nobody', which"),
        ({"user": ["u003"], "item": ["x"]}, "column 'item' is string"),
        ({"user": ["u003"], "item": [[1]]}, "column 'item' is list<"),
        ({"user": [None], "item": [1]}, "row 0 has the user None"),
    ],
)
def test_candidates_that_cannot_be_scored(catalog, columns, message):
    run = run_of(Communicator(), catalog, small_config(catalog.uri, model=USER))
    columns = {name: pa.array(values, None if name == "item" else pa.string()) for name, values in columns.items()}
    with pytest.raises(InputError, match=message):
        rescore.pair_indexes(run, pa.table(columns), "pairs.parquet")


def test_what_the_filter_keeps_is_read_out_by_factor():
    rng = np.random.default_rng(0)
    factors, other = rng.normal(size=(400, 3)), 3 * rng.normal(size=(400, 1))
    x0 = np.concatenate([factors, other], axis=1) @ np.linalg.qr(rng.normal(size=(12, 4)))[0].T
    x0 /= np.linalg.norm(x0, axis=1, keepdims=True)
    decode = planted.Decoder(x0, factors)
    assert (decode.r2 > 0.2).all()
    before = decode(torch.from_numpy(x0))
    kept, moved = planted.slopes(before, 0.5 * before + np.array([0, 0, 1.0, 0]))
    assert kept == pytest.approx([0.5] * 4)
    assert moved - moved[0] == pytest.approx([0, 0, 1, 0], abs=0.1)
    alike = planted.correlation(np.array([[1.0, 2, 3], [5, 5, 5]]), np.array([[1.0, 2, 3], [1, 2, 3]]))
    assert alike == {"mean": 1.0, "se": 0.0, "above_zero": 1.0}
