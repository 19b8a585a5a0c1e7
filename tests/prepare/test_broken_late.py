"""Broken inputs that prepare finds while reading or later: each gives an InputError with the place, the problem and the
remedy, and leaves no catalog. Unusual but valid inputs give a catalog whose manifest counts the dropped rows."""

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pytest
from broken import (
    AS_PARQUET,
    BY_TIME,
    COLUMNS,
    GIVEN,
    GOOD,
    JSON,
    LABEL,
    NO_PARQUET,
    NPY,
    RATING,
    ROWS,
    VECTORS,
    Case,
    npy,
    one,
    parquet,
    patched,
    refused,
    replaced,
    text,
    vectors,
)

from gtc_dist.data.catalog import MANIFEST, SPLITS, Catalog
from gtc_dist.errors import InputError
from gtc_dist.prepare import build_catalog

LATE = {
    "parquet with broken pages": one("a.parquet", patched(GOOD, 4, 600), NO_PARQUET),
    "parquet without rows": one("a.parquet", parquet(rows=0), "no interactions in"),
    "parquet with a null id": one(
        "a.parquet", parquet(item_id=replaced("item_id", 4, None)), "row 4: column 'item_id' (item) is null"
    ),
    "csv with an empty id": one(
        "a.csv", text(user_id=replaced("user_id", 9, "")), "line 10: column 'user_id' (user) is empty: ',"
    ),
    "jsonl of ids in latin-1": one(
        "a.jsonl", JSON.replace(b"1", b'"\xe9"'), "line 1: column 'user_id' (user) is not UTF-8 text"
    ),
    "parquet with a NUL byte in an id": one(
        "a.parquet",
        parquet(user_id=["a", "b\0"] * 18),
        "18 bad rows: row 2: column 'user_id' (user): 'b\\x00' holds a NUL byte; row 4: ",
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
        "row 4: column 'time' (time) is null",
        overrides=BY_TIME,
    ),
    "nanoseconds declared as milliseconds": one(
        "a.parquet",
        parquet(time=pa.array(replaced("time", 3, 17 * 10**17), pa.timestamp("ms"))),
        "row 3: column 'time' (time) is out of range",
        overrides=BY_TIME,
    ),
    "a time beyond int64": one(
        "a.parquet",
        parquet(time=pa.array(replaced("time", 2, 2**63), pa.uint64())),
        "row 2: column 'time' (time): 9223372036854775808 is out of range",
        overrides=BY_TIME,
    ),
    "an infinite rating": one(
        "a.parquet",
        parquet(rating=replaced("rating", 7, np.inf)),
        "row 7: column 'rating' (rating) is infinite",
        overrides=[RATING],
    ),
    "a rating beyond float64": one(
        "a.parquet",
        parquet(rating=[1] * 35 + [2**60 + 1]),
        "row 36: column 'rating' (rating): 1152921504606846977 is out of range",
        overrides=[RATING],
    ),
    "another label": one(
        "a.parquet",
        parquet(x_label=replaced("x_label", 5, 7)),
        "row 5: column 'x_label' (label): 7 is not in data.split.labels (0, 1, 2)",
        overrides=[LABEL],
    ),
    "a label that never occurs": Case(
        {"a.parquet": parquet(rows=30)},
        ["the test split is empty", "column 'x_label' needs rows with the label 2 (data.split.labels)"],
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
        "v.npy", NPY, "or of another modality are strings; list each row's id (data.features.v.ids)"
    ),
    "vectors of another width": Case(
        {"v1.parquet": vectors([0, 1], [[1, 2]] * 2), "v2.parquet": vectors([2, 3], [[1, 2], [1, 2, 3]])},
        ["{raw}/v2.parquet: the vector of item 3 (row 2) has 3 values, but others have 2"],
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


@dataclass
class Kept(Case):
    """Dropped rows by reason, and other counts of the manifest."""

    dropped: dict = field(default_factory=dict)
    counts: dict = field(default_factory=dict)


NFC, NFD, CYRILLIC = "\u00e9", "e\u0301", "\u0430"
KEPT = {
    "repeated interactions": Kept({"a.parquet": GOOD, "a.2.parquet": GOOD}, dropped={"duplicate": ROWS}),
    "low ratings": Kept({}, [], [RATING, "data.interactions.min_rating=2"], {"min_rating": 12, "features/v": 1}),
    "vectors of unknown items": Kept({"v.npy": npy(np.arange(60.0).reshape(20, 3))}, dropped={"features/v": 12}),
    "ids that look the same": Kept(
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
    "vectors that are all equal": Kept(
        {"v.npy": npy(np.full((8, 3), 2.5)), "i.txt": b"\xef\xbb\xbf0\n1\n2\n3\n4\n5\n6\n7\n"},
        overrides=["data.features.v.ids=i.txt"],
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_kept_with_counts(tmp_path, ray_local, name):
    case = KEPT[name]
    arguments, _ = case.write(tmp_path)
    assert build_catalog.main(arguments) == 0
    catalog = Catalog(str(tmp_path / "catalog"), verify="checksum")
    held = catalog.manifest.model_dump()
    assert {reason: rows for reason, rows in held["dropped"].items() if rows} == case.dropped
    assert {key: held[key] for key in case.counts} == case.counts
    assert np.isfinite(catalog.features("v")).all()
    for graph in held["graphs"]:
        assert np.isfinite(catalog.graph(graph).weight).all()


def test_an_error_leaves_the_old_catalog_unchanged(tmp_path, ray_local):
    arguments, _ = Case().write(tmp_path)
    build_catalog.main(arguments)
    before = {path: path.read_bytes() for path in (tmp_path / "catalog").rglob("*") if path.is_file()}
    assert tmp_path / "catalog" / MANIFEST in before
    (tmp_path / "raw" / "v.npy").write_bytes(npy(np.full((8, 3), np.nan)))
    with pytest.raises(InputError, match="not finite"):
        build_catalog.main([*arguments, "--force"])
    assert {path: path.read_bytes() for path in (tmp_path / "catalog").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe{}", b"[]", b'{"users": 3}'])
def test_a_broken_manifest_is_refused(tmp_path, data):
    (tmp_path / "catalog").mkdir()
    (tmp_path / "catalog" / MANIFEST).write_bytes(data)
    arguments, _ = Case().write(tmp_path)
    with pytest.raises(InputError, match=r"manifest\.json"):
        build_catalog.main(arguments)
    assert [path.read_bytes() for path in (tmp_path / "catalog").iterdir()] == [data]


def test_a_damaged_manifest_is_rebuilt_by_force(tmp_path, ray_local):
    arguments, _ = Case().write(tmp_path)
    build_catalog.main(arguments)
    path = tmp_path / "catalog" / MANIFEST
    whole = path.read_text()
    path.write_text(whole.replace('"users":', '"losers":'))
    with pytest.raises(InputError, match=r"damaged manifest\.json; --force rebuilds it: (?s:.*)users"):
        build_catalog.main(arguments)
    assert build_catalog.main([*arguments, "--force"]) == 0
    assert path.read_text() == whole
