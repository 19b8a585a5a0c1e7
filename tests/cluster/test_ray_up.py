"""cluster/aws/: read by Ray's cluster launcher and by the model of Amazon's API."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from botocore import session, validate
from seaweed import find_program, free_ports
from small import ROOT

FILE = ROOT / "cluster" / "aws" / "cluster.yaml"


@pytest.fixture
def config() -> dict:
    return yaml.safe_load(FILE.read_text())


def test_rays_own_schema(config):
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(config))
    assert config["provider"]["type"] == "aws"
    pinned = re.search(r"^ray==(\S+)", (ROOT / "constraints.txt").read_text(), re.M)[1]
    assert config["docker"]["image"].startswith(f"rayproject/ray:{pinned}-")
    starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    assert all("RAY_AUTH_MODE=token" in line for line in starts if "ray start" in line)


def test_instances_are_as_amazons_api_takes_them(config):
    """Names and types of what the launcher passes to RunInstances; the head is not spot, the workers are."""
    types = config["available_node_types"]
    request = session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for kind in types.values():
        report = validate.ParamValidator().validate(kind["node_config"] | {"MinCount": 1, "MaxCount": 1}, request)
        assert not report.has_errors(), report.generate_report()
        assert set(kind["node_config"]["IamInstanceProfile"]) == {"Name"}  # a role, no keys
    assert "InstanceMarketOptions" not in types[config["head_node_type"]]["node_config"]
    assert types["gpu_worker"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}


def test_no_secret_is_among_the_mounted_files(config):
    assert config["file_mounts"] == {"/home/ray/gtc-dist": "."}
    assert "auth_token" not in str(config["file_mounts"])
    assert "AWS_SECRET" not in FILE.read_text()


def test_nodes_take_the_token_from_the_bucket(config, s3_server, s3, tmp_path):
    """The setup command itself, with the storage of the tests; s3 is a folder in a bucket, as BUCKET may be."""
    from gtc_dist.data import storage

    storage.write_bytes(f"{s3}/ray/auth_token", b"token-of-the-test")
    (command,) = [line for line in config["setup_commands"] if "auth_token" in line]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = os.environ | {"HOME": str(tmp_path), "BUCKET": s3.removeprefix("s3://"), "PATH": path}
    subprocess.run(["bash", "-c", command], env=env, check=True)
    token = tmp_path / ".ray" / "auth_token"
    assert token.read_text() == "token-of-the-test"
    assert token.stat().st_mode & 0o077 == 0


@pytest.mark.long
def test_ray_up_launches_the_head(tmp_path, config):
    """`ray up` without an account: moto answers in place of Amazon, until the launcher waits for SSH on the head."""
    packages = tmp_path / "packages"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        f"--target={packages}",
        "boto3",
        "moto[ec2,iam,server]",
    ]
    subprocess.run([*install, f"--constraint={ROOT / 'constraints.txt'}"], check=True)
    (port,) = free_ports(1)
    config["provider"]["use_internal_ips"] = True  # moto's public addresses may be those of somebody's machines
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    env = os.environ | {
        "HOME": str(tmp_path),  # the launcher keeps the key of the instances below it
        "PYTHONPATH": str(packages),
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-west-2",
        "RAY_AUTH_MODE": "disabled",
    }
    profile = (
        "import boto3; iam = boto3.client('iam'); iam.create_instance_profile(InstanceProfileName='gtc-ray'); "
        "iam.create_role(RoleName='r', AssumeRolePolicyDocument='{}'); "
        "iam.add_role_to_instance_profile(InstanceProfileName='gtc-ray', RoleName='r')"
    )
    log = tmp_path / "log"
    with open(log, "wb") as out:
        moto = subprocess.Popen([packages / "bin" / "moto_server", f"-p{port}"], env=env, stdout=out, stderr=out)
        launcher = None
        try:
            wait_for(lambda: b"Running on" in log.read_bytes(), log)
            subprocess.run([sys.executable, "-c", profile], env=env, check=True)
            words = [find_program("ray"), "up", "--no-config-cache", "--yes", str(file)]
            launcher = subprocess.Popen(words, cwd=ROOT, env=env, stdout=out, stderr=out)
            wait_for(lambda: b"Launched 1 nodes" in log.read_bytes(), log)
            listed = (
                "import boto3; answer = boto3.client('ec2').describe_instances(); "
                "[print(i['InstanceType'], i['IamInstanceProfile']['Arn'], i.get('InstanceLifecycle')) "
                "for r in answer['Reservations'] for i in r['Instances']]"
            )
            done = subprocess.run([sys.executable, "-c", listed], env=env, capture_output=True, text=True, check=True)
        finally:
            for process in filter(None, (launcher, moto)):
                process.kill()
                process.wait()
    kind, role, lifecycle = done.stdout.split()
    assert kind == "m5.2xlarge"
    assert role.endswith("instance-profile/gtc-ray")
    assert lifecycle == "None"  # not spot


def wait_for(done, log: Path, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.2)
