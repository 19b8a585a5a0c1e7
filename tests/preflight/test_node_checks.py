"""Nodes that differ from the command's own are named before the work starts. Every node is a real one."""

import os
import signal
import subprocess
import sys

import pytest
from local_cluster import LocalCluster
from processes import process_ids, session_of
from strange_nodes import add_strange_node, can_mount, run_python

from gtc_dist.errors import InputError
from gtc_dist.preflight import node_checks

CHECK = """
from gtc_dist.errors import run_command
from gtc_dist.launch import ray_cluster
from gtc_dist.preflight import node_checks

node_checks.ANSWER_SECONDS, node_checks.SAY_SECONDS, node_checks.SHOWN_PROBLEMS = {seconds}, {seconds} / 2, 9
run_command(lambda: (ray_cluster.connect(), node_checks.check_nodes({files}))[1])
"""


@pytest.mark.long
@pytest.mark.skipif(not can_mount(), reason="needs the permission to mount")
def test_strange_nodes(s3_server, tmp_path):
    """A node with a folder and a shared memory of its own, one with other packages, and one that hangs."""
    shared, packages = tmp_path / "shared", tmp_path / "packages/numpy-1.26.4.dist-info"
    for folder in (shared / "run", shared / "catalog", packages):
        folder.mkdir(parents=True)
    (shared / "run/lease.json").write_text('{"id": "this"}')
    (shared / "catalog/manifest.json").write_text('{"fingerprint": "new"}')
    (packages / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 1.26.4\n")
    files = {"run.storage": f"{shared}/run/lease.json", "data.catalog": f"{shared}/catalog/manifest.json"}
    mounts = f"mount -t tmpfs -o size=64m tmpfs /dev/shm; mount -t tmpfs tmpfs {shared}; mkdir {shared}/catalog"
    mounts += f"; echo old > {shared}/catalog/manifest.json"
    with LocalCluster(nodes=1, cpus=1, storage=s3_server) as cluster:
        alone = run_python(cluster, CHECK.format(seconds=60, files=files))
        assert (alone.returncode, alone.stderr) == (0, "")
        add_strange_node(cluster, "apart", mounts)
        path = os.pathsep.join([str(packages.parent), os.environ.get("PYTHONPATH", "")])
        add_strange_node(cluster, "old", PYTHONPATH=path)
        cluster._wait_for_nodes()
        both = run_python(cluster, CHECK.format(seconds=60, files=files))
        assert both.returncode == 2, both.stderr
        warning, error = both.stderr.splitlines()
        assert warning.startswith("warning: node apart (")
        assert "has 64 MiB of /dev/shm, so Ray keeps its object store of 256 MiB on disk" in warning
        assert f"cannot see run.storage, {shared}/run/lease.json ({shared}/run/lease.json does not exist" in error
        assert f"has another file in the place of data.catalog, {shared}/catalog/manifest.json; on several" in error
        assert "node old (" in error
        assert "has numpy 1.26.4 where this command has " in error
        assert "node head" not in error
        for pid in process_ids():
            if session_of(pid) == cluster.processes[-1].pid:
                os.kill(pid, signal.SIGSTOP)
        hanging = run_python(cluster, CHECK.format(seconds=6, files={}))
        assert hanging.returncode == 2, hanging.stderr
        assert "waiting for node old (" in hanging.stderr
        assert "did not start a task within 6 s" in hanging.stderr


def test_the_own_node_agrees(ray_local, s3, tmp_path, monkeypatch, capsys):
    """A real task on the node of this process; then the command has another version than the task."""
    monkeypatch.setattr(node_checks, "started_here", lambda: False)
    (tmp_path / "lock").write_text("{}")
    node_checks.check_nodes({"run.storage": str(tmp_path / "lock")})
    with pytest.raises(
        InputError, match=r"node \S+ cannot see run\.storage, .*none \(.* does not exist .*\); on several"
    ):
        node_checks.check_nodes({"run.storage": str(tmp_path / "none")})
    assert capsys.readouterr().err == ""
    there = node_checks.installed_versions()
    node_checks.check_versions(there)
    monkeypatch.setattr(node_checks, "installed_versions", lambda: there | {"torch": "1.0.0"})
    message = rf"node \S+ has torch {there['torch']} where this command has 1\.0\.0; use the same image"
    with pytest.raises(InputError, match=message):
        node_checks.check_nodes({})


def test_the_check_imports_no_torch():
    code = "import sys, gtc_dist.preflight.node_checks; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
