"""The whole command: catalogs on local disk and on S3, reruns, incomplete folders, refusals."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from raw_files import ITEMS, catalog_config, catalog_contents, write_raw

from gtc_dist import progress
from gtc_dist.config import PrepareConfig
from gtc_dist.data import formats, storage
from gtc_dist.data.catalog import GRAPHS, MANIFEST, SPLITS, Catalog
from gtc_dist.data.feature_transform import FeatureTransform
from gtc_dist.data.scratch import Scratch
from gtc_dist.errors import InputError
from gtc_dist.graph.csc import load_graphs
from gtc_dist.prepare import build_catalog, interactions
from gtc_dist.prepare.fingerprint import catalog_inputs, fingerprint

ROOT = Path(__file__).resolve().parents[2]
TIKTOK = ROOT.parent / "shared" / "data" / "tiktok"


@pytest.fixture
def raw(tmp_path) -> str:
    write_raw(str(tmp_path / "raw"))
    return str(tmp_path / "raw")


def test_catalog_matches_the_raw_tables(ray_local, tmp_path, raw):
    manifest, built = build_catalog.prepare_catalog(catalog_config(raw, tmp_path / "catalog"))
    assert built
    catalog = Catalog(str(tmp_path / "catalog"), verify="checksum")
    assert catalog.manifest == manifest
    assert set(storage.listing(catalog.uri)) == {*manifest.files, MANIFEST}
    users, items = catalog.ids("users"), catalog.ids("items")
    assert users.type == pa.string()
    assert items.type == pa.int32()
    assert (len(users), len(items)) == (manifest.users, manifest.items)
    for split in SPLITS:
        table = pq.read_table(f"{raw}/{split}.parquet")
        expected = sorted(zip(table["user_id"].to_pylist(), table["item_id"].to_pylist(), strict=True))
        user, item = catalog.interactions(split)
        found = zip(users.take(pa.array(user)).to_pylist(), items.take(pa.array(item)).to_pylist(), strict=True)
        assert sorted(found) == expected
        assert manifest.interactions[split] == len(expected)
    trained = set(catalog.interactions("train")[1].tolist())
    assert manifest.cold_items == manifest.items - len(trained)

    visual = np.load(f"{raw}/visual.npy")[items.to_numpy()]
    assert np.array_equal(FeatureTransform.load(catalog.uri, "visual").apply(visual), catalog.features("visual"))
    assert (manifest.modalities["visual"].dim, manifest.modalities["visual"].raw_dim) == (4, 8)
    assert 0 < manifest.modalities["visual"].explained_variance < 1
    text = pq.read_table(f"{raw}/textual.parquet")
    known = set(text["item_id"].to_pylist())
    textual = catalog.features("textual")
    assert np.array_equal(catalog.features("textual", 3, 9), textual[3:9])
    missing = [index for index, item in enumerate(items.to_pylist()) if item not in known]
    assert manifest.modalities["textual"].missing == len(missing) > 0
    assert (textual[missing] == 0).all()
    np.testing.assert_allclose(np.delete(textual, missing, 0).astype(float).mean(0), 0, atol=2e-3)
    np.testing.assert_allclose(np.delete(textual, missing, 0).astype(float).std(0), 1, atol=2e-3)
    for name in GRAPHS:
        graph = catalog.graph(name)
        destinations = manifest.users if name in ("item_user", "user_user") else manifest.items
        assert len(graph.indptr) == destinations + 1
        assert len(graph.indices) == len(graph.weight) == graph.indptr[-1] == manifest.graphs[name]
    for name in ("item_item", "user_user"):
        graph = catalog.graph(name)
        sums = np.add.reduceat(graph.weight, graph.indptr[:-1][graph.degree > 0])
        np.testing.assert_allclose(sums, 1, rtol=1e-5)


@pytest.mark.parametrize("kind", ["seconds", "timestamps"])
def test_recency_weights_are_in_the_catalog_only_where_asked_for(ray_local, tmp_path, raw, kind):
    """The newest train row weighs 1, and the other rows follow from the graph's weights and degrees."""
    weight_of, ages = {}, np.random.default_rng(1)
    for split in SPLITS:
        table = pq.read_table(f"{raw}/{split}.parquet")
        age = ages.integers(0, 300, len(table)) if split == "train" else np.full(len(table), -50)
        age[0] = 0 if split == "train" else age[0]
        pairs = zip(table["user_id"].to_pylist(), table["item_id"].to_pylist(), strict=True)
        weight_of |= dict(zip(pairs, 0.5 ** (age / 30), strict=True)) if split == "train" else {}
        seconds = pa.array(1_600_000_000 - age * 86_400)
        time = seconds if kind == "seconds" else seconds.cast(pa.timestamp("s"))
        pq.write_table(table.append_column("when", time), f"{raw}/{split}.parquet")
    columns = {"interactions": {"time": "when"}}
    plain, _ = build_catalog.prepare_catalog(catalog_config(raw, tmp_path / "plain", **columns))
    config = catalog_config(raw, tmp_path / "weighted", **columns, recency_half_life=30)
    manifest, _ = build_catalog.prepare_catalog(config)
    assert manifest.files.keys() - plain.files.keys() == {f"graph/{g}.degree.npy" for g in ("item_user", "user_item")}
    assert plain.fingerprint != manifest.fingerprint
    catalog = Catalog(str(tmp_path / "weighted"), verify="checksum")
    graphs, (user, item) = load_graphs(config, catalog), catalog.interactions("train")
    users, items = catalog.ids("users").to_pylist(), catalog.ids("items").to_pylist()
    expected = np.array([weight_of[users[u], items[i]] for u, i in zip(user, item, strict=True)])
    np.testing.assert_allclose(graphs.relative_weights(user, item), expected / expected.mean(), rtol=1e-5)
    np.testing.assert_allclose(graphs.weighted_user_degree, np.bincount(user, expected, catalog.users), rtol=1e-5)
    without = Catalog(str(tmp_path / "plain"))
    assert load_graphs(catalog_config(raw, without.uri, **columns), without).relative_weights(user, item) is None
    with pytest.raises(InputError, match=r"recency_half_life is 30, but the catalog .* was built without it"):
        load_graphs(config, without)


