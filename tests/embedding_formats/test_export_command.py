"""`gtc export --format`: the command, its manifest and README.md."""

import json

import faiss
import numpy as np
import pytest
from ranks import run_ranks
from small import small_catalog, write_config
from trainings import read_export, train_without_ray

from gtc_dist import export
from gtc_dist.api import Run
from gtc_dist.checkpoint.existing_run import find_run
from gtc_dist.data import storage
from gtc_dist.embedding_formats.write_formats import EXPORT_FORMATS, write_formats
from gtc_dist.inference.embedding_files import export_rank


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return train_without_ray(write_config(folder, small_catalog(folder / "c").uri, str(folder / "runs"), epochs=1))


def test_all_formats_hold_the_same_rows(run, tmp_path):
    out = str(tmp_path / "e")
    export.main(["--run", run, "--out", out, "--format", *EXPORT_FORMATS])
    manifest = storage.read_json(f"{out}/manifest.json")
    assert manifest["formats"] == ["parquet", "numpy", "faiss", "jsonl"]
    assert manifest["id_types"] == {"users": "text", "items": "integer"}
    assert manifest["index"] == {"kind": "flat", "metric": "inner product", "ids": "original"}
    assert set(storage.listing(out)) == {*manifest["files"], "manifest.json", "README.md"}
    text = (tmp_path / "e/README.md").read_text()
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == [
        "Parquet",
        "NumPy",
        "FAISS",
        "JSON lines",
    ]
    (users, queries), (items, rows) = (read_export(out, kind) for kind in ("users", "items"))
    assert np.array_equal(np.load(f"{out}/items.npy"), rows)
    assert np.load(f"{out}/items_ids.npy").tolist() == items
    with open(f"{out}/users.jsonl") as file:
        lines = [json.loads(line) for line in file]
    assert [line["id"] for line in lines] == users
    assert np.array_equal(np.array([line["vector"] for line in lines], np.float32), queries)
    found = faiss.read_index(f"{out}/items.faiss").search(queries, 5)
    np.testing.assert_allclose(found[0], np.sort(queries @ rows.T, axis=1)[:, ::-1][:, :5], rtol=1e-5)
    by_id = dict(zip(items, rows, strict=True))
    for query, ids, scores in zip(queries, *found[::-1], strict=True):
        np.testing.assert_allclose([by_id[item] @ query for item in ids], scores, rtol=1e-5)


def on_ranks(comm, run: str, out: str) -> dict:
    return export_rank(comm, None, find_run(run), out, "float32")


def test_the_files_do_not_depend_on_the_ranks(run, tmp_path):
    contents = []
    for size in (1, 2):
        out = str(tmp_path / str(size))
        made = run_ranks(on_ranks, size, run, out)[0]
        files = write_formats(out, made, {"numpy", "faiss", "jsonl"}, "float32")["files"]
        assert set(storage.listing(out)) == set(files)
        contents.append(files)
    assert contents[0] == contents[1]  # SHA-256 and sizes


def test_an_interrupted_export_in_other_formats_is_repeated(run, tmp_path, capsys):
    Run(run).export(str(tmp_path / "e"), formats=["numpy", "jsonl"])
    assert not (tmp_path / "e/items").exists()
    complete = {path.name: path.read_bytes() for path in (tmp_path / "e").iterdir()}
    (tmp_path / "e/manifest.json").unlink()
    (tmp_path / "e/items.npy").rename(tmp_path / "e/items.npy.12345678.partial")
    capsys.readouterr()
    Run(run).export(str(tmp_path / "e"), formats=["numpy", "jsonl"])
    assert "was cut off: starting again" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in (tmp_path / "e").iterdir()} == complete


def test_an_index_of_a_kind_that_is_chosen(run, tmp_path):
    export.main(
        ["--run", run, "--out", str(tmp_path / "e"), "--format", "faiss", "--index", "hnsw", "--dtype", "float16"]
    )
    about = storage.read_json(f"{tmp_path}/e/manifest.json")["index"]
    assert about["kind"] == "hnsw"
    assert about["recall@20"] >= 0.95
    assert about["recall_users"] == 60
    assert "`IndexHNSWFlat`" in (tmp_path / "e/README.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--index", "flat"], "--index goes with --format faiss"), (["--format", "csv"], "invalid choice: 'csv'")],
)
def test_options_that_do_not_fit(run, tmp_path, capsys, words, message):
    with pytest.raises(SystemExit):
        export.main(["--run", run, "--out", str(tmp_path / "e"), *words])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "e").exists()
