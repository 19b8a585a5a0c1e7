"""One raw file of every format to normalised tables; every kind of broken file."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from raw_files import FORMATS, rows_table, write_table_file

from gtc_dist.errors import InputError
from gtc_dist.raw import ids, interaction_file, parse

ROLES = {"user": "user_id", "item": "item_id", "time": "time", "rating": "rating"}


def read_alone(uri: str, roles: dict[str, str] = ROLES, **options) -> pa.Table:
    """Parse one file without Ray."""
    return pa.concat_tables(parse.read_table_file(parse.inspect_table(uri, roles, **options)))


@pytest.mark.parametrize("text_ids", [False, True])
@pytest.mark.parametrize("extension", [f + z for f in FORMATS for z in ("", ".gz")])
def test_every_format_reads_the_same(tmp_path, extension, text_ids):
    table = rows_table(text_ids=text_ids)
    found = read_alone(write_table_file(tmp_path / f"a.{extension}", table))
    assert found.column_names == ["user", "item", "time", "rating"]
    for role, name in ROLES.items():
        assert found[role].to_pylist() == table[name].to_pylist(), role


def test_mmrec_file_with_header_suffixes_and_labels(tmp_path):
    path = tmp_path / "baby.inter"
    path.write_text("userID:token\titemID:token\tx_label:float\n7\t3\t0.0\n7\t4\t3\n8\t3\t2\n")
    labels = {"0": 0, "1": 1, "2": 2}
    roles = {"user": "userID", "item": "itemID", "label": "x_label"}
    with pytest.raises(InputError, match=r"line 3: column 'x_label:float' \(label\): '3' is not in data.split.labels"):
        read_alone(str(path), roles, labels=labels)
    path.write_text(path.read_text().replace("4\t3", "4\t1"))
    found = read_alone(str(path), roles, labels=labels)
    assert found.to_pydict() == {"user": [7, 7, 8], "item": [3, 4, 3], "split": [0, 1, 2]}


@pytest.mark.parametrize("type", [pa.int64(), pa.int8(), pa.float64(), pa.string()])
def test_labels_of_any_type(tmp_path, type):
    table = pa.table({"u": [1, 1, 2], "i": [1, 2, 3], "l": pa.array([0, 2, 1]).cast(type)})
    roles = {"user": "u", "item": "i", "label": "l"}
    found = read_alone(write_table_file(tmp_path / "a.parquet", table), roles, labels={"0": 0, "1": 1, "2": 2})
    assert found["split"].to_pylist() == [0, 2, 1]


def test_a_byte_order_mark_and_windows_line_ends(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbfuser_id,item_id\r\n1,2\r\n")
    assert read_alone(str(path), {"user": "user_id", "item": "item_id"}).to_pydict() == {"user": [1], "item": [2]}


def test_quoted_lines_in_csv_may_cross_the_blocks_of_a_file(tmp_path):
    rows = interaction_file.TEXT_BLOCK_BYTES // 500 + 100
    text = "user_id,review,item_id\n" + "".join(f'{row},"{chr(10) * 500}",7\n' for row in range(rows))
    (tmp_path / "a.csv").write_text(text)
    found = read_alone(str(tmp_path / "a.csv"), {"user": "user_id", "item": "item_id"})
    assert found["user"].to_pylist() == list(range(rows))
    assert set(found["item"].to_pylist()) == {7}


ID_TYPES = [pa.int8(), pa.int32(), pa.int64(), pa.uint8(), pa.uint32(), pa.uint64(), pa.string(), pa.large_string()]


@pytest.mark.parametrize("type", ID_TYPES, ids=str)
def test_id_types_are_preserved(tmp_path, type):
    values = [5, 3, 9, 3] if not ids.is_text(type) else ["ä", "b", "", "b"]
    values = [v or "c" for v in values]
    table = pa.table({"u": pa.array(values, type), "i": pa.array(values, type).dictionary_encode()})
    found = read_alone(write_table_file(tmp_path / "a.parquet", table), {"user": "u", "item": "i"})
    for role in ("user", "item"):
        unique, codes = ids.encode(found[role])
        if role == "user" or type != pa.large_string():  # Parquet reads those dictionaries as plain strings
            assert unique.type == type
        assert unique.take(pa.array(codes)).to_pylist() == values


def refused_file(uri: str, roles: dict[str, str] | None = None, **options) -> str:
    """The error message of parsing a file."""
    with pytest.raises(InputError) as caught:
        read_alone(uri, roles or {"user": "user_id", "item": "item_id"}, **options)
    assert uri in str(caught.value)
    return str(caught.value)


def test_a_missing_column_is_named_with_those_found(tmp_path):
    uri = write_table_file(tmp_path / "a.csv", rows_table())
    message = refused_file(uri, {"user": "user_id", "item": "asin"})
    assert "no column 'asin'; columns found: item_id, user_id, time, rating, title" in message


def test_an_ambiguous_column_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("user_id,item_id,item_id\n1,2,3\n")
    assert "has 2 columns named 'item_id'" in refused_file(str(tmp_path / "a.csv"))


def test_an_unknown_extension_asks_for_the_format(tmp_path):
    write_table_file(tmp_path / "a.csv", rows_table())
    (tmp_path / "a.csv").rename(tmp_path / "a.dat")
    assert "set data.interactions.format" in refused_file(str(tmp_path / "a.dat"))
    assert read_alone(str(tmp_path / "a.dat"), format="csv").num_rows == 60


@pytest.mark.parametrize("extension", ["parquet", "jsonl"])
def test_ids_of_another_type_are_refused(tmp_path, extension):
    table = pa.table({"user_id": [1.5, 2.0], "item_id": [1, 2]})
    assert "column 'user_id' (user) has type double" in refused_file(
        write_table_file(tmp_path / f"a.{extension}", table)
    )


def test_ratings_and_times_of_another_type_are_refused(tmp_path):
    table = pa.table({"user_id": [1], "item_id": [1], "time": ["soon"], "rating": ["good"]})
    uri = write_table_file(tmp_path / "a.parquet", table)
    assert "'time' (time) has type string; expected numbers or timestamps" in refused_file(uri, {"time": "time"})
    assert "'rating' (rating) has type string; expected numbers" in refused_file(uri, {"rating": "rating"})


@pytest.mark.parametrize("extension", FORMATS)
def test_null_ids_are_named_by_row(tmp_path, extension):
    table = pa.table({"user_id": ["a", "b", None, "d"], "item_id": [1, 2, 3, 4]})
    if extension in ("csv", "tsv", "inter"):
        table = table.set_column(0, "user_id", pa.array(["a", "b", "", "d"]))
    place = {"parquet": "row 3", "jsonl": "line 3"}.get(extension, "line 4")
    message = refused_file(write_table_file(tmp_path / f"a.{extension}", table))
    assert f": {place}: column 'user_id' (user) is {'empty' if place == 'line 4' else 'null'}" in message


def test_null_ids_are_named_by_their_row_in_the_file_not_in_the_batch(tmp_path):
    rows = interaction_file.PARQUET_BATCH_ROWS + 10
    item = np.arange(rows)
    mask = item == rows - 1
    table = pa.table({"user_id": item, "item_id": pa.array(item, mask=mask)})
    assert f": row {rows}: column 'item_id' (item) is null." in refused_file(
        write_table_file(tmp_path / "a.parquet", table)
    )


@pytest.mark.parametrize(("role", "values"), [("rating", [1.0, None]), ("rating", [1.0, np.nan]), ("time", [1, None])])
def test_null_ratings_and_times_are_named_by_row(tmp_path, role, values):
    table = pa.table({role: pa.array(values, from_pandas=False)})
    message = refused_file(write_table_file(tmp_path / "a.parquet", table), {role: role})
    assert f"row 2: column '{role}' ({role}) is {'null' if values[1] is None else 'NaN'}" in message


def test_ragged_rows_are_named(tmp_path):
    (tmp_path / "a.csv").write_text("user_id,item_id\n1,2\n3\n")
    assert "line 3: has 1 column, expected 2: '3'" in refused_file(str(tmp_path / "a.csv"))
    rows = interaction_file.TEXT_BLOCK_BYTES // len("1234567,1\n") + 1000
    (tmp_path / "b.csv").write_text("user_id,item_id\n" + "1234567,1\n" * rows + "1,2,3\n")
    assert f"line {rows + 2}: has 3 columns, expected 2: '1,2,3'" in refused_file(str(tmp_path / "b.csv"))


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.csv.gz", "a.parquet"])
def test_empty_files_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    refused_file(str(tmp_path / name))


@pytest.mark.parametrize("extension", ["csv.gz", "jsonl.gz", "parquet.gz", "parquet"])
def test_truncated_files_are_refused(tmp_path, extension):
    path = Path(write_table_file(tmp_path / f"a.{extension}", rows_table(300)))
    path.write_bytes(path.read_bytes()[:-30])
    refused_file(str(path))


def test_a_parquet_file_with_broken_pages_is_refused(tmp_path):
    path = Path(write_table_file(tmp_path / "a.parquet", rows_table(300)))
    data = bytearray(path.read_bytes())
    data[4:2000] = b"\xff" * 1996  # the pages; its footer stays
    path.write_bytes(data)
    refused_file(str(path))


@pytest.mark.parametrize("text", ["[1, 2]", '{"user_id":'])
def test_files_without_a_json_object_are_refused(tmp_path, text):
    (tmp_path / "a.jsonl").write_text(text)
    assert "not readable as jsonl" in refused_file(str(tmp_path / "a.jsonl"))


def test_text_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"user_id,item_id\n\xff\xfe,1\n")
    assert (
        "line 2: column 'user_id' (user): '\ufffd\ufffd' is not UTF-8 text (write the file as UTF-8)"
        in refused_file(str(tmp_path / "a.csv"))
    )
