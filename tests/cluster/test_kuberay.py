"""cluster/kuberay/: rendered by kubectl, checked with the types of Kubernetes and KubeRay; its commands run."""

import copy
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import make_dataset
import pytest
import yaml
from kubernetes_types import problems
from local_cluster import LocalCluster
from small import ROOT

from gtc_dist import config_file
from gtc_dist.data import storage

FOLDER = ROOT / "cluster" / "kuberay"
OVERLAYS = ("prepare", "raycluster", "train", "export", "tensorboard")
VERSIONS = ("v1.5.1", "v1.7.0")  # the oldest that knows authOptions, and the newest
# with runAsNonRoot and seccompProfile of the pods, what Kubernetes' standard `restricted` asks of a container
RESTRICTED = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
MAX_NAME = 47  # of a RayJob: KubeRay appends to it (utils/constant.go, MaxRayJobNameLength)

needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")


def rendered(folder: Path) -> dict[str, dict]:
    """What `kubectl apply -k FOLDER` sends, by kind and name."""
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {f"{d['kind']}/{d['metadata']['name']}": d for d in yaml.safe_load_all(done.stdout)}


@pytest.fixture
def edited(tmp_path) -> Path:
    """The folder after a user's edits: an image, a bucket, numbers of ranks."""
    folder = tmp_path / "kuberay"
    shutil.copytree(FOLDER, folder)
    settings = folder / "settings" / "kustomization.yaml"
    text = settings.read_text()
    for old, new in {
        "newName: YOUR-REGISTRY/gtc-dist": "newName: registry.example/gtc-dist",
        "BUCKET=s3://YOUR-BUCKET/gtc": "BUCKET=s3://shop/gtc",
        "- WORKERS=2": "- WORKERS=6",
        "MIN_WORKERS=1": "MIN_WORKERS=3",
    }.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    settings.write_text(text)
    return folder


def pods(document: dict) -> list[dict]:
    """Pod specifications anywhere in a document."""
    if isinstance(document, list):
        return [pod for item in document for pod in pods(item)]
    if not isinstance(document, dict):
        return []
    return [document] * ("containers" in document) + [pod for item in document.values() for pod in pods(item)]


def documents_as_written() -> dict[str, dict]:
    files = [file for file in FOLDER.rglob("*.yaml") if "ustom" not in file.name and "settings" not in str(file)]
    files.append(FOLDER / "settings" / "account.yaml")
    documents = [d for file in files for d in yaml.safe_load_all(file.read_text())]
    return {f"{d['kind']}/{d['metadata']['name']}": d for d in documents}


@pytest.mark.parametrize("version", VERSIONS)
def test_files_pass_the_schemas(version):
    """Without kubectl: the files as they are; the specification of train/ is that of base/."""
    documents = documents_as_written()
    assert len(documents) == 7
    documents["RayJob/gtc-train"]["spec"]["rayClusterSpec"] = documents["RayCluster/gtc"]["spec"]
    for document in documents.values():
        assert problems(document, version) == []


def test_the_check_finds_mistakes():
    job = documents_as_written()["RayJob/gtc-train"]
    job["spec"]["rayClusterSpec"] = documents_as_written()["RayCluster/gtc"]["spec"]

    def found(change) -> list[str]:
        broken = copy.deepcopy(job)
        change(broken["spec"]["rayClusterSpec"]["workerGroupSpecs"][0])
        return problems(broken, VERSIONS[-1])

    container = lambda group: group["template"]["spec"]["containers"][0]  # noqa: E731
    assert "'2' is not of type integer" in found(lambda group: group.update(replicas="2"))[0]
    assert "unknown field minReplica" in found(lambda group: group.update(minReplica=2))[0]
    assert "unknown field toleration" in found(lambda group: group["template"]["spec"].update(toleration=[]))[0]
    assert "is not a quantity" in found(lambda group: container(group)["resources"]["limits"].update(memory="4 GB"))[0]
    assert "`name`" in found(lambda group: container(group).pop("name"))[0]
    assert "groupName is missing" in found(lambda group: group.pop("groupName"))[0]


