"""Losses of more than a rank: two nodes at once, the head, and nodes that an autoscaler brings late. Each training ends
with the result of an undisturbed one."""

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from local_cluster import LocalCluster
from processes import send_signal
from ranks import run_ranks
from ray.cluster_utils import Cluster
from small import small_catalog, write_config
from strange_nodes import AutoscalingCluster
from trainings import LONG_OVERRIDES, run_result, train_on, wait_for_states

pytestmark = pytest.mark.long
KEYS = ["cluster.workers=2", *LONG_OVERRIDES]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("config")
    return write_config(folder, small_catalog(folder / "catalog", users=120, items=80).uri, "unused")


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory) -> dict:
    """Result of an undisturbed run of two ranks, trained without Ray."""
    runs = tmp_path_factory.mktemp("undisturbed")
    run_ranks(train_on, 2, config, [*KEYS, f"run.storage={runs}"])
    return run_result(runs / "r")


def command(config: str, runs: Path, *keys: str) -> list[str]:
    return [sys.executable, "-m", "gtc_dist.train", "--config", config, *KEYS, f"run.storage={runs}", *keys]


def test_two_nodes_lost_at_once(undisturbed, config, tmp_path):
    """Both nodes with ranks; two others take their place. The head has no CPU, so it has no rank."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        lost = [cluster.add_node() for _ in range(2)]
        environment = os.environ | {"RAY_ADDRESS": cluster.address}
        with open(tmp_path / "log", "w+") as log:
            words = command(config, tmp_path / "runs", "cluster.cpus_per_worker=0.75")
            training = subprocess.Popen(words, env=environment, stdout=log, stderr=log)
            try:
                wait_for_states(tmp_path / "runs/r", 2)
                for node in lost:
                    cluster.remove_node(node, allow_graceful=False)
                assert training.poll() is None
                for _ in lost:
                    cluster.add_node()
                assert training.wait(300) == 0, (tmp_path / "log").read_text()
            finally:
                training.kill()
                training.wait()
    finally:
        cluster.shutdown()
    assert "resuming at epoch" in (tmp_path / "log").read_text()
    assert run_result(tmp_path / "runs/r") == undisturbed


def test_a_restarted_head(s3_server, undisturbed, config, tmp_path):
    """The head is lost with the job's command. The other node ends by itself; new ones take the same command."""
    with LocalCluster(nodes=2, cpus=1, storage=s3_server) as cluster:
        words, run = command(config, tmp_path / "runs"), tmp_path / "runs/r"
        thread = threading.Thread(target=lambda: cluster.submit(words, job="first", timeout=300))
        thread.start()
        wait_for_states(run, 2)
        head, node = cluster.processes
        for pid in [*(child.pid for child in psutil.Process(head.pid).children(recursive=True)), head.pid]:
            send_signal(pid, signal.SIGKILL)
        head.wait()
        thread.join()
        assert not (run / "metrics.json").exists()
        cluster.processes = [node]
        node.wait(180)
        cluster.processes.clear()
        (cluster.folder / "head/ray_current_cluster").unlink()  # of the lost head
        cluster.head = cluster._start_head()
        cluster.add_node()
        cluster._wait_for_nodes()
        again = cluster.submit(words, job="second", timeout=300)
        assert again.returncode == 0, again.stdout[-3000:]
    assert f"resuming {run}" in again.stdout
    assert run_result(run) == undisturbed


def test_an_autoscaler_that_brings_nodes_late(s3_server, undisturbed, config, tmp_path):
    with AutoscalingCluster(more=2, cpus=1, storage=s3_server) as cluster:
        done = cluster.submit(command(config, tmp_path / "runs"), timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]
    waited = re.findall(
        r"^cluster\.workers=2 needs 2 CPUs, .* autoscaler may add nodes: waiting for them", done.stdout, re.M
    )
    assert len(waited) == 1
    assert "nodes were added; the cluster has head (" in done.stdout
    assert run_result(tmp_path / "runs/r") == undisturbed
