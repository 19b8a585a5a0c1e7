"""The command against a corpus of broken inputs. Each ends in an InputError that says where, what and what to do, and
leaves no catalog; or in a catalog whose manifest counts what was left out."""

import gzip
import io
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gtc_dist import prepare
from gtc_dist.config import load_config
from gtc_dist.data import ids, parse
from gtc_dist.data.catalog import MANIFEST, SPLITS, Catalog
from gtc_dist.errors import InputError

ROWS = 36
PAIRS = np.random.default_rng(0).permutation(48)[:ROWS]  # of 6 users and 8 items
COLUMNS = {
    "user_id": (PAIRS // 8).tolist(),
    "item_id": (PAIRS % 8).tolist(),
    "time": list(range(ROWS)),
    "rating": [1.0, 2.0, 3.0] * 12,
    "x_label": [0] * 24 + [1] * 6 + [2] * 6,
}


def parquet(names: list[str] | None = None, rows: int = ROWS, **columns) -> bytes:
    """The interactions with some columns replaced."""
    sink = io.BytesIO()
    table = pa.table({**COLUMNS, **columns})
    pq.write_table((table if names is None else table.rename_columns(names)).slice(0, rows), sink)
    return sink.getvalue()


def replaced(column: str, row: int, value) -> list:
    """A column with another value in a row, counted from 1."""
    values = list(COLUMNS[column])
    values[row - 1] = value
    return values


def text(sep: str = ",", **columns) -> bytes:
    table = {**COLUMNS, **columns}
    return "".join(
        sep.join(map(str, row)) + "\n" for row in [tuple(table), *zip(*table.values(), strict=True)]
    ).encode()


def npy(array) -> bytes:
    sink = io.BytesIO()
    np.save(sink, array, allow_pickle=True)
    return sink.getvalue()


def vectors(item_ids, rows: list, type: pa.DataType | None = None, names=("item_id", "vector")) -> bytes:
    sink = io.BytesIO()
    columns = [pa.array(item_ids), pa.array(rows, type or pa.list_(pa.float32()))]
    pq.write_table(pa.table(columns, names=list(names)), sink)
    return sink.getvalue()


def patched(data: bytes, start: int, stop: int) -> bytes:
    return data[:start] + b"\xff" * len(data[start:stop]) + data[stop:]


VECTORS = np.random.default_rng(1).normal(size=(8, 3)).astype(np.float32)
GOOD, CSV, NPY = parquet(), text(), npy(VECTORS)
JSON = b'{"user_id": 1, "item_id": 2}\n'
EIGHT = vectors(range(8), VECTORS.tolist())
TIME, RATING, LABEL = "data.interactions.time=time", "data.interactions.rating=rating", "data.split.method=label"
BY_TIME = [TIME, "data.split.method=global_time"]
AS_PARQUET = "data.features.v.path=v.parquet"
GIVEN = ["data.split.method=given", *(f"data.split.{name}=[{name}.parquet]" for name in SPLITS)]
FOLDER = object()  # stands for a folder of that name
NO_NUL = "has NUL bytes, as UTF-16 or a broken file has; write it as UTF-8"


@dataclass
class Case:
    """Files below data.raw (a.* are interactions), overrides, and parts of the message. Without interactions or
    vectors of its own it gets good ones. {raw} stands for the folder."""

    files: dict = field(default_factory=dict)
    says: list[str] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)

    def write(self, folder: Path) -> tuple[list[str], str]:
        """The command's arguments, and the folder of the raw files."""
        raw = folder / "raw"
        files = {"v.npy": NPY, **self.files}
        if not any(name.startswith(("a.", "train")) for name in files):
            files["a.parquet"] = GOOD
        for name, data in files.items():
            path = raw / name
            path.parent.mkdir(exist_ok=True)
            path.mkdir() if data is FOLDER else path.write_bytes(data)
        config = folder / "c.yaml"
        config.write_text(
            f"data: {{raw: {raw}, catalog: {folder}/catalog, interactions: {{files: ['a.*']}}, "
            "features: {v: {path: v.npy}}, split: {valid_share: 0.2, test_share: 0.2}}\n"
            f"run: {{storage: {folder}/runs, name: x}}\ngraph: {{item_neighbours: 2, user_neighbours: 2}}\n"
        )
        return ["--config", str(config), *self.overrides], str(raw)


