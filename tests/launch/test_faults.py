"""Lost ranks, killed and stopped commands: the run still ends with the result of an undisturbed one."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import yaml
from local_cluster import LocalCluster
from ranks import run_ranks
from small import small_catalog, write_config
from trainings import EPOCHS, LONG_OVERRIDES, run_result, train_on, wait_for_states

from gtc_dist import train
from gtc_dist.checkpoint import checkpoint_files
from gtc_dist.errors import InputError


@pytest.fixture(scope="module")
def catalog(tmp_path_factory) -> str:
    return small_catalog(tmp_path_factory.mktemp("catalog") / "c", users=120, items=80).uri


def command(tmp_path: Path, catalog: str, workers: int, *overrides: str) -> list[str]:
    """Arguments of a training; one of a single rank is longer, so that it is still running when it is killed."""
    config = write_config(tmp_path, catalog, str(tmp_path / "runs"))
    longer = [f"train.epochs={2 * EPOCHS}", f"eval.patience={2 * EPOCHS}"] if workers == 1 else []
    return ["--config", config, f"cluster.workers={workers}", *LONG_OVERRIDES, *longer, *overrides]


@pytest.fixture(scope="module")
def undisturbed(catalog, tmp_path_factory) -> dict[int, Path]:
    """Number of ranks -> folder with their finished run, trained without Ray."""
    folders = {ranks: tmp_path_factory.mktemp("undisturbed") for ranks in (1, 2)}
    for ranks, folder in folders.items():
        _, file, *overrides = command(folder, catalog, ranks)
        run_ranks(train_on, ranks, file, overrides)
    return folders


def ranks_of(process: psutil.Process) -> list[psutil.Process]:
    return [p for p in process.children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())]


TWICE = [signal.SIGKILL, signal.SIGSTOP]


@pytest.mark.parametrize("numbers", [[signal.SIGKILL], pytest.param(TWICE, marks=pytest.mark.long)])
def test_a_lost_rank_is_replaced_and_the_result_is_the_same(ray_local, undisturbed, catalog, tmp_path, numbers):
    """Killed; and then stopped (SIGSTOP), so that it keeps the other rank waiting beyond the limit."""
    run, lost = tmp_path / "runs/r", []

    def disturb() -> None:
        for states, number in enumerate(numbers, start=2):
            wait_for_states(run, states)
            victim = ranks_of(psutil.Process())[-1]
            victim.send_signal(number)
            lost.append(victim)
            psutil.wait_procs([victim], timeout=90)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        limit = ["cluster.wait_minutes=0.25"] if signal.SIGSTOP in numbers else []
        train.main(command(tmp_path, catalog, 2, *limit))
    finally:
        thread.join()
    assert [victim.is_running() for victim in lost] == [False] * len(numbers)
    assert run_result(run) == run_result(undisturbed[2] / "runs/r")
    assert (
        checkpoint_files.list_checkpoints(str(run), "step-")[1],
        checkpoint_files.list_checkpoints(str(run), "epoch-")[1],
    ) == ([], [])


ENDED = [(2, signal.SIGKILL, -signal.SIGKILL), (3, signal.SIGTERM, train.STOPPED)]


@pytest.mark.parametrize("endings", [ENDED[:1], pytest.param(ENDED, marks=pytest.mark.long)])
def test_an_interrupted_command_resumes_when_it_is_rerun(ray_local, undisturbed, catalog, tmp_path, endings, capfd):
    """Killed, then stopped, each time with its own local cluster; finally undisturbed in another cluster."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    arguments = [sys.executable, "-m", "gtc_dist.train", *command(tmp_path, catalog, 1)]
    run, log = tmp_path / "runs/r", tmp_path / "log"
    for states, number, status in endings:
        with open(log, "ab") as out:
            process = subprocess.Popen(arguments, stdout=out, stderr=out, env=environment)
        wait_for_states(run, states)
        with pytest.raises(InputError, match=rf"is being trained by process {process.pid} on"):
            train.main(command(tmp_path, catalog, 1))
        children = [p for p in psutil.Process(process.pid).children(recursive=True) if "Agent" not in p.name()]
        process.send_signal(number)
        assert process.wait(60) == status, log.read_text()
        assert not (run / "metrics.json").exists()
        _, alive = psutil.wait_procs(children, timeout=60)
        assert alive == []  # no orphans; Ray's agents exit a minute later
    assert train.main(command(tmp_path, catalog, 1)) == 0
    assert f"resuming {run}" in capfd.readouterr().err
    assert run_result(run) == run_result(undisturbed[1] / "runs/r")
    assert not (run / "stop").exists()
    assert checkpoint_files.list_checkpoints(str(run), "step-")[1] == []  # nor the one being written when it was killed


