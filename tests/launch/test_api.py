"""The commands as functions of Python, against the commands; and the notebook of the docs, cell by cell."""

import json
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from small import ROOT, small_catalog, write_config
from trainings import train_without_ray

import gtc_dist
from gtc_dist import evaluate
from gtc_dist.api import Run, prepare, train
from gtc_dist.config_file import load_config
from gtc_dist.errors import InputError
from gtc_dist.recommend import lists


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("run")
    return train_without_ray(write_config(folder, small_catalog(folder / "catalog").uri, str(folder / "runs")))


def test_a_run_gives_what_the_commands_give(run, tmp_path, capsys):
    opened = Run(run)
    evaluate.main(["--run", run, "--split", "valid"])
    assert {"split": "valid", **json.loads(json.dumps(opened.evaluate("valid")))} == json.loads(capsys.readouterr().out)
    opened.export(str(tmp_path / "e"))
    for kind in ("users", "items"):
        exported, table = pq.read_table(tmp_path / "e" / kind), opened.embeddings(kind)
        assert table["id"].to_pylist() == exported["id"].to_pylist()
        assert table["embedding"].to_pylist() == exported["embedding"].to_pylist()
        ids, vectors = opened.numpy_embeddings(kind)
        assert ids.tolist() == exported["id"].to_pylist()
        np.testing.assert_array_equal(vectors, np.array(exported["embedding"].to_pylist(), np.float32))
    lists.main(["--run", run, "--out", str(tmp_path / "l"), "--top", "4"])
    written = pq.read_table(tmp_path / "l").to_pylist()
    assert opened.recommend(top=4).to_pylist() == written
    users = [written[9]["user_id"], written[0]["user_id"]]
    chosen = opened.recommend(users, top=4, include_seen=False).to_pylist()
    expected = [row for row in written if row["user_id"] in users]
    assert [{**row, "score": 0} for row in chosen] == [{**row, "score": 0} for row in expected]
    assert [row["score"] for row in chosen] == pytest.approx([row["score"] for row in expected], rel=1e-5)
    capsys.readouterr()
    lists.main(["--run", run, "--item", str(written[0]["item_id"]), "--top", "3"])
    printed = [line.split()[2] for line in capsys.readouterr().out.splitlines()[1:]]
    similar = opened.similar_items(written[0]["item_id"], top=3).to_pylist()
    assert [str(row["item_id"]) for row in similar] == printed
    assert opened.metrics["best_epoch"] == json.loads((tmp_path / run / "metrics.json").read_text())["best_epoch"]


def test_the_readme_of_an_export_says_what_it_is_and_its_code_loads_it(run, tmp_path, monkeypatch):
    opened = Run(run)
    opened.export(str(tmp_path / "e"), dtype="float16")
    monkeypatch.chdir(tmp_path / "e")
    text = (tmp_path / "e" / "README.md").read_text()
    users, items = (opened.embeddings(kind) for kind in ("users", "items"))
    width = len(items["embedding"][0])
    assert f"{len(users):,} users and {len(items):,} items, {width} columns of float16, of the best epoch" in text
    ndcg = opened.metrics["test"]["overall"]["ndcg@20"]
    assert next(line for line in text.splitlines() if line.startswith("| test |")).endswith(f" {ndcg:.4f} |")
    names: dict = {}
    exec(text.partition("```python\n")[2].partition("```")[0], names)
    np.testing.assert_allclose(names["vectors"], opened.numpy_embeddings("items")[1], rtol=1e-2, atol=1e-2)


def test_what_is_not_there_is_refused(run, tmp_path):
    with pytest.raises(InputError, match="holds no run"):
        Run(str(tmp_path))
    with pytest.raises(InputError, match="u999"):
        Run(run).recommend(["u999"])
    with pytest.raises(InputError, match="no id of users is given"):
        Run(run).recommend([])
    with pytest.raises(InputError, match="overrides go with a YAML file"):
        prepare({"data": {}}, "a.b=c")
    with pytest.raises(InputError, match=r"the configuration: key 'run' is missing"):
        train({"data": {"raw": "r", "catalog": "c"}})


def test_one_user_may_be_a_text(run):
    assert Run(run).recommend("u003", top=3) == Run(run).recommend(["u003"], top=3)


def test_a_finished_run_is_opened(run, capsys):
    config = load_config(f"{run}/config.yaml")
    assert train(config).metrics == Run(run).metrics
    assert "is finished" in capsys.readouterr().err


def test_the_package_has_the_functions_and_loads_torch_when_they_are_used(run):
    """Whatever was imported before: prepare and train are modules as well as functions."""
    assert gtc_dist.Run is Run
    assert gtc_dist.train(load_config(f"{run}/config.yaml")).uri == run
    with pytest.raises(InputError, match="overrides go with a YAML file"):
        gtc_dist.prepare({"data": {}}, "a.b=c")
    assert {"Run", "prepare", "train"} <= set(dir(gtc_dist))
    with pytest.raises(AttributeError, match="module 'gtc_dist' has no attribute 'Runs'"):
        _ = gtc_dist.Runs
    code = (
        "import sys, gtc_dist; loaded = 'torch' in sys.modules or 'ray' in sys.modules\n"
        "import gtc_dist.prepare.clean, gtc_dist.train\n"
        "print(loaded, gtc_dist.Run.__name__, *map(callable, (gtc_dist.prepare, gtc_dist.train)), gtc_dist.train.main)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.startswith("False Run True True <function main")


def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch, ray_local):
    monkeypatch.chdir(tmp_path)
    cells = json.loads((ROOT / "docs" / "notebook.ipynb").read_text())["cells"]
    names: dict = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    assert len(names["run"].recommend(top=2)) == 2 * 300
    assert names["vectors"].shape[0] == names["manifest"].items
    assert names["run"].metrics["test"]["overall"]["recall@20"] > names["run"].metrics["popularity"]["recall@20"]
