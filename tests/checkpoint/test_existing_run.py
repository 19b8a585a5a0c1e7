"""Runs and catalogs that were copied to another place."""

import shutil

import pytest
from small import small_catalog, write_config
from trainings import train_without_ray

from gtc_dist import evaluate
from gtc_dist.checkpoint.existing_run import find_run
from gtc_dist.data import storage
from gtc_dist.errors import InputError


@pytest.fixture
def moved(tmp_path):
    """A finished run and its catalog, moved together to another folder."""
    small_catalog(tmp_path / "old" / "catalog")
    file = write_config(tmp_path, str(tmp_path / "old" / "catalog"), str(tmp_path / "old" / "runs"), epochs=1)
    train_without_ray(file)
    shutil.move(tmp_path / "old", tmp_path / "new")
    return tmp_path


def test_a_run_beside_its_catalog_finds_it(moved, capsys):
    found = find_run(f"{moved}/new/runs/r")
    assert found.config.data.catalog == f"{moved}/new/catalog"
    evaluate.main(["--run", f"{moved}/new/runs/r"])
    assert '"overall"' in capsys.readouterr().out


def test_a_run_without_its_catalog_takes_the_one_it_is_given(moved, capsys):
    shutil.move(moved / "new" / "catalog", moved / "elsewhere")
    with pytest.raises(InputError, match=r"old/catalog of run .*new/runs/r does not exist; .*--catalog"):
        find_run(f"{moved}/new/runs/r")
    evaluate.main(["--run", f"{moved}/new/runs/r", "--catalog", f"{moved}/elsewhere"])
    assert '"overall"' in capsys.readouterr().out
    small_catalog(moved / "other", seed=1)
    with pytest.raises(InputError, match=r"other is not the catalog .*; name its own with --catalog"):
        find_run(f"{moved}/new/runs/r", f"{moved}/other")


def test_a_run_in_object_storage_finds_a_catalog_beside_it(moved, s3):
    for name in storage.listing(str(moved / "new")):
        storage.write_bytes(f"{s3}/copy/{name}", storage.read_bytes(f"{moved}/new/{name}"))
    assert find_run(f"{s3}/copy/runs/r").config.data.catalog == f"{s3}/copy/catalog"


def test_a_moved_training_goes_on(moved):
    file = write_config(moved, str(moved / "new" / "catalog"), str(moved / "new" / "runs"), epochs=2)
    run = train_without_ray(file)
    assert run == f"{moved}/new/runs/r"
    assert storage.read_json(f"{run}/metrics.json")["last_epoch"] == 2
    lines = storage.read_bytes(f"{run}/metrics.jsonl").decode().splitlines()
    assert len(lines) == 3  # epochs 0 and 1 of the first place, epoch 2
