"""A configuration for a folder of files: guesses from names and columns, and the way from there to a catalog."""

import gzip
import io
import json
import re
import shlex

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from raw_files import write_raw

from gtc_dist.config_file import load_config
from gtc_dist.data.catalog import Catalog
from gtc_dist.errors import InputError
from gtc_dist.features import encode_items
from gtc_dist.init import write_config
from gtc_dist.init.look_at_files import columns_by_role
from gtc_dist.prepare import build_catalog


def init(folder, out) -> None:
    write_config.main([str(folder), "--out", str(out)])


@pytest.mark.parametrize(
    ("columns", "roles"),
    [
        (["user_id:token", "item_id:token", "timestamp:float"], ["user_id:token", "item_id:token", "timestamp:float"]),
        (["userId", "movieId", "rating", "timestamp"], ["userId", "movieId", "timestamp", "rating"]),
        (["reviewerID", "asin", "overall", "unixReviewTime"], ["reviewerID", "asin", "unixReviewTime", "overall"]),
        (["asin", "parent_asin", "user_id", "rating"], ["user_id", "parent_asin", "rating"]),
        (["order_no", "customer", "product_id", "created_at"], ["customer", "product_id", "created_at"]),
        (["a", "b"], []),
    ],
)
def test_columns_are_known_by_their_names(columns, roles):
    schema = pa.schema([(name, pa.float64() if "rat" in name or "over" in name else pa.string()) for name in columns])
    assert list(columns_by_role(schema).values()) == roles


