"""The layout `amazon`: reviews, ratings and metadata as published in 2014, 2018 and 2023."""

import gzip
import json
from datetime import datetime

import pyarrow.parquet as pq
import pytest
from imports import inspected, refusal, rows, run_import

OLD = [("A3PMSRCL80KSA1", "0000031852", 4.0, 1388275200), ("AA9ITO6ZLZW6", "B000000001", 5.0, 1399507200)]
NEW = [
    ("AGKASBHYZPGTEPO6LWZPVJWB2BVA", "B00V6R3R3S", 5.0, 1452647102123),
    ("AGCI7FAH4GL5FI65", "0000031852", 3.0, 1e12),
]
SECOND = {"asin": "B000000001", "title": "Instant Heat Curling Iron, 1-Inch", "related": {"also_bought": []}}


def write_lines(path, lines) -> None:
    data = "".join(line + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def old_reviews() -> list[str]:
    keys = ("reviewerID", "asin", "overall", "unixReviewTime")
    return [
        json.dumps({**dict(zip(keys, row, strict=True)), "helpful": [0, 0], "reviewText": "é \ud83d"}) for row in OLD
    ]


def folder_2014(folder) -> None:
    write_lines(folder / "reviews_Beauty_5.json.gz", old_reviews())
    meta = {"asin": "0000031852", "title": 'A "b" it\'s', "categories": [["Beauty", "Hair"], ["Beauty"]], "brand": ""}
    other = {"asin": "7777777777", "title": "no review of it"}
    write_lines(folder / "meta_Beauty.json.gz", [*map(repr, (meta, other, meta | {"title": "again"}, SECOND))])


def folder_2018(folder) -> None:
    write_lines(folder / "Luxury_Beauty.json", old_reviews())
    meta = {
        "asin": "0000031852",
        "title": "T",
        "brand": "Conair",
        "category": ["Beauty"],
        "description": ["one", "two"],
    }
    write_lines(folder / "meta_Luxury_Beauty.json", [json.dumps(meta), json.dumps(SECOND)])


def folder_2023(folder) -> None:
    keys = ("user_id", "parent_asin", "rating", "timestamp")
    lines = [json.dumps({**dict(zip(keys, (*row[:3], int(row[3])), strict=True)), "asin": "OTHER"}) for row in NEW]
    write_lines(folder / "All_Beauty.jsonl.gz", lines)
    meta = {"parent_asin": "0000031852", "title": "T", "store": "Howard", "categories": [], "description": []}
    second = {"parent_asin": "B00V6R3R3S", "title": SECOND["title"], "store": None}
    write_lines(folder / "meta_All_Beauty.jsonl.gz", [json.dumps(meta), json.dumps(second)])


@pytest.mark.parametrize(
    ("write", "text"),
    [
        (folder_2014, ("0000031852", 'A "b" it\'s', None, "Beauty Hair", None)),
        (folder_2018, ("0000031852", "T", "Conair", "Beauty", "one two")),
        (folder_2023, ("0000031852", "T", "Howard", None, None)),
    ],
)
def test_reviews_and_metadata(tmp_path, ray_local, capsys, write, text):
    (tmp_path / "raw").mkdir()
    write(tmp_path / "raw")
    run_import("amazon", tmp_path / "raw", tmp_path / "out")
    found = rows(tmp_path / "out")
    if write is folder_2023:
        assert [row[:3] for row in found] == [row[:3] for row in NEW]
        assert found[0][3] == datetime(2016, 1, 13, 1, 5, 2, 123000)
    else:
        assert found == OLD
    texts = rows(tmp_path / "out", "texts")
    assert texts == [text, (texts[1][0], SECOND["title"], None, None, None)]
    assert {row[0] for row in texts} == {row[1] for row in found}
    config = inspected(tmp_path / "out", capsys.readouterr().out)
    assert config.data.split.method == "global_time"


def test_ratings_without_a_header_in_both_orders(tmp_path):
    for year, order in {2014: (0, 1), 2018: (1, 0)}.items():
        folder = tmp_path / str(year)
        folder.mkdir()
        lines = [",".join(map(str, (row[order[0]], row[order[1]], row[2], row[3]))) for row in OLD]
        write_lines(folder / "ratings_Beauty.csv", lines)
        run_import("amazon", folder, tmp_path / f"out{year}")
        table = pq.read_table(tmp_path / f"out{year}" / "interactions.parquet")
        assert [
            tuple(row.values()) for row in table.select(["user_id", "item_id", "rating", "timestamp"]).to_pylist()
        ] == OLD
    write_lines(tmp_path / "2014" / "ratings_Beauty.csv", ["1,2,5.0,1388275200"])
    assert "has no header, and neither of its first two" in refusal("amazon", tmp_path / "2014", tmp_path / "out")


def test_ratings_with_a_header_and_a_split(tmp_path):
    (tmp_path / "raw").mkdir()
    for split in ("train", "valid", "test"):
        header, line = "user_id,parent_asin,rating,timestamp,history", "AG,0000031852,5.0,1452647102123,B1 B2"
        write_lines(tmp_path / "raw" / f"All_Beauty.{split}.csv.gz", [header, line])
    run_import("amazon", tmp_path / "raw", tmp_path / "out")
    assert rows(tmp_path / "out", "valid") == [("AG", "0000031852", 5.0, datetime(2016, 1, 13, 1, 5, 2, 123000))]
    assert "method: given" in (tmp_path / "out" / "config.yaml").read_text()


def test_errors_name_file_and_line(tmp_path):
    folder, out = tmp_path / "raw", tmp_path / "out"
    folder.mkdir()
    write_lines(folder / "meta_Beauty.json.gz", ["{}"])
    assert "has no file of reviews" in refusal("amazon", folder, out)
    reviews = folder / "reviews_Beauty.json.gz"
    write_lines(reviews, [*old_reviews(), "{'asin': __import__('os').getcwd()}"])
    assert "line 3 is neither a JSON object nor a Python dictionary" in refusal("amazon", folder, out)
    write_lines(reviews, [*old_reviews(), "", '{"reviewerID": "A1", "asin": "B1", "overall": 5}'])
    assert "line 4 has no 'unixReviewTime'" in refusal("amazon", folder, out)
    write_lines(reviews, ['{"a": 1}'])
    assert "has no reviews with user_id, parent_asin" in refusal("amazon", folder, out)
    write_lines(reviews, old_reviews())
    assert "meta_Beauty.json.gz: line 1 has no 'asin'" in refusal("amazon", folder, out)
    write_lines(reviews, old_reviews() * 400)
    reviews.write_bytes(reviews.read_bytes()[:-20])
    assert "broken or truncated gzip file" in refusal("amazon", folder, out)
    write_lines(folder / "reviews_Beauty_5.json.gz", old_reviews())
    assert "has 2 files of interactions" in refusal("amazon", folder, out)
