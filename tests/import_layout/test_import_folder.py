"""`gtc import`: from a public folder to a catalog, folders that it may not write, and names with any character."""

from pathlib import Path

import pytest
from imports import inspected, printed_commands, refusal, rows, run_import
from test_atomic_files import write_mmrec
from test_matrices import write_folder
from test_movielens import RATINGS, write_csv, write_dat

from gtc_dist.config_file import load_config, read_config
from gtc_dist.data import storage
from gtc_dist.data.catalog import Catalog
from gtc_dist.errors import InputError
from gtc_dist.import_layout import matrices, tables
from gtc_dist.prepare import build_catalog

ODD = "a*b [1]?'\"::é\n#%41 $(x) {y}\u2028\x85\\"


def test_an_imported_folder_is_prepared(tmp_path, ray_local, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("raw")
    write_mmrec(folder)
    lines = [f"{user}\t{item}\t{(user + item) % 4 % 3}" for user in range(12) for item in range(3)]
    (folder / "baby.inter").write_text("\n".join(["userID\titemID\tx_label", *lines]) + "\n")
    run_import("mmrec", folder, Path("data/baby"))
    manifest, built = build_catalog.prepare_catalog(load_config("data/baby/config.yaml"))
    assert built
    assert manifest.interactions == {"train": 18, "valid": 9, "test": 9}
    assert Catalog("work/baby/catalog").modalities() == {"visual": 4, "textual": 2}


def test_any_name_is_taken_literally(tmp_path, ray_local, monkeypatch, capsys):
    """A folder whose name has wildcards, quotes and a line end; another one, which a wildcard matches, is not read."""
    monkeypatch.chdir(tmp_path)
    for name in ("aXb 1Y" + ODD.partition("?")[2], ODD):
        Path(name).mkdir()
        write_csv(Path(name))
        run_import("movielens", Path(name), Path("out") / name)
        shown = capsys.readouterr().out
        config = inspected(Path("out") / name, shown)
        assert printed_commands(shown)[1:] == [
            ["gtc", step, "--config", str(tmp_path / "out" / name / "config.yaml")] for step in ("prepare", "train")
        ]
    files, sources = build_catalog.inspect_raw_data(config)
    raw = str(tmp_path / "out" / ODD)
    assert [file.uri for file in files] == [f"{raw}/interactions.parquet"]
    assert sources["text"].uris == [f"{raw}/features/text/part-000000.parquet"]


def test_a_name_that_is_no_text_is_refused(tmp_path):
    write_folder(tmp_path / "raw")
    with pytest.raises(InputError, match=r"out.udcff' is not UTF-8 text, which config.yaml needs; rename the folder"):
        run_import("mmssl", tmp_path / "raw", tmp_path / "out\udcff")


def test_folders_that_it_does_not_overwrite(tmp_path):
    write_folder(tmp_path / "raw")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(InputError, match=r"mine is not empty: 1 of 1 files are not part of an import, such as thesis"):
        run_import("mmssl", tmp_path / "raw", tmp_path / "mine")
    run_import("mmssl", tmp_path / "raw", tmp_path / "out")
    with pytest.raises(InputError, match=r"out is not empty, it holds an import; name another folder"):
        run_import("mmssl", tmp_path / "raw", tmp_path / "out")


def test_an_interrupted_import_starts_again(tmp_path, monkeypatch):
    write_folder(tmp_path / "raw")
    out = tmp_path / "out"

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(matrices, "copy_vectors", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_import("mmssl", tmp_path / "raw", out)
    assert not (out / "config.yaml").exists()
    assert (out / "train.parquet").exists()
    run_import("mmssl", tmp_path / "raw", out)
    inspected(out)


def test_blocks_of_lines_have_the_rows_and_numbers_of_the_whole_file(tmp_path, monkeypatch):
    """Several blocks; the same from the object store's reader as from a local file."""
    monkeypatch.setattr(tables, "BLOCK_LINES", 2)
    (tmp_path / "ml").mkdir()
    write_dat(tmp_path / "ml")
    run_import("movielens", tmp_path / "ml", tmp_path / "out")
    assert rows(tmp_path / "out") == RATINGS
    with open(tmp_path / "ml" / "ratings.dat", "a") as file:
        file.write("1::2::3::x\n")
    assert "the timestamp in line 4 is b'x'" in refusal("movielens", tmp_path / "ml", tmp_path / "out2")


def test_folders_in_object_storage(tmp_path, s3):
    write_folder(tmp_path / "raw")
    for path in (tmp_path / "raw").iterdir():
        storage.copy_file(str(path), storage.join(s3, "raw", path.name))
    run_import("mmssl", f"{s3}/raw", f"{s3}/out")
    config = read_config(storage.read_bytes(f"{s3}/out/config.yaml"), "config.yaml")
    files, _ = build_catalog.inspect_raw_data(config)
    assert [file.uri for file in files] == [f"{s3}/out/{split}.parquet" for split in ("train", "valid", "test")]
