"""Users outside the catalog get what they would get in it, and nothing changes for the others."""

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest
import torch
from grown import day_before
from small import small_catalog, write_config
from trainings import read_export, train_without_ray

from gtc_dist import export
from gtc_dist.checkpoint.existing_run import find_run
from gtc_dist.config_data import DataConfig
from gtc_dist.data import formats, storage
from gtc_dist.data.catalog import Catalog
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.errors import InputError
from gtc_dist.graph.csc import Graphs
from gtc_dist.inference.new_users import NewUsers, load_run_with_new_users, without_new_users
from gtc_dist.prepare.new_users import read_new_users
from gtc_dist.recommend import lists

HYBRID = ["model.hybrid.graph_filter=3", "model.hybrid.content_profile=4", "model.masked_members=2"]
HYBRID += ["model.user_hop=false"]
GONE = range(50, 60)  # users of today who are new to the run


@pytest.fixture(scope="module", params=[[], HYBRID])
def run(tmp_path_factory, request) -> tuple[str, Catalog, Catalog]:
    """A run without some users, its catalog, and the one with them."""
    folder = tmp_path_factory.mktemp("run")
    today = small_catalog(folder / "today")
    before = day_before(today, folder / "before", without_users=GONE)
    config = write_config(folder, before.uri, str(folder / "runs"), epochs=4)
    return train_without_ray(config, *request.param), before, today


def interactions_of(today: Catalog, users) -> pa.Table:
    """Train interactions of some users under the original ids."""
    user, item = today.interactions("train")
    chosen = np.isin(user, list(users))
    ids = {kind: today.ids(kind).to_numpy(zero_copy_only=False) for kind in ("users", "items")}
    return pa.table({"user_id": ids["users"][user[chosen]], "item_id": ids["items"][item[chosen]]})


def write(path, table: pa.Table) -> str:
    pyarrow.csv.write_csv(table, path)
    return str(path)


def test_others_stay_as_they_are_and_a_user_does_not_depend_on_the_others(run, tmp_path):
    uri, _, today = run
    file = write(tmp_path / "new.csv", interactions_of(today, GONE))
    one = write(tmp_path / "one.csv", interactions_of(today, [53]))
    export.main(["--run", uri, "--out", str(tmp_path / "plain")])
    for name, users in (("new", file), ("one", one)):
        export.main(["--run", uri, "--out", str(tmp_path / name), "--new-users", users])
        for kind in ("users", "items"):
            ids, rows = read_export(str(tmp_path / name), kind)
            want_ids, want = read_export(str(tmp_path / "plain"), kind)
            assert ids[: len(want_ids)] == want_ids
            np.testing.assert_array_equal(rows[: len(want)], want)
    ids, rows = (dict(zip(*read_export(str(tmp_path / name), "users"), strict=True)) for name in ("new", "one"))
    np.testing.assert_allclose(rows["u053"], ids["u053"], rtol=1e-4, atol=1e-5)
    assert storage.read_json(str(tmp_path / "new/manifest.json"))["new_users"] == 10
    assert {f"u{n:03d}" for n in GONE} <= ids.keys()


@pytest.mark.parametrize("run", [HYBRID], indirect=True)
def test_a_user_gets_what_one_of_the_catalog_with_the_same_items_gets(run):
    """All but the row of the user table comes from the items."""
    uri, before, _ = run
    table = interactions_of(before, [7])
    copies = table.set_column(0, "user_id", pa.array(["copy"] * len(table)))
    opened = load_run_with_new_users(find_run(uri), new_users(before, copies), Communicator())
    opened.tables.user.weight[-1] = opened.tables.user.weight[7]
    embeddings, rows = without_new_users(opened, opened.final_embeddings())
    torch.testing.assert_close(rows[0], embeddings.users.weight[7], rtol=1e-4, atol=1e-5)


def new_users(catalog: Catalog, table: pa.Table, **settings) -> NewUsers:
    uri = f"{catalog.uri}-new-users.parquet"
    formats.write_table(uri, table)
    return read_new_users(data_config(catalog, **settings), catalog, uri)


def data_config(catalog: Catalog, **settings) -> DataConfig:
    recency = settings.pop("recency_half_life", None)
    return DataConfig(raw="r", catalog=catalog.uri, interactions=settings, recency_half_life=recency)


