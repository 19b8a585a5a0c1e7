"""Pictures to feature vectors, by the command."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from encoded_items import WORDS, encode, nearest_is_alike, picture_bytes, vectors

from gtc_dist.config_file import build_config
from gtc_dist.data.catalog import Catalog
from gtc_dist.errors import InputError
from gtc_dist.prepare import build_catalog


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


def test_a_folder_without_pictures(tmp_path):
    with pytest.raises(InputError, match="has no picture"):
        encode("--pictures", tmp_path, "--out", tmp_path / "out")


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
