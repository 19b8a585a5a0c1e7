"""Numbers of a training at the endpoint that Prometheus reads from a node."""

import re
import time
import urllib.request

import ray
from small import small_catalog, small_config
from trainings import trainer_of

from gtc_dist.distributed.collectives import Communicator
from gtc_dist.launch.ray_metrics import STEP_GAUGES, VALIDATION_GAUGES, RunGauges

SERVED = {"gtc_interactions_per_second", "gtc_loss", "gtc_stall_seconds", "gtc_recall_at_20"}  # cluster/grafana


def served_gauges(run: str) -> dict[str, float]:
    """Gauges of a run that the nodes of the cluster serve: name without Ray's prefix -> value."""
    found = {}
    for node in ray.nodes():
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        text = urllib.request.urlopen(url, timeout=10).read().decode()
        for name, tags, value in re.findall(r"^ray_(gtc_\w+)\{(.*)\} (\S+)$", text, re.M):
            if f'run="{run}"' in tags.split(","):
                found[name] = float(value)
    return found


def test_gauges_are_served_by_the_node(ray_local):
    @ray.remote(num_cpus=0)
    class Rank:
        def publish(self) -> None:
            self.gauges = RunGauges("my run")
            self.gauges.set({"interactions_per_second": 1500, "loss/total": 0.5, "seconds_per_step/data": 0.25})
            self.gauges.set({"recall@20": 0.125, "ndcg@20": 7})

    rank = Rank.remote()
    ray.get(rank.publish.remote())
    deadline = time.monotonic() + 60
    while (found := served_gauges("my run")).keys() != SERVED:  # Ray exports them every ten seconds
        assert time.monotonic() < deadline, found
        time.sleep(0.5)
    values = {
        "gtc_interactions_per_second": 1500,
        "gtc_loss": 0.5,
        "gtc_stall_seconds": 0.25,
        "gtc_recall_at_20": 0.125,
    }
    assert found == values
    assert served_gauges("another run") == {}
    ray.kill(rank)


def test_a_training_publishes_what_the_gauges_show(tmp_path):
    catalog = small_catalog(tmp_path / "catalog")
    config = small_config(catalog.uri, train={"epochs": 1, "log_every": 3})
    points, validations = [], []
    trainer = trainer_of(
        Communicator(), config, str(tmp_path / "run"), publish=points.append, report=validations.append
    )
    trainer.fit()
    assert len(points) == -(-trainer.loader.steps // 3)
    for point in points:
        assert point.keys() >= STEP_GAUGES.keys()
        weighted = point["loss/bpr"] + 0.4 * point["loss/tc"] + 0.7 * point["loss/diffusion"]
        assert abs(point["loss/total"] - weighted - config.train.w_reg * point["loss/l2"]) < 1e-6
        assert point["seconds_per_step/data"] >= 0
    assert all(metrics.keys() >= VALIDATION_GAUGES.keys() for metrics in validations)