def test_without_recency_fingerprints_are_those_of_version_0_1():
    found = fingerprint(catalog_inputs(catalog_config("raw", "catalog"), [], {}))
    assert found == "214a5726c9d253f898de7461b07d814355ee81ece992541de42efcb4a359f762"


def test_s3_gives_the_same_catalog_as_local_disk(ray_local, tmp_path, raw, s3):
    write_raw(f"{s3}/raw")
    local, _ = build_catalog.prepare_catalog(catalog_config(raw, tmp_path / "catalog"))
    remote, built = build_catalog.prepare_catalog(catalog_config(f"{s3}/raw", f"{s3}/catalog"))
    assert built
    depends = {"fingerprint", "inputs"}
    assert remote.model_dump(exclude=depends) == local.model_dump(exclude=depends)  # with checksums
    assert catalog_contents(Catalog(f"{s3}/catalog", verify="checksum")) == catalog_contents(
        Catalog(str(tmp_path / "catalog"))
    )
    assert set(storage.listing(f"{s3}/catalog")) == {*remote.files, MANIFEST}
    _, built = build_catalog.prepare_catalog(catalog_config(f"{s3}/raw", f"{s3}/catalog"))
    assert not built
    _, built = build_catalog.prepare_catalog(catalog_config(f"{s3}/raw", f"{s3}/catalog"), force=True)
    assert built


@pytest.mark.parametrize("method", ["given", "ratio"])
def test_memory_and_scratch_do_not_change_the_catalog(ray_local, tmp_path, raw, method):
    """Every file has the same bytes, and the fingerprint is the same."""
    data = {"split": {"method": method}, "interactions": {"files": ["train.parquet"], "k_core": 2}}
    large, _ = build_catalog.prepare_catalog(catalog_config(raw, tmp_path / "large", **data))
    tight = catalog_config(raw, tmp_path / "small", **data)
    (tmp_path / "scratch").mkdir()
    tight = tight.model_copy(update={"prepare": PrepareConfig(memory_gib=1e-6, scratch=str(tmp_path / "scratch"))})
    small, _ = build_catalog.prepare_catalog(tight)
    assert small == large
    assert not list((tmp_path / "scratch").iterdir())


def test_intermediate_data_is_removed_after_an_error(ray_local, tmp_path, raw):
    (tmp_path / "scratch").mkdir()
    broken = catalog_config(raw, tmp_path / "catalog", interactions={"k_core": 50})
    broken = broken.model_copy(update={"prepare": PrepareConfig(scratch=str(tmp_path / "scratch"))})
    with pytest.raises(InputError, match="k_core=50 leaves no interaction"):
        build_catalog.prepare_catalog(broken)
    assert not list((tmp_path / "scratch").iterdir())
    gone = broken.model_copy(update={"prepare": PrepareConfig(scratch=str(tmp_path / "gone"))})
    with pytest.raises(InputError, match=r"prepare\.scratch .*gone is not a folder"):
        build_catalog.prepare_catalog(gone)


def test_long_steps_report_progress(ray_local, tmp_path, raw, capsys, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    build_catalog.prepare_catalog(catalog_config(raw, tmp_path / "catalog"))
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("[") for line in lines)
    for part in (
        "... interactions read: 600; 60 users, 40 items so far",
        "... feature rows read: 77 of 77",
        "... features written: visual, 40 of 40",
    ):
        assert any(line.endswith(part) for line in lines), lines


