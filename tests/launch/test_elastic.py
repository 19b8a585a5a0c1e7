"""Elastic ranks: nodes are lost and added, and training continues with the remaining ones."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from local_cluster import LocalCluster
from small import small_catalog, write_config
from trainings import train_without_ray

from gtc_dist.checkpoint import checkpoint_files
from gtc_dist.data import storage

EPOCHS = 400


@pytest.mark.long
def test_training_continues_with_the_remaining_nodes(s3_server, tmp_path):
    catalog = small_catalog(tmp_path / "catalog", users=400, items=200)
    config, run = write_config(tmp_path, catalog.uri, str(tmp_path / "runs")), str(tmp_path / "runs/r")
    keys = ["cluster.workers=2", "cluster.min_workers=1", f"train.epochs={EPOCHS}", f"eval.every={EPOCHS}"]
    keys += ["train.batch_size=16", "train.checkpoint_minutes=0"]
    log = tmp_path / "log"
    with LocalCluster(nodes=2, cpus=1, storage=s3_server) as cluster:
        submit = [Path(sys.executable).with_name("ray"), "job", "submit", "--address", cluster.address, "--"]
        command = [*submit, sys.executable, "-m", "gtc_dist.train", "--config", config, *keys]
        with open(log, "wb") as out:
            job = subprocess.Popen(command, env=cluster.env, stdout=out, stderr=out)
        try:
            wait_for(run, 2, job, log)
            cluster.lose_node()
            wait_for(run, 1, job, log)
            cluster.add_node()
            wait_for(run, 2, job, log)
            cluster.lose_node()
            wait_for(run, 1, job, log)
        finally:
            job.kill()
    # the remaining epochs would take long: the cluster is gone, and one process finishes the run after one more epoch
    newest = checkpoint_files.read_manifest(
        f"{run}/checkpoints/{checkpoint_files.list_checkpoints(run, 'step-')[0][-1]}"
    )
    last = newest["epoch"] + 1
    assert 1 < last < EPOCHS
    train_without_ray(config, *keys, f"train.epochs={last}")
    metrics = storage.read_json(f"{run}/metrics.json")
    assert (metrics["last_epoch"], metrics["workers"]) == (last, 1)
    assert metrics["test"]["overall"]["recall@20"] > metrics["popularity"]["recall@20"]


def wait_for(run: str, ranks: int, job: subprocess.Popen, log: Path, limit: float = 240) -> None:
    """Wait until the newest complete state was written by `ranks` ranks."""
    deadline = time.monotonic() + limit
    while True:
        assert job.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        for name in checkpoint_files.list_checkpoints(run, "step-")[0][-1:]:
            try:
                files = checkpoint_files.read_manifest(f"{run}/checkpoints/{name}")["files"]
            except (ValueError, OSError):
                continue  # pruned meanwhile
            if sum(file.startswith("user.weight.") for file in files) == ranks:
                return
        time.sleep(0.2)
