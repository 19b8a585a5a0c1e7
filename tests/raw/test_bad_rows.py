"""Rows that cannot be read: found by their lines, all at once; left out on request, and listed in the catalog."""

import gzip
import io

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from broken import VECTORS, npy
from hypothesis import given, settings
from hypothesis import strategies as st
from test_parse import read_alone, refused_file

from gtc_dist.prepare import build_catalog
from gtc_dist.raw import csv_streams, interaction_file, json_rows, parse
from gtc_dist.raw.bad_rows import REJECTED

ROLES = {"user": "user_id", "item": "item_id", "time": "time", "rating": "rating"}
SHOP = """user_id,item_id,time,rating,note
u1,i1,2024-05-01 10:00:00,4,"two
lines"

u2,,2024-05-01 10:00:00,4,no item
u3,i3,n/a,4,no time
u4,i4,2024-05-02,five,a word
u5,i5,2024-05-02 11:00:00,4
u6,i6,2024-05-02 12:00:00,3,good,more
u7,i7,2024-05-02 13:00:00.5, 2 ,spaces
"""
BAD = {
    "line 5": "column 'item_id' (item) is empty",
    "line 6": "column 'time' (time): 'n/a' is not a timestamp",
    "line 7": "column 'rating' (rating): 'five' is not a number",
    "line 8": "has 4 columns, expected 5",
    "line 9": "has 6 columns, expected 5",
}
JSON = [
    '{"user_id": "a", "item_id": 1, "time": 5, "rating": 1.5}',
    "",
    '{"user_id": "b", "item_id": "x", "time": 5, "rating": 1}',
    '{"user_id": "c", "item_id": 2, "time": 5, "rating": 1',
    "[1, 2]",
    '{"user_id": "d", "item_id": 3, "rating": 1}',
    '{"user_id": "", "item_id": 3, "time": 6, "rating": 1}',
    '{"user_id": "e", "item_id": 4, "time": 7, "rating": 2}',
]


def kept_and_rejected(uri: str, roles: dict = ROLES, **options) -> tuple[list[dict], dict[str, tuple[str, str]]]:
    """Rows that are left, and place -> row and problem of the others."""
    tables = list(parse.read_table_file(parse.inspect_table(uri, roles, skip=True, **options)))
    rejected = [table for table in tables if table.schema.equals(REJECTED)]
    kept = [row for table in tables if not table.schema.equals(REJECTED) for row in table.to_pylist()]
    rows = pa.concat_tables(rejected).to_pylist() if rejected else []
    assert sum(row["count"] for row in rows) == len(rows)
    return kept, {row["place"]: (row["row"], row["problem"]) for row in rows}


@pytest.mark.parametrize("block", [8 << 20, 120])
def test_all_bad_rows_of_a_file_are_named_with_their_lines(tmp_path, monkeypatch, block):
    """Also with blocks of two rows; lines are counted through quoted line breaks and blank lines."""
    monkeypatch.setattr(interaction_file, "TEXT_BLOCK_BYTES", block)
    (tmp_path / "a.csv").write_text(SHOP)
    message = refused_file(str(tmp_path / "a.csv"), ROLES)
    assert f"a.csv: 5 bad rows: line 5: {BAD['line 5']}: 'u2,,2024-05-01 10:00:00,4,no item'; line 6: " in message
    for place, problem in BAD.items():
        assert f"{place}: {problem}: '" in message
    assert message.endswith("Correct them, or leave them out with data.interactions.on_bad_rows=skip")
    assert "\n" not in message


