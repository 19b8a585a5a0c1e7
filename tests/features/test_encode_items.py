"""Texts to feature vectors, by the command."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from encoded_items import encode, nearest_is_alike, picture_bytes, titles, vectors, write_titles

from gtc_dist.data import formats, storage
from gtc_dist.errors import InputError
from gtc_dist.features import encode_items
from gtc_dist.features.item_content import read_ids, read_texts
from gtc_dist.features.text_ngrams import NgramEncoder


@pytest.mark.parametrize("format", ["csv", "tsv", "jsonl", "parquet", "csv.gz"])
def test_texts_of_every_format_become_vectors_by_id(tmp_path, ray_local, small_parts, format, capsys):
    from raw_files import write_table_file

    rows = titles()
    table = pa.table(dict(zip(("item_id", "title", "description"), map(list, zip(*rows, strict=True)), strict=True)))
    write_table_file(tmp_path / f"items.{format}", table)
    encode("--texts", tmp_path / f"items.{format}", "--columns", "title,description", "--out", tmp_path / "out")
    found = vectors(tmp_path / "out")
    assert list(found) == [row[0] for row in rows]
    assert nearest_is_alike(found, lambda item: int(item[1:]) % 4) == 1.0
    shown = capsys.readouterr()
    assert "60 items with a vector of width" in shown.out
    lines = [line.partition("] ")[2] for line in shown.err.splitlines() if line.startswith("[")]
    assert lines[:4] == [
        "60 items, 60 with a text; encoder ngrams",
        "encoder fitted",
        "starting Ray",
        "Ray started; encoding",
    ]
    assert pq.read_table(tmp_path / "out").num_rows == 60  # the folder reads as one table
    encode("--texts", tmp_path / f"items.{format}", "--columns", "title,description", "--out", tmp_path / "out")
    assert "is up to date" in capsys.readouterr().out


def test_items_without_a_text_have_no_vector_and_ids_keep_their_type(tmp_path, ray_local, small_parts, capsys):
    table = pa.table({"id": pa.array(range(40), pa.int32()), "a": [" ", None] * 2 + ["some words here"] * 36})
    pq.write_table(table, tmp_path / "items.parquet")
    encode("--texts", tmp_path / "items.parquet", "--id", "id", "--columns", "a", "--out", tmp_path / "out")
    assert list(vectors(tmp_path / "out")) == list(range(4, 40))
    assert "4 items have no vector" in capsys.readouterr().out
    assert pq.read_table(tmp_path / "out" / "part-000000.parquet")["item_id"].type == pa.int32()


def test_an_interrupted_command_goes_on_and_other_content_is_refused(tmp_path, ray_local, small_parts, capsys):
    items, out = write_titles(tmp_path), tmp_path / "out"
    encode("--texts", items, "--columns", "title", "--out", out)
    want = {name: (out / name).read_bytes() for name in storage.listing(str(out)) if name.startswith("part-")}
    assert len(want) == 4
    manifest = json.loads((out / "_manifest.json").read_text())
    (out / "_manifest.json").unlink()
    (out / "part-000002.parquet").unlink()
    (out / "_encoding.json").write_text(json.dumps({"fingerprint": manifest["fingerprint"]}))
    kept = (out / "part-000001.parquet").stat().st_mtime_ns
    encode("--texts", items, "--columns", "title", "--out", out)
    assert "going on with what an earlier command has written" in capsys.readouterr().err
    assert (out / "part-000001.parquet").stat().st_mtime_ns == kept
    assert {name: (out / name).read_bytes() for name in want} == want
    assert json.loads((out / "_manifest.json").read_text())["rows"] == manifest["rows"]
    with pytest.raises(InputError, match=r"holds vectors of other content or of another encoder; .*--force"):
        encode("--texts", items, "--columns", "title", "--out", out, "--width", "7")
    encode("--texts", items, "--columns", "title", "--out", out, "--width", "7", "--force")
    assert {len(vector) for vector in vectors(out).values()} == {7}


def test_later_items_are_encoded_alike(tmp_path, ray_local, small_parts):
    encode("--texts", write_titles(tmp_path), "--columns", "title", "--out", tmp_path / "out")
    rows = titles()[:5]
    later = pa.table({"item_id": [f"new{n}" for n in range(5)], "title": [row[1] for row in rows]})
    pq.write_table(later, tmp_path / "later.parquet")
    words = ["--texts", tmp_path / "later.parquet", "--columns", "title", "--out", tmp_path / "later"]
    encode(*words, "--like", tmp_path / "out")
    first, more = vectors(tmp_path / "out"), vectors(tmp_path / "later")
    for n, row in enumerate(rows):
        np.testing.assert_allclose(more[f"new{n}"], first[row[0]], rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match="is no finished output"):
        encode(*words, "--like", tmp_path / "nothing")


def test_everything_in_object_storage(ray_local, small_parts, s3):
    rows = titles()
    formats.write_table(
        f"{s3}/items.parquet", pa.table({"item_id": [r[0] for r in rows], "title": [r[1] for r in rows]})
    )
    for n in range(8):
        storage.write_bytes(f"{s3}/pictures/{n}.jpg", picture_bytes(n % 4, n))
    encode("--texts", f"{s3}/items.parquet", "--columns", "title", "--out", f"{s3}/text")
    encode("--pictures", f"{s3}/pictures", "--out", f"{s3}/visual")
    assert len(vectors(f"{s3}/text")) == 60
    assert sorted(vectors(f"{s3}/visual")) == list(range(8))


CUSTOM = """
import numpy as np

