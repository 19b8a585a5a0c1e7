"""cluster/slurm/: the batch script, run by a real Slurm whose two nodes share this machine."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from processes import environment_of, process_ids
from seaweed import find_program
from slurm import SlurmCluster, installed
from small import ROOT, small_catalog, write_config

from gtc_dist.checkpoint import checkpoint_files
from gtc_dist.data import storage

SCRIPT = ROOT / "cluster" / "slurm" / "train.sbatch"
needs_slurm = pytest.mark.skipif(
    os.geteuid() != 0 or not installed(), reason="needs root, and Debian's packages slurmctld, slurmd, munge"
)


def test_shellcheck():
    scripts = [SCRIPT, *(ROOT / "cluster" / "local").glob("*.sh")]
    words = [find_program("shellcheck"), "--shell=bash", *map(str, scripts)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.fixture
def slurm():
    folder = Path(tempfile.mkdtemp(prefix="gtc-slurm-"))
    with SlurmCluster(folder) as cluster:
        yield cluster
    shutil.rmtree(folder)


def submit(slurm: SlurmCluster, folder: Path, *words: str) -> str:
    """Id of a job of two nodes with one CPU each; its output is in FOLDER/log."""
    slurm.env |= {
        "HOME": str(folder),
        "PYTHONPATH": str(ROOT),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), slurm.env["PATH"]]),
    }
    options = ["--parsable", "--cpus-per-task=1", "--mem=1000", f"--output={folder}/log"]
    return slurm.run("sbatch", *options, str(SCRIPT), *words).strip()


def left(job: str, home: Path) -> list:
    """Processes and files of a job that are still there."""
    processes = [pid for pid in process_ids() if f"SLURM_JOB_ID={job}".encode() in environment_of(pid).split(b"\0")]
    return [*processes, *Path("/tmp").glob(f"gtc-{job}-*"), *home.glob(".gtc-slurm-*")]


@needs_slurm
@pytest.mark.long
def test_a_job_trains_and_one_at_its_time_limit_is_gone_on_with(slurm, tmp_path):
    catalog = small_catalog(tmp_path / "catalog", users=120, items=80)
    config, run = write_config(tmp_path, catalog.uri, str(tmp_path / "runs")), str(tmp_path / "runs" / "r")
    epochs = ["train.epochs=5000", "eval.every=5000", "train.checkpoint_minutes=60"]
    job = submit(slurm, tmp_path, "--config", config, *epochs)
    log = tmp_path / "log"
    wait_for(slurm, job, log, "epoch 1/5000")
    slurm.run("scancel", "--signal=TERM", "--batch", job)  # as --signal=B:TERM@120 does before the limit
    assert slurm.wait(job, "COMPLETED", "FAILED", "CANCELLED") == "FAILED"
    printed = log.read_text()
    assert "a Ray cluster of 2 nodes is up" in printed
    assert "ExitCode=143:0" in slurm.run("scontrol", "show", "job", job)
    assert "the same sbatch command goes on from it" in printed
    (saved,) = checkpoint_files.list_checkpoints(run, "step-")[0]
    epoch = checkpoint_files.read_manifest(f"{run}/checkpoints/{saved}")["epoch"]
    assert left(job, tmp_path) == []

    job = submit(slurm, tmp_path, "--config", config, *epochs, f"train.epochs={epoch + 2}")
    assert slurm.wait(job, "COMPLETED", "FAILED", "CANCELLED") == "COMPLETED", log.read_text()[-3000:]
    metrics = storage.read_json(f"{run}/metrics.json")
    assert (metrics["last_epoch"], metrics["workers"]) == (epoch + 2, 2)
    assert left(job, tmp_path) == []


@needs_slurm
@pytest.mark.long
def test_a_job_that_fails_ends_its_cluster(slurm, tmp_path):
    (tmp_path / ".gtc-slurm-1").mkdir()  # as an attempt leaves it that was killed before Slurm requeued the job
    job = submit(slurm, tmp_path, "--config", str(tmp_path / "missing.yaml"))
    assert job == "1"
    assert slurm.wait(job, "COMPLETED", "FAILED", "CANCELLED") == "FAILED"
    assert "missing.yaml" in (tmp_path / "log").read_text()
    assert "ExitCode=2:0" in slurm.run("scontrol", "show", "job", job)
    assert left(job, tmp_path) == []


@needs_slurm
@pytest.mark.long
def test_a_head_that_cannot_start_ends_the_job(slurm, tmp_path):
    """Before the five minutes that a slow start may take: the port of the first job's head is taken."""
    with socket.create_server(("", 20010)):
        job = submit(slurm, tmp_path, "--config", str(tmp_path / "c.yaml"))
        assert job == "1"
        assert slurm.wait(job, "COMPLETED", "FAILED", "CANCELLED", seconds=200) == "FAILED"
    assert "error: the Ray cluster of 2 nodes has not started" in (tmp_path / "log").read_text()
    assert left(job, tmp_path) == []


def wait_for(slurm: SlurmCluster, job: str, log: Path, text: str, seconds: float = 300) -> None:
    """Wait until a job has printed a text."""
    deadline = time.monotonic() + seconds
    while not (log.exists() and text in log.read_text()):
        printed = log.read_text() if log.exists() else ""
        assert slurm.state(job) in ("PENDING", "CONFIGURING", "RUNNING"), printed
        assert time.monotonic() < deadline, printed
        time.sleep(0.5)
