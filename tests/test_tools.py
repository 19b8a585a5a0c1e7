"""The tools that have no test file of their own."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small import small_catalog
from test_train import write_config

ROOT = Path(__file__).resolve().parent.parent


def test_benchmark_writes_what_it_measured(tmp_path):
    catalog = small_catalog(tmp_path / "catalog")
    config = write_config(tmp_path, catalog.uri, str(tmp_path / "runs"))
    command = [sys.executable, "tools/benchmark.py", "step", "--config", config, "--threads", "1", "--epochs", "2"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "b.json"), "model.width=4"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "b.json").read_text())["step"][0]
    train_rows = len(catalog.interactions("train")[0])
    assert row["steps"] == -(-train_rows // 64)
    assert row["processor_seconds_per_epoch"] > 0
    assert row["interactions_per_second"] * row["seconds_per_epoch"] == pytest.approx(train_rows)
    inside = sum(row["seconds_by_part"][part] for part in ("data", "lookup", "forward", "backward", "optimizer"))
    assert 0 < inside < 1.5 * row["seconds_per_epoch"]
    assert "seconds_per_epoch" in done.stdout
    assert not (tmp_path / "runs").exists()


def test_the_demo_leaves_a_folder_that_it_did_not_make_alone(tmp_path):
    for name in ("tools", "configs", "gtc_dist"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "mine.txt").write_text("precious")
    done = subprocess.run([sys.executable, "tools/demo.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "demo/ holds files that the demo did not write" in done.stderr
    assert [path.name for path in (tmp_path / "demo").iterdir()] == ["mine.txt"]