def test_changed_files_of_a_catalog_are_named(ray_local, tmp_path, raw):
    uri = str(tmp_path / "catalog")
    build_catalog.prepare_catalog(catalog_config(raw, uri))
    path = tmp_path / "catalog" / "graph" / "item_item.weight.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    Catalog(uri, verify="size")
    with pytest.raises(InputError, match=r"graph/item_item\.weight\.npy was changed"):
        Catalog(uri, verify="checksum")
    path.write_bytes(data[:-4])
    with pytest.raises(InputError, match=r"item_item\.weight\.npy has \d+ bytes, its manifest says"):
        Catalog(uri, verify="size")
    path.unlink()
    with pytest.raises(InputError, match=r"item_item\.weight\.npy is missing"):
        Catalog(uri, verify="size")


def test_items_that_only_have_features(ray_local, tmp_path, raw):
    few = catalog_config(raw, tmp_path / "few", interactions={"k_core": 3})
    every = catalog_config(raw, tmp_path / "every", items="all", interactions={"k_core": 3})
    some = formats.read_table(f"{raw}/test.parquet")
    keep = [item < 20 for item in some["item_id"].to_pylist()]
    for split in SPLITS:
        table = formats.read_table(f"{raw}/{split}.parquet")
        keep = pa.array([item < 20 for item in table["item_id"].to_pylist()])
        formats.write_table(f"{raw}/{split}.parquet", table.filter(keep))
    less, more = build_catalog.prepare_catalog(few)[0], build_catalog.prepare_catalog(every)[0]
    assert (less.items, more.items) == (20, ITEMS)
    assert more.cold_items == less.cold_items + 20
    assert less.dropped["features/visual"] == 20
    assert more.dropped["features/visual"] == 0
    assert more.interactions == less.interactions
    assert sorted(Catalog(str(tmp_path / "every")).ids("items").to_pylist()) == list(range(ITEMS))


def test_ids_are_matched_exactly_where_features_have_text(ray_local, tmp_path, raw):
    """Items are integers in the interactions; one source of features writes them, and others, as text."""
    written = pq.read_table(f"{raw}/textual.parquet")
    names = [str(item) for item in written["item_id"].to_pylist()]
    more = pa.table({"item_id": [*names, "007", "B07"], "vector": written["vector"].to_pylist() + [[1.0] * 5] * 2})
    pq.write_table(more, f"{raw}/textual.parquet")
    pq.write_table(pa.table({"item_id": [str(i) for i in range(ITEMS)]}), f"{raw}/rows.parquet")
    config = catalog_config(raw, tmp_path / "catalog", items="all")
    visual = config.data.features["visual"].model_copy(update={"ids": "rows.parquet"})
    features = config.data.features | {"visual": visual}
    config = config.model_copy(update={"data": config.data.model_copy(update={"features": features})})
    build_catalog.prepare_catalog(config)
    catalog = Catalog(str(tmp_path / "catalog"))
    items = catalog.ids("items").to_pylist()
    assert {"007", "B07", "7"} <= set(items)
    trained = {str(i) for i in pq.read_table(f"{raw}/train.parquet")["item_id"].to_pylist()}
    assert {items[i] for i in catalog.interactions("train")[1].tolist()} == trained
    present = catalog.features("textual").any(axis=1)
    assert {items[row] for row in np.flatnonzero(present)} == {*names, "007", "B07"}


def test_ids_may_be_text_in_any_case_or_must_be_integers(ray_local, tmp_path, raw):
    """Text: the catalog of today has digits alone, and tomorrow's item may have a letter. Users are text here."""
    textual = {"textual": {"path": "textual.parquet"}}
    build_catalog.prepare_catalog(catalog_config(raw, tmp_path / "text", features=textual, ids="text"))
    items = Catalog(str(tmp_path / "text")).ids("items")
    assert items.type == pa.large_string()
    assert set(items.to_pylist()) <= {str(i) for i in range(ITEMS)}
    message = bad(raw, tmp_path / "integer", features=textual, ids="integer")
    assert message.startswith("data.ids is integer, but user ids of ")
    assert re.search(r"\.parquet are text, such as 'u\d+'; set data\.ids=text$", message)
    files = interactions.inspect_interactions(catalog_config(raw, tmp_path / "auto", features=textual).data)
    with Scratch() as scratch, pytest.raises(InputError, match=r"data\.ids is integer, but user ids of .*'u"):
        interactions.read_interactions(files, scratch, ids_as="integer")  # as where text follows after a file's head


