"""What ends processes: lost ranks, killed and stopped commands. Afterwards the run ends as it would have."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import yaml
from small import small_catalog
from test_train import write_config

from gtc_dist import train
from gtc_dist.engine import checkpoint
from gtc_dist.errors import InputError

EPOCHS = 5
LONG = [f"train.epochs={EPOCHS}", "train.batch_size=32", "train.checkpoint.minutes=0.0", "train.log_every=5"]
LONG += ["model.propagation=sampled", "model.fanout=[3,3]", "train.refresh=4"]


@pytest.fixture(scope="module")
def catalog(tmp_path_factory) -> str:
    return small_catalog(tmp_path_factory.mktemp("catalog") / "c", users=120, items=80).uri


def command(tmp_path: Path, catalog: str, workers: int, *overrides: str) -> list[str]:
    config = write_config(tmp_path, catalog, str(tmp_path / "runs"))
    return ["--config", config, f"cluster.workers={workers}", *LONG, *overrides]


def result(run: Path) -> dict:
    found = json.loads((run / "metrics.json").read_text())
    return {name: value for name, value in found.items() if not name.startswith("seconds")}


@pytest.fixture(scope="module")
def undisturbed(ray_local, catalog, tmp_path_factory) -> dict[int, dict]:
    """Results by number of ranks."""
    results = {}
    for workers in (1, 2):
        folder = tmp_path_factory.mktemp("undisturbed")
        train.main(command(folder, catalog, workers))
        results[workers] = result(folder / "runs/r")
    return results


def wait_for_states(run: Path, count: int, limit: float = 120) -> None:
    """Until so many states were whole, one after the other."""
    seen: set[str] = set()
    deadline = time.monotonic() + limit
    while len(seen) < count:
        assert time.monotonic() < deadline, f"{run} has {sorted(seen)}"
        seen |= set(checkpoint.names(str(run), "step-")[0])
        time.sleep(0.02)


def ranks_of(process: psutil.Process) -> list[psutil.Process]:
    return [p for p in process.children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())]


def test_a_rank_that_is_killed_is_replaced_and_the_result_is_the_same(ray_local, undisturbed, catalog, tmp_path):
    run, killed = tmp_path / "runs/r", []

    def kill() -> None:
        for states in (2, 3):  # twice, at two places
            wait_for_states(run, states)
            victims = ranks_of(psutil.Process())
            victims[-1].kill()
            killed.append(victims[-1].pid)
            while victims[-1].is_running() and victims[-1].status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.05)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        train.main(command(tmp_path, catalog, 2))
    finally:
        thread.join()
    assert len(killed) == 2
    assert result(run) == undisturbed[2]
    assert (checkpoint.names(str(run), "step-")[1], checkpoint.names(str(run), "epoch-")[1]) == ([], [])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_command_that_is_ended_goes_on_when_it_is_given_again(undisturbed, catalog, tmp_path, number):
    """In a cluster of its own, which goes with it."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    arguments = [sys.executable, "-m", "gtc_dist.train", *command(tmp_path, catalog, 1)]
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(arguments, stdout=log, stderr=log, env=environment)
    run = tmp_path / "runs/r"
    wait_for_states(run, 2)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    code = process.wait(60)
    assert code == (train.LEFT if number == signal.SIGTERM else -signal.SIGKILL), (tmp_path / "log").read_text()
    assert not (run / "metrics.json").exists()
    _, alive = psutil.wait_procs(children, timeout=120)
    assert alive == []  # no orphans; Ray's agents look for their parent once in a while
    again = subprocess.run(arguments, capture_output=True, env=environment, check=True, text=True)
    assert "going on with" in again.stderr
    assert result(run) == undisturbed[1]
    assert not (run / "stop").exists()


def test_given_again_a_finished_run_says_so_and_another_configuration_is_refused(ray_local, catalog, tmp_path, capsys):
    short = command(tmp_path, catalog, 1, "train.epochs=2")
    assert train.main(short) == 0
    before = capsys.readouterr().out
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs/r").rglob("*") if p.is_file()}
    assert train.main(short) == 0
    told = capsys.readouterr()
    assert "is finished" in told.err
    assert told.out.splitlines()[-3:] == before.splitlines()[-3:]
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "runs/r").rglob("*") if p.is_file()} == written
    with pytest.raises(InputError, match=r"another configuration \(train\.lr: 0\.001 there, 0\.5 here\)"):
        train.main([*short, "train.lr=0.5"])
    assert train.main([*short, "train.epochs=3", "cluster.workers=2"]) == 0
    assert result(tmp_path / "runs/r")["last_epoch"] == 3
    assert yaml.safe_load((tmp_path / "runs/r/config.yaml").read_text())["train"]["epochs"] == 3


def test_a_loss_that_is_not_finite_ends_the_run_at_once(ray_local, catalog, tmp_path, capfd):
    with pytest.raises(FloatingPointError, match=r"epoch \d+, step \d+: the loss is not finite"):
        train.main(command(tmp_path, catalog, 2, "train.table_lr=1e30", "train.lr=1e30"))
    assert not (tmp_path / "runs/r/failed.json").exists()