def test_users_without_interactions_get_the_mean(run, tmp_path, capsys):
    uri, before, _ = run
    file = write(tmp_path / "none.csv", pa.table({"user_id": ["x1", "x2"]}))
    export.main(["--run", uri, "--out", str(tmp_path / "e"), "--new-users", file])
    assert "2 of them without an interaction" in capsys.readouterr().err
    rows = read_export(str(tmp_path / "e"), "users")[1]
    warm = Graphs.load(before).user_degree > 0
    np.testing.assert_allclose(rows[-1], rows[:-2][warm].mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(rows[-1], rows[-2])


def test_lists_leave_out_what_the_new_users_have(run, tmp_path, capsys):
    uri, _, today = run
    table = interactions_of(today, GONE)
    file = write(tmp_path / "new.csv", table)
    lists.main(["--run", uri, "--new-users", file, "--out", str(tmp_path / "lists"), "--top", "30"])
    found = formats.read_table(str(tmp_path / "lists/part-000000000000.parquet")).to_pylist()
    has = set(zip(table["user_id"].to_pylist(), table["item_id"].to_pylist(), strict=True))
    assert {row["user_id"] for row in found} == {f"u{n:03d}" for n in GONE}
    assert not {(row["user_id"], row["item_id"]) for row in found} & has
    capsys.readouterr()
    lists.main(["--run", uri, "--new-users", file, "--user", "u051", "--top", "2"])
    assert capsys.readouterr().out.startswith("user u051\n   1 ")


def test_columns_events_weights_and_repeats_are_those_of_the_interactions(tmp_path):
    catalog = small_catalog(tmp_path / "c")
    items = catalog.ids("items").to_pylist()
    table = pa.table(
        {
            "who": ["n2", "n1", "n2", "n2", "n1", "n2", "n1"],
            "item_id": [items[3], items[0], items[3], items[1], 999, items[2], items[0]],
            "event": ["buy", "view", "view", "hover", "buy", "buy", "buy"],
            "count": [2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 3.0],
            "stars": [5, 5, 5, 5, 5, 1, 4],
        }
    )
    settings = {"user": "who", "event": "event", "event_weights": {"view": 1, "buy": 5, "hover": 0}, "weight": "count"}
    found = new_users(catalog, table, **settings, rating="stars", min_rating=3)
    assert found.ids.to_pylist() == ["n1", "n2"]
    assert (found.indptr.tolist(), found.items.tolist()) == ([0, 1, 2], [0, 3])
    assert found.weight.tolist() == [15.0, 10.0]  # the heaviest of the repeats
    assert found.unknown == 1
    found = new_users(catalog, table, **settings, repeats=2)
    assert found.items.tolist() == [0, 2, 3]
    assert found.weight.tolist() == [16.0, 5.0, 11.0]


def test_age_is_counted_back_from_the_newest_interaction(tmp_path):
    catalog = small_catalog(tmp_path / "c")
    days = pa.array([10, 0, 20], pa.int64())
    time = pa.array([day * 86_400_000_000 for day in days.to_pylist()], pa.timestamp("us"))
    items = catalog.ids("items").take(pa.array([0, 1, 2]))
    table = pa.table({"user_id": ["n"] * 3, "item_id": items, "t": time})
    found = new_users(catalog, table, time="t", recency_half_life=10)
    np.testing.assert_allclose(found.weight, [0.5, 0.25, 1])


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            pa.table({"user_id": ["u003", "n"], "item_id": [100, 107]}),
            "1 of 2 users are in the catalog already, such as 'u003'",
        ),
        (pa.table({"person": ["n"], "item_id": [100]}), "has no column 'user_id'; columns found: person, item_id"),
        (pa.table({"user_id": [None, "n"], "item_id": [100, 107]}), "row 1: column 'user_id' (user) is null"),
        (pa.table({"user_id": pa.array([], pa.string()), "item_id": pa.array([], pa.int64())}), "has no user"),
    ],
)
def test_bad_files_are_refused_and_nothing_is_written(run, tmp_path, table, message):
    formats.write_table(str(tmp_path / "new.parquet"), table)
    words = ["--run", run[0], "--out", str(tmp_path / "e"), "--new-users", str(tmp_path / "new.parquet")]
    with pytest.raises(InputError, match=r"new\.parquet") as error:
        export.main(words)
    assert message in str(error.value)
    assert not storage.listing(str(tmp_path / "e"))
