"""Prepare and train in one job on a cluster: `ray job submit`, two nodes, two ranks, everything under s3://."""

import json
import os
import shlex
import urllib.error
import urllib.request
from pathlib import Path

import make_dataset
import pytest
from local_cluster import LocalCluster

from gtc_dist import evaluate, export
from gtc_dist.data import storage

ROOT = Path(__file__).resolve().parents[2]


def check_logs(text: str) -> None:
    """What `ray job logs` shows of prepare and train: lines of progress, without escape sequences, bars that redraw
    themselves, prefixes of Ray or what libraries log about themselves."""
    assert "interactions read: " in text
    assert "epoch 3/3" in text
    for noise in (
        "\x1b",
        "\r",
        "(RayTrainWorker",
        "pid=",
        "ip=",
        "Found credentials",
        "Running Dataset",
        "Execution plan",
    ):
        assert noise not in text
    assert len(text.splitlines()) < 60


def test_prepare_and_train_as_a_job_on_object_storage(s3, s3_server, capsys):
    make_dataset.main(["--out", f"{s3}/raw", "--users", "400", "--items", "200", "--interactions", "5000"])
    places = [f"data.raw={s3}/raw", f"data.catalog={s3}/catalog", f"run.storage={s3}/runs", "run.name=job"]
    keys = ["cluster.workers=2", "cluster.threads=1", "train.epochs=3", "train.batch_size=256", "model.width=16"]
    with LocalCluster(nodes=2, cpus=1, storage=s3_server) as cluster:
        with pytest.raises(urllib.error.HTTPError, match="401"):  # no token
            urllib.request.urlopen(f"{cluster.address}/nodes?view=summary", timeout=30)
        commands = [
            ["python", "-m", f"gtc_dist.{command}", "--config", "configs/demo.yaml", *places, *keys]
            for command in ("prepare", "train")
        ]
        words = ["sh", "-c", " && ".join(shlex.join(command) for command in commands)]
        done = cluster.submit(words, working_dir=ROOT, timeout=280, job="all")
        assert done.returncode == 0, done.stdout[-3000:]
        output = [done.stdout, done.stderr or ""]
        logs = cluster._ray_job("logs", "all", timeout=60).stdout
        (job,) = cluster._get("/api/jobs/")
        datasets = cluster._get(f"/api/data/datasets/{job['job_id']}")["datasets"]
        folder = cluster.folder
        assert len(cluster.running()) > 2
        assert cluster._all_alive()  # both nodes, after the jobs
    assert cluster.running() == []
    assert not folder.exists()
    assert s3_server.process.poll() is None  # it belongs to the test, not to the cluster
    assert "epoch 3/3" in done.stdout
    assert any(dataset["dataset"].startswith("train job_") for dataset in datasets)  # in the dashboard
    check_logs(logs.partition("Running entrypoint")[2])
    metrics = storage.read_json(f"{s3}/runs/job/metrics.json")
    assert metrics["workers"] == 2
    assert metrics["test"]["overall"]["recall@20"] > metrics["popularity"]["recall@20"]

    capsys.readouterr()
    evaluate.main(["--run", f"{s3}/runs/job"])
    alone = json.loads(capsys.readouterr().out)
    assert alone["overall"] == pytest.approx(metrics["test"]["overall"], abs=1e-6)
    export.main(["--run", f"{s3}/runs/job", "--out", f"{s3}/embeddings"])
    manifest = storage.read_json(f"{s3}/embeddings/manifest.json")
    assert manifest["users"] == 400
    assert manifest["dim"] >= 64 + 16  # four modality views of width 16, and the graph filter

    written = {name: storage.read_bytes(f"{s3}/{name}") for name in storage.listing(s3)}
    assert len(written) > 40
    written["output of the jobs"] = "".join(output).encode()
    for secret in (s3_server.access_key, s3_server.secret_key, os.environ["RAY_AUTH_TOKEN"]):
        assert [name for name, data in written.items() if secret.encode() in data] == []
