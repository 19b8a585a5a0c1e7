"""An existing catalog is up to date, rebuilt or refused; other files are never touched."""

import pytest
from raw_files import catalog_config, catalog_contents, write_raw

from gtc_dist.config import Config
from gtc_dist.data import storage
from gtc_dist.data.catalog import BUILDING, MANIFEST, Catalog
from gtc_dist.errors import InputError
from gtc_dist.graph.csc import Graphs
from gtc_dist.prepare import build_catalog
from gtc_dist.prepare.feature_files import FeatureSource
from gtc_dist.prepare.fingerprint import catalog_inputs, fingerprint
from gtc_dist.raw.interaction_file import InteractionFile


@pytest.fixture
def raw(tmp_path) -> str:
    write_raw(str(tmp_path / "raw"))
    return str(tmp_path / "raw")


def test_a_rerun_is_up_to_date_until_something_changes(ray_local, tmp_path, raw, capsys):
    first, _ = build_catalog.prepare_catalog(catalog_config(raw, tmp_path / "catalog"))
    again, built = build_catalog.prepare_catalog(catalog_config(raw, tmp_path / "catalog", verify="size"))
    assert (again, built) == (first, False)
    changed = catalog_config(raw, tmp_path / "catalog", interactions={"k_core": 2})
    before = storage.listing(str(tmp_path / "catalog"))
    with pytest.raises(InputError, match=r"raw files \(data.interactions.k_core is 2, was 0\); --force"):
        build_catalog.prepare_catalog(changed)
    assert storage.listing(str(tmp_path / "catalog")) == before
    write_raw(raw, seed=1)
    with pytest.raises(InputError, match=r"other raw files \(.*/test.parquet has changed; .*; and 1 more\); --force"):
        build_catalog.prepare_catalog(catalog_config(raw, tmp_path / "catalog"))
    rebuilt, built = build_catalog.prepare_catalog(changed, force=True)
    assert built
    assert rebuilt.fingerprint != first.fingerprint
    assert Catalog(str(tmp_path / "catalog"), verify="checksum").manifest == rebuilt


def test_force_builds_the_same_catalog_and_removes_old_files(ray_local, tmp_path, raw):
    uri = str(tmp_path / "catalog")
    build_catalog.prepare_catalog(catalog_config(raw, uri))
    before = catalog_contents(Catalog(uri))
    storage.write_bytes(f"{uri}/interactions/train/part-00099.parquet", b"of an earlier, larger catalog")
    manifest, _ = build_catalog.prepare_catalog(catalog_config(raw, uri), force=True)
    assert catalog_contents(Catalog(uri, verify="checksum")) == before
    assert set(storage.listing(uri)) == {*manifest.files, MANIFEST}


def test_an_incomplete_catalog_is_refused_and_rebuilt(ray_local, tmp_path, raw):
    """As a crash leaves it: the marker, some files, no manifest."""
    uri = str(tmp_path / "catalog")
    whole, _ = build_catalog.prepare_catalog(catalog_config(raw, uri))
    storage.write_json(f"{uri}/{BUILDING}", {"schema_version": 1})
    (tmp_path / "catalog" / MANIFEST).unlink()
    with pytest.raises(InputError, match="is incomplete"):
        Catalog(uri)
    rebuilt, built = build_catalog.prepare_catalog(catalog_config(raw, uri))
    assert built
    assert rebuilt == whole
    Catalog(uri, verify="checksum")


def test_a_failure_while_writing_leaves_no_catalog(ray_local, tmp_path, raw):
    """graph/item_user.indices.npy cannot be written, since a folder has that name."""
    blocked = tmp_path / "catalog" / "graph" / "item_user.indices.npy"
    blocked.mkdir(parents=True)
    with pytest.raises(OSError, match=r"item_user\.indices\.npy"):
        build_catalog.prepare_catalog(catalog_config(raw, tmp_path / "catalog"))
    with pytest.raises(InputError, match="is incomplete"):
        Catalog(str(tmp_path / "catalog"))
    blocked.rmdir()
    assert build_catalog.prepare_catalog(catalog_config(raw, tmp_path / "catalog"))[1]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    "files",
    [
        {"notes.txt": b"mine"},
        {"users/part-00000.parquet": b"an export"},
        {MANIFEST: b'{"metric": "dot"}', "users/part-00000.parquet": b"an export"},
        {MANIFEST: b'{"schema_version": 1, "fingerprint": "x"}', "notes.txt": b"mine"},
        {BUILDING: b"{}", "notes.txt": b"mine"},
    ],
)
def test_a_folder_with_other_files_is_never_touched(tmp_path, raw, files, force):
    uri = str(tmp_path / "catalog")
    for name, data in files.items():
        storage.write_bytes(f"{uri}/{name}", data)
    with pytest.raises(InputError, match="name another folder"):
        build_catalog.prepare_catalog(catalog_config(raw, uri), force)
    assert {name: storage.read_bytes(f"{uri}/{name}") for name in storage.listing(uri)} == files