@needs_kubectl
@pytest.mark.parametrize("version", VERSIONS)
def test_rendered_documents_pass_the_schemas(version, edited):
    train = edited / "train" / "kustomization.yaml"
    for overlay in OVERLAYS:
        for document in rendered(edited / overlay).values():
            assert problems(document, version) == [], document["metadata"]["name"]
    assert train.read_text().count("  # - ../kueue") == 1
    train.write_text(train.read_text().replace("  # - ../kueue", "  - ../kueue"))
    for document in rendered(edited / "train").values():
        assert problems(document, version) == []


@needs_kubectl
def test_numbers_and_image_are_written_once(edited):
    job = rendered(edited / "train")["RayJob/gtc-train"]
    gpu = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert (gpu["groupName"], gpu["replicas"], gpu["minReplicas"], gpu["maxReplicas"]) == ("gpu", 3, 3, 6)
    for overlay in OVERLAYS:
        documents = rendered(edited / overlay)
        assert "YOUR-" not in str({name: d for name, d in documents.items() if "ServiceAccount" not in name})
        assert "RayCluster/gtc" in documents or overlay != "raycluster"
        assert "RayCluster/gtc" not in documents or overlay == "raycluster"
        for pod in (pod for document in documents.values() for pod in pods(document)):
            assert {container["image"] for container in pod["containers"]} == {"registry.example/gtc-dist:0.9.2-cuda"}


