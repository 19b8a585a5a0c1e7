"""A start of Ray that fails ends in one line that says what to do. Every case is a process with the real Ray."""

import http.server
import os
import signal
import subprocess
import sys
import threading

import pytest
from seaweed import free_ports

CONNECT = """
from gtc_dist.errors import run_command
from gtc_dist.launch import ray_cluster
from gtc_dist.preflight import ray_start

ray_start.CLIENT_SECONDS = {seconds}
run_command(ray_cluster.connect)
"""

HANG = """
import ctypes
from gtc_dist.preflight import ray_start

ray_start.SLOW_SECONDS, ray_start.START_SECONDS, ray_start.BUSY_START_SECONDS = 0.25, 0.5, 0.75
ray_start._LIMIT = ray_start._LIMIT.replace("os.getloadavg()[0]", "{load}")
with ray_start.one_line_errors("a local Ray cluster"):
    ctypes.PyDLL(None).pause()
"""


def connect(seconds: float = 20.0, **environment: str) -> tuple[int, str]:
    """Exit status and stderr of a command that connects with these variables; `seconds` limits what may take long."""
    done = subprocess.run(
        [sys.executable, "-c", CONNECT.format(seconds=seconds)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stderr


def refused(seconds: float = 20.0, **environment: str) -> str:
    """The one line that such a command prints."""
    found, text = connect(seconds, **environment)
    assert found == 2, text
    assert text.startswith("error: ")
    assert text.count("\n") == 1, text
    return text


def test_nothing_listens(free_port):
    assert "nothing answers there" in refused(RAY_ADDRESS=f"127.0.0.1:{free_port}")


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "127.0.0.1", "127.0.0.1:70000", "head:port"])
def test_not_an_address(address):
    assert "is not of the form HOST:PORT" in refused(RAY_ADDRESS=address)


def test_another_server_listens():
    """A web server takes the connection and never speaks Ray's protocol."""
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            text = refused(3.0, RAY_ADDRESS=f"127.0.0.1:{server.server_port}")
        finally:
            server.shutdown()
    assert "no Ray cluster answered within 3 seconds" in text


def test_another_token(ray_local):
    address = ray_local.address_info["gcs_address"]
    text = refused(RAY_ADDRESS=address, RAY_AUTH_TOKEN="0" * 64)
    assert "refuses this token" in text
    assert os.environ["RAY_AUTH_TOKEN"] not in text
    assert connect(RAY_ADDRESS=address) == (0, "")  # with the cluster's own token


def test_another_version(ray_local):
    """A cluster that says it runs another version: the record that Ray compares is replaced for the test."""
    from ray._common.usage import usage_constants
    from ray._private import ray_constants
    from ray.experimental import internal_kv

    key, namespace = usage_constants.CLUSTER_METADATA_KEY, ray_constants.KV_NAMESPACE_CLUSTER
    before = internal_kv._internal_kv_get(key, namespace=namespace)
    version = ray_local.ray_version
    internal_kv._internal_kv_put(key, before.replace(version.encode(), b"1.0.0"), True, namespace=namespace)
    try:
        text = refused(RAY_ADDRESS=ray_local.address_info["gcs_address"])
    finally:
        internal_kv._internal_kv_put(key, before, True, namespace=namespace)
    assert f"cluster has Ray version 1.0.0 but local Ray version is {version}; run the same version on both" in text


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
def test_long_temporary_folder(tmp_path, name):
    folder = tmp_path / ("x" * 60)
    folder.mkdir()
    text = refused(**{name: str(folder)})
    assert f"{name}={folder} is" in text
    assert "characters too long" in text
    assert "set RAY_TMPDIR to a shorter folder" in text


def test_missing_temporary_folder():
    assert "cannot write to its temporary folder" in refused(RAY_TMPDIR="/proc/none")


def test_token_file(tmp_path):
    path = str(tmp_path / "token")
    assert "cannot be read" in refused(RAY_AUTH_TOKEN="", RAY_AUTH_TOKEN_PATH=path)
    (tmp_path / "token").write_text("\n")
    assert "is an empty file" in refused(RAY_AUTH_TOKEN="", RAY_AUTH_TOKEN_PATH=path)


def test_local_cluster_that_fails():
    """Ray gives its head no time to write the file with its port."""
    text = refused(RAY_gcs_server_port_wait_time_s="0")
    assert "a local Ray cluster did not start: Timed out waiting for file" in text


@pytest.mark.parametrize(("load", "seconds"), [(0, 0.5), (1000, 0.75)])
def test_start_that_hangs(load, seconds):
    """C code that never returns and lets no other Python thread run, as Ray's does while it waits for its node."""
    command = [sys.executable, "-c", HANG.format(load=load)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL
    slow, late = done.stderr.splitlines()
    assert (
        slow == "a local Ray cluster is not ready after 0.25 seconds; waiting until 0.5, on a busy machine until 0.75"
    )
    assert late.startswith(f"error: a local Ray cluster did not start: it is not ready after {seconds} seconds. Free")


@pytest.fixture
def free_port() -> int:
    """A port where nothing listens."""
    return free_ports(1)[0]
