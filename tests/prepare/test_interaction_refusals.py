"""Interactions that `prepare` refuses, with errors that concern several files."""

import numpy as np
import pyarrow as pa
import pytest
from raw_files import rows_table, write_table_file
from raw_interactions import build, data_config, raw_of, read, write_given

from gtc_dist.config_data import DataConfig
from gtc_dist.data.catalog import SPLITS
from gtc_dist.errors import InputError
from gtc_dist.prepare import interactions
from gtc_dist.prepare.clean import RawInteractions


def refused(data: DataConfig) -> str:
    """The error message of inspecting, without Ray."""
    with pytest.raises(InputError) as caught:
        interactions.inspect_interactions(data)
    return str(caught.value)


def test_missing_files_are_named_with_their_key(tmp_path):
    data = write_given(tmp_path)
    (tmp_path / "valid.parquet").unlink()
    assert "data.split.valid: " + str(tmp_path / "valid.parquet") + " does not exist" in refused(data)
    message = refused(data_config(tmp_path, interactions={"files": ["part-*.csv"]}))
    assert f"data.interactions.files: no file matches {tmp_path}/part-*.csv" in message
    assert "data.interactions.files is empty" in refused(data_config(tmp_path))


@pytest.mark.parametrize("method", ["global_time", "leave_last_out"])
def test_splits_by_time_ask_for_the_time_column(tmp_path, method):
    write_table_file(tmp_path / "a.csv", rows_table())
    message = refused(data_config(tmp_path, interactions={"files": ["a.csv"]}, split={"method": method}))
    assert "set data.interactions.time" in message


def test_files_that_disagree_on_time_are_both_named(tmp_path, ray_local):
    write_table_file(tmp_path / "a.csv", pa.table({"user_id": [1], "item_id": [3], "time": [5]}))
    write_table_file(tmp_path / "b.csv", pa.table({"user_id": [1], "item_id": [3], "time": ["2024-05-01 10:00:00"]}))
    data = data_config(tmp_path, interactions={"files": ["*.csv"], "time": "time"})
    with pytest.raises(InputError, match=r"timestamps in .*b\.csv but numbers in .*a\.csv"):
        read(interactions.inspect_interactions(data))


def test_an_error_in_a_ray_task_arrives_as_itself(tmp_path, ray_local):
    for name in ("a", "b", "c"):
        table = rows_table()
        if name != "a":
            last = pa.array([*table["user_id"].to_pylist()[:-1], None])
            table = table.set_column(table.column_names.index("user_id"), "user_id", last)
        write_table_file(tmp_path / f"{name}.parquet", table)
    files = interactions.inspect_interactions(data_config(tmp_path, interactions={"files": ["*.parquet"]}))
    with pytest.raises(InputError) as caught:
        read(files)
    assert str(caught.value).startswith(f"{tmp_path}/b.parquet: row 60: column 'user_id' (user) is null. Correct them")


def test_files_without_rows_are_refused(tmp_path, ray_local):
    write_table_file(tmp_path / "a.csv", rows_table(0))
    with pytest.raises(InputError, match=r"no interactions in .*a\.csv"):
        read(interactions.inspect_interactions(data_config(tmp_path, interactions={"files": ["a.csv"]})))


@pytest.mark.parametrize("which", range(3))
def test_an_empty_split_is_named(tmp_path, which):
    codes = [c for c in range(3) if c != which]
    raw = raw_of([(1, c) for c in codes], split_codes=codes)
    with pytest.raises(InputError, match=f"the {SPLITS[which]} split is empty"):
        build(raw, data_config(tmp_path, split={"method": "given"}))


@pytest.mark.parametrize(("code", "name"), [(1, "valid"), (2, "test")])
@pytest.mark.parametrize("method", ["given", "label"])
def test_rows_repeated_in_train_are_counted_with_an_example(tmp_path, code, name, method):
    rows = [("a", 1), ("b", 1), ("a", 2), ("a", 3), ("a", 1), ("b", 1)]
    raw = raw_of(rows, split_codes=[0, 0, 1, 2, code, code])
    data = data_config(tmp_path, interactions={"files": ["x.csv"]}, split={"method": method})
    with pytest.raises(InputError, match=f"{name} .* repeats 2 interactions of train, such as user_id='a', item_id=1"):
        build(raw, data)


@pytest.mark.parametrize(("key", "value"), [("k_core", 50), ("min_rating", 99.0)])
def test_filters_that_leave_nothing_are_named(tmp_path, key, value):
    raw = raw_of([(1, 1), (2, 2)])
    raw = RawInteractions(raw.user_ids, raw.item_ids, raw.user, raw.item, rating=np.ones(2))
    with pytest.raises(InputError, match=f"data.interactions.{key}={value:g} leaves no interaction"):
        build(raw, data_config(tmp_path, interactions={key: value, "rating": "r"}))
