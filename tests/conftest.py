"""Fixtures: a local Ray cluster and an S3 server, each started once per test session."""

import os
import secrets
import sys
import uuid
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "cluster" / "local"))  # scripts, not packages
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "cluster"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

from seaweed import SeaweedServer

# Set before ray, torch and numpy are imported, which read these variables at import.
os.environ.update(
    {
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),  # otherwise ray.init writes one to the home folder
        "RAY_DEDUP_LOGS": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # 2 by default: each training would wait several times for it
        "RAY_worker_niceness": "0",  # default 15: the other pytest process would starve the ranks
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # silences a warning about CUDA_VISIBLE_DEVICES
    }
)
for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN_PATH", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
    os.environ.pop(name, None)

BUCKET = "gtc-test"
OBJECT_STORE_BYTES = 400 << 20


def pytest_collection_modifyitems(items):
    """Run the slowest files first: two processes share the tests by file, so the last file should be short."""
    slow = ["test_faults.py", "test_job.py", "test_compile.py", "test_train.py", "test_search_settings.py"]
    slow += ["test_resume.py", "test_tools.py", "test_build_catalog.py", "test_api.py"]
    slow += ["test_refusals.py"]
    items.sort(key=lambda item: slow.index(item.path.name) if item.path.name in slow else len(slow))


@pytest.fixture(scope="session")
def s3_server():
    """An S3 server (SeaweedFS); the environment of this process and its children points to it."""
    with SeaweedServer(buckets=[BUCKET]) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.env.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture
def s3(s3_server) -> str:
    """URI of an empty folder in the S3 server."""
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture(params=["local", "s3"])
def folder(request, tmp_path) -> str:
    """An empty folder: on the local disk, and in the S3 server."""
    return str(tmp_path) if request.param == "local" else request.getfixturevalue("s3")


@pytest.fixture(scope="session")
def ray_local(s3_server):
    """A local Ray cluster of 4 CPUs. The S3 server is started first: workers inherit its environment at ray.init."""
    import ray

    context = ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield context
    ray.shutdown()