class Lengths:
    def __call__(self, texts):
        return np.array([[len(text), text.count(" ")] for text in texts], float)

def broken(texts):
    raise ValueError("no such model")

def flat(texts):
    return np.zeros(len(texts))

def infinite(texts):
    return np.full((len(texts), 2), np.inf)
"""


@pytest.fixture
def custom(tmp_path, monkeypatch):
    (tmp_path / "custom_encoders.py").write_text(CUSTOM)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_any_callable_is_an_encoder(custom, ray_local, small_parts):
    items = write_titles(custom)
    encode("--texts", items, "--columns", "title", "--encoder", "custom_encoders:Lengths", "--out", custom / "out")
    assert {item: tuple(vector) for item, vector in vectors(custom / "out").items()} == {
        item: (len(title), title.count(" ")) for item, title, _ in titles()
    }


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        ("custom_encoders:broken", "custom_encoders:broken failed: ValueError: no such model"),
        ("custom_encoders:flat", r"returned an array \[16\] for 16 items; expected \[16, d\]"),
        ("custom_encoders:infinite", "returned a value that is not finite"),
        ("custom_encoders:none", "cannot be imported"),
        ("nothing:none", "cannot be imported: No module named 'nothing'"),
        ("word2vec", r"unknown encoder 'word2vec'; use ngrams, descriptor, sentence-.* or module:callable"),
        ("descriptor", "the encoder descriptor does not take texts; use ngrams"),
    ],
)
def test_encoders_that_do_not_work(custom, ray_local, small_parts, encoder, message):
    items = write_titles(custom)
    with pytest.raises(InputError, match=message):
        encode("--texts", items, "--columns", "title", "--encoder", encoder, "--out", custom / "out")


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        (
            {"item_id": [1, 2], "title": ["a", "b"]},
            ["--columns", "text"],
            "has no column 'text'; columns found: item_id",
        ),
        ({"id": [1, 2], "title": ["a", "b"]}, [], "has no column 'item_id'"),
        ({"item_id": [1, None], "title": ["a", "b"]}, [], "column 'item_id' is null or empty in row 2"),
        ({"item_id": [1, 1], "title": ["a", "b"]}, [], "1 items are more than once in .*, such as 1"),
        ({"item_id": [1.5, 2], "title": ["a", "b"]}, [], "'item_id' has type double; expected integers or strings"),
        ({"item_id": [1, 2], "title": [3, 4]}, [], "'title' has type int64; expected a text"),
        ({"item_id": [1, 2], "title": ["", None]}, [], "no item has a text"),
        ({"item_id": [1, 2], "title": ["a", "a"]}, [], "too few to fit an encoder to"),
    ],
)
def test_tables_that_do_not_fit(tmp_path, columns, options, message):
    pq.write_table(pa.table(columns), tmp_path / "items.parquet")
    with pytest.raises(InputError, match=message):
        encode("--texts", tmp_path / "items.parquet", "--columns", "title", *options, "--out", tmp_path / "out")
    assert not list(storage.listing(str(tmp_path / "out"))) or message.startswith("too few")


def test_fewer_texts_than_directions():
    encoder = NgramEncoder.fit(["red shoe", "blue shoe", "green hat"], 256)
    assert encoder(["red hat", "nothing known"]).shape == (2, 2)


@pytest.mark.parametrize("text", ["item_id,title\n", "item_id,title,picture\n"])
def test_tables_without_a_row(tmp_path, text):
    (tmp_path / "items.csv").write_text(text)
    kind = "--texts" if text.endswith("title\n") else "--pictures"
    with pytest.raises(InputError, match="has no item"):
        encode(kind, tmp_path / "items.csv", "--columns", text.strip().rpartition(",")[2], "--out", tmp_path / "out")


@pytest.mark.parametrize("separator", [";", "|", "\t", "::"])
def test_the_header_shows_the_separator(tmp_path, separator):
    rows = [["sku", "title", "note"], ["007", "a shoe, red", "x"], ["7", "a hat", ""]]
    (tmp_path / "items.csv").write_text("".join(separator.join(row) + "\n" for row in rows))
    found = read_texts(f"{tmp_path}/items.csv", "sku", ["title", "note"])
    assert (found.ids.to_pylist(), found.content.to_pylist()) == (["007", "7"], ["a shoe, red x", "a hat"])
    assert read_ids(f"{tmp_path}/items.csv", "sku").to_pylist() == ["007", "7"]
    (tmp_path / "items.csv").write_text("".join(separator.join(row) + "\n" for row in [*rows, ["8", "a"]]))
    with pytest.raises(InputError, match=r"line 4: has 2 columns, expected 3: '8"):
        read_texts(f"{tmp_path}/items.csv", "sku", ["title"])


def test_ids_of_a_text_file_may_have_any_character_but_a_line_end(tmp_path):
    (tmp_path / "ids.txt").write_bytes("a\x85b\r\n\n007\n7\u2028 \n".encode())
    assert read_ids(f"{tmp_path}/ids.txt", "").to_pylist() == ["a\x85b", "007", "7\u2028 "]


def test_all_bad_rows_of_a_table_are_named_with_their_lines(tmp_path):
    (tmp_path / "items.csv").write_bytes(b'item_id,title\n1,"two\nlines"\n\n,none\n3\n4,caf\xe9\n5,a,b\n')
    with pytest.raises(InputError) as caught:
        encode("--texts", tmp_path / "items.csv", "--columns", "title", "--out", tmp_path / "out")
    rows = [
        "line 5: column 'item_id' is empty: ',none'",
        "line 6: has 1 column, expected 2: '3'",
        "line 7: column 'title' is not UTF-8 text (write the file as UTF-8): '4,caf\ufffd'",
        "line 8: has 3 columns, expected 2: '5,a,b'",
    ]
    assert str(caught.value) == f"{tmp_path}/items.csv: 4 bad rows: {'; '.join(rows)}. Correct them"


def test_a_folder_that_is_being_emptied_is_not_gone_on_with(tmp_path, ray_local, small_parts, monkeypatch, capsys):
    items, out = write_titles(tmp_path), tmp_path / "out"
    encode("--texts", items, "--columns", "title", "--out", out)
    remove, removed = storage.remove_tree, []

    def interrupted(uri):
        removed.append(uri)
        if len(removed) == 3:
            raise KeyboardInterrupt
        remove(uri)

    monkeypatch.setattr(storage, "remove_tree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encode("--texts", items, "--columns", "title", "--out", out, "--width", "5", "--force")
    monkeypatch.undo()
    monkeypatch.setattr(encode_items, "PART_ITEMS", {"text": 16})
    assert len(removed) == 3
    encode("--texts", items, "--columns", "title", "--out", out, "--width", "5")
    assert "going on" not in capsys.readouterr().err
    assert {len(vector) for vector in vectors(out).values()} == {5}


def test_a_new_fit_of_the_first_output_is_noticed(tmp_path, ray_local, small_parts):
    items = write_titles(tmp_path)
    words = ["--texts", items, "--columns", "title"]
    encode(*words, "--out", tmp_path / "first")
    encode(*words, "--out", tmp_path / "later", "--like", tmp_path / "first")
    encode(*words, "--out", tmp_path / "first", "--width", "9", "--force")
    with pytest.raises(InputError, match="holds vectors of other content or of another encoder"):
        encode(*words, "--out", tmp_path / "later", "--like", tmp_path / "first")
    with pytest.raises(InputError, match="--like and --out are the same folder"):
        encode(*words, "--out", tmp_path / "first", "--like", tmp_path / "first", "--force")
