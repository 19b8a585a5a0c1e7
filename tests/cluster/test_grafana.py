"""cluster/grafana/dashboard.json: what it asks Prometheus for is what Ray exports."""

import json
import re
import subprocess
import time
import urllib.request

import pytest
from local_cluster import LocalCluster
from small import ROOT

DASHBOARD = json.loads((ROOT / "cluster" / "grafana" / "dashboard.json").read_text())
# metrics of a training, each tagged `run`; Ray adds the prefix ray_
METRICS = {"gtc_interactions_per_second", "gtc_loss", "gtc_stall_seconds", "gtc_recall_at_20"}
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
PUBLISH = """
import time, ray
from ray.util.metrics import Gauge
ray.init(log_to_driver=False)
for name in {names}:
    Gauge(name, tag_keys=("run",)).set(0.5, tags={{"run": "first"}})
print("published", flush=True)
time.sleep(600)
"""


def names_in(expression: str) -> set[str]:
    return set(re.findall(r"\bray_\w+", expression))


def test_every_metric_is_one_that_is_exported():
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    asked = set().union(*map(names_in, EXPRESSIONS))
    assert {f"ray_{name}" for name in METRICS} <= asked
    assert asked <= {f"ray_{name}" for name in METRICS | set(METRICS_GAUGES)}
    for expression in EXPRESSIONS:
        if "ray_gtc_" in expression:
            assert '{run=~"$run"}' in expression
            assert "by (run)" in expression


def test_dashboard_can_be_imported():
    """What Grafana needs: places, ids, and variables that the panels refer to."""
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)\}?", json.dumps(DASHBOARD["panels"])))
    assert used <= set(variables)
    assert names_in(variables["run"]["definition"]) <= {f"ray_{name}" for name in METRICS}
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert max(x for x, _ in cells) < 24
        assert not taken & cells, panel["title"]
        taken |= cells


@pytest.mark.long
def test_ray_exports_these_names(s3_server):
    """Gauges of a job, as Prometheus reads them from the nodes."""
    with LocalCluster(nodes=1, cpus=1, storage=s3_server) as cluster:
        command = ["python", "-c", PUBLISH.format(names=sorted(METRICS))]
        job = subprocess.Popen(
            ["ray", "job", "submit", "--address", cluster.address, "--", *command],
            env=cluster.env,
            stdout=subprocess.DEVNULL,
        )
        try:
            discovery = cluster.folder / "head" / "prom_metrics_service_discovery.json"
            deadline = time.monotonic() + 240
            missing = {f"ray_{name}" for name in METRICS}
            while missing:
                assert time.monotonic() < deadline, missing
                time.sleep(1)
                for target in (t for group in json.loads(discovery.read_text()) for t in group["targets"]):
                    try:
                        with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as answer:
                            text = answer.read().decode()
                    except OSError:  # Ray lists ports of parts that this cluster has not, such as its autoscaler
                        continue
                    missing -= {name for name in missing if re.search(rf'^{name}\{{.*run="first"', text, re.M)}
        finally:
            job.kill()
            job.wait()
