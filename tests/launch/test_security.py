"""Nothing in files is run, and names in them lead nowhere else. What is never written is looked for in test_job."""

import json
import sys
from pathlib import Path

import pytest
from small import small_catalog

from gtc_dist.config_file import build_config
from gtc_dist.data.catalog import Catalog
from gtc_dist.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import lock  # noqa: E402  (a script)


@pytest.mark.parametrize("name", ["../outside.npy", "graph/../../x", "/etc/hostname", "s3://other/x", "a\\..\\b"])
@pytest.mark.parametrize("part", ["files", "modalities"])
def test_names_in_a_manifest_cannot_leave_the_catalog(tmp_path, part, name):
    catalog = small_catalog(tmp_path / "c")
    path = tmp_path / "c" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest[part][name] = next(iter(manifest[part].values()))
    path.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="leads out of the catalog"):
        Catalog(catalog.uri)


@pytest.mark.parametrize("name", ["../x", "a/b", "", "a b", "members", "spectral", "cold"])
def test_names_of_modalities(name):
    tree = {"data": {"raw": "r", "catalog": "c", "features": {name: {"path": "x.npy"}}}}
    with pytest.raises(InputError, match="modality"):
        build_config({**tree, "run": {"storage": "s", "name": "n"}}, "test")


def test_pinned_packages_with_checksums():
    package = {
        "metadata": {"name": "b", "version": "2"},
        "download_info": {"archive_info": {"hashes": {"sha256": "00"}}},
    }
    other = {"metadata": {"name": "A", "version": "1"}, "download_info": {"archive_info": {"hashes": {"sha256": "11"}}}}
    assert lock.locked({"install": [package, other]}) == ["A==1 --hash=sha256:11", "b==2 --hash=sha256:00"]
    with pytest.raises(InputError, match="no sha256 for b 2"):
        lock.locked({"install": [{**package, "download_info": {"url": "x", "dir_info": {}}}]})


def test_every_package_is_pinned():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert len(lines) > 50
    assert all("==" in line for line in lines)