def refused(case: Case, folder: Path) -> str:
    """What the command says; it leaves no catalog."""
    arguments, raw = case.write(folder)
    with pytest.raises(InputError) as caught:
        prepare.main(arguments)
    assert type(caught.value) is InputError
    assert not (folder / "catalog").exists()
    for part in case.says:
        assert part.replace("{raw}", raw) in str(caught.value)
    assert "\0" not in str(caught.value)
    return str(caught.value)


def one(name: str, data, *says: str, overrides=()) -> Case:
    """One file that is broken, and named."""
    return Case({name: data}, [f"{{raw}}/{name}", *says], list(overrides))


def listed(name: str, data: bytes, *says: str) -> Case:
    """A file of ids beside v.npy."""
    return Case({name: data}, [f"{{raw}}/{name}", *says], [f"data.features.v.ids={name}"])


NO_PARQUET = "is not readable as parquet (mend it or write it again)"
NO_VECTORS = "is not a readable Parquet file (mend it or write it again)"

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
    "files that disagree on the id type": Case(
        {"a.parquet": GOOD, "a.2.parquet": parquet(user_id=[f"u{u}" for u in COLUMNS["user_id"]])},
        ["user ids are integers (int64) in {raw}/a.parquet but strings in {raw}/a.2.parquet; write them with one type"],
    ),
    "a column that one file lacks": Case(
        {"a.parquet": GOOD, "a.2.csv": b"user_id,item_id\n1,2\n"},
        ["{raw}/a.2.csv has no column 'time'; columns found: user_id, item_id (name it under data.interactions)"],
        [TIME],
    ),
    "a missing column": Case(
        {}, ["{raw}/a.parquet has no column 'asin'; columns found:"], ["data.interactions.item=asin"]
    ),
    "ids of floats": one("a.parquet", parquet(user_id=[0.5] * ROWS), "'user_id' (user) has type double; integers or"),
    "times of words": one(
        "a.parquet", parquet(time=["soon"] * ROWS), "'time' (time) has type string", overrides=BY_TIME
    ),
    "one time of words in csv": one(
        "a.csv",
        text(time=replaced("time", 18, "soon")),
        "type string ('soon' in row 18); numbers or",
        overrides=BY_TIME,
    ),
    "ratings of words": one("a.parquet", parquet(rating=["good"] * ROWS), "'rating' (rating) has", overrides=[RATING]),
    "one rating of words in tsv": one(
        "a.tsv", text("\t", rating=replaced("rating", 5, "good")), "('good' in row 5); numbers are", overrides=[RATING]
    ),
    "a split by time without times": Case({}, ["set data.interactions.time"], ["data.split.method=leave_last_out"]),
    "gz that ends early": one("a.csv.gz", gzip.compress(CSV)[:-30], "Truncated compressed stream"),
    "gz without its checksum": one("a.jsonl.gz", gzip.compress(JSON)[:-8], "Truncated compressed stream"),
    "gz with another checksum": one("a.csv.gz", patched(gzip.compress(CSV), -8, -4), "incorrect data check"),
    "gz of parquet that ends early": one("a.parquet.gz", gzip.compress(GOOD)[:-30], NO_PARQUET),
    "gz that is no gz": one("a.csv.gz", CSV, "incorrect header check"),
    "gz without its name": one("a.csv", gzip.compress(CSV), "is gzipped, but its name does not end in .gz"),
    "gz in gz": one("a.csv.gz", gzip.compress(gzip.compress(CSV)), "is gzipped twice"),
    "csv with an open quote": one("a.csv", b'user_id,item_id\n"a,1\nb,2\n', "Row #2: Expected 2 columns, got 1"),
    "csv by semicolons": one(
        "a.csv", text(";"), "no column 'user_id'", "one column that holds ';': CSV is separated by"
    ),
    "tsv by commas": one("a.tsv", CSV, "no column 'user_id'", "one column that holds ','"),
    "csv with a short row": one("a.csv", b"user_id,item_id\n1,2\n3\n", "Row #3: Expected 2 columns, got 1: 3"),
    "csv with a long row": one("a.csv", b"user_id,item_id\n1,2\n3,4,5\n", "Row #3: Expected 2 columns, got 3: 3,4,5"),
    "csv without a header": one(
        "a.csv", CSV.partition(b"\n")[2], "has no column 'user_id'; columns found: 0, 4, 0, 1.0"
    ),
    "csv with a column twice": one("a.csv", b"user_id,item_id,item_id\n1,2,3\n", "has 2 columns named 'item_id'"),
    "parquet with a column twice": one(
        "a.parquet", parquet(["user_id", "item_id", "item_id", "r", "l"]), "has 2 columns named 'item_id'"
    ),
    "jsonl with a key twice": one("a.jsonl", JSON + b'{"user_id":1,"user_id":2}\n', "twice in row 2"),
    "csv in utf-16": one("a.csv", CSV.decode().encode("utf-16"), NO_NUL),
    "csv in utf-16 without a mark": one("a.csv", CSV.decode().encode("utf-16-le"), NO_NUL),
    "jsonl in utf-16": one("a.jsonl", JSON.decode().encode("utf-16"), NO_NUL),
    "csv with a header in latin-1": one("a.csv", b"user_id,item_id,\xe9\na,1,2\n", "is not readable as csv", "utf-8"),
    "csv with NUL bytes in an id": one("a.csv", b"user_id,item_id\n1,2\n3\0,4\n", NO_NUL),
    "csv that ends in NUL bytes": one("a.csv", CSV + b"\0" * 100, NO_NUL),
    "jsonl with a broken line": one("a.jsonl", JSON * 5 + b'{"user_id": 1, "ite\n' + JSON, "in row 6"),
    "jsonl with a line of words": one("a.jsonl", JSON + b"not json\n", "Invalid value. in row 2"),
    "jsonl with nested ids": one(
        "a.jsonl", b'{"user_id": {"$oid": "a"}, "item_id": 2}\n', "'user_id' (user) has type struct"
    ),
    "jsonl with one nested id": one(
        "a.jsonl", JSON + b'{"user_id": {"$oid": 1}, "item_id": 2}\n', "to object in row 2"
    ),
    "jsonl of arrays": one("a.jsonl", b"[1, 2]\n", "from object to array in row 1"),
    "jsonl with one array": one("a.jsonl", JSON + b"[1, 2]\n", "from object to array in row 2"),
    "json that is one array": one("a.json", b'[{"user_id": 1, "item_id": 2}]', "from object to array in row 1"),
    "jsonl of null": one("a.jsonl", b"null\n", "line 1 is null; one JSON object a line is needed"),
    "jsonl with a null line": one(
        "a.jsonl.gz", gzip.compress(JSON * 3 + b" null\n"), "line 4 is null; one JSON object a"
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
    "a name that does not tell the format": one("a.dat", GOOD, "set data.interactions.format"),
    "labels that are alike": Case({}, ["test_label must differ"], [LABEL, "data.split.test_label=1"]),
    "a catalog that is a file": Case(
        {}, ["v.npy is a file; name another folder"], ["data.catalog={raw}/v.npy/catalog"]
    ),
    "user and item in one column": Case(
        {}, ["user and item are both column 'item_id'; name two columns"], ["data.interactions.user=item_id"]
    ),
}

