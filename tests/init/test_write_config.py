"""A configuration for a folder of files: guesses from names and columns, and the way from there to a catalog."""

import io
import re
import shlex

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
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
    """The commands that it prints, and its file with the comments taken off the modalities' entries."""
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
    text = (tmp_path / "shop.yaml").read_text().replace("features: {}   # needs one modality at least", "features:")
    (tmp_path / "shop.yaml").write_text(re.sub(r"^    # (text|visual): ", r"    \1: ", text, flags=re.MULTILINE))
    manifest, _ = build_catalog.prepare_catalog(load_config("shop.yaml", []))
    assert set(manifest.modalities) == {"text", "visual"}
    assert Catalog("work/shop/catalog").ids("items").to_pylist()[0].startswith("S")


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


def test_folders_that_it_does_not_understand(tmp_path):
    with pytest.raises(InputError, match="has no file"):
        init(tmp_path / "nothing", tmp_path / "a.yaml")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "x.csv").write_text("left,right\n1,2\n")
    (tmp_path / "raw" / "x.bin").write_bytes(b"\0")
    with pytest.raises(InputError, match=r"no table with a column of users and one of items.*looked at x.bin, x.csv"):
        init(tmp_path / "raw", tmp_path / "a.yaml")
    assert not (tmp_path / "a.yaml").exists()
    (tmp_path / "a.yaml").write_text("mine: true\n")
    with pytest.raises(InputError, match=r"a.yaml exists; name another file"):
        init(tmp_path / "raw", tmp_path / "a.yaml")
