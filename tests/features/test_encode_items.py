"""Texts and pictures to feature vectors, by the command."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

from gtc_dist.config_file import build_config
from gtc_dist.data import formats, storage
from gtc_dist.data.catalog import Catalog
from gtc_dist.errors import InputError
from gtc_dist.features import encode_items
from gtc_dist.features.text_ngrams import NgramEncoder
from gtc_dist.prepare import build_catalog

WORDS = {0: "red lipstick matte", 1: "shampoo for dry hair", 2: "steel kitchen knife", 3: "garden hose nozzle"}


def titles(count: int = 60) -> list[tuple[str, str, str]]:
    """Rows (id, title, description) of items in four groups that share words."""
    rng = np.random.default_rng(0)
    return [(f"B{n:03d}", f"{WORDS[n % 4]} {rng.integers(100)}", f"no. {n}, {WORDS[n % 4]}s") for n in range(count)]


def encode(*words: str) -> None:
    encode_items.main([str(word) for word in words])


def vectors(out) -> dict:
    """Id -> vector of an output."""
    found = {}
    for name in storage.listing(str(out)):
        if name.startswith("part-"):
            table = formats.read_table(storage.join(str(out), name), ["item_id", "vector"])
            values = table["vector"].combine_chunks().flatten().to_numpy().reshape(table.num_rows, -1)
            found |= dict(zip(table["item_id"].to_pylist(), values, strict=True))
    return found


def nearest_is_alike(found: dict, group) -> float:
    """Share of items whose nearest other item by cosine is of the same group."""
    ids, rows = list(found), np.stack(list(found.values()))
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    scores = rows @ rows.T - 2 * np.eye(len(rows))
    return float(np.mean([group(ids[a]) == group(ids[b]) for a, b in enumerate(scores.argmax(1))]))


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(encode_items, "PART_ITEMS", {"text": 16, "picture": 16})


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
    assert "60 items with a vector of width" in capsys.readouterr().out
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


def write_titles(folder) -> str:
    rows = titles()
    pq.write_table(pa.table({"item_id": [r[0] for r in rows], "title": [r[1] for r in rows]}), folder / "items.parquet")
    return str(folder / "items.parquet")


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


def picture(group: int, seed: int) -> Image.Image:
    """A noisy picture of one of four kinds: colour and shape."""
    rng = np.random.default_rng(seed)
    colour = [(200, 30, 30), (30, 180, 60), (40, 60, 200), (220, 200, 40)][group]
    found = Image.fromarray(rng.integers(180, 255, (90, 120, 3), dtype=np.uint8))
    draw, x, y = ImageDraw.Draw(found), *rng.integers(10, 30, 2)
    (draw.ellipse if group % 2 else draw.rectangle)((x, y, x + 70, y + 50), fill=colour)
    return found


def picture_bytes(group: int, seed: int, format: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    picture(group, seed).save(buffer, format)
    return buffer.getvalue()


def test_pictures_of_a_folder(tmp_path, ray_local, small_parts, capsys):
    (tmp_path / "pictures" / "more").mkdir(parents=True)
    for n in range(40):
        place = tmp_path / "pictures" / ("more" if n % 3 == 0 else "") / f"{n}.{'png' if n % 2 else 'JPG'}"
        place.write_bytes(picture_bytes(n % 4, n, "PNG" if n % 2 else "JPEG"))
    (tmp_path / "pictures" / "40.jpg").write_bytes(b"no picture")
    (tmp_path / "pictures" / "notes.txt").write_text("no picture either")
    encode("--pictures", tmp_path / "pictures", "--out", tmp_path / "out")
    found = vectors(tmp_path / "out")
    assert sorted(found) == list(range(40))
    assert nearest_is_alike(found, lambda item: item % 4) > 0.9
    shown = capsys.readouterr().out
    assert "1 items have no vector" in shown
    assert "40.jpg is not a picture that can be read" in shown
    (tmp_path / "pictures" / "3.webp").write_bytes(picture_bytes(0, 1))
    with pytest.raises(InputError, match=r"1 items are more than once in .*, such as 3; keep one row of each"):
        encode("--pictures", tmp_path / "pictures", "--out", tmp_path / "again")


@pytest.mark.parametrize("kind", ["paths", "bytes", "uris"])
def test_pictures_named_by_a_column(tmp_path, ray_local, small_parts, kind):
    (tmp_path / "files").mkdir()
    data = [picture_bytes(n % 4, n) for n in range(12)]
    for n, each in enumerate(data):
        (tmp_path / "files" / f"{n}.jpg").write_bytes(each)
    names = [f"files/{n}.jpg" if kind == "paths" else f"file://{tmp_path}/files/{n}.jpg" for n in range(12)]
    column = data if kind == "bytes" else names
    table = pa.table({"item_id": [f"i{n}" for n in range(12)], "picture": [*column[:11], None]})
    pq.write_table(table, tmp_path / "items.parquet")
    encode("--pictures", tmp_path / "items.parquet", "--columns", "picture", "--out", tmp_path / "out")
    assert sorted(vectors(tmp_path / "out")) == sorted(f"i{n}" for n in range(11))


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


def test_a_folder_without_pictures(tmp_path):
    with pytest.raises(InputError, match="has no picture"):
        encode("--pictures", tmp_path, "--out", tmp_path / "out")


def test_fewer_texts_than_directions():
    encoder = NgramEncoder.fit(["red shoe", "blue shoe", "green hat"], 256)
    assert encoder(["red hat", "nothing known"]).shape == (2, 2)


def test_titles_and_pictures_to_a_catalog(tmp_path, ray_local, small_parts):
    """What a shop has: orders, titles and pictures; ids that look like numbers, with zeros before them."""
    rng = np.random.default_rng(0)
    ids = [f"{n:04d}" for n in range(24)]
    orders = [(f"c{user}", ids[item]) for user in range(30) for item in rng.permutation(24)[:6]]
    (tmp_path / "orders.csv").write_text("customer,sku\n" + "".join(f"{user},{item}\n" for user, item in orders))
    (tmp_path / "items.csv").write_text("sku,title\n" + "".join(f"{i},{WORDS[n % 4]} {n}\n" for n, i in enumerate(ids)))
    (tmp_path / "pictures").mkdir()
    for n, item in enumerate(ids[:20]):
        (tmp_path / "pictures" / f"{item}.jpg").write_bytes(picture_bytes(n % 4, n))
    words = ["--texts", tmp_path / "items.csv", "--id", "sku", "--columns", "title"]
    encode(*words, "--out", tmp_path / "features" / "text")
    encode("--pictures", tmp_path / "pictures", "--out", tmp_path / "features" / "visual")
    tree = {
        "data": {
            "raw": str(tmp_path),
            "catalog": str(tmp_path / "catalog"),
            "interactions": {"files": ["orders.csv"], "user": "customer", "item": "sku"},
            "features": {name: {"path": f"features/{name}/*.parquet"} for name in ("text", "visual")},
        },
        "run": {"storage": str(tmp_path), "name": "run"},
    }
    build_catalog.prepare_catalog(build_config(tree, "test"))
    catalog = Catalog(str(tmp_path / "catalog"))
    items = catalog.ids("items").to_pylist()
    assert sorted(items) == ids
    assert catalog.features("text").any(axis=1).all()
    assert {items[row] for row in np.flatnonzero(catalog.features("visual").any(axis=1))} == set(ids[:20])


def test_pictures_that_cannot_be_read_are_told_apart_from_storage_that_cannot(tmp_path, ray_local, small_parts, capsys):
    png = picture_bytes(0, 0, "PNG")
    (tmp_path / "good.png").write_bytes(png)
    (tmp_path / "cut.png").write_bytes(png[:300])
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "items.csv").write_text("item_id,picture\n1,good.png\n2,\n3,cut.png\n4,missing.png\n5,folder.png\n")
    encode("--pictures", tmp_path / "items.csv", "--columns", "picture", "--out", tmp_path / "out")
    assert list(vectors(tmp_path / "out")) == [1]
    shown = capsys.readouterr().out
    assert "4 items have no vector" in shown
    for warning in ("cut.png is not a picture", "missing.png does not exist", "folder.png does not exist"):
        assert warning in shown
    (tmp_path / "remote.csv").write_text("item_id,picture\n1,good.png\n2,gopher://there/2.png\n")
    with pytest.raises(InputError, match="gopher"):
        encode("--pictures", tmp_path / "remote.csv", "--columns", "picture", "--out", tmp_path / "remote")
    assert not (tmp_path / "remote" / "_manifest.json").exists()


@pytest.mark.parametrize("text", ["item_id,title\n", "item_id,title,picture\n"])
def test_tables_without_a_row(tmp_path, text):
    (tmp_path / "items.csv").write_text(text)
    kind = "--texts" if text.endswith("title\n") else "--pictures"
    with pytest.raises(InputError, match="has no item"):
        encode(kind, tmp_path / "items.csv", "--columns", text.strip().rpartition(",")[2], "--out", tmp_path / "out")


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