@pytest.mark.parametrize("block", [8 << 20, 120])
def test_bad_rows_are_left_out_and_kept_aside(tmp_path, monkeypatch, block):
    monkeypatch.setattr(interaction_file, "TEXT_BLOCK_BYTES", block)
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(SHOP.encode()))
    kept, rejected = kept_and_rejected(str(tmp_path / "a.csv.gz"))
    assert [(row["user"], row["rating"]) for row in kept] == [("u1", 4.0), ("u7", 2.0)]
    assert [row["time"].isoformat() for row in kept] == ["2024-05-01T10:00:00", "2024-05-02T13:00:00.500000"]
    assert {place: problem for place, (_, problem) in rejected.items()} == BAD
    assert rejected["line 9"][0] == "u6,i6,2024-05-02 12:00:00,3,good,more"


@pytest.mark.parametrize("lines", [1 << 16, 2])
def test_bad_lines_of_json(tmp_path, monkeypatch, lines):
    monkeypatch.setattr(json_rows, "LINES", lines)
    (tmp_path / "a.jsonl").write_text("\n".join(JSON))
    kept, rejected = kept_and_rejected(str(tmp_path / "a.jsonl"))
    assert [(row["user"], row["item"], row["time"]) for row in kept] == [("a", 1, 5), ("e", 4, 7)]
    problems = {place: problem for place, (_, problem) in rejected.items()}
    assert list(problems) == ["line 3", "line 4", "line 5", "line 6", "line 7"]
    assert problems["line 3"] == "column 'item_id' (item) is text; the rows before have integers"
    assert problems["line 4"].startswith("is not JSON (")
    assert problems["line 5"] == "is a list; expected a JSON object"
    assert problems["line 6"] == "column 'time' (time) is null"
    assert problems["line 7"] == "column 'user_id' (user) is empty"
    message = refused_file(str(tmp_path / "a.jsonl"), ROLES)
    assert all(f"{place}: {problem}" in message for place, problem in problems.items())


def test_bad_rows_of_parquet(tmp_path):
    columns = {"user_id": ["a", None, "c", "d"], "item_id": [1, 2, 3, 4], "time": [1, 2, None, 4]}
    pq.write_table(pa.table({**columns, "rating": [1.0, 2.0, 3.0, np.inf]}), tmp_path / "a.parquet")
    kept, rejected = kept_and_rejected(str(tmp_path / "a.parquet"))
    assert [row["user"] for row in kept] == ["a"]
    assert {place: problem for place, (_, problem) in rejected.items()} == {
        "row 2": "column 'user_id' (user) is null",
        "row 3": "column 'time' (time) is null",
        "row 4": "column 'rating' (rating) is infinite",
    }


def test_more_bad_rows_than_a_message_holds(tmp_path):
    (tmp_path / "a.csv").write_text("user_id,item_id\n" + "u,i\nu,\n" * 2000)
    assert "a.csv: 2,000 bad rows: line 3: " in refused_file(str(tmp_path / "a.csv"))
    assert "'u,' and 1,995 more. Correct" in refused_file(str(tmp_path / "a.csv"))
    (tmp_path / "a.csv").write_text("user_id,item_id\n" + "u,\n" * 30_000)
    assert "30,000 or more bad rows" in refused_file(str(tmp_path / "a.csv"))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(["good", "short", "long", "empty", "blank", "quoted"]), max_size=30), st.integers(1, 99)
)
def test_places_are_those_of_a_slow_reading(tmp_path_factory, kinds, block):
    """Random files against lines that are counted while the file is written."""
    text, line, expected, good = "user_id,item_id,x\n", 2, {}, 0
    for kind in kinds:
        row = {"short": "u,i", "long": "u,i,x,y", "empty": "u,,x", "blank": "", "quoted": 'u,"i\n\n",x'}.get(
            kind, "u,i,x"
        )
        if kind in ("short", "long", "empty"):
            expected[f"line {line}"] = row
        good += kind in ("good", "quoted")
        text, line = text + row + "\n", line + row.count("\n") + 1
    path = tmp_path_factory.mktemp("f") / "a.csv"
    path.write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interaction_file, "TEXT_BLOCK_BYTES", 40 + block)
        kept, rejected = kept_and_rejected(str(path), {"user": "user_id", "item": "item_id"})
    assert len(kept) == good
    assert {place: row for place, (row, _) in rejected.items()} == expected


