"""Explanations of lists, by the command, against sums over the columns of final embeddings and cosines by hand."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ranks import run_ranks
from small import small_catalog, write_config
from trainings import train_without_ray

from gtc_dist.api import Run
from gtc_dist.checkpoint.existing_run import find_run
from gtc_dist.inference.trained_run import load_run
from gtc_dist.recommend import explain, lists
from gtc_dist.recommend.explain import named_parts, user_blocks

PARTS = ["popularity", "network", "masked_diffusion", "graph_filter", "content_m0", "content_m1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """With all parts; the two users without a train interaction and the cold items are explained, too."""
    folder = tmp_path_factory.mktemp("run")
    catalog = small_catalog(folder / "catalog", users=40, items=30)
    hybrid = ["model.hybrid.graph_filter=3", "model.hybrid.content_profile=4"]
    config = write_config(folder, catalog.uri, str(folder / "runs"))
    return train_without_ray(config, "train.epochs=1", "model.masked_members=1", *hybrid)


@pytest.fixture(scope="module")
def table(run, tmp_path_factory) -> pa.Table:
    out = str(tmp_path_factory.mktemp("lists") / "l")
    lists.main(["--run", run, "--out", out, "--top", "6", "--explain"])
    return pq.read_table(out)


def test_the_parts_add_up_to_the_score(run, table):
    opened = load_run(find_run(run))
    users, items = lists.with_mean_user(opened, opened.final_embeddings())
    groups = named_parts(opened, items.width)
    assert list(groups) == PARTS == [name[6:] for name in table.column_names if name.startswith("score_")]
    parts = np.array([table[f"score_{name}"].to_numpy() for name in PARTS])
    np.testing.assert_allclose(parts.sum(axis=0), table["score"].to_numpy(), atol=1e-4)
    user = opened.catalog.index_of("users", table["user_id"])
    item = opened.catalog.index_of("items", table["item_id"])
    for name, values in zip(PARTS, parts, strict=True):
        own, other = users.weight[:, groups[name]].numpy()[user], items.weight[:, groups[name]].numpy()[item]
        np.testing.assert_allclose(values, (own * other).sum(axis=1), atol=1e-4)


def test_the_nearest_items_are_the_users_own_by_cosine(run, table):
    opened = load_run(find_run(run))
    items, catalog = opened.final_embeddings().items.weight.numpy()[:, 3:].astype(np.float64), opened.catalog
    unit = items / np.maximum(np.linalg.norm(items, axis=1, keepdims=True), 1e-12)
    has: dict[int, set[int]] = {}
    for user, item in zip(*catalog.interactions("train"), strict=True):
        has.setdefault(int(user), set()).add(int(item))
    users, listed = catalog.index_of("users", table["user_id"]), catalog.index_of("items", table["item_id"])
    for user, item, found in zip(users, listed, table["nearest_own"].to_pylist(), strict=True):
        own = np.array(sorted(has.get(int(user), ())), np.int64)
        cosine = unit[own] @ unit[item]
        assert [near["cosine"] for near in found] == pytest.approx(np.sort(cosine)[::-1][:3], abs=1e-5)
        indexes = catalog.index_of("items", pa.array([near["item_id"] for near in found], table["item_id"].type))
        assert set(indexes.tolist()) <= set(own.tolist())
        assert [near["cosine"] for near in found] == pytest.approx(unit[indexes] @ unit[item], abs=1e-5)


def test_an_item_is_not_near_itself(run):
    """Where what a user has may be listed."""
    explained = Run(run).recommend(top=30, include_seen=True, explain=True)
    assert explained.num_rows == 40 * 30
    for item, near in zip(explained["item_id"].to_pylist(), explained["nearest_own"].to_pylist(), strict=True):
        assert item not in [own["item_id"] for own in near]


def on_ranks(comm, run: str, out: str) -> dict:
    options = {"users": None, "top": 6, "include_seen": False, "allowed": None, "titles": None, "explain": True}
    return lists.recommend_rank(comm, None, find_run(run), out=out, **options)


def test_ranks_and_blocks_do_not_matter(run, table, tmp_path, monkeypatch):
    monkeypatch.setattr(explain, "BLOCK_ITEMS", 20)
    run_ranks(on_ranks, 3, run, str(tmp_path))
    found = pq.read_table(tmp_path)
    assert found["item_id"] == table["item_id"]
    for name in PARTS:
        np.testing.assert_allclose(found[f"score_{name}"], table[f"score_{name}"], atol=1e-4)
    near, expected = ([[own["cosine"] for own in row] for row in t["nearest_own"].to_pylist()] for t in (found, table))
    for one, other in zip(near, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_blocks_of_users_are_bounded(monkeypatch):
    monkeypatch.setattr(explain, "BLOCK_USERS", 3)
    monkeypatch.setattr(explain, "BLOCK_ITEMS", 10)
    assert user_blocks(np.array([4, 4, 1, 1, 30, 2])) == [slice(0, 3), slice(3, 4), slice(4, 5), slice(5, 6)]
    assert user_blocks(np.empty(0, np.int64)) == []


def test_explanations_on_the_terminal(run, table, capsys, tmp_path):
    user, ids = table["user_id"][0].as_py(), sorted(set(load_run(find_run(run)).catalog.ids("items").to_pylist()))
    pq.write_table(pa.table({"item_id": ids, "title": [f"thing {item}" for item in ids]}), tmp_path / "titles.parquet")
    titles = ["--titles", str(tmp_path / "titles.parquet")]
    lists.main(["--run", run, "--user", user, "--top", "1", "--explain", *titles])
    shown, first = capsys.readouterr().out, table.slice(0, 1).to_pylist()[0]
    assert f"= popularity {first['score_popularity']:+.4f}  network {first['score_network']:+.4f}  masked_" in shown
    for near in first["nearest_own"]:
        assert f"      near {near['cosine']:.4f}  {near['item_id']}  thing {near['item_id']}\n" in shown
    with pytest.raises(SystemExit):
        lists.main(["--run", run, "--item", "1", "--explain"])
    assert "--explain goes with --user and --out" in capsys.readouterr().err