FEATURES = {  # found before Ray starts
    "npy without a byte": one("v.npy", b"", "is not a .npy file that can be read: EOF"),
    "npy that is no npy": one("v.npy", b"PK\x03\x04" + b"0" * 90, "the magic string is not correct"),
    "npy cut at its end": one("v.npy", NPY[:-10], "is truncated: 214 bytes, its header needs 224"),
    "npy cut in its head": one("v.npy", NPY[:40], "EOF: reading array header"),
    "npy with a broken head": one("v.npy", NPY.replace(b"{'descr'", b"{{{descr'"), "its head is broken"),
    "npy with a negative shape": one(
        "v.npy", NPY.replace(b"(8, 3), ", b"(-8, 3),"), "its head gives the shape (-8, 3)"
    ),
    "npy of objects": one(
        "v.npy", npy(np.array([[1, "a"]], object)), "holds Python objects, which are not read; save a"
    ),
    "npy of text": one("v.npy", npy(np.array([["a"]])), "features must be float or integer numbers"),
    "npy of one dimension": one("v.npy", npy(np.ones(8)), "has shape (8,); features must be a matrix, one row an item"),
    "npy without rows": one("v.npy", npy(np.ones((0, 3))), "hold no vector"),
    "npy without columns": one("v.npy", npy(np.ones((8, 0))), "has shape (8, 0)"),
    "npy narrower than its pca": Case(
        {}, ["data.features.v.pca is 4, but the vectors have just 3"], ["data.features.v.pca=4"]
    ),
    "ids of another length": listed("i.txt", b"1\n2\n", "has 2 ids, but {raw}/v.npy has 8 rows"),
    "ids with a blank line": listed("i.txt", b"0\n1\n2\n\n4\n5\n6\n7\n", "the item id of row 4 is null or empty"),
    "ids in utf-16": listed("i.txt", "0\n1\n".encode("utf-16"), "data.features.v.ids: ", "is not UTF-8 text"),
    "ids given twice": Case(
        {"i.txt": b"7\n" * 8}, ["{raw}/v.npy: item '7' has 8 vectors"], ["data.features.v.ids=i.txt"]
    ),
    "ids npy of objects": listed("i.npy", npy(np.arange(8).astype(object)), "holds Python objects"),
    "ids npy of two dimensions": listed(
        "i.npy", npy(np.ones((8, 1), int)), "shape (8, 1); one integer or string a row"
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
        "'vector' has type string; lists of numbers",
        overrides=[AS_PARQUET],
    ),
    "vectors whose files disagree on the id type": Case(
        {"v1.parquet": vectors([1], [[1]]), "v2.parquet": vectors(["2"], [[1]])},
        ["integers (int64) in {raw}/v1.parquet but strings in {raw}/v2.parquet"],
        ["data.features.v.path=v*.parquet"],
    ),
    "vectors with a null id": one("v.parquet", vectors([1, None], [[1]] * 2), "row 2 is null", overrides=[AS_PARQUET]),
    "vectors with an id in latin-1": one(
        "v.parquet",
        vectors(pa.array([b"a", b"\xe9"]).view(pa.string()), [[1]] * 2),
        "row 2 is not UTF-8 text",
        overrides=[AS_PARQUET],
    ),
    "vectors of two formats": Case(
        {"v.parquet": EIGHT}, ["names .npy and Parquet files", "keep one kind"], ["data.features.v.path='v.*'"]
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
    case = Case({}, ["cannot be a folder, since", "c.yaml is a file"], [f"data.catalog={tmp_path}/c.yaml"])
    refused(case, tmp_path)
    assert (tmp_path / "c.yaml").read_text().startswith("data:")


# --- found by Ray's tasks or later ---

LATE = {
    "parquet with broken pages": one("a.parquet", patched(GOOD, 4, 600), NO_PARQUET),
    "parquet without rows": one("a.parquet", parquet(rows=0), "no interactions in"),
    "parquet with a null id": one(
        "a.parquet", parquet(item_id=replaced("item_id", 4, None)), "is null or empty in row 4"
    ),
    "csv with an empty id": one(
        "a.csv", text(user_id=replaced("user_id", 9, "")), "'user_id' is null or empty in row 9"
    ),
    "jsonl of ids in latin-1": one("a.jsonl", JSON.replace(b"1", b'"\xe9"'), "'user_id' is not UTF-8 text in row 1"),
    "parquet with a NUL byte in an id": one(
        "a.parquet", parquet(user_id=["a", "b\0"] * 18), "column 'user_id' holds a NUL byte in row 2"
    ),
    "ids of uint64 beside negative ones": Case(
        {
            "a.parquet": parquet(user_id=pa.array(replaced("user_id", 1, 2**64 - 1), pa.uint64())),
            "a.2.parquet": parquet(user_id=replaced("user_id", 1, -5)),
        },
        ["uint64 in {raw}/a.parquet", "int64 in {raw}/a.2.parquet", "do not fit int64", "18446744073709551615"],
    ),
    "a null time": one(
        "a.parquet",
        parquet(time=replaced("time", 4, None)),
        "column 'time' is null or empty in row 4",
        overrides=BY_TIME,
    ),
    "nanoseconds that say milliseconds": one(
        "a.parquet",
        parquet(time=pa.array(replaced("time", 3, 17 * 10**17), pa.timestamp("ms"))),
        "column 'time' (time) is out of range in row 3",
        overrides=BY_TIME,
    ),
    "a time beyond int64": one(
        "a.parquet",
        parquet(time=pa.array(replaced("time", 2, 2**63), pa.uint64())),
        "column 'time' (time) is out of range in row 2",
        overrides=BY_TIME,
    ),
    "an infinite rating": one(
        "a.parquet", parquet(rating=replaced("rating", 7, np.inf)), "'rating' is infinite in row 7", overrides=[RATING]
    ),
    "a rating beyond float64": one(
        "a.parquet",
        parquet(rating=[1] * 35 + [2**60 + 1]),
        "'rating' (rating) is out of range in row 36",
        overrides=[RATING],
    ),
    "another label": one(
        "a.parquet",
        parquet(x_label=replaced("x_label", 5, 7)),
        "label '7' in column 'x_label', row 5, is none of data.split.train_label",
        overrides=[LABEL],
    ),
    "a label that never occurs": Case(
        {"a.parquet": parquet(rows=30)},
        ["the test split is empty", "column 'x_label' needs rows with data.split.test_label=2"],
        [LABEL],
    ),
    "a k-core that removes everything": Case({}, ["k_core=9 leaves no interaction"], ["data.interactions.k_core=9"]),
    "a split that is in train too": Case(
        {f"{name}.parquet": GOOD for name in SPLITS},
        ["valid (valid.parquet in {raw}) repeats 36 interactions of train", "remove them from one of the two"],
        GIVEN,
    ),
    "npy with NaN": one(
        "v.npy",
        npy(np.where(np.arange(24).reshape(8, 3) == 7, np.nan, VECTORS)),
        "vector of item 2 (row 3) has a value that",
    ),
    "npy with inf": one("v.npy", npy(np.full((8, 3), np.inf)), "item 0 (row 1) has a value that is not finite (inf"),
    "npy with fewer rows than items": one("v.npy", npy(VECTORS[:5]), "has 5 rows, one for each item id from 0, but"),
    "npy for items with names": one(
        "v.npy", NPY, "the interactions' item ids are strings; list each row's id (data.features.v.ids)"
    ),
    "vectors of another width": Case(
        {"v1.parquet": vectors([0, 1], [[1, 2]] * 2), "v2.parquet": vectors([2, 3], [[1, 2], [1, 2, 3]])},
        ["{raw}/v2.parquet: the vector of item 3 (row 2) has 3 values where others have 2"],
        ["data.features.v.path=v*.parquet"],
    ),
    "vectors of other items": one(
        "v.parquet", vectors([100], [[1]]), "none of its ids (such as 100) is an item", overrides=[AS_PARQUET]
    ),
}
LATE["npy for items with names"].files["a.parquet"] = parquet(item_id=[f"i{i}" for i in COLUMNS["item_id"]])


@pytest.mark.parametrize("name", LATE)
def test_refused_after_reading(tmp_path, ray_local, name):
    refused(LATE[name], tmp_path)


# --- inputs that are odd but not wrong ---


@dataclass
class Kept(Case):
    """What becomes of it: rows that are dropped by reason, and further counts of the manifest."""

    dropped: dict = field(default_factory=dict)
    counts: dict = field(default_factory=dict)


NFC, NFD, CYRILLIC = "\u00e9", "e\u0301", "\u0430"
KEPT = {
    "repeated interactions": Kept({"a.parquet": GOOD, "a.2.parquet": GOOD}, dropped={"duplicate": ROWS}),
    "low ratings": Kept({}, [], [RATING, "data.interactions.min_rating=2"], {"min_rating": 12, "features/v": 1}),
    "vectors of unknown items": Kept({"v.npy": npy(np.arange(60.0).reshape(20, 3))}, dropped={"features/v": 12}),
    "ids alike to the eye": Kept(
        {"a.csv": text(user_id=[[NFC, NFD, "a", CYRILLIC, "e", "A"][u] for u in COLUMNS["user_id"]])},
        counts={"users": 6},
    ),
    "ids beyond int32, negative ids": Kept(
        {"a.parquet": parquet(user_id=[2**40 * u - 5 for u in COLUMNS["user_id"]])}, counts={"users": 6}
    ),
    "text ids beyond int64": Kept(
        {"a.csv": text(user_id=[10**20 + u for u in COLUMNS["user_id"]])}, counts={"users": 6}
    ),
    "csv with a mark, quotes and line breaks": Kept(
        {"a.csv": b"\xef\xbb\xbf" + text(user_id=[f'"u,\n""{u}"""' for u in COLUMNS["user_id"]])}, counts={"users": 6}
    ),
    "valid and test users that train lacks": Kept(
        {
            "train.parquet": GOOD,
            "valid.parquet": parquet(user_id=[100] * ROWS, rows=3),
            "test.parquet": parquet(user_id=[200] * ROWS, rows=3),
        },
        overrides=GIVEN,
        dropped={"duplicate": 2},
        counts={"users": 8},
    ),
    "rows of Fortran order, big-endian ids": Kept(
        {"v.npy": npy(np.asfortranarray(VECTORS)), "i.npy": npy(np.arange(8, dtype=">i8"))},
        overrides=["data.features.v.ids=i.npy"],
    ),
    "vectors that are all alike": Kept(
        {"v.npy": npy(np.full((8, 3), 2.5)), "i.txt": b"\xef\xbb\xbf0\n1\n2\n3\n4\n5\n6\n7\n"},
        overrides=["data.features.v.ids=i.txt"],
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_kept_with_counts(tmp_path, ray_local, name):
    case = KEPT[name]
    arguments, _ = case.write(tmp_path)
    assert prepare.main(arguments) == 0
    catalog = Catalog(str(tmp_path / "catalog"), verify="checksum")
    held = catalog.manifest.model_dump()
    assert {reason: rows for reason, rows in held["dropped"].items() if rows} == case.dropped
    assert {key: held[key] for key in case.counts} == case.counts
    assert np.isfinite(catalog.features("v")).all()
    for graph in held["graphs"]:
        assert np.isfinite(catalog.graph(graph).weight).all()


def test_an_error_leaves_the_catalog_before_it_alone(tmp_path, ray_local):
    arguments, _ = Case().write(tmp_path)
    prepare.main(arguments)
    before = {path: path.read_bytes() for path in (tmp_path / "catalog").rglob("*") if path.is_file()}
    assert tmp_path / "catalog" / MANIFEST in before
    (tmp_path / "raw" / "v.npy").write_bytes(npy(np.full((8, 3), np.nan)))
    with pytest.raises(InputError, match="not finite"):
        prepare.main([*arguments, "--force"])
    assert {path: path.read_bytes() for path in (tmp_path / "catalog").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe{}", b"[]", b'{"users": 3}'])
def test_a_broken_manifest_is_refused(tmp_path, data):
    (tmp_path / "catalog").mkdir()
    (tmp_path / "catalog" / MANIFEST).write_bytes(data)
    arguments, _ = Case().write(tmp_path)
    with pytest.raises(InputError, match=r"manifest\.json"):
        prepare.main(arguments)
    assert [path.read_bytes() for path in (tmp_path / "catalog").iterdir()] == [data]


def test_a_damaged_manifest_is_rebuilt_by_force(tmp_path, ray_local):
    arguments, _ = Case().write(tmp_path)
    prepare.main(arguments)
    path = tmp_path / "catalog" / MANIFEST
    whole = path.read_text()
    path.write_text(whole.replace('"users":', '"losers":'))
    with pytest.raises(InputError, match=r"damaged manifest\.json; --force rebuilds it: (?s:.*)users"):
        prepare.main(arguments)
    assert prepare.main([*arguments, "--force"]) == 0
    assert path.read_text() == whole


# --- configurations ---

MINIMAL = "data: {raw: r, catalog: c}\nrun: {storage: s, name: n}\n"
CONFIGS = {  # text, overrides, part of the message
    "a key twice": (MINIMAL + "train: {lr: 1, lr: 2}\n", [], ":3: key 'lr' is given twice"),
    "a section twice": (MINIMAL + "data: {raw: x}\n", [], ":3: key 'data' is given twice"),
    "a merge key twice": (MINIMAL + "train: {<<: {lr: 1}, <<: {lr: 2}}\n", [], ":3: key '<<' is given twice"),
    "a merge of a number": (MINIMAL + "train: {<<: 5}\n", [], "expected a mapping or list of mappings for merging"),
    "an alias without an anchor": (MINIMAL + "train: *t\n", [], "found undefined alias 't'"),
    "a section that holds itself": (MINIMAL + "dataset: &d {a: *d}\n", [], ":3: this value holds itself by an alias"),
    "a list that holds itself": (MINIMAL + "model: {fanout: &f [*f]}\n", [], ":3: this value holds itself by an alias"),
    "a tab": ("data:\n\traw: r\n", [], "cannot start any token"),
    "a list at the top": ("- data\n- run\n", [], "holds a list; expected sections such as data: and run:"),
    "a word at the top": ("data\n", [], "holds a str; expected sections"),
    "nothing": ("", [], "key 'data' is missing"),
    "two documents": (MINIMAL + "---\n" + MINIMAL, [], "expected a single document"),
    "an open bracket": ("data: {raw: [r\n", [], "is not valid YAML"),
    "a list as a key": (MINIMAL + "? [a]\n: 1\n", [], ":3: a key must be a plain word, found a list"),
    "a date as a key": (MINIMAL + "dataset: {2024-01-01: 1}\n", [], ":3: a key must be a plain word, found a date"),
    "a number as a key": (MINIMAL + "7: 1\n", [], "key '7': Keys should be strings; found 7"),
    "a date that is none": (MINIMAL, ["run.name=2024-02-30"], "'2024-02-30' is no timestamp (day is out of range"),
    "a date as a name": (MINIMAL, ["run.name=2024-02-03"], "key 'run.name': Input should be a valid string"),
    "a tag that does not fit": (MINIMAL + "train: {lr: !!int abc}\n", [], ":3: 'abc' is no int"),
    "a tag that runs code": (MINIMAL + "x: !!python/object/apply:os.system [ls]\n", [], "is not valid YAML"),
    "a number of 5000 digits": (MINIMAL + f"train: {{seed: {'9' * 5000}}}\n", [], ":3: '9999"),
    "half of a surrogate pair": (MINIMAL.replace(": r", ': "\\ud800"'), [], ":1: '\\ud800' is no str"),
    "5000 lists in each other": (MINIMAL + "x: " + "[" * 5000 + "]" * 5000, [], "lie too deep in each other"),
    "a NUL byte": (MINIMAL + "x: a\0b\n", [], "special characters are not allowed"),
    "latin-1": (b"# \xe9\n" + MINIMAL.encode(), [], "is not UTF-8 text"),
    "utf-16": (MINIMAL.encode("utf-16"), [], "is not UTF-8 text"),
    "an unknown section": (MINIMAL + "modle: {width: 3}\n", [], "unknown key 'modle'; did you mean 'model'?"),
    "an unknown key": (MINIMAL, ["train.batchsize=3"], "unknown key 'train.batchsize'; did you mean 'batch_size'?"),
    "a section without a value": (MINIMAL + "train:\n", [], "key 'train': Input should be a valid dictionary"),
    "a section that is a list": (MINIMAL + "train: [1]\n", [], "key 'train': Input should be a valid dictionary"),
    "files that are one word": (MINIMAL, ["data.interactions.files=a.csv"], "files': Input should be a valid list"),
    "features that are a list": (
        MINIMAL,
        ["data.features=[v.npy]"],
        "'data.features': Input should be a valid dictionary",
    ),
    "a modality that is a word": (MINIMAL, ["data.features.v=v.npy"], "key 'data.features.v': Input should be"),
    "a folder without a name": (MINIMAL, ["data.catalog="], "key 'data.catalog': String should have at least 1"),
    "words in place of a number": (
        MINIMAL,
        ["train.epochs=many"],
        "key 'train.epochs': Input should be a valid integer",
    ),
    "a fraction in place of a count": (MINIMAL, ["train.epochs=1.5"], "key 'train.epochs': Input should be"),
    "a negative weight": (MINIMAL, ["train.w_tc=-1"], "key 'train.w_tc': Input should be greater than or equal to 0"),
    "a negative k-core": (MINIMAL, ["data.interactions.k_core=-2"], "k_core': Input should be greater"),
    "NaN": (MINIMAL, ["train.lr=.nan"], "key 'train.lr': Input should be a finite number; found nan"),
    "an endless number": (MINIMAL, ["train.lr=1e999"], "key 'train.lr': Input should be a finite number"),
    "more memory than there is": (
        MINIMAL,
        ["prepare.memory_gib=1e308"],
        "key 'prepare.memory_gib': Input should be less",
    ),
    "fanout against layers": (
        MINIMAL,
        ["model.propagation=sampled", "model.fanout=[5]"],
        "model: fanout [5] names 1 layers, model.layers is 2",
    ),
    "start_step against steps": (MINIMAL, ["model.diffusion.steps=50"], "start_step 100 is beyond steps 50"),
    "shares that leave no train": (MINIMAL, ["data.split.valid_share=0.95"], "leaves nothing to train on"),
    "an override without =": (MINIMAL, ["train.epochs"], "override 'train.epochs' is not of the form a.b=c"),
    "an override without a key": (MINIMAL, ["=3"], "override '=3' is not of the form a.b=c"),
    "an override of broken YAML": (MINIMAL, ["model.fanout=[1"], "override model.fanout is not valid YAML"),
    "an override with a key twice": (MINIMAL, ["train={lr: 1, lr: 2}"], "override train:1: key 'lr' is given twice"),
    "an override with a NUL byte": (MINIMAL, ["run.name=a\0"], "override run.name is not valid YAML"),
    "an override of an element": (MINIMAL, ["data.interactions.files.0=x"], "files': Input should be a valid list"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_refused_configurations(tmp_path, name):
    text, overrides, says = CONFIGS[name]
    path = tmp_path / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    for read in (lambda: load_config(path, overrides), lambda: prepare.main(["--config", str(path), *overrides])):
        with pytest.raises(InputError) as caught:
            read()
        assert says in str(caught.value)
        assert str(path) in str(caught.value) or "override" in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["c.yaml"]


def test_a_folder_as_configuration(tmp_path):
    with pytest.raises(InputError, match=f"config file {tmp_path} is a folder; name a YAML file"):
        load_config(tmp_path)


def test_anchors_and_merge_keys_work(tmp_path):
    """A merged key may be given again, also where what is merged has merged keys itself."""
    (tmp_path / "c.yaml").write_text(
        "data: {raw: &r x, catalog: *r, features: {a: &a {path: p, pca: 3}, b: &b {<<: *a, pca: 4}, "
        "c: {<<: *b, path: q}}}\nrun: {storage: s, name: n}\n"
    )
    data = load_config(tmp_path / "c.yaml").data
    assert (data.raw, data.catalog) == ("x", "x")
    assert {name: (m.path, m.pca) for name, m in data.features.items()} == {"a": ("p", 3), "b": ("p", 4), "c": ("q", 4)}


# --- any bytes, any ids ---

QUICK = settings(deadline=None, max_examples=25)
ROLES = {"user": "user_id", "item": "item_id"}


def rows_of(path: Path) -> list[dict] | None:
    """The rows of one file without Ray, or None if it is refused by its name."""
    found = None
    try:
        found = [row for table in parse.read(parse.inspect(str(path), ROLES)) for row in table.to_pylist()]
    except InputError as error:
        said = str(error)
    assert found is not None or str(path) in said
    return found


@QUICK
@given(st.sampled_from(["a.parquet", "a.csv", "a.jsonl", "a.csv.gz"]), st.data())
def test_a_file_with_any_bytes_changed_is_read_or_refused(tmp_path_factory, name, draw):
    data = bytearray({"a.parquet": GOOD, "a.csv": CSV, "a.jsonl": JSON * 9, "a.csv.gz": gzip.compress(CSV)}[name])
    for place in draw.draw(st.lists(st.integers(0, len(data) - 1), min_size=1, max_size=4)):
        data[place] = draw.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("any") / name
    path.write_bytes(data[: draw.draw(st.integers(0, len(data)))] if draw.draw(st.booleans()) else data)
    rows_of(path)


words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), min_size=1, max_size=5)


@QUICK
@given(st.lists(st.tuples(words, st.integers(-(2**63), 2**63 - 1)), min_size=1, max_size=8))
def test_any_ids_come_through_a_csv_as_they_are(tmp_path_factory, pairs):
    path = tmp_path_factory.mktemp("any") / "a.csv"
    lines = ['"' + user.replace('"', '""') + f'",{item}\n' for user, item in pairs]
    path.write_text("user_id,item_id\n" + "".join(lines), encoding="utf-8", newline="")
    rows = rows_of(path)
    assert [(str(row["user"]), row["item"]) for row in rows] == pairs


@QUICK
@given(st.lists(st.one_of(st.none(), st.text(max_size=3), st.just(b"\xe9"), st.just("a\0")), max_size=8))
def test_the_first_bad_id_is_found(values):
    """Against a loop."""

    def problem(value) -> str:
        return (
            "null or empty" if value in (None, "") else "UTF-8" if value == b"\xe9" else "NUL" if "\0" in value else ""
        )

    encoded = [value.encode() if isinstance(value, str) else value for value in values]
    bad, said = ids.first_bad(pa.array(encoded, pa.binary()).view(pa.string()))
    wrong = {
        kind: [n for n, value in enumerate(values) if problem(value) == kind]
        for kind in ("UTF-8", "null or empty", "NUL")
    }
    expected = next(((kind, rows[0]) for kind, rows in wrong.items() if rows), None)
    assert bad == (None if expected is None else expected[1])
    assert (expected or ("",))[0] in said