@needs_kubectl
def test_kueue_starts_all_ranks_at_once(edited):
    file = edited / "train" / "kustomization.yaml"
    file.write_text(file.read_text().replace("  # - ../kueue", "  - ../kueue"))
    job = rendered(edited / "train")["RayJob/gtc-train"]
    assert job["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "gtc"}
    assert job["spec"]["suspend"] is True
    assert job["spec"]["shutdownAfterJobFinishes"] is True  # KubeRay and Kueue ask for it
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"] is False
    assert "automountServiceAccountToken" not in cluster["headGroupSpec"]["template"]["spec"]
    gpu = cluster["workerGroupSpecs"][0]
    assert (gpu["replicas"], gpu["minReplicas"], gpu["maxReplicas"]) == (6, 6, 6)


def test_what_kuberay_itself_asks_for():
    """Rules of KubeRay's controller that are not in its CRD (ray-operator/controllers/ray/utils/validation.go)."""
    documents = documents_as_written()
    job, cluster = documents["RayJob/gtc-train"], documents["RayCluster/gtc"]["spec"]
    assert len(job["metadata"]["name"]) <= MAX_NAME
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", job["metadata"]["name"])
    spec = job["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] >= 0
    assert spec["backoffLimit"] >= 1
    assert spec["activeDeadlineSeconds"] > 0
    assert spec["submitterPodTemplate"]["spec"]["restartPolicy"] in ("Never", "OnFailure")
    assert cluster["authOptions"] == {"mode": "token"}
    pinned = re.search(r"^ray==(\S+)", (ROOT / "constraints.txt").read_text(), re.M)[1]
    assert cluster["rayVersion"] == pinned
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:  # autoscaler v2 allows no other policy
        assert "restartPolicy" not in group["template"]["spec"]
    for group in cluster["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_pods_are_as_a_cluster_asks():
    """Resources, shared memory, users, accounts, credentials, probes, tolerations."""
    documents = documents_as_written()
    cluster = documents["RayCluster/gtc"]["spec"]
    groups = {
        group.get("groupName", "head"): group for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    }
    assert set(groups) == {"head", "gpu", "cpu"}
    for pod in (pod for document in documents.values() for pod in pods(document)):
        assert pod["serviceAccountName"] == "gtc"
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            assert container["resources"]["requests"] == container["resources"]["limits"]
            assert container["securityContext"] == RESTRICTED
    assert cluster["autoscalerOptions"]["securityContext"] == RESTRICTED
    # the pods' account has no token; the autoscaler, a container that KubeRay adds to the head, needs it
    assert documents["ServiceAccount/gtc"]["automountServiceAccountToken"] is False
    for name, group in groups.items():
        pod = group["template"]["spec"]
        assert pod.get("automountServiceAccountToken", False) == (name == "head")
        (container,) = pod["containers"]
        assert {"configMapRef": {"name": "gtc-settings"}} in container["envFrom"]
        assert {"secretRef": {"name": "gtc-s3", "optional": True}} in container["envFrom"]
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        assert volumes[mounts["/etc/gtc"]]["configMap"]["name"] == "gtc"
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert container[probe]["httpGet"] == {"path": "/api/healthz", "port": 52365}
        keys = {toleration["key"] for toleration in pod.get("tolerations", [])}
        assert ({"nvidia.com/gpu", "cloud.google.com/gke-spot"} <= keys) == (name != "head")
        assert ("nvidia.com/gpu" in container["resources"]["limits"]) == (name == "gpu")
    board = documents["Deployment/gtc-tensorboard"]["spec"]["template"]
    assert documents["Service/gtc-tensorboard"]["spec"]["selector"] == board["metadata"]["labels"]


def settings() -> dict[str, str]:
    tree = yaml.safe_load((FOLDER / "settings" / "kustomization.yaml").read_text())
    (generated,) = [g for g in tree["configMapGenerator"] if g["name"] == "gtc-settings"]
    return dict(literal.split("=", 1) for literal in generated["literals"])


def command_of(name: str, variables: dict[str, str]) -> list[str]:
    """The command of a Job's container, with $(NAME) replaced as the kubelet does."""
    (pod,) = pods(documents_as_written()[name])
    (container,) = pod["containers"]
    words = [*container["command"], *container["args"]]
    return [re.sub(r"\$\((\w+)\)", lambda found: variables[found[1]], word) for word in words]


def entrypoint() -> str:
    return documents_as_written()["RayJob/gtc-train"]["spec"]["entrypoint"]


def test_commands_and_configuration_are_accepted():
    """The configuration of the ConfigMap, with the keys that the pods add."""
    variables = settings()
    shell, option, inner = shlex.split(entrypoint())
    assert (shell, option) == ("sh", "-c")
    assert inner.startswith("exec gtc train ")
    train = re.sub(r"\$(\w+)", lambda found: variables[found[1]], inner).split()[3:]
    for words in (command_of("Job/gtc-prepare", variables)[2:], train):
        assert words[:2] == ["--config", "/etc/gtc/mine.yaml"]
        read = config_file.load_config(FOLDER / "settings" / "mine.yaml", words[2:])
        assert read.data.catalog == "s3://YOUR-BUCKET/gtc/catalog"
    assert (read.cluster.workers, read.cluster.min_workers, read.cluster.gpu) == (2, 1, True)
    assert (read.run.storage, read.run.name) == ("s3://YOUR-BUCKET/gtc/runs", "first")


@pytest.mark.long
def test_the_commands_of_the_pods_run(s3, s3_server, tmp_path, monkeypatch):
    """Prepare, train (submitted as KubeRay's submitter does) and export, with the storage of the tests, on CPUs."""
    make_dataset.main(["--out", f"{s3}/raw", "--users", "400", "--items", "200", "--interactions", "5000"])
    config = tmp_path / "mine.yaml"
    config.write_text((FOLDER / "settings" / "mine.yaml").read_text().replace("epochs: 20", "epochs: 2"))
    variables = settings() | {"BUCKET": s3, "GPU": "false"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))

    def run(words: list[str], env: dict[str, str] | None = None) -> str:
        words = [word.replace("/etc/gtc/mine.yaml", str(config)) for word in words]
        done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=280, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(command_of("Job/gtc-prepare", variables))
    with LocalCluster(nodes=2, cpus=1, storage=s3_server) as cluster:
        submit = f"ray job submit --address {cluster.address} --submission-id gtc-train-x -- {entrypoint()}"
        run(["/bin/bash", "-c", "--", submit], cluster.env)
    assert storage.read_json(f"{s3}/runs/first/metrics.json")["last_epoch"] == 2
    run(command_of("Job/gtc-export", variables))
    assert storage.read_json(f"{s3}/embeddings/first/manifest.json")["users"] == 400
