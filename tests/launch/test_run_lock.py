"""One command at a time in a run folder: who is refused, who takes over, who ends."""

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


def elsewhere(run: str, renewed: int = 0) -> None:
    """The lease of a command on another machine."""
    other = {"id": "other", "host": "elsewhere", "pid": 1, "began": 0.0, "renewed": renewed}
    storage.write_json(f"{run}/lease.json", other)


def test_a_second_command_is_refused_and_nothing_is_left(run, quick):
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


def test_folders_that_nothing_came_into_are_not_left(tmp_path):
    (tmp_path / "there").mkdir()
    with hold_run_lock(str(tmp_path / "there/runs/deep/run")):
        assert (tmp_path / "there/runs/deep/run/lease.json").exists()
    assert list((tmp_path / "there").iterdir()) == []
    with hold_run_lock(str(tmp_path / "there/runs/deep/run")):
        (tmp_path / "there/runs/other").mkdir()
        (tmp_path / "there/runs/other/config.yaml").write_bytes(b"x")
    assert (tmp_path / "there/runs/other/config.yaml").exists()


def test_the_lease_of_a_dead_process_is_taken_over_at_once(tmp_path):
    """Also where its number now belongs to another."""
    script = f"import os, gtc_dist.launch.run_lock as l\nwith l.held({str(tmp_path)!r}): os.kill(os.getpid(), 9)"
    killed = subprocess.Popen([sys.executable, "-c", script])
    while not storage.exists(f"{tmp_path}/lease.json"):
        assert killed.poll() in (None, -9)
        time.sleep(0.02)
    while psutil.Process(killed.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.02)
    with hold_run_lock(str(tmp_path)):  # not waited for yet: a zombie
        pass
    killed.wait()
    found = {"id": "x", "host": run_lock.socket.gethostname(), "pid": os.getpid(), "began": 1.0}
    storage.write_json(f"{tmp_path}/lease.json", found)
    with hold_run_lock(str(tmp_path)):
        assert storage.read_json(f"{tmp_path}/lease.json")["id"] != "x"


def test_a_lease_of_another_machine_is_watched(run, quick, capsys):
    elsewhere(run)
    with hold_run_lock(run):  # nobody renews it
        pass
    assert "was being trained by process 1 on elsewhere; waiting 2 s" in capsys.readouterr().err
    elsewhere(run)
    renewal = threading.Timer(0.5, elsewhere, (run, 1))
    renewal.start()
    with pytest.raises(InputError, match="is being trained by process 1 on elsewhere"):
        with hold_run_lock(run):
            pass
    renewal.join()
    assert storage.read_json(f"{run}/lease.json")["renewed"] == 1


@pytest.mark.parametrize("settled", [True, False])
def test_who_lost_its_lease_ends_and_leaves_the_other_s(run, quick, monkeypatch, capsys, settled):
    """Later on; and where both commands started at once, before the first renewal."""
    lost = threading.Event()
    monkeypatch.setattr(run_lock, "_end", lost.set)
    monkeypatch.setattr(run_lock, "SETTLE_SECONDS", 0.5)
    monkeypatch.setattr(run_lock, "RENEW_SECONDS", 0.1 if settled else 60)
    with hold_run_lock(run):
        if settled:
            while not storage.read_json(f"{run}/lease.json")["renewed"]:
                time.sleep(0.02)
        elsewhere(run)
        assert lost.wait(10)
    assert "is being trained by process 1 on elsewhere; this one ends" in capsys.readouterr().err
    assert storage.read_json(f"{run}/lease.json")["id"] == "other"


@pytest.mark.parametrize("problem", [Unreachable("cannot reach it"), InputError("no permission"), KeyError("odd")])
def test_renewals_go_on_after_the_store_was_away(tmp_path, quick, monkeypatch, problem):
    write, tries = storage.write_json, 0

    def away(*args):
        nonlocal tries
        tries += 1
        if 2 <= tries <= 4:
            raise problem
        return write(*args)

    monkeypatch.setattr(storage, "write_json", away)
    with hold_run_lock(str(tmp_path)):
        deadline = time.monotonic() + 20
        while storage.read_json(f"{tmp_path}/lease.json")["renewed"] < 5:
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"id": 1}', b"\xff"])
def test_a_lease_that_cannot_be_read_is_none(tmp_path, content):
    storage.write_bytes(f"{tmp_path}/lease.json", content)
    with hold_run_lock(str(tmp_path)):
        assert storage.read_json(f"{tmp_path}/lease.json")["pid"] == os.getpid()