def write_shop(folder) -> None:
    rng = np.random.default_rng(0)
    (folder / "orders").mkdir(parents=True)
    days = [f"2026-01-{1 + n:02d} 10:00:00" for n in range(28)]
    for part in range(2):
        rows = [f"c{rng.integers(30)},S{rng.integers(20):03d},{days[rng.integers(28)]}" for _ in range(150)]
        (folder / "orders" / f"part-{part}.csv").write_text("customer,sku,created_at\n" + "\n".join(rows) + "\n")
    words = ["red lipstick", "hair shampoo", "kitchen knife", "garden hose"]
    lines = [f'{{"sku": "S{n:03d}", "title": "{words[n % 4]} {n}", "price": {n}}}' for n in range(20)]
    (folder / "items.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "pictures").mkdir()
    for n in range(20):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(buffer, "PNG")
        (folder / "pictures" / f"S{n:03d}.png").write_bytes(buffer.getvalue())


def test_a_shops_folder_to_a_catalog(tmp_path, ray_local, capsys, monkeypatch):
    """The commands that it prints, and its file as it is."""
    monkeypatch.chdir(tmp_path)
    write_shop(tmp_path / "my shop: 2026")  # a name that YAML and the shell need quoted
    init("my shop: 2026", "shop.yaml")
    shown = capsys.readouterr().out
    config = load_config("shop.yaml", [])
    assert config.data.interactions.files == ["orders/part*.csv"]
    roles = config.data.interactions
    assert (roles.user, roles.item, roles.time, config.data.split.method) == (
        "customer",
        "sku",
        "created_at",
        "global_time",
    )
    commands = re.findall(r"^  gtc features (.*)$", shown, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        encode_items.main(shlex.split(command))
    manifest, _ = build_catalog.prepare_catalog(load_config("shop.yaml", []))
    assert set(manifest.modalities) == {"text", "visual"}
    assert Catalog("work/shop/catalog").ids("items").to_pylist()[0].startswith("S")


def test_separators_are_seen_and_weights_suggested(tmp_path):
    (tmp_path / "raw").mkdir()
    rows = "\n".join(f"c{n};S{n % 3};{'view' if n % 2 else 'buy'};{n}" for n in range(9))
    (tmp_path / "raw" / "log.csv").write_text(f"customer;sku;event_type;quantity\n{rows}\n")
    (tmp_path / "raw" / "other.csv").write_text("a;b\n1;2\n")
    (tmp_path / "raw" / "items.csv").write_text("sku;title\nS1;a shoe, red\n")
    np.save(tmp_path / "raw" / "v.npy", np.ones((3, 4), np.float32))
    init(tmp_path / "raw", tmp_path / "mine.yaml")
    text = (tmp_path / "mine.yaml").read_text()
    assert load_config(str(tmp_path / "mine.yaml"), []).data.interactions.separator == ";"
    weights = 'event_weights: {"buy": 1, "view": 1}'
    assert f'    # event: "event_type"   # with, and weights of yours: {weights}\n' in text
    assert '    # weight: "quantity"   #' in text
    assert text.startswith("# not understood: other.csv\n")
    assert "/items.csv --id sku --columns title --out" in text
    suggested = re.sub(r"# (event|weight|repeats): ", r"\1: ", text)
    suggested = suggested.replace("    weight:", f"    {weights}\n    weight:")
    (tmp_path / "mine.yaml").write_text(suggested)
    chosen = load_config(str(tmp_path / "mine.yaml"), []).data.interactions
    assert (chosen.event, chosen.weight, chosen.repeats) == ("event_type", "quantity", 3)


def test_files_of_a_given_split_and_vectors(tmp_path, ray_local):
    write_raw(str(tmp_path / "raw"))
    pq.write_table(pa.table({"item_id": [str(n) for n in range(40)]}), tmp_path / "raw" / "visual_ids.parquet")
    init(tmp_path / "raw", tmp_path / "mine.yaml")
    config = load_config(str(tmp_path / "mine.yaml"), [f"data.catalog={tmp_path}/catalog"])
    split = config.data.split
    assert (split.method, split.train, split.test) == ("given", ["train.parquet"], ["test.parquet"])
    assert config.data.features["visual"].ids == "visual_ids.parquet"
    assert config.data.features["textual"].path == "textual.parquet"
    manifest, _ = build_catalog.prepare_catalog(config)
    assert manifest.modalities["visual"].raw_dim == 8


def test_vectors_of_every_format_are_found(tmp_path, ray_local):
    """And the configuration prepares as it is."""
    ids, rows = [f"i{n:03d}" for n in range(30)], np.random.default_rng(0).normal(size=(30, 9))
    (tmp_path / "raw").mkdir()
    bought = [f"u{n % 40},{ids[n * 7 % 30]}\n" for n in range(240)]
    (tmp_path / "raw" / "orders.csv").write_text("user_id,item_id\n" + "".join(bought))
    texts = [f'{i},"[{" ".join(map(str, row))}]",red shoe\n' for i, row in zip(ids, rows, strict=True)]
    (tmp_path / "raw" / "texts.csv").write_text("sku,embedding,title\n" + "".join(texts))
    wide = ["\t".join([i, *map(str, row), "9\n"]) for i, row in zip(ids, rows, strict=True)]
    names = "\t".join(["item_id", *(f"dim_{n}" for n in range(9)), "price\n"])
    (tmp_path / "raw" / "wide.tsv.gz").write_bytes(gzip.compress((names + "".join(wide)).encode()))
    lists = [json.dumps({"item_id": i, "vector": row.tolist()}) + "\n" for i, row in zip(ids, rows, strict=True)]
    (tmp_path / "raw" / "lists.jsonl").write_text("".join(lists))
    np.savez(tmp_path / "raw" / "arrays.npz", ids=ids, vectors=rows)
    np.savez(tmp_path / "raw" / "others.npz", left=ids, right=rows)
    torch.save({"ids": ids, "vectors": torch.tensor(rows)}, tmp_path / "raw" / "tensors.pt")
    torch.save(torch.nn.Linear(3, 3).state_dict(), tmp_path / "raw" / "weights.pt")
    init(tmp_path / "raw", tmp_path / "mine.yaml")
    text = (tmp_path / "mine.yaml").read_text()
    assert "# not understood: others.npz, weights.pt" in text
    config = load_config(str(tmp_path / "mine.yaml"), [f"data.catalog={tmp_path}/catalog"])
    found = {name: (each.id_column, each.vector_column) for name, each in config.data.features.items()}
    usual = ("item_id", "vector")
    assert found == {
        "arrays": usual,
        "lists": usual,
        "tensors": usual,
        "texts": ("sku", "embedding"),
        "wide": ("item_id", "dim_*"),
    }
    manifest, _ = build_catalog.prepare_catalog(config)
    assert {entry.raw_dim for entry in manifest.modalities.values()} == {9}


def test_a_matrix_of_torch_has_items_by_row(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "orders.csv").write_text("user_id,item_id\n1,0\n2,1\n")
    torch.save(torch.ones(2, 3), tmp_path / "raw" / "visual.pt")
    init(tmp_path / "raw", tmp_path / "mine.yaml")
    assert "visual: {path: visual.pt}   # row number = item id" in (tmp_path / "mine.yaml").read_text()


def test_folders_that_it_does_not_understand(tmp_path):
    with pytest.raises(InputError, match="has no file"):
        init(tmp_path / "nothing", tmp_path / "a.yaml")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "x.csv").write_text("left,right\n1,2\n")
    (tmp_path / "raw" / "x.bin").write_bytes(b"\0")
    (tmp_path / "raw" / "x.tsv").write_text("item_id\tshade\n")
    with pytest.raises(
        InputError, match=r"no table with a column of users and one of items.*looked at x.bin, x.csv, x.tsv"
    ):
        init(tmp_path / "raw", tmp_path / "a.yaml")
    assert not (tmp_path / "a.yaml").exists()
    (tmp_path / "a.yaml").write_text("mine: true\n")
    with pytest.raises(InputError, match=r"a.yaml exists; name another file"):
        init(tmp_path / "raw", tmp_path / "a.yaml")


def test_files_that_cannot_be_read_are_left_out_and_named(tmp_path, capsys):
    """Whatever their names are, the configuration is that of the others."""
    write_shop(tmp_path / "shop")
    init(tmp_path / "shop", tmp_path / "a.yaml")
    expected = yaml.safe_load((tmp_path / "a.yaml").read_text().replace("work/a/", "work/b/"))
    capsys.readouterr()
    for name, text in {
        "settings.json": "[{}]",
        "empty.csv": "",
        "x\ndata: y.foo": "",
        "y\ndata: 1.csv": "a,b\n1,2\n",
    }.items():
        (tmp_path / "shop" / name).write_text(text)
    init(tmp_path / "shop", tmp_path / "b.yaml")
    assert yaml.safe_load((tmp_path / "b.yaml").read_text()) == expected
    shown = capsys.readouterr().out
    assert f"left out: {tmp_path}/shop/settings.json is one JSON array; " in shown
    assert f"left out: {tmp_path}/shop/empty.csv is not readable as csv" in shown
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.json").write_text("[{}]")
    with pytest.raises(InputError, match=r"a\.json is one JSON array"):
        init(tmp_path / "broken", tmp_path / "c.yaml")
    with pytest.raises(InputError, match=r"there is no folder .*/nowhere for c\.yaml; make it"):
        init(tmp_path / "shop", tmp_path / "nowhere" / "c.yaml")
