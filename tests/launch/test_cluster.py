"""cluster/: the local cluster runs, and the YAML files are valid."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from local_cluster import MARK, LocalCluster
from processes import environment_of, process_ids

ROOT = Path(__file__).resolve().parents[2]
COUNT_NODES = (
    "import os, ray; ray.init(log_to_driver=False); "
    "print('nodes', sum(n['Alive'] for n in ray.nodes()), 'cpus', int(ray.cluster_resources()['CPU']), "
    "'at', os.environ['AWS_ENDPOINT_URL'])"
)


@pytest.mark.long
def test_script_prints_working_commands_and_ends_on_sigterm(tmp_path):
    before = set(_clusters())
    with open(tmp_path / "out.txt", "wb") as log:
        script = subprocess.Popen(
            [sys.executable, str(ROOT / "cluster" / "local_cluster.py"), "--nodes", "1", "--cpus", "1"],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + 120
        while "Ctrl-C ends" not in (printed := (tmp_path / "out.txt").read_text()):
            assert script.poll() is None, printed
            assert time.monotonic() < deadline, printed
            time.sleep(0.2)
        source = re.search(r"^ +(source (\S+))$", printed, re.M)
        address = re.search(r"^ +(ray job submit --address \S+)", printed, re.M)
        env_file = Path(source[2])
        secret = re.search(r"AWS_SECRET_ACCESS_KEY=(\S+)", env_file.read_text())[1]
        assert env_file.stat().st_mode & 0o077 == 0
        assert secret not in printed
        assert (env_file.parent / "auth_token").read_text() not in printed
        shell = f"{source[1]} && {address[1]} -- python -c {shlex.quote(COUNT_NODES)}"
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        done = subprocess.run(
            ["bash", "-c", shell], env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "nodes 1 cpus 1 at http://127.0.0.1" in done.stdout
    finally:
        script.send_signal(signal.SIGTERM)
        status = script.wait(60)
    assert status == 0
    assert not env_file.exists()
    assert set(_clusters()) <= before


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="nodes is 0"):
        LocalCluster(nodes=0)


def test_rayjob_manifest():
    documents = list(yaml.safe_load_all((ROOT / "cluster" / "rayjob.yaml").read_text()))
    (job,) = [d for d in documents if d["kind"] == "RayJob"]
    assert job["apiVersion"] == "ray.io/v1"
    spec = job["spec"]
    assert "gtc_dist.train" in spec["entrypoint"]
    assert spec["shutdownAfterJobFinishes"] is True
    cluster = spec["rayClusterSpec"]
    assert cluster["rayVersion"] == _pinned("ray")
    assert cluster["authOptions"] == {"mode": "token"}
    head, (workers,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    for group in (head, workers):
        (container,) = group["template"]["spec"]["containers"]
        secrets = {ref["secretRef"]["name"] for ref in container["envFrom"] if "secretRef" in ref}
        assert secrets == {"gtc-s3"}
        assert container["image"] == head["template"]["spec"]["containers"][0]["image"]
    assert "nvidia.com/gpu" not in head["template"]["spec"]["containers"][0]["resources"]["limits"]
    gpus = int(workers["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    asked = int(re.search(r"cluster\.workers=(\d+)", spec["entrypoint"])[1])
    assert asked == gpus * workers["replicas"]
    assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]


def test_aws_cluster_file_passes_rays_own_schema():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((ROOT / "cluster" / "aws.yaml").read_text())
    validate_config(prepare_config(config))
    assert config["provider"]["type"] == "aws"
    types = config["available_node_types"]
    head, workers = types[config["head_node_type"]], types["gpu_worker"]
    assert "InstanceMarketOptions" not in head["node_config"]
    assert workers["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert all("IamInstanceProfile" in t["node_config"] for t in types.values())
    starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    assert all("RAY_AUTH_MODE=token" in line for line in starts if "ray start" in line)
    assert _pinned("ray") in yaml.safe_dump(config)


def _clusters() -> list[bytes]:
    """Marks of all local clusters with a running process."""
    marks = (v for pid in process_ids() for v in environment_of(pid).split(b"\0"))
    return [v for v in marks if v.startswith(MARK.encode())]


def _pinned(package: str) -> str:
    return re.search(rf"^{package}==(\S+)", (ROOT / "constraints.txt").read_text(), re.M)[1]