ML = "1::1193::5::978300760\n1::661::3::978302109\n22::914::3::978301968\n"
NAMES = ("user_id", "item_id", "rating", "time")


def test_a_file_without_a_header_and_with_a_separator_of_two_characters(tmp_path):
    (tmp_path / "ratings.dat").write_text(ML)
    found = read_alone(str(tmp_path / "ratings.dat"), ROLES, format="csv", separator="::", names=NAMES)
    assert found.to_pydict() == {
        "user": [1, 1, 22],
        "item": [1193, 661, 914],
        "time": [978300760, 978302109, 978301968],
        "rating": [5.0, 3.0, 3.0],
    }


@settings(max_examples=100, deadline=None)
@given(st.text("ab:\n", max_size=30).map(str.encode), st.integers(1, 5))
def test_a_separator_is_replaced_wherever_a_read_ends(text, size):
    stream = csv_streams.OneByteSeparator(io.BytesIO(text), b"::")
    parts = list(iter(lambda: stream.read(size), b""))
    assert b"".join(parts) == text.replace(b"::", b"\x1f")


def test_semicolons(tmp_path):
    (tmp_path / "a.csv").write_text('user_id;item_id\n"a;b";1\n')
    roles = {"user": "user_id", "item": "item_id"}
    assert "set data.interactions.separator=';'" in refused_file(str(tmp_path / "a.csv"), roles)
    assert read_alone(str(tmp_path / "a.csv"), roles, separator=";").to_pydict() == {"user": ["a;b"], "item": [1]}


@pytest.mark.parametrize("block", [8 << 20, 120])
@pytest.mark.parametrize("sep", [",", "::"])
def test_rows_with_other_columns_that_are_not_utf8(tmp_path, monkeypatch, capfd, block, sep):
    """They are bad rows like others; text that is not UTF-8 in a column that is not read does no harm."""
    monkeypatch.setattr(interaction_file, "TEXT_BLOCK_BYTES", block)
    good = [f"u{n},i{n},\xe9t\xe9" for n in range(20)]
    lines = ["user_id,item_id,note", *good, "u\xe9,i1", "", "u\xe9,i2,x", "u1,i3", *good, "\xfc,,,"]
    (tmp_path / "a.csv").write_text("\n".join(lines).replace(",", sep), encoding="latin-1")
    roles = {"user": "user_id", "item": "item_id"}
    kept, rejected = kept_and_rejected(str(tmp_path / "a.csv"), roles, separator=sep)
    assert [row["user"] for row in kept] == 2 * [f"u{n}" for n in range(20)]
    assert {place: problem.partition("; ")[0] for place, (_, problem) in rejected.items()} == {
        "line 22": "has 2 columns, expected 3",
        "line 24": "column 'user_id' (user): 'u\ufffd' is not UTF-8 text (write the file as UTF-8)",
        "line 25": "has 2 columns, expected 3",
        "line 46": "has 4 columns, expected 3",
    }
    assert "a.csv: 4 bad rows: line 22: has 2 columns" in refused_file(str(tmp_path / "a.csv"), roles, separator=sep)
    assert capfd.readouterr().err == ""


def test_times_that_cannot_be_read(tmp_path):
    uri, roles = str(tmp_path / "a.csv"), {"user": "user_id", "item": "item_id", "time": "time"}
    for text in ("31/05/2024", "May 31 2024", "true"):
        (tmp_path / "a.csv").write_text("user_id,item_id,time\n" + f"u,i,{text}\n" * 3)
        message = refused_file(uri, roles)
        assert f"column 'time' (time): '{text}' is not a time that can be read; write times as numbers, " in message
    plain, zoned = "2024-05-31T10:00:00", "2024-05-31T10:00:00Z"
    for most, other, problem in (
        (plain, zoned, "has a time zone, other times have none"),
        (zoned, plain, "has no time zone, other times have one"),
    ):
        (tmp_path / "a.csv").write_text(f"user_id,item_id,time\nu,i,{most}\nu,j,{other}\nu,k,{most}\nu,l,x\n")
        _, rejected = kept_and_rejected(uri, roles)
        assert {place: found for place, (_, found) in rejected.items()} == {
            "line 3": f"column 'time' (time): '{other}' {problem}",
            "line 5": "column 'time' (time): 'x' is not a timestamp",
        }