@pytest.mark.long
def test_a_job_that_is_stopped_and_submitted_again_has_the_same_result(catalog, tmp_path):
    """Long enough that it still runs when `ray job stop` has started. Without historical embeddings: with them, a state
    saved on request is not exact (docs/faults.md)."""
    keys = ["train.epochs=150", "eval.patience=150", "eval.every=50", "train.refresh=0"]
    (tmp_path / "undisturbed").mkdir()
    _, file, *overrides = command(tmp_path / "undisturbed", catalog, 1, *keys)
    run_ranks(train_on, 1, file, overrides)
    words = ["python", "-m", "gtc_dist.train", *command(tmp_path, catalog, 1, *keys)]
    run = tmp_path / "runs/r"
    with LocalCluster(nodes=1, cpus=2) as cluster, ThreadPoolExecutor(1) as pool:
        first = pool.submit(cluster.submit, words, job="first", timeout=200)
        wait_for_states(run, 2)
        stopped = cluster.stop_job("first")
        assert stopped.returncode == 0, stopped.stdout
        assert "stopped" in first.result().stdout
        assert not (run / "metrics.json").exists()
        again = cluster.submit(words, job="second", timeout=200)
        assert again.returncode == 0, again.stdout[-3000:]
        assert "resuming" in again.stdout
    assert run_result(run) == run_result(tmp_path / "undisturbed/runs/r")
    assert (
        checkpoint_files.list_checkpoints(str(run), "step-")[1],
        checkpoint_files.list_checkpoints(str(run), "epoch-")[1],
    ) == ([], [])


def test_rerun_a_finished_run_is_reported_and_another_configuration_is_refused(undisturbed, catalog, capsys):
    run, same = undisturbed[2] / "runs/r", command(undisturbed[2], catalog, 2)
    written = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}
    assert train.main(same) == 0
    printed = capsys.readouterr()
    assert "is finished" in printed.err
    assert f"best epoch {run_result(run)['best_epoch']} of" in printed.out
    assert "or more epochs to continue it" in printed.err
    early = [*same, "train.epochs=99"]  # as if the run had stopped early
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(re.sub(r"epochs: \d+", "epochs: 99", config))
    assert train.main(early) == 0
    assert re.search(r"or an eval\.patience above \d+ to continue it", capsys.readouterr().err)
    (run / "config.yaml").write_text(config)
    written[run / "config.yaml"] = (run / "config.yaml").stat().st_mtime_ns
    with pytest.raises(InputError, match=r"another configuration \(train\.lr: 0\.001 there, 0\.5 here\)"):
        train.main([*same, "train.lr=0.5"])
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()} == written


@pytest.mark.long
def test_a_finished_run_goes_on_with_more_epochs_on_fewer_ranks(ray_local, undisturbed, catalog):
    run, same = undisturbed[2] / "runs/r", command(undisturbed[2], catalog, 2)
    longer = EPOCHS + 1
    assert train.main([*same, f"train.epochs={longer}", "cluster.workers=1"]) == 0
    assert (run_result(run)["last_epoch"], run_result(run)["workers"]) == (longer, 1)
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["epochs"] == longer


@pytest.mark.long
def test_a_loss_that_is_not_finite_ends_the_command_with_a_step_to_replay(catalog, tmp_path):
    module = [sys.executable, "-m", "gtc_dist.train"]
    words = command(tmp_path, catalog, 1, "train.table_lr=1e30", "train.lr=1e30")
    ended = subprocess.run([*module, *words], capture_output=True, text=True)
    message = ended.stderr.splitlines()[-1]
    assert (ended.returncode, message[:14]) == (3, "error: epoch 1"), ended.stderr
    [file] = (tmp_path / "runs/r").glob("not-finite-*.npz")
    assert f"--replay {file}" in message
    again = subprocess.run([*module, "--replay", str(file)], capture_output=True, text=True, check=True)
    assert json.loads(again.stdout)["not_finite"]
    assert not (tmp_path / "runs/r/failed.json").exists()
