"""Broken inputs that prepare finds before Ray starts: each gives an InputError with the place, the problem and the
remedy, and leaves no catalog. Found later: test_broken_late.py; configurations: test_broken_configs.py."""

import gzip

import numpy as np
import pyarrow as pa
import pytest
from broken import (
    AS_PARQUET,
    BY_TIME,
    COLUMNS,
    CSV,
    EIGHT,
    FOLDER,
    GOOD,
    JSON,
    LABEL,
    NO_NUL,
    NO_PARQUET,
    NO_VECTORS,
    NPY,
    RATING,
    ROWS,
    TIME,
    Case,
    listed,
    npy,
    one,
    parquet,
    patched,
    refused,
    replaced,
    text,
    vectors,
)

INTERACTIONS = {  # found before Ray starts
    "parquet cut at its end": one("a.parquet", GOOD[:-30], NO_PARQUET),
    "parquet cut in its middle": one("a.parquet", GOOD[: len(GOOD) // 2], NO_PARQUET),
    "parquet with other magic": one("a.parquet", GOOD[:-4] + b"PARX", NO_PARQUET),
    "parquet with a footer longer than the file": one("a.parquet", patched(GOOD, -8, -5), NO_PARQUET),
    "parquet with a broken footer": one("a.parquet", patched(GOOD, -200, -8), NO_PARQUET),
    "parquet that is csv": one("a.parquet", CSV, NO_PARQUET),
    "csv that is parquet": one("a.csv", GOOD, "write it as UTF-8"),
    "parquet without a byte": one("a.parquet", b"", "0 bytes"),
    "csv without a byte": one("a.csv", b"", "Empty CSV file"),
    "jsonl without a byte": one("a.jsonl", b"", "Empty JSON stream"),
    "gz without a byte": one("a.csv.gz", b"", "Empty CSV file"),
    "parquet of nulls without a type": one(
        "a.parquet", parquet(user_id=pa.nulls(ROWS)), "'user_id' (user) has type null"
    ),
    "a column that one file lacks": Case(
        {"a.parquet": GOOD, "a.2.csv": b"user_id,item_id\n1,2\n"},
        ["{raw}/a.2.csv has no column 'time'; columns found: user_id, item_id (name it under data.interactions)"],
        [TIME],
    ),
    "a missing column": Case(
        {}, ["{raw}/a.parquet has no column 'asin'; columns found:"], ["data.interactions.item=asin"]
    ),
    "parquet with users of text": one(
        "a.parquet",
        parquet(user_id=[f"u{n}" for n in COLUMNS["user_id"]]),
        "data.ids is integer, but user ids of {raw}/a.parquet are text, such as 'u",
        overrides=["data.ids=integer"],
    ),
    "csv with an item of text": one(
        "a.csv",
        text(item_id=replaced("item_id", 20, "007")),
        "data.ids is integer, but item ids of {raw}/a.csv are text, such as '007'; set data.ids=text",
        overrides=["data.ids=integer"],
    ),
    "jsonl with items of text": one(
        "a.jsonl",
        JSON.replace(b"2", b'"2X"'),
        "data.ids is integer, but item ids of {raw}/a.jsonl are text, such as '2X'; set data.ids=text",
        overrides=["data.ids=integer"],
    ),
    "ids of floats": one("a.parquet", parquet(user_id=[0.5] * ROWS), "'user_id' (user) has type double; expected"),
    "times of words": one(
        "a.parquet", parquet(time=["soon"] * ROWS), "'time' (time) has type string", overrides=BY_TIME
    ),
    "one time of words in csv": one(
        "a.csv",
        text(time=replaced("time", 18, "soon")),
        "line 19: column 'time' (time): 'soon' is not a number: '",
        overrides=BY_TIME,
    ),
    "times of one day in words": one(
        "a.csv",
        text(time=["31/05/2024"] * ROWS),
        "'31/05/2024' is not a time that can be read; write",
        overrides=BY_TIME,
    ),
    "times of which one has a time zone": one(
        "a.csv",
        text(time=["2024-05-31 10:00:00", "2024-05-31 10:00:00Z", *["2024-05-31 10:00:00"] * (ROWS - 2)]),
        "line 3: column 'time' (time): '2024-05-31 10:00:00Z' has a time zone, other times have none: '",
        overrides=BY_TIME,
    ),
    "csv with a comma more in every row but the header's": one(
        "a.csv", CSV.replace(b"\n", b",\n").replace(b",\n", b"\n", 1), "36 bad rows: line 2: has ", overrides=BY_TIME
    ),
    "csv with a short row that is not UTF-8": one(
        "a.csv", b"user_id,item_id\n1,2\n\xe9\n", "line 3: has 1 column, expected 2: '\ufffd'"
    ),
    "ratings of words": one("a.parquet", parquet(rating=["good"] * ROWS), "'rating' (rating) has", overrides=[RATING]),
    "one rating of words in tsv": one(
        "a.tsv",
        text("\t", rating=replaced("rating", 5, "good")),
        "line 6: column 'rating' (rating): 'good' is not a number: '",
        overrides=[RATING],
    ),
    "a split by time without times": Case({}, ["set data.interactions.time"], ["data.split.method=leave_last_out"]),
    "gz that ends early": one("a.csv.gz", gzip.compress(CSV)[:-30], "Truncated compressed stream"),
    "gz without its checksum": one("a.jsonl.gz", gzip.compress(JSON)[:-8], "Truncated compressed stream"),
    "gz with another checksum": one("a.csv.gz", patched(gzip.compress(CSV), -8, -4), "incorrect data check"),
    "gz of parquet that ends early": one("a.parquet.gz", gzip.compress(GOOD)[:-30], NO_PARQUET),
    "gz that is no gz": one("a.csv.gz", CSV, "incorrect header check"),
    "gz without its name": one("a.csv", gzip.compress(CSV), "is gzipped, but its name does not end in .gz"),
    "gz in gz": one("a.csv.gz", gzip.compress(gzip.compress(CSV)), "is gzipped twice"),
    "csv with an open quote": one(
        "a.csv", b'user_id,item_id\n"a,1\nb,2\n', "line 2: has 1 column, expected 2: '\"a,1\\nb,2'"
    ),
    "csv by semicolons": one(
        "a.csv", text(";"), "no column 'user_id'", "one column that holds ';': CSV is separated by"
    ),
    "tsv by commas": one("a.tsv", CSV, "no column 'user_id'", "one column that holds ','"),
    "csv with a short row": one("a.csv", b"user_id,item_id\n1,2\n3\n", "line 3: has 1 column, expected 2: '3'"),
    "csv with a long row": one("a.csv", b"user_id,item_id\n1,2\n3,4,5\n", "line 3: has 3 columns, expected 2: '3,4,5'"),
    "csv without a header": one(
        "a.csv", CSV.partition(b"\n")[2], "has no column 'user_id'; columns found: 0, 4, 0, 1.0"
    ),
    "csv with a column twice": one("a.csv", b"user_id,item_id,item_id\n1,2,3\n", "has 2 columns named 'item_id'"),
    "parquet with a column twice": one(
        "a.parquet", parquet(["user_id", "item_id", "item_id", "r", "l"]), "has 2 columns named 'item_id'"
    ),
    "jsonl with a key twice": one(
        "a.jsonl", JSON + b'{"user_id":1,"user_id":2}\n', "line 2: is not JSON (the key 'user_id' is there twice)"
    ),
    "csv in utf-16": one("a.csv", CSV.decode().encode("utf-16"), NO_NUL),
    "csv in utf-16 without a mark": one("a.csv", CSV.decode().encode("utf-16-le"), NO_NUL),
    "jsonl in utf-16": one("a.jsonl", JSON.decode().encode("utf-16"), NO_NUL),
    "csv with a header in latin-1": one("a.csv", b"user_id,item_id,\xe9\na,1,2\n", "is not readable as csv", "utf-8"),
    "csv with NUL bytes in an id": one("a.csv", b"user_id,item_id\n1,2\n3\0,4\n", NO_NUL),
    "csv that ends in NUL bytes": one("a.csv", CSV + b"\0" * 100, NO_NUL),
    "jsonl with a broken line": one("a.jsonl", JSON * 5 + b'{"user_id": 1, "ite\n' + JSON, "line 6: is not JSON"),
    "jsonl with a line of words": one(
        "a.jsonl", JSON + b"not json\n", "line 2: is not JSON (Expecting value): 'not json'"
    ),
    "jsonl with nested ids": one(
        "a.jsonl", b'{"user_id": {"$oid": "a"}, "item_id": 2}\n', "'user_id' (user) has type struct"
    ),
    "jsonl with one nested id": one(
        "a.jsonl", JSON + b'{"user_id": {"$oid": 1}, "item_id": 2}\n', "line 2: column 'user_id' (user) is an object"
    ),
    "jsonl of arrays": one("a.jsonl", b"[1, 2]\n", "from object to array in row 1"),
    "jsonl with one array": one("a.jsonl", JSON + b"[1, 2]\n", "line 2: is a list; expected a JSON object"),
    "json that is one array": one(
        "a.json", b'[{"user_id": 1, "item_id": 2}]', "is one JSON array; write one object per line"
    ),
    "jsonl of null": one("a.jsonl", b"null\n", "line 1 is null; expected one JSON object per line"),
    "jsonl with a null line": one(
        "a.jsonl.gz", gzip.compress(JSON * 3 + b" null\n"), "line 4 is null; expected one JSON object"
    ),
    "jsonl with fractions as ids": one(
        "a.jsonl", JSON + b'{"user_id": 1.5, "item_id": 3}\n', "'user_id' (user) has type"
    ),
    "jsonl with ids beyond int64": one(
        "a.jsonl", b'{"user_id": 99999999999999999999, "item_id": 2}', "has type double"
    ),
    "a folder in place of a file": Case(
        {"a.parquet": FOLDER},
        ["data.interactions.files: {raw}/a.parquet is a folder; name the files in it"],
        ["data.interactions.files=[a.parquet]"],
    ),
    "a glob that matches a folder only": Case(
        {"a.parquet": FOLDER}, ["data.interactions.files: no file matches {raw}/a.*"]
    ),
    "a glob that matches nothing": Case({}, ["no file matches {raw}/b-*.csv"], ["data.interactions.files=['b-*.csv']"]),
    "a file that is not there": Case({}, ["{raw}/b.csv does not exist"], ["data.interactions.files=[b.csv]"]),
    "a name with an unknown extension": one("a.dat", GOOD, "set data.interactions.format"),
    "labels that are equal": Case({}, ["[0, 1, 1]; the labels must differ"], [LABEL, "data.split.labels=[0, 1, 1]"]),
    "a catalog that is a file": Case(
        {}, ["v.npy is a file, not a folder; name another folder"], ["data.catalog={raw}/v.npy/catalog"]
    ),
    "user and item in one column": Case(
        {}, ["user and item are both column 'item_id'; name two columns"], ["data.interactions.user=item_id"]
    ),
}

FEATURES = {  # found before Ray starts
    "npy without a byte": one("v.npy", b"", "is not a readable .npy file: EOF"),
    "npy that is no npy": one("v.npy", b"PK\x03\x04" + b"0" * 90, "the magic string is not correct"),
    "npy cut at its end": one("v.npy", NPY[:-10], "is truncated: 214 bytes, but its header declares 224"),
    "npy cut in its head": one("v.npy", NPY[:40], "EOF: reading array header"),
    "npy with a broken head": one("v.npy", NPY.replace(b"{'descr'", b"{{{descr'"), "its header is invalid"),
    "npy with a negative shape": one(
        "v.npy", NPY.replace(b"(8, 3), ", b"(-8, 3),"), "its header has the shape (-8, 3)"
    ),
    "npy of objects": one(
        "v.npy", npy(np.array([[1, "a"]], object)), "holds Python objects, which are refused; save a"
    ),
    "npy of text": one("v.npy", npy(np.array([["a"]])), "features must be float or integer numbers"),
    "npy of one dimension": one(
        "v.npy", npy(np.ones(8)), "has shape (8,); features must be a matrix with one row per item"
    ),
    "npy without rows": one("v.npy", npy(np.ones((0, 3))), "hold no vector"),
    "npy without columns": one("v.npy", npy(np.ones((8, 0))), "has shape (8, 0)"),
    "npy narrower than its pca": Case(
        {}, ["data.features.v.pca is 4, but the vectors have only 3"], ["data.features.v.pca=4"]
    ),
    "ids of another length": listed("i.txt", b"1\n2\n", "has 2 ids, but {raw}/v.npy has 8 rows"),
    "ids with a blank line": listed("i.txt", b"0\n1\n2\n\n4\n5\n6\n7\n", "the item id of row 4 is null or empty"),
    "ids in utf-16": listed("i.txt", "0\n1\n".encode("utf-16"), "data.features.v.ids: ", "is not UTF-8 text"),
    "ids given twice": Case(
        {"i.txt": b"7\n" * 8}, ["{raw}/v.npy: item '7' has 8 vectors"], ["data.features.v.ids=i.txt"]
    ),
    "ids npy of objects": listed("i.npy", npy(np.arange(8).astype(object)), "holds Python objects"),
    "ids npy of two dimensions": listed(
        "i.npy", npy(np.ones((8, 1), int)), "shape (8, 1); expected one integer or string per"
    ),
    "ids npy cut at its end": listed("i.npy", npy(np.arange(8))[:-8], "it ends before its last row"),
    "ids npy with a huge shape": listed(
        "i.npy", npy(np.arange(8)).replace(b"(8,), }" + b" " * 12, b"(8" + b"0" * 12 + b",), }"), "before its last row"
    ),
    "ids parquet with broken pages": listed("i.parquet", patched(EIGHT, 4, 60), NO_VECTORS),
    "ids parquet of other columns": listed(
        "i.parquet", vectors([1], [[1]], names="ab"), "no column 'item_id'", "found: a, b"
    ),
    "ids in a folder": Case(
        {"i.txt": FOLDER}, ["data.features.v.ids: {raw}/i.txt is a folder"], ["data.features.v.ids=i.txt"]
    ),
    "vectors parquet cut": one("v.parquet", EIGHT[:-20], NO_VECTORS, overrides=[AS_PARQUET]),
    "vectors parquet without a byte": one("v.parquet", b"", NO_VECTORS, "0 bytes", overrides=[AS_PARQUET]),
    "vectors parquet with a broken footer": one(
        "v.parquet", patched(EIGHT, -200, -8), NO_VECTORS, overrides=[AS_PARQUET]
    ),
    "vectors parquet with broken pages": one("v.parquet", patched(EIGHT, 4, 300), NO_VECTORS, overrides=[AS_PARQUET]),
    "vectors parquet without rows": one(
        "v.parquet", vectors(pa.array([], pa.int64()), []), "hold no vector", overrides=[AS_PARQUET]
    ),
    "vectors of no width": one(
        "v.parquet", vectors([1], [[]], pa.list_(pa.float32(), 0)), "hold no vector", overrides=[AS_PARQUET]
    ),
    "vectors with a column twice": one(
        "v.parquet", vectors([1], [[1]], names=["vector"] * 2), "no column 'item_id'", overrides=[AS_PARQUET]
    ),
    "vectors in text": one(
        "v.parquet",
        vectors([1], ["[1]"], pa.string()),
        "'vector' has type string; expected lists of",
        overrides=[AS_PARQUET],
    ),
    "vectors with a null id": one("v.parquet", vectors([1, None], [[1]] * 2), "row 2 is null", overrides=[AS_PARQUET]),
    "vectors with an id in latin-1": one(
        "v.parquet",
        vectors(pa.array([b"a", b"\xe9"]).view(pa.string()), [[1]] * 2),
        "row 2 is not UTF-8 text",
        overrides=[AS_PARQUET],
    ),
    "vectors with ids of text": Case(
        {"v.parquet": vectors(["1", "2"], [[1], [2]])},
        ["data.ids is integer, but the item ids of data.features.v are text; set data.ids=text"],
        [AS_PARQUET, "data.ids=integer"],
    ),
    "vectors of two formats": Case(
        {"v.parquet": EIGHT},
        ["names files of several formats: npy ({raw}/v.npy), parquet ({raw}/v.parquet)", "use one format"],
        ["data.features.v.path='v.*'"],
    ),
    "a folder of vectors": Case({"w.npy": FOLDER}, ["{raw}/w.npy is a folder"], ["data.features.v.path=w.npy"]),
}


@pytest.mark.parametrize("name", [*INTERACTIONS, *FEATURES])
def test_refused_before_ray_starts(tmp_path, capsys, name):
    case = (INTERACTIONS | FEATURES)[name]
    case = Case(case.files, case.says, [text.replace("{raw}", str(tmp_path / "raw")) for text in case.overrides])
    refused(case, tmp_path)
    assert "starting Ray" not in capsys.readouterr().err


def test_a_catalog_that_is_a_file_is_left_alone(tmp_path):
    case = Case({}, ["c.yaml is a file, not a folder"], [f"data.catalog={tmp_path}/c.yaml"])
    refused(case, tmp_path)
    assert (tmp_path / "c.yaml").read_text().startswith("data:")