def test_a_json_array_is_refused(tmp_path):
    for text in (
        '[{"user_id": 1, "item_id": 2}]',
        '[\n  {"user_id": 1, "item_id": 2},\n{"user_id": 1, "item_id": 3}\n]',
    ):
        (tmp_path / "a.json").write_text(text)
        assert "a.json is one JSON array; write one object per line" in refused_file(str(tmp_path / "a.json"))


def test_files_in_which_no_row_fits(tmp_path):
    uri, roles = str(tmp_path / "a.csv"), {"user": "user_id", "item": "item_id", "time": "time"}
    (tmp_path / "a.csv").write_text("user_id,item_id,time\n")
    assert kept_and_rejected(uri, roles) == ([], {})
    assert not list(parse.read_table_file(parse.inspect_table(uri, roles)))
    (tmp_path / "a.csv").write_text("user_id,item_id,time\nu,i,2024-05-31,\n")
    assert "line 2: has 4 columns, expected 3" in refused_file(uri, roles)


def test_headers_that_are_missing_or_too_many(tmp_path):
    (tmp_path / "a.csv").write_text("196,242,3,881250949\n186,302,3,891717742\n")
    uri, roles = str(tmp_path / "a.csv"), {"user": "user_id", "item": "item_id"}
    assert "looks like a file without a header line; name its columns: data.interactions.columns=[" in refused_file(uri)
    assert "2 bad rows: line 1: has 4 columns, expected 3: '196," in refused_file(uri, roles, names=NAMES[:3])
    assert read_alone(uri, roles, names=NAMES).to_pydict() == {"user": [196, 186], "item": [242, 302]}
    (tmp_path / "a.csv").write_text("user_id,item_id\n1,2\n")
    assert "has a header line" in refused_file(uri, roles, names=("user_id", "item_id"))


def test_the_catalog_lists_the_rejected_rows_and_the_summary_counts_them(tmp_path, ray_local, capsys):
    raw, catalog = tmp_path / "raw", tmp_path / "catalog"
    raw.mkdir()
    pairs = np.random.default_rng(0).permutation(48)[:36]
    lines = [f"{p // 8},{p % 8}" for p in pairs]
    (raw / "a.csv").write_text("\n".join(["user_id,item_id", *lines[:20], "7", *lines[20:], ",3", lines[0]]) + "\n")
    (raw / "v.npy").write_bytes(npy(VECTORS))
    config = tmp_path / "c.yaml"
    config.write_text(
        f"data: {{raw: {raw}, catalog: {catalog}, interactions: {{files: [a.csv], on_bad_rows: skip}}, "
        f"features: {{v: {{path: v.npy}}}}}}\nrun: {{storage: {tmp_path}/runs, name: x}}\n"
    )
    build_catalog.main(["--config", str(config)])
    shown = capsys.readouterr().out
    assert "left out  2 rows that cannot be read (interactions/rejected.parquet of the catalog lists them)" in shown
    assert "left out  1 repeats of a user and an item" in shown
    rejected = pq.read_table(catalog / "interactions" / "rejected.parquet").to_pylist()
    assert rejected == [
        {"file": f"{raw}/a.csv", "place": "line 22", "row": "7", "problem": "has 1 column, expected 2"},
        {"file": f"{raw}/a.csv", "place": "line 39", "row": ",3", "problem": "column 'user_id' (user) is empty"},
    ]
