"""The lines of README that start a cluster, run a job and end the cluster, executed as they stand there."""

import os
import re
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from seaweed import HOST, find_program, free_ports
from small import ROOT, small_catalog, write_config

from gtc_dist.data import storage

OTHER_PORTS = {  # those of `ray start --head` without options
    "port": 6379,
    "dashboard-port": 8265,
    "ray-client-server-port": 10001,
    "dashboard-agent-listen-port": 52365,
}


def readme_lines() -> str:
    """The indented lines of README's section on clusters."""
    section = re.search(r"^## A cluster\n(.*?)^## ", (ROOT / "README.md").read_text(), re.M | re.S)[1]
    return "\n".join(line[4:] for line in section.splitlines() if line.startswith("    "))


def free(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex((HOST, port)) != 0


@pytest.fixture
def other_ray(tmp_path, tmp_path_factory):
    """Another Ray of the machine, on Ray's default ports where they are free."""
    ports = {name: port if free(port) else free_ports(1)[0] for name, port in OTHER_PORTS.items()}
    with open(tmp_path / "other.log", "wb") as log:
        process = subprocess.Popen(
            [
                find_program("ray"),
                *("start", "--head", "--block", "--disable-usage-stats", "--num-cpus=1"),
                *(f"--{name}={port}" for name, port in ports.items()),
                f"--object-store-memory={100 << 20}",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    yield ports
    process.terminate()
    process.wait(30)


def run_lines(lines: str, folder: Path, home: Path) -> subprocess.CompletedProcess:
    """Run lines of a shell in a session of their own, as a user with the home folder `home`."""
    home.mkdir()
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = os.environ | {"HOME": str(home), "PATH": path, "PYTHONPATH": str(ROOT)}
    del env["RAY_AUTH_TOKEN"], env["RAY_AUTH_MODE"]
    return subprocess.run(
        ["bash", "-c", lines], cwd=folder, env=env, capture_output=True, text=True, timeout=300, start_new_session=True
    )


@pytest.mark.long
def test_a_taken_port_is_named_and_the_head_is_not_called_ready(tmp_path):
    """Ray's job server answers seconds before Ray notices that another of its processes found its port taken."""
    start, submit, _ = readme_lines().partition("ray job submit ")
    assert submit
    with socket.socket() as other:
        other.bind((HOST, 7001))
        other.listen()
        done = run_lines(start, tmp_path, tmp_path / "home")
    printed = done.stdout + done.stderr
    assert "ready" not in printed, printed
    assert f"Failed to bind to address {HOST}:7001" in printed, printed
    assert free(7379)


@pytest.mark.long
def test_the_lines_of_readme(other_ray, s3, tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    catalog = small_catalog(f"{s3}/catalog", users=120, items=80)
    Path(write_config(folder, catalog.uri, f"{s3}/runs")).rename(folder / "mine.yaml")
    lines = readme_lines().replace("s3://BUCKET", s3)
    assert lines.count("s3://") == 2
    home = tmp_path / "home"
    done = run_lines(lines, folder, home)
    printed = done.stdout + done.stderr
    assert printed.count("ready") == 1, printed
    assert "succeeded" in printed, printed
    assert storage.read_json(f"{s3}/runs/r/metrics.json")["workers"] == 2
    token = home / ".ray" / "auth_token"
    assert token.stat().st_mode & 0o077 == 0
    assert len(token.read_text().strip()) == 64
    assert token.read_text().strip() not in printed
    # this cluster has ended, and the other one runs
    assert free(7379)
    assert not free(other_ray["port"])
    assert not free(other_ray["dashboard-port"])
    # what the probes of Docker and Kubernetes ask, without a token
    agent = other_ray["dashboard-agent-listen-port"]
    with urllib.request.urlopen(f"http://{HOST}:{agent}/api/healthz", timeout=30) as answer:
        assert answer.status == 200


def test_the_lines_of_readme_name_options_of_ray():
    """Quick: bash can parse the lines, and `ray start` knows each option."""
    from ray.scripts.scripts import start as ray_start

    lines = readme_lines()
    assert subprocess.run(["bash", "-n"], input=lines, text=True, check=False).returncode == 0
    start = re.search(r"^ray start (.*?)[>&]", lines.replace("\\\n", " "), re.M)[1]
    known = {option for parameter in ray_start.params for option in parameter.opts}
    options = set(re.findall(r"--[a-z-]+", start))
    assert "--disable-usage-stats" in options
    for name in OTHER_PORTS:
        assert f"--{name}" in options
    assert options <= known