def bad(raw: str, catalog: Path, force: bool = False, **data) -> str:
    """The error message; nothing is written."""
    with pytest.raises(InputError) as caught:
        build_catalog.prepare_catalog(catalog_config(raw, catalog, **data), force)
    assert not catalog.exists()
    return str(caught.value)


def test_raw_files_inside_the_catalog_are_refused(tmp_path, raw):
    with pytest.raises(InputError, match=r"raw files, such as .*train\.parquet, are inside data\.catalog"):
        build_catalog.prepare_catalog(catalog_config(raw, tmp_path), force=True)


def test_bad_input_writes_nothing(ray_local, tmp_path, raw):
    catalog = tmp_path / "catalog"
    assert "data.features is empty" in bad(raw, catalog, features={})
    assert "every modality has weight 0" in bad(raw, catalog, features={"v": {"path": "visual.npy", "weight": 0}})
    assert "no column 'user'; columns found: user_id, item_id" in bad(raw, catalog, interactions={"user": "user"})
    assert "visual.bin does not exist" in bad(raw, catalog, features={"v": {"path": "visual.bin"}})

    visual = np.load(f"{raw}/visual.npy")
    visual[7, 2] = np.nan
    formats.write_array(f"{raw}/visual.npy", visual)
    assert f"{raw}/visual.npy: the vector of item 7 (row 8)" in bad(raw, catalog)
    formats.write_array(f"{raw}/visual.npy", np.nan_to_num(visual)[:-2])
    assert f"{raw}/visual.npy has {ITEMS - 2} rows" in bad(raw, catalog)

    write_raw(raw)
    train = formats.read_table(f"{raw}/train.parquet")
    formats.write_table(f"{raw}/test.parquet", train.slice(0, 2))
    assert "repeats 2 interactions of train, such as user_id='u" in bad(raw, catalog)
    formats.write_table(f"{raw}/test.parquet", train.slice(0, 0))
    assert "the test split is empty" in bad(raw, catalog)


def run_prepare(*args: str, **environment: str) -> subprocess.CompletedProcess:
    command, env = [sys.executable, "-m", "gtc_dist.prepare", *args], {**os.environ, **environment}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=env)


def test_command_on_tiktok(tmp_path):
    """In separate processes: the real data, a rerun, and an error as a user sees it."""
    args = ("--config", "configs/tiktok.yaml", f"data.catalog={tmp_path / 'catalog'}")
    first = run_prepare(*args)
    assert first.returncode == 0, first.stderr
    assert "users 9,308  items 6,710" in first.stdout
    assert "train 59,541  valid 3,051  test 6,130" in first.stdout
    assert all(line.startswith("[") for line in first.stderr.splitlines()), first.stderr  # progress lines only
    catalog = Catalog(str(tmp_path / "catalog"), verify="checksum")
    assert (catalog.users, catalog.items) == (9308, 6710)
    assert catalog.manifest.interactions == {"train": 59541, "valid": 3051, "test": 6130}
    assert catalog.modalities() == {"visual": 128, "acoustic": 128}
    assert catalog.ids("items").type == pa.int32()
    visual = np.load(TIKTOK / "visual.npy")[catalog.ids("items").to_numpy()].astype(np.float64)
    expected = (visual - visual.mean(0)) / visual.std(0)
    np.testing.assert_allclose(catalog.features("visual"), expected, atol=5e-3)

    again = run_prepare(*args)
    assert again.returncode == 0
    assert "is up to date (--force rebuilds it)" in again.stdout
    assert again.stderr == ""

    broken = run_prepare(*args, "data.interactions.user=uid")
    assert broken.returncode == 2
    assert broken.stderr.splitlines() == [
        f"error: {ROOT}/../shared/data/tiktok/train.parquet has no column 'uid'; columns found: user_id, item_id "
        "(name it under data.interactions)"
    ]


def test_an_error_found_by_ray_is_one_line(ray_local, tmp_path, raw):
    write_raw(raw)
    visual = np.load(f"{raw}/visual.npy")
    visual[3, 0] = np.inf
    formats.write_array(f"{raw}/visual.npy", visual)
    path = tmp_path / "c.yaml"
    path.write_text(
        f"data: {{raw: {raw}, catalog: {tmp_path}/catalog, split: {{method: given}}, "
        "features: {visual: {path: visual.npy}}}\nrun: {storage: runs, name: x}\n"
    )
    found = run_prepare("--config", str(path), RAY_ADDRESS=ray_local.address_info["address"])
    assert found.returncode == 2
    message = f"error: {raw}/visual.npy: the vector of item 3 (row 4) has a value that is not finite (inf, position 0)"
    assert [line for line in found.stderr.splitlines() if not line.startswith("[")] == [message]
    assert not (tmp_path / "catalog").exists()
