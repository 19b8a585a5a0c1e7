"""Interactions that weigh differently: kinds of events, counts, repeats; pairs that two splits share; units of time."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_files import write_table_file
from test_interactions import build, data_config, raw_of, read, triples

from gtc_dist.config_file import build_config
from gtc_dist.data.catalog import Catalog
from gtc_dist.errors import InputError
from gtc_dist.graph.csc import load_graphs
from gtc_dist.prepare import build_catalog, interactions, split

EVENTS = {"view": 1, "cart": 3, "buy": 5.5, "hover": 0}


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 2), st.integers(1, 9)), max_size=40),
    st.integers(1, 4),
    st.booleans(),
)
def test_weights_of_merged_rows_are_the_sums_of_the_heaviest(rows, most, has_weights):
    columns = np.array(rows, np.int64).reshape(-1, 4).T
    user, item, code, weight = columns[0], columns[1], columns[2].astype(np.int8), columns[3].astype(np.float32)
    found = split.merged_weights(user, item, code, weight if has_weights else None, most)
    kept = split.merge_duplicates(user, item, code)
    for row, value in zip(kept, found, strict=True):
        same = weight[(user == user[row]) & (item == item[row]) & (code == code[row])]
        expected = np.sort(same)[::-1][:most].sum() if has_weights else min(len(same), most)
        assert value == expected


def shop(rows: int = 400) -> pa.Table:
    """Orders with repeats: few users and items."""
    rng = np.random.default_rng(3)
    return pa.table(
        {
            "user_id": rng.integers(0, 12, rows),
            "item_id": rng.integers(0, 9, rows),
            "event": rng.choice(list(EVENTS), rows),
            "count": rng.integers(1, 5, rows),
            "time": rng.permutation(rows) + 1_700_000_000,
        }
    )


@pytest.mark.parametrize(
    ("method", "half_life"), [("ratio", None), ("ratio", 0.001), ("global_time", None), ("leave_last_out", 0.001)]
)
def test_weights_reach_the_graphs_and_the_loss(ray_local, tmp_path, method, half_life):
    """Weights of a catalog against a slow computation from the rows. What is later than train does not count."""
    table = shop()
    write_table_file(tmp_path / "a.csv", table)
    np.save(tmp_path / "v.npy", np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32))
    settings = {"event": "event", "event_weights": EVENTS, "weight": "count", "repeats": 2, "time": "time"}
    data = {
        "raw": str(tmp_path),
        "catalog": str(tmp_path / "catalog"),
        "interactions": {"files": ["a.csv"], **settings},
        "features": {"v": {"path": "v.npy"}},
        "split": {"method": method},
        "recency_half_life": half_life,
    }
    config = build_config({"data": data, "run": {"storage": "runs", "name": "x"}}, "test")
    manifest, _ = build_catalog.prepare_catalog(config)
    weights, first = {}, {}
    for row in table.to_pylist():
        pair = row["user_id"], row["item_id"]
        if EVENTS[row["event"]]:
            weights.setdefault(pair, []).append((row["time"], EVENTS[row["event"]] * row["count"]))
            first[pair] = min(first.get(pair, row["time"]), row["time"])
    hovers = sum(row["event"] == "hover" for row in table.to_pylist())
    assert manifest.dropped["event"] == hovers
    assert manifest.dropped["duplicate"] == table.num_rows - hovers - len(weights)
    catalog = Catalog(data["catalog"])
    user, item = catalog.interactions("train")
    users, items = catalog.ids("users").to_pylist(), catalog.ids("items").to_pylist()
    pairs = [(users[u], items[i]) for u, i in zip(user, item, strict=True)]
    expected = slow_weights(pairs, weights, first, method, half_life)
    if method != "ratio":
        assert not np.array_equal(expected, slow_weights(pairs, weights, first, "ratio", half_life))
    graphs = load_graphs(config, catalog)
    np.testing.assert_allclose(graphs.relative_weights(user, item), expected / expected.mean(), rtol=1e-4)
    np.testing.assert_allclose(graphs.weighted_user_degree, np.bincount(user, expected, catalog.users), rtol=1e-4)

    final = config.model_copy(update={"train": config.train.model_copy(update={"final_fit": "selection"})})
    graphs, (user, item) = load_graphs(final, catalog), catalog.interactions("train", "valid")
    pairs = [(users[u], items[i]) for u, i in zip(user, item, strict=True)]
    expected = slow_weights(pairs, weights, first, method, half_life)
    np.testing.assert_allclose(graphs.relative_weights(user, item), expected / expected.mean(), rtol=1e-4)
    np.testing.assert_allclose(graphs.weighted_user_degree, np.bincount(user, expected, catalog.users), rtol=1e-4)


def slow_weights(pairs: list, weights: dict, first: dict, method: str, half_life: float | None) -> np.ndarray:
    """Weights of the pairs that are trained on, of which the two heaviest rows count.

    Args:
        weights: pair -> (time, weight) of its rows.
        first: pair -> time of its first row.
    """
    newest = max(first[pair] for pair in pairs)
    until = dict.fromkeys((user for user, _ in pairs), np.inf if method == "ratio" else newest)
    if method == "leave_last_out":
        until = {user: max(first[pair] for pair in pairs if pair[0] == user) for user in until}
    counted = [sorted(weight for time, weight in weights[pair] if time <= until[pair[0]]) for pair in pairs]
    ages = np.array([newest - first[pair] for pair in pairs]) / 86_400
    return np.array([sum(each[-2:]) for each in counted]) * (0.5 ** (ages / half_life) if half_life else 1)


def test_a_catalog_without_weights_is_refused_where_they_are_configured(ray_local, tmp_path):
    write_table_file(tmp_path / "a.csv", shop())
    np.save(tmp_path / "v.npy", np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32))
    data = {"raw": str(tmp_path), "catalog": str(tmp_path / "catalog"), "features": {"v": {"path": "v.npy"}}}
    tree = {"data": data | {"interactions": {"files": ["a.csv"]}}, "run": {"storage": "runs", "name": "x"}}
    build_catalog.prepare_catalog(build_config(tree, "test"))
    tree["data"]["interactions"] |= {"repeats": 3, "weight": "count"}
    with pytest.raises(
        InputError, match=r"interactions.weight is count and data.interactions.repeats is 3, but the cat"
    ):
        load_graphs(build_config(tree, "test"), Catalog(data["catalog"]))


def test_an_unknown_event_and_a_weight_of_zero_are_bad_rows(tmp_path):
    (tmp_path / "a.csv").write_text("user_id,item_id,event,count\n1,2,view,1\n1,3,click,1\n1,4,buy,0\n")
    columns = {"files": ["a.csv"], "event": "event", "event_weights": EVENTS, "weight": "count"}
    with pytest.raises(InputError) as caught:
        interactions.inspect_interactions(data_config(tmp_path, interactions=columns))
    known = "view, cart, buy, hover"
    assert f"line 3: column 'event' (event): 'click' is not in data.interactions.event_weights ({known})" in str(
        caught.value
    )
    assert "line 4: column 'count' (weight): '0' is not above 0" in str(caught.value)


ROWS = [("a", "x"), ("a", "y"), ("b", "x"), ("b", "y"), ("a", "x"), ("b", "z"), ("a", "y"), ("a", "z")]


def test_pairs_of_train_are_refused_in_valid_and_test_or_dropped_there(tmp_path):
    codes = [0, 0, 0, 0, 1, 1, 2, 2]
    with pytest.raises(InputError, match=r"repeats 1 interactions of train.*or set data\.split\.repeats=drop"):
        build(raw_of(ROWS, split_codes=codes), data_config(tmp_path, split={"method": "given"}))
    found = build(raw_of(ROWS, split_codes=codes), data_config(tmp_path, split={"method": "given", "repeats": "drop"}))
    pairs = {name: set(rows) for name, rows in triples(found).items()}
    assert pairs == {"train": set(ROWS[:4]), "valid": {("b", "z")}, "test": {("a", "z")}}
    assert found.dropped["in_train"] == 2


def test_times_of_two_units_are_refused(tmp_path, ray_local):
    (tmp_path / "a.csv").write_text("user_id,item_id,time\n1,2,1700000000\n1,3,1700000000000\n2,3,5\n")
    (tmp_path / "b.csv").write_text("user_id,item_id,time\n1,4,1600000000.5\n")
    data = data_config(tmp_path, interactions={"files": ["*.csv"], "time": "time"})
    with pytest.raises(InputError) as caught:
        read(interactions.inspect_interactions(data))
    assert "times look like seconds in " in str(caught.value)
    assert f"milliseconds in {tmp_path}/a.csv (1700000000000); write them in one unit" in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"event": "event"}, "event, a column, and event_weights"),
        ({"event_weights": {"view": 1}}, "event, a column, and event_weights"),
        ({"event": "event", "event_weights": {"view": 0}}, "event_weights has only zeros"),
        ({"columns": ["user_id", "item_id", "item_id"]}, "name each column once"),
        ({"repeats": 0}, "greater than 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(columns, says):
    tree = {"data": {"raw": "raw", "catalog": "c", "interactions": columns}, "run": {"storage": "r", "name": "x"}}
    with pytest.raises(InputError, match=says):
        build_config(tree, "test")
