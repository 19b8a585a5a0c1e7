"""cluster/local/: up.sh and down.sh; what a job uploads."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
import urllib.request
import zipfile
from pathlib import Path

import pytest
from local_cluster import MARK, LocalCluster
from processes import environment_of, process_ids
from small import ROOT
from upload_size import main, upload_sizes

LOCAL = ROOT / "cluster" / "local"
COUNT_NODES = (
    "import os, ray; ray.init(log_to_driver=False); "
    "print('nodes', sum(n['Alive'] for n in ray.nodes()), 'cpus', int(ray.cluster_resources()['CPU']), "
    "'at', os.environ['AWS_ENDPOINT_URL'])"
)
LIST_FILES = "import os; print('uploaded', sorted(os.path.join(r, n) for r, _, names in os.walk('.') for n in names))"


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="nodes is 0"):
        LocalCluster(nodes=0)


@pytest.fixture
def project(tmp_path) -> Path:
    """A working folder with what a job must not upload."""
    folder = tmp_path / "project"
    files = ["mine.yaml", "code/model.py", ".venv/lib/big.so", "demo/catalog/ids.bin", "data/raw.parquet", ".git/HEAD"]
    files += ["code/__pycache__/model.pyc", "code/notes/a.log"]
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x" * 1000)
    (folder / ".gitignore").write_text("/demo/\n")
    (folder / ".rayignore").write_text("/data/\n")
    (folder / "code" / ".gitignore").write_text("*.log\n")
    return folder


UPLOADED = [".gitignore", ".rayignore", "code/.gitignore", "code/model.py", "mine.yaml"]


def test_the_size_is_told_before_the_upload(project, capsys):
    assert sorted(upload_sizes(project)) == UPLOADED
    assert main([str(project)]) == 0
    assert f"{project}: 5 files, 0.0 MiB" in capsys.readouterr().out
    (project / "forgotten.bin").write_bytes(bytes(2 << 20))
    assert main([str(project), "--limit-mib", "1"]) == 1
    told = capsys.readouterr()
    assert "6 files, 2.0 MiB" in told.out
    assert "2.0 MiB  forgotten.bin" in told.out
    assert ".rayignore" in told.err


def test_the_project_itself_is_small_to_upload():
    """A checkout with an environment and the demo's data, as a new user has it."""
    sizes = upload_sizes(ROOT)
    assert sum(sizes.values()) < 5 << 20
    assert {"configs/demo.yaml", "gtc_dist/train.py"} <= set(sizes)
    assert {name.split("/")[0] for name in sizes}.isdisjoint({".venv", "demo", "work", ".git"})


def test_the_list_is_what_ray_uploads(project):
    """The package that Ray makes for a job, unpacked."""
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env import packaging

    package = project.parent / "package.zip"
    packaging.create_package(str(project), package, include_gitignore=True, excludes=get_runtime_env_default_excludes())
    assert sorted(n for n in zipfile.ZipFile(package).namelist() if not n.endswith("/")) == UPLOADED


@pytest.mark.long
def test_up_and_down(project, tmp_path):
    """One command starts all, the printed lines work in a shell, a job gets the listed files, and nothing is left."""
    before = set(clusters())
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = os.environ | {"PATH": path, "GTC_LOCAL_DIR": str(tmp_path / "state")}

    def run(*words: str, status: int = 0) -> str:
        done = subprocess.run(words, env=env, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    printed = run(str(LOCAL / "up.sh"), "--nodes", "2", "--cpus", "1")
    try:
        source = re.search(r"^ +(source \S+)$", printed, re.M)[1]
        env_file = Path(source.split()[1])
        secret = re.search(r"AWS_SECRET_ACCESS_KEY=(\S+)", env_file.read_text())[1]
        token = Path(re.search(r"RAY_AUTH_TOKEN_PATH=(\S+)", env_file.read_text())[1])
        assert env_file.stat().st_mode & 0o077 == 0
        assert secret not in printed
        assert token.read_text() not in printed
        assert "a cluster is up already" in run(str(LOCAL / "up.sh"), status=2)

        submit = f"{source} && ray job submit"
        done = run("bash", "-c", f"{submit} -- python -c {shlex.quote(COUNT_NODES)}")
        assert "nodes 2 cpus 2 at http://127.0.0.1" in done
        done = run("bash", "-c", f"{submit} --working-dir {project} -- python -c {shlex.quote(LIST_FILES)}")
        assert f"uploaded {['./' + name for name in UPLOADED]}" in done

        board = re.search(r"^TensorBoard: (\S+)$", printed, re.M)[1]
        write = "import glob, os, tempfile; from torch.utils.tensorboard import SummaryWriter; "
        write += "from gtc_dist.data import storage; folder = tempfile.mkdtemp(); log = SummaryWriter(folder); "
        write += "log.add_scalar('loss/x', 0.5, 1); log.close(); file = glob.glob(folder + '/*')[0]; "
        write += "storage.copy_file(file, 's3://gtc/runs/a/tensorboard/' + os.path.basename(file))"
        run("bash", "-c", f"{source} && python -c {shlex.quote(write)}")
        wait_for_run(board, "runs/a/tensorboard")
    finally:
        assert "has ended" in run(str(LOCAL / "down.sh"))
    assert not env_file.exists()
    assert not token.exists()
    assert set(clusters()) <= before
    assert "no cluster is up" in run(str(LOCAL / "down.sh"))


def wait_for_run(board: str, name: str) -> None:
    """Wait until TensorBoard, which looks every five seconds, shows a run."""
    deadline = time.monotonic() + 60
    while True:
        with urllib.request.urlopen(f"{board}/data/runs", timeout=30) as answer:
            if name in (runs := json.load(answer)):
                return
        assert time.monotonic() < deadline, runs
        time.sleep(0.5)


def clusters() -> list[bytes]:
    """Marks of all local clusters with a running process."""
    marks = (v for pid in process_ids() for v in environment_of(pid).split(b"\0"))
    return [v for v in marks if v.startswith(MARK.encode())]
