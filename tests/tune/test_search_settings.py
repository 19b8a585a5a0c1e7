"""The command `gtc tune`, with Ray Tune, as a user runs it."""

import json
import os
import signal
import subprocess
import sys

import pytest
import yaml
from small import ROOT, refused, small_catalog, write_config

from gtc_dist.config_file import load_config
from gtc_dist.data import storage
from gtc_dist.data.catalog import Catalog
from gtc_dist.report.run_data import read_run
from gtc_dist.report.write_report import report_page
from gtc_dist.train import open_for_training
from gtc_dist.tune import search_settings
from gtc_dist.tune.search_space import read_space

SPACE = {
    "trials": 3,
    "first_epochs": 1,
    "factor": 2,
    "parameters": {"train.table_lr": {"log_uniform": [1e-3, 1e-1]}, "model.layers": {"choice": [1, 2]}},
}


@pytest.fixture
def files(tmp_path):
    small_catalog(tmp_path / "catalog")
    config = write_config(tmp_path, str(tmp_path / "catalog"), str(tmp_path / "runs"), epochs=4)
    space = tmp_path / "space.yaml"
    space.write_text(yaml.safe_dump(SPACE))
    return ["-m", "gtc_dist.tune", "--config", config, "--space", str(space)]


def results_of(folder) -> dict:
    return json.loads((folder / "tune.json").read_text())


def test_a_search_and_going_on_with_it(files, tmp_path):
    folder = tmp_path / "runs" / "r"
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = {"args": [sys.executable, *files], "cwd": ROOT, "env": environment}
    with subprocess.Popen(**command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        first = running.stdout.readline()  # a trial ended
        running.send_signal(signal.SIGKILL)
        running.communicate()
    assert first.startswith("[1/3] trial-0000")
    name = first.split()[1]
    ended = json.loads((folder / name / "trial.json").read_text())
    assert ended["status"] in ("finished", "stopped")
    assert not (folder / "tune.json").exists()
    before = sorted(path.stat().st_mtime_ns for path in (folder / name / "checkpoints").rglob("*"))

    done = subprocess.run(**command, capture_output=True, text=True, check=True)
    assert "going on with a search of 3 trials" in done.stderr
    trials = results_of(folder)["trials"]
    assert sorted(trial["name"] for trial in trials) == [f"trial-{n:05d}" for n in range(3)]
    again = next(trial for trial in trials if trial["name"] == name)
    assert {key: again[key] for key in ended} == ended
    assert sorted(path.stat().st_mtime_ns for path in (folder / name / "checkpoints").rglob("*")) == before

    values = [trial["value"] for trial in trials]
    assert values == sorted(values, reverse=True)
    for trial in trials:
        run = folder / trial["name"]
        config = yaml.safe_load((run / "config.yaml").read_text())
        assert config["train"]["table_lr"] == trial["settings"]["train.table_lr"]
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert max(line["valid"]["recall@20"] for line in lines) == trial["value"]
        assert (run / "metrics.json").exists() == (trial["status"] == "finished")
    best = load_config(folder / "best.yaml")
    assert best.train.table_lr == trials[0]["settings"]["train.table_lr"]
    assert best.run.name == "r-best"
    assert f"{values[0]:.4f}  {trials[0]['name']}" in done.stdout

    page = report_page(read_run(str(folder / name)), None, None)
    assert f"{name} (this run)" in page
    assert all(f"{trial['value']:.4f}" in page for trial in trials)

    third = subprocess.run(**command, capture_output=True, text=True, check=True)  # nothing is left to do
    assert third.stdout.splitlines()[0] == "recall@20 on valid, 3 trials:"
    assert "Ray" not in third.stderr
    refused([*files, "train.w_reg=0.5"], "is a search with another configuration, space or catalog")


def test_a_finished_search_is_printed_without_its_graphs(files, monkeypatch, capsys):
    """They may be large."""
    config, catalog, folder = open_for_training(load_config(files[3]))
    asked = search_settings.asked_for(config, read_space(files[5], config), catalog)
    trial = {"name": "trial-00002", "value": 0.25, "status": "finished", "overrides": "model.layers=1"}
    storage.write_json(f"{folder}/search.json", asked)
    storage.write_json(f"{folder}/tune.json", {"metric": "recall@20", "trials": [trial]})
    monkeypatch.setattr(Catalog, "graph", None)
    assert search_settings.main(files[2:]) == 0
    assert "0.2500  trial-00002  finished  model.layers=1" in capsys.readouterr().out


def test_refusals_before_ray(files, tmp_path):
    refused([*files, "cluster.workers=2"], "a trial trains on one rank")
    refused([*files, "train.epochs=0"], "first_epochs is 1, above train.epochs 0")
    refused([*files, f"train.init_from={tmp_path}/none"], f"{tmp_path}/none")
    (tmp_path / "runs/r").mkdir(parents=True)
    (tmp_path / "runs/r/config.yaml").write_text("{}")
    refused(files, "holds other files, such as config.yaml; choose another run.name")