FEATURES = {"visual": {"path": "visual.npy", "pca": 4}, "textual": {"path": "textual.parquet", "weight": 2.0}}
DEFAULTS = {"raw": "/raw", "catalog": "/c", "features": FEATURES}
OTHERS = {
    "raw": "/raw",
    "catalog": "/c2",
    "verify": "size",
    "items": "all",
    "features": FEATURES,
    "interactions": {
        "files": ["a.csv", "b/*.csv"],
        "format": "csv",
        "user": "u",
        "item": "i",
        "rating": "r",
        "time": "t",
        "min_rating": 3.5,
        "k_core": 5,
    },
    "split": {
        "method": "label",
        "label": "l",
        "labels": ["a", 1, "c"],
        "valid_share": 0.05,
        "test_share": 0.2,
        "seed": 7,
    },
}


@pytest.mark.parametrize("user_hop", [False, True])
@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (DEFAULTS, "2ccde033029a3615116128cabb15c57ea59d731897010c6af6cd5798242a0650"),
        (OTHERS, "1eed096b45e8748dd22c335a9b71aa3739cd5c0c29a77a2eb5aaa0f39ba2c9af"),
    ],
    ids=["defaults", "no defaults"],
)
def test_fingerprints_are_those_of_version_0_1(monkeypatch, data, expected, user_hop):
    """Computed with version 0.1 for the same settings and file signatures: its catalogs are still up to date."""
    monkeypatch.setattr(storage, "file_signatures", lambda uris: [[uri, 10, "1.5"] for uri in uris])
    tree = {"data": data, "model": {"user_hop": user_hop}, "run": {"storage": "runs", "name": "x"}}
    files = [InteractionFile("/raw/train.parquet", "parquet", False, {}, {})]
    uris = {"visual": "/raw/visual.npy", "textual": "/raw/textual.parquet"}
    sources = {name: FeatureSource(name, [uri], 1, 1, "float32", None, []) for name, uri in uris.items()}
    assert fingerprint(catalog_inputs(Config.model_validate(tree), files, sources)) == expected


def test_the_user_user_graph_is_built_only_for_user_hop(ray_local, tmp_path, raw):
    uri = str(tmp_path / "catalog")
    without, asking = catalog_config(raw, uri, user_hop=False), catalog_config(raw, uri)
    manifest, _ = build_catalog.prepare_catalog(without)
    assert list(manifest.graphs) == ["item_user", "user_item", "item_item"]
    assert not [name for name in manifest.files if "user_user" in name]
    assert Graphs.load(Catalog(uri), user_user=False).user_user is None
    with pytest.raises(
        InputError, match=r"has no graph user_user, which the configured network uses; run .*prepare --force"
    ):
        Graphs.load(Catalog(uri))
    before = catalog_contents(Catalog(uri))
    with pytest.raises(InputError, match=r"has no user-user graph, .* --force rebuilds it with the graph$"):
        build_catalog.prepare_catalog(asking)
    assert catalog_contents(Catalog(uri, verify="checksum")) == before

    rebuilt, built = build_catalog.prepare_catalog(asking, force=True)
    assert built
    assert rebuilt.graphs["user_user"] > 0
    assert rebuilt.fingerprint == manifest.fingerprint
    assert build_catalog.prepare_catalog(asking) == (rebuilt, False)
    assert build_catalog.prepare_catalog(without) == (rebuilt, False)  # an extra graph is fine
    graphs = catalog_contents(Catalog(uri))
    assert {name: value for name, value in graphs.items() if name != "user_user"} == before
