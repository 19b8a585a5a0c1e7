"""Files are not executed, and names in them cannot leave their folder. test_job checks that no secret is written."""

import json
from pathlib import Path

import pytest
from small import small_catalog

from gtc_dist.config_file import build_config
from gtc_dist.data.catalog import Catalog
from gtc_dist.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["../outside.npy", "graph/../../x", "/etc/hostname", "s3://other/x", "a\\..\\b"])
@pytest.mark.parametrize("part", ["files", "modalities"])
def test_names_in_a_manifest_cannot_leave_the_catalog(tmp_path, part, name):
    catalog = small_catalog(tmp_path / "c")
    path = tmp_path / "c" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest[part][name] = next(iter(manifest[part].values()))
    path.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="is a path outside the catalog"):
        Catalog(catalog.uri)


@pytest.mark.parametrize("name", ["../x", "a/b", "", "a b", "members", "spectral", "cold"])
def test_names_of_modalities(name):
    tree = {"data": {"raw": "r", "catalog": "c", "features": {name: {"path": "x.npy"}}}}
    with pytest.raises(InputError, match="modality"):
        build_config({**tree, "run": {"storage": "s", "name": "n"}}, "test")


def test_every_package_is_pinned():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert len(lines) > 50
    assert all("==" in line for line in lines)
