"""Run lock: which command is refused, takes the lock over, or exits."""

import os
import subprocess
import sys
import threading
import time

import psutil
import pytest

from gtc_dist.data import storage
from gtc_dist.errors import InputError, Unreachable
from gtc_dist.launch import run_lock
from gtc_dist.launch.run_lock import hold_run_lock


@pytest.fixture(params=["local", "s3"])
def run(request, tmp_path) -> str:
    return str(tmp_path / "run") if request.param == "local" else request.getfixturevalue("s3")


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(run_lock, "RENEW_SECONDS", 0.1)
    monkeypatch.setattr(run_lock, "EXPIRES_SECONDS", 2.0)
    monkeypatch.setattr(run_lock, "SETTLE_SECONDS", 0.1)


def lock_elsewhere(run: str, renewed: int = 0) -> None:
    """Write the lock of a command on another machine."""
    other = {"id": "other", "host": "elsewhere", "pid": 1, "began": 0.0, "renewed": renewed}
    storage.write_json(f"{run}/lease.json", other)


def test_a_second_command_is_refused_and_the_lock_is_removed(run, quick):
    with hold_run_lock(run):
        with pytest.raises(InputError, match=rf"is being trained by process {os.getpid()} on .*choose another"):
            with hold_run_lock(run):
                pass
        time.sleep(0.5)
        assert storage.read_json(f"{run}/lease.json")["renewed"] >= 1
    assert storage.listing(run) == {}
    with hold_run_lock(run):
        storage.write_bytes(f"{run}/config.yaml", b"x")
    assert set(storage.listing(run)) == {"config.yaml"}


def test_folders_made_for_the_lock_are_removed_if_empty(tmp_path):
    (tmp_path / "there").mkdir()
    with hold_run_lock(str(tmp_path / "there/runs/deep/run")):
        assert (tmp_path / "there/runs/deep/run/lease.json").exists()
    assert list((tmp_path / "there").iterdir()) == []
    with hold_run_lock(str(tmp_path / "there/runs/deep/run")):
        (tmp_path / "there/runs/other").mkdir()
        (tmp_path / "there/runs/other/config.yaml").write_bytes(b"x")
    assert (tmp_path / "there/runs/other/config.yaml").exists()


def test_the_lock_of_a_dead_process_is_taken_over_at_once(tmp_path):
    """Also if another process has its pid now."""
    script = (
        f"import os, gtc_dist.launch.run_lock as l\nwith l.hold_run_lock({str(tmp_path)!r}): os.kill(os.getpid(), 9)"
    )
    killed = subprocess.Popen([sys.executable, "-c", script])
    while not storage.exists(f"{tmp_path}/lease.json"):
        assert killed.poll() in (None, -9)
        time.sleep(0.02)
    while psutil.Process(killed.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.02)
    with hold_run_lock(str(tmp_path)):  # a zombie: its exit status was not collected yet
        pass
    killed.wait()
    found = {"id": "x", "host": run_lock.socket.gethostname(), "pid": os.getpid(), "began": 1.0}
    storage.write_json(f"{tmp_path}/lease.json", found)
    with hold_run_lock(str(tmp_path)):
        assert storage.read_json(f"{tmp_path}/lease.json")["id"] != "x"


def test_a_lock_of_another_machine_is_watched_for_renewals(run, quick, capsys):
    lock_elsewhere(run)
    with hold_run_lock(run):  # not renewed
        pass
    assert "was being trained by process 1 on elsewhere; waiting 2 s" in capsys.readouterr().err
    lock_elsewhere(run)
    renewal = threading.Timer(0.5, lock_elsewhere, (run, 1))
    renewal.start()
    with pytest.raises(InputError, match="is being trained by process 1 on elsewhere"):
        with hold_run_lock(run):
            pass
    renewal.join()
    assert storage.read_json(f"{run}/lease.json")["renewed"] == 1


@pytest.mark.parametrize("settled", [True, False])
def test_a_command_that_lost_its_lock_exits_and_leaves_the_other_lock(run, quick, monkeypatch, capsys, settled):
    """After some renewals; and before the first one, if both commands started at once."""
    lost = threading.Event()
    monkeypatch.setattr(run_lock, "_exit", lost.set)
    monkeypatch.setattr(run_lock, "SETTLE_SECONDS", 0.5)
    monkeypatch.setattr(run_lock, "RENEW_SECONDS", 0.1 if settled else 60)
    with hold_run_lock(run):
        if settled:
            while not storage.read_json(f"{run}/lease.json")["renewed"]:
                time.sleep(0.02)
        lock_elsewhere(run)
        assert lost.wait(10)
    assert "is being trained by process 1 on elsewhere; this command exits" in capsys.readouterr().err
    assert storage.read_json(f"{run}/lease.json")["id"] == "other"


@pytest.mark.parametrize("problem", [Unreachable("cannot reach it"), InputError("no permission"), KeyError("odd")])
def test_renewals_continue_after_a_storage_failure(tmp_path, quick, monkeypatch, problem):
    write, tries = storage.write_json, 0

    def failing_write(*args):
        nonlocal tries
        tries += 1
        if 2 <= tries <= 4:
            raise problem
        return write(*args)

    monkeypatch.setattr(storage, "write_json", failing_write)
    with hold_run_lock(str(tmp_path)):
        deadline = time.monotonic() + 20
        while storage.read_json(f"{tmp_path}/lease.json")["renewed"] < 5:
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"id": 1}', b"\xff"])
def test_an_unreadable_lock_is_ignored(tmp_path, content):
    storage.write_bytes(f"{tmp_path}/lease.json", content)
    with hold_run_lock(str(tmp_path)):
        assert storage.read_json(f"{tmp_path}/lease.json")["pid"] == os.getpid()
