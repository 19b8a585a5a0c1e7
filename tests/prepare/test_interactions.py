"""Raw interactions through Ray to users, items and splits."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from raw_files import FORMATS, rows_table, slow_core, write_table_file
from raw_interactions import build, data_config, raw_of, read, triples, write_given

from gtc_dist.config_data import DataConfig
from gtc_dist.data.catalog import SPLITS
from gtc_dist.errors import InputError
from gtc_dist.prepare import catalog_interactions, interactions
from gtc_dist.prepare.catalog_interactions import SplitInteractions
from gtc_dist.prepare.clean import RawInteractions
from gtc_dist.raw import ids, interaction_file


def test_all_formats_together_through_ray(tmp_path, ray_local):
    """Ten files read in parallel give all rows, and codes of their ids."""
    tables = [rows_table(seed=i) for i in range(10)]
    names = [f"{i}.{f}{z}" for i, (f, z) in enumerate((f, z) for f in FORMATS for z in ("", ".gz"))]
    for name, table in zip(names, tables, strict=True):
        write_table_file(tmp_path / name, table, suffixes=name.endswith(".inter"))
    data = data_config(
        tmp_path, interactions={"files": ["*.*"], "time": "time", "rating": "rating"}, split={"method": "ratio"}
    )
    raw = read(interactions.inspect_interactions(data))
    expected = Counter(
        (r["user_id"], r["item_id"], r["time"], r["rating"]) for table in tables for r in table.to_pylist()
    )
    users, items = raw.user_ids.to_pylist(), raw.item_ids.to_pylist()
    found = Counter(
        (users[u], items[i], t, r) for u, i, t, r in zip(raw.user, raw.item, raw.time, raw.rating, strict=True)
    )
    assert found == expected
    assert users == sorted(users)
    assert raw.user_ids.type == pa.int64()


def test_text_ids_that_turn_out_strings_late_in_a_file_are_strings_throughout(tmp_path, ray_local):
    path = tmp_path / "a.csv"
    rows = interaction_file.TEXT_BLOCK_BYTES // len("1234567,1\n") + 1000
    path.write_text("user_id,item_id\n" + "".join(f"{1_000_000 + i},1\n" for i in range(rows)) + "abc,1\n")
    data = data_config(tmp_path, interactions={"files": ["a.csv"]})
    raw = read(interactions.inspect_interactions(data))
    assert ids.is_text(raw.user_ids.type)
    assert len(raw.user_ids) == rows + 1
    assert raw.user_ids[0].as_py() == "1000000"
    assert raw.item_ids.to_pylist() == [1]


def codes_of(raw: RawInteractions, found: SplitInteractions) -> tuple[np.ndarray, ...]:
    """All pairs as codes of `raw`, and their splits."""
    user, item = (np.concatenate([pair[n] for pair in found.splits.values()]) for n in range(2))
    codes = np.repeat(np.arange(3), list(found.counts.values()))
    return ids.positions(found.users, raw.user_ids)[user], ids.positions(found.items, raw.item_ids)[item], codes


@pytest.mark.parametrize("kind", [int, float])
def test_global_time_puts_the_latest_into_test(tmp_path, kind):
    """Against a sort of all rows; ties in time go by user and item."""
    rng = np.random.default_rng(3)
    pairs = [divmod(int(p), 30) for p in rng.permutation(12 * 30)[:200]]
    time = {pair: kind(rng.integers(-5, 5)) / (1 if kind is int else 7) for pair in pairs}
    raw = raw_of([(*pair, t) for pair, t in time.items()], time=True)
    split = {"method": "global_time", "valid_share": 0.21, "test_share": 0.13}
    found = build(raw, data_config(tmp_path, interactions={"time": "t"}, split=split), memory=900)
    order = sorted(pairs, key=lambda pair: (time[pair], pair))
    cuts = len(order) - round(200 * 0.21) - round(200 * 0.13), len(order) - round(200 * 0.13)
    parts = order[: cuts[0]], order[cuts[0] : cuts[1]], order[cuts[1] :]
    assert {name: sorted(rows) for name, rows in triples(found).items()} == {
        name: sorted(part) for name, part in zip(SPLITS, parts, strict=True)
    }


DAY = 86_400


def recency_config(raw: Path, half_life: float = 2.0, method: str = "label") -> DataConfig:
    columns = {"time": "t", "files": ["x"]}
    return data_config(raw, interactions=columns, split={"method": method}, recency_half_life=half_life)


@pytest.mark.parametrize("unit", [1, 1_000_000], ids=["seconds", "microseconds of timestamps"])
def test_weights_halve_with_each_half_life_before_the_newest_train_row(tmp_path, unit):
    """By hand, with a half-life of 2 days: rows 0, 1, 4 and 1000 days before the newest of train; valid and test are
    newer."""
    days = {("a", 1): 2000, ("a", 2): 1999, ("b", 1): 1996, ("b", 3): 1000, ("a", 3): 2005, ("b", 2): 2006}
    rows = [(*pair, day * DAY * unit) for pair, day in days.items()]
    raw = replace(raw_of(rows, time=True, split_codes=[0, 0, 0, 0, 1, 2]), time_unit=1 / unit)
    found = build(raw, recency_config(tmp_path))
    weights = dict(zip(triples(found)["train"], found.train_weight.tolist(), strict=True))
    expected = {("a", 1): 1.0, ("a", 2): 2**-0.5, ("b", 1): 0.25, ("b", 3): 2.0**-64}
    assert weights == pytest.approx(expected, rel=1e-6)
    without = build(raw, data_config(tmp_path, interactions={"time": "t", "files": ["x"]}, split={"method": "label"}))
    assert without.train_weight is None
    assert triples(without) == triples(found)


def test_weights_do_not_depend_on_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(catalog_interactions, "INTERACTION_ROWS", 50)
    rows = [(int(u), int(i), int(t) * DAY) for u, i, t in np.random.default_rng(2).random((600, 3)) * [25, 40, 20]]
    data, raw = recency_config(tmp_path, method="global_time"), raw_of(rows, time=True)
    large, small = build(raw, data), build(raw, data, memory=500)
    assert len(np.unique(large.train_weight)) > 5
    assert np.array_equal(large.train_weight, small.train_weight)


def test_milliseconds_are_refused_as_seconds(tmp_path):
    raw = raw_of([(u, i, 1_700_000_000_000 + u) for u in range(6) for i in range(6)], time=True)
    with pytest.raises(InputError, match="column 't' has numbers up to 1700000000005, which are no seconds since 1970"):
        build(raw, recency_config(tmp_path, method="leave_last_out"))


@pytest.mark.parametrize("method", ["ratio", "global_time", "leave_last_out", "label"])
@pytest.mark.parametrize("memory", [1, 3000, 20_000])
def test_result_does_not_depend_on_memory(tmp_path, monkeypatch, method, memory):
    """Blocks of one row (one user), of several and of many; large splits are shuffled in several buckets."""
    monkeypatch.setattr(catalog_interactions, "INTERACTION_ROWS", 50)
    rng = np.random.default_rng(2)
    rows = [(int(u), int(i), int(t)) for u, i, t in rng.random((900, 3)) ** [1, 2, 1] * [25, 40, 20]]
    codes = [(u + i) % 3 for u, i, _ in rows] if method == "label" else None
    raw = raw_of(rows, time=True, split_codes=codes)
    raw = RawInteractions(raw.user_ids, raw.item_ids, raw.user, raw.item, raw.time, rng.random(900), raw.split)
    columns = {"time": "t", "rating": "r", "min_rating": 0.1, "k_core": 8, "files": ["x"]}
    data = data_config(tmp_path, interactions=columns, split={"method": method, "seed": 4})
    large, small = build(raw, data), build(raw, data, memory=memory)
    assert large.users.equals(small.users)
    assert large.items.equals(small.items)
    assert large.dropped == small.dropped
    assert large.dropped["k_core"] > 0
    for name in SPLITS:
        assert all(np.array_equal(a, b) for a, b in zip(large.splits[name], small.splits[name], strict=True))
    user, _ = large.splits["train"]
    assert len(user) > 100
    for part in np.array_split(user, 4):  # every part holds users from everywhere
        assert part.max() - part.min() > len(large.users) // 2


def test_reading_in_small_batches_gives_the_same_rows(tmp_path, ray_local):
    """Codes are assigned batch by batch while the known ids grow and change their type."""
    tables = [pa.table({"user_id": [9, 3], "item_id": [5, 7]}), pa.table({"user_id": [2, 9], "item_id": [5, 1]})]
    for number, (table, type) in enumerate(
        zip(tables * 2, [pa.int32(), pa.int64(), pa.uint8(), pa.int16()], strict=True)
    ):
        pq.write_table(table.set_column(0, "user_id", table["user_id"].cast(type)), tmp_path / f"{number}.parquet")
    (tmp_path / "5.csv").write_text("user_id,item_id\n" + "77,1\n" * 3 + "3,8\n")
    files = interactions.inspect_interactions(data_config(tmp_path, interactions={"files": ["*"]}))
    whole, small = read(files), read(files, memory=8)
    assert whole.user_ids.type == small.user_ids.type == pa.int64()
    for raw in (whole, small):
        assert raw.user_ids.to_pylist() == [2, 3, 9, 77]
        assert raw.item_ids.to_pylist() == [1, 5, 7, 8]
        found = Counter(zip(raw.user_ids.take(pa.array(raw.user)).to_pylist(), raw.item.tolist(), strict=True))
        assert found == {(9, 1): 2, (3, 2): 2, (2, 1): 2, (9, 0): 2, (77, 0): 3, (3, 3): 1}


def test_times_with_fractions_in_one_file_only(tmp_path, ray_local):
    write_table_file(tmp_path / "a.csv", pa.table({"user_id": [1, 1], "item_id": [3, 4], "time": [2**31, -7]}))
    write_table_file(tmp_path / "b.csv", pa.table({"user_id": [2], "item_id": [3], "time": [0.5]}))
    data = data_config(tmp_path, interactions={"files": ["*.csv"], "time": "time"})
    for memory in (8, 1 << 30):
        raw = read(interactions.inspect_interactions(data), memory)
        assert raw.time.dtype == np.float64
        assert sorted(zip(raw.user.tolist(), raw.time.tolist(), strict=True)) == [(0, -7.0), (0, 2.0**31), (1, 0.5)]


@pytest.mark.parametrize("method", ["ratio", "global_time", "leave_last_out"])
def test_result_does_not_depend_on_the_order_of_rows(tmp_path, method):
    rng = np.random.default_rng(1)
    rows = [(int(u), f"i{i}", int(t)) for u, i, t in rng.integers(0, [12, 30, 20], (300, 3))]
    data = data_config(tmp_path, interactions={"time": "t", "k_core": 2}, split={"method": method, "seed": 4})
    first = build(raw_of(rows, time=True), data)
    second = build(raw_of([rows[r] for r in rng.permutation(len(rows))], time=True), data)
    assert triples(first) == triples(second)
    assert first.users.equals(second.users)
    assert first.items.equals(second.items)
    merged = {(u, i) for u, i, _ in rows}
    kept = [pair for name in SPLITS for pair in triples(first)[name]]
    assert len(kept) == len(set(kept))  # the splits are disjoint
    assert set(kept) == slow_core(merged, 2)  # and complete
    assert first.dropped == {"duplicate": len(rows) - len(merged), "k_core": len(merged) - len(kept)}
    other = data.model_copy(update={"split": data.split.model_copy(update={"seed": 5})})
    assert build(raw_of(rows, time=True), other).users.to_pylist() != first.users.to_pylist()


def test_indexes_are_shuffled_and_interactions_too(tmp_path):
    rows = [(u, i) for u in range(40) for i in range(10)]
    found = build(raw_of(rows), data_config(tmp_path))
    assert sorted(found.users.to_pylist()) == list(range(40))
    assert found.users.to_pylist() != list(range(40))
    user = found.splits["train"][0]
    assert user.dtype == np.int32
    assert (np.diff(user) < 0).any()


def test_ratings_are_filtered_before_duplicates_merge(tmp_path):
    """A pair is kept if its highest rating passes; its time is the earliest among the rows that pass."""
    rows = [
        (1, 1, 5, 1.0),
        (1, 1, 9, 4.0),
        (1, 1, 8, 3.0),
        (1, 2, 4, 3.0),
        (1, 3, 2, 3.5),
        (2, 1, 1, 5.0),
        (2, 2, 3, 2.9),
    ]
    raw = raw_of(rows, time=True)
    raw = RawInteractions(raw.user_ids, raw.item_ids, raw.user, raw.item, raw.time, np.array([r[3] for r in rows]))
    columns = {"rating": "r", "time": "t", "min_rating": 3.0}
    found = build(raw, data_config(tmp_path, interactions=columns, split={"method": "leave_last_out"}))
    assert found.dropped == {"min_rating": 2, "duplicate": 1}
    assert triples(found)["test"] == [(1, 1)]  # at time 8, the earliest that passes
    assert triples(found)["valid"] == [(1, 2)]
    assert sorted(triples(found)["train"]) == [(1, 3), (2, 1)]
    assert sorted(found.items.to_pylist()) == [1, 2, 3]


GIVEN = [(1, 1), (1, 2), (2, 1), (2, 1), (1, 3), (2, 3), (2, 4)]

GIVEN_CODES = [0, 0, 0, 0, 1, 2, 2]


def test_given_splits_are_kept(tmp_path):
    found = build(raw_of(GIVEN, split_codes=GIVEN_CODES), data_config(tmp_path, split={"method": "given"}))
    assert {name: sorted(rows) for name, rows in triples(found).items()} == {
        "train": [(1, 1), (1, 2), (2, 1)],
        "valid": [(1, 3)],
        "test": [(2, 3), (2, 4)],
    }
    assert found.dropped == {"duplicate": 1}


def test_more_items_become_items_without_interactions(tmp_path):
    data = data_config(tmp_path, split={"method": "given"})
    found = build(raw_of(GIVEN, split_codes=GIVEN_CODES), data, pa.array([0, 3, 9, 100]))
    assert sorted(found.items.to_pylist()) == [0, 1, 2, 3, 4, 9, 100]
    assert sorted(triples(found)["test"]) == [(2, 3), (2, 4)]


def test_given_files_through_ray(tmp_path, ray_local):
    data = write_given(tmp_path)
    found = build(read(interactions.inspect_interactions(data)), data)
    assert {k: sorted(v) for k, v in triples(found).items()} == {
        "train": [(1, 1), (1, 2)],
        "valid": [(1, 3)],
        "test": [(1, 4)],
    }


@pytest.mark.parametrize("names", [["a.parquet", "b.csv"], ["a.csv", "b.parquet"], ["a.jsonl", "b.csv"]])
def test_integers_are_text_where_one_file_has_text(tmp_path, ray_local, names):
    write_table_file(tmp_path / names[0], pa.table({"user_id": [1, 20], "item_id": [7, 8]}))
    write_table_file(tmp_path / names[1], pa.table({"user_id": ["1", "x", "01"], "item_id": ["7", "9", "8"]}))
    raw = read(interactions.inspect_interactions(data_config(tmp_path, interactions={"files": names})))
    assert raw.user_ids.to_pylist() == ["01", "1", "20", "x"]
    found = {(raw.user_ids[u].as_py(), str(raw.item_ids[i])) for u, i in zip(raw.user, raw.item, strict=True)}
    assert found == {("1", "7"), ("20", "8"), ("x", "9"), ("01", "8")}
