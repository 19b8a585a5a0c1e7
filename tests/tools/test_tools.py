"""Tools without a test file of their own: the benchmark and the demo."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import small_catalog, write_config

from gtc_dist.config_file import load_config
from gtc_dist.data.catalog import Catalog
from gtc_dist.graph.csc import load_graphs

ROOT = Path(__file__).resolve().parents[2]


def benchmark(folder: Path, *words: str) -> tuple[list[dict], str]:
    """Rows of the JSON file, and the printed output."""
    done = subprocess.run(
        [sys.executable, "tools/benchmark.py", words[0], "--out", str(folder / "b.json"), *words[1:]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((folder / "b.json").read_text())
    assert report["machine"] in done.stdout
    assert report["measured"] == words[0]
    return report["rows"], done.stdout


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[str, Catalog]:
    folder = tmp_path_factory.mktemp("benchmark")
    catalog = small_catalog(folder / "catalog")
    return write_config(folder, catalog.uri, str(folder / "runs")), catalog


def test_benchmark_steps_on_one_and_two_ranks(small, tmp_path):
    config, catalog = small
    rows, printed = benchmark(tmp_path, "step", "--config", config, "--ranks", "1,2", "--repeats", "3", "model.width=4")
    train_rows = len(catalog.interactions("train")[0])
    for row in rows:
        result = row["result"]
        assert result["steps_per_pass"] == -(-train_rows // 64)
        assert result["interactions_per_second"] * result["seconds_per_step"] == pytest.approx(64)
        assert 0 <= result["waiting_for_batch"] < 1
        inside = sum(result[f"seconds/{part}"] for part in ("lookup", "forward", "backward", "optimizer"))
        assert inside > 0
        assert result["loader_interactions_per_second"] > 0
    assert [row["result"]["sent_bytes_per_step"] > 0 for row in rows] == [False, True]
    assert 0 < rows[0]["result"]["floor/share_reached"] < 1
    assert 100 < rows[0]["result"]["operators/launches"] < 1000
    assert rows[0]["result"]["operators/waits"] == 0
    assert "seconds_per_step" in printed
    assert not Path(config).with_name("runs").exists()


def test_benchmark_beside_lightgcn(small, tmp_path, monkeypatch):
    config, catalog = small
    rows, _ = benchmark(tmp_path, "peer", "--config", config, "--repeats", "1", "model.masked_members=2")
    result = rows[0]["result"]
    for name in ("lightgcn", "network_alone", "default"):
        seconds = result[f"processor_seconds/{name}"]
        assert seconds > 0
        assert result[f"of_lightgcn/{name}"] == pytest.approx(seconds / result["processor_seconds/lightgcn"])

    monkeypatch.syspath_prepend(str(ROOT / "tools/bench"))
    from measure_peer import LightGCN, lightgcn_epoch

    torch.manual_seed(0)
    users, items = catalog.interactions("train")
    network = LightGCN(load_graphs(load_config(config), catalog))
    losses = [lightgcn_epoch(network, users, items, 64, epoch) for epoch in range(100)]
    assert losses[0] == pytest.approx(math.log(2), abs=0.03)
    assert losses[-1] < 0.5


def test_benchmark_of_lists_and_of_the_formats_of_an_export(small, tmp_path):
    config, catalog = small
    words = ["lists", "--config", config, "--users", "8,16", "--width", "12", "--explain"]
    rows, _ = benchmark(tmp_path, *words)
    assert [row["result"]["rows"] for row in rows] == [160, 320]
    assert all(row["result"]["items"] == catalog.items for row in rows)
    rows, printed = benchmark(tmp_path, "formats", "--rows", "500", "--width", "12")
    assert [row["case"]["format"] for row in rows] == ["numpy", "jsonl", "faiss"]
    assert rows[0]["result"]["bytes"] == 2 * 128 + 1500 * 12 * 4 + 2 * 128 + 1500 * 8  # rows and ids, with headers
    assert "index/kind" in printed


def test_benchmark_compares_with_an_earlier_file(tmp_path):
    words = ("lookup", "--rows", "100", "--ids", "50", "--width", "4", "--ranks", "2", "--repeats", "2")
    rows, _ = benchmark(tmp_path, *words)
    result = rows[0]["result"]
    # each rank looks up at most 50 distinct rows, about half of them from the other rank: ids, rows and gradients
    assert 0 < result["sent_bytes"] < 50 * (8 + 2 * 4 * 4) + 16
    (tmp_path / "b.json").rename(tmp_path / "earlier.json")
    _, printed = benchmark(tmp_path, *words, "--compare", str(tmp_path / "earlier.json"))
    assert "peak_mib  " in printed
    assert "sent_bytes  1.000" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lookup", "--compare", "b.json"], "b.json would overwrite the file of --compare"),
        (["lookup", "--compare", "none.json"], "the file none.json of --compare does not exist"),
        (["lookup", "rows=5"], "lookup takes no configuration overrides: rows=5"),
        (["command", "ls"], "give the command to measure after --"),
        (["command", "--"], "give the command to measure after --"),
    ],
)
def test_benchmark_refuses_before_it_measures(tmp_path, words, message):
    (tmp_path / "b.json").write_text("{}")
    command = [sys.executable, str(ROOT / "tools/benchmark.py"), words[0], "--out", "b.json", *words[1:]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert (tmp_path / "b.json").read_text() == "{}"


@pytest.mark.long
def test_benchmark_of_the_whole_catalog_and_of_commands(small, tmp_path):
    config, catalog = small
    embedded, _ = benchmark(tmp_path, "inference", "--config", config, "--export", str(tmp_path / "e"), "--ranks", "2")
    assert embedded[0]["result"]["sent_bytes"] > 0
    assert len(list((tmp_path / "e" / "items").iterdir())) == 2
    ranked, _ = benchmark(tmp_path, "ranking", "--config", config, "--users", "20")
    assert ranked[0]["result"]["items"] == catalog.items
    sampled, _ = benchmark(
        tmp_path, "sampling", "--nodes", "300", "--interactions", "3000", "--seeds", "50", "--repeats", "2"
    )
    assert len(sampled) == 2  # both samplers
    assert sampled[0]["result"]["edges"] == pytest.approx(sampled[1]["result"]["edges"], rel=0.1)
    saved, _ = benchmark(tmp_path, "checkpoint", "--config", config, "--repeats", "2", "--ranks", "2")
    assert saved[0]["result"]["state_mib"] > 0
    hold = "x = bytearray(200 << 20); import time; time.sleep(2.5)"
    ran, _ = benchmark(tmp_path, "command", "--", sys.executable, "-c", hold)
    assert 200 < ran[0]["result"]["peak_mib_all_processes"] < 300


@pytest.mark.long
def test_benchmark_of_resuming(small, tmp_path):
    words = ["train.checkpoint_minutes=0.01", "train.epochs=100000"]
    rows, _ = benchmark(tmp_path, "resume", "--config", small[0], *words)
    result = rows[0]["result"]
    # equal where Ray hands over both lines at once: an epoch of this catalog takes less time than that
    assert 0 < result["seconds_to_ready"] <= result["seconds_to_progress"]
    assert result["state_mib"] > 0


def test_help_of_the_demo_leaves_a_finished_one_alone(tmp_path):
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    for name in ("raw", "catalog"):
        (tmp_path / "demo" / name).mkdir(parents=True)
    (tmp_path / "demo" / ".made-by-make-demo").touch()
    for option, status in (("--help", 0), ("--hlep", 2)):
        done = subprocess.run([sys.executable, "tools/demo.py", option], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == status
        assert "usage: demo.py" in done.stdout + done.stderr
        assert (tmp_path / "demo" / "catalog").is_dir()


def test_the_demo_refuses_a_folder_that_it_did_not_make(tmp_path):
    for name in ("tools", "configs", "gtc_dist"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "mine.txt").write_text("precious")
    done = subprocess.run([sys.executable, "tools/demo.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "demo/ holds files that the demo did not write" in done.stderr
    assert [path.name for path in (tmp_path / "demo").iterdir()] == ["mine.txt"]


def test_the_gpu_check_runs_on_a_cpu(tmp_path):
    words = ["--size", "0.01", "--minutes", "0.001", "--out", str(tmp_path / "check.json")]
    command = [sys.executable, str(ROOT / "tools/gpu_check.py"), *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    report = json.loads((tmp_path / "check.json").read_text())
    assert report["parity"] == {"loss": 0, "gradient": 0}
    assert report["transfer"] == 0
    assert report["sampler"]["different"] == 0
    assert set(report["left_out"].values()) == {"no time"}
    assert "parity with the CPU" in done.stdout
