"""Numbers of a training as gauges of Ray, which every node serves to Prometheus (`ray_gtc_loss{run="..."}`, ...).

The training loop knows nothing of them: it calls `publish` with what it logs, and `report` with each validation.
"""

from ray.util.metrics import Gauge

# what the training loop logs -> name without Ray's prefix, description
STEP_GAUGES = {
    "interactions_per_second": ("gtc_interactions_per_second", "train interactions a second, over all ranks"),
    "loss/total": ("gtc_loss", "loss of a step, mean since the last point of the logs"),
    "seconds_per_step/data": (
        "gtc_stall_seconds",
        "seconds that a step waits for its batch, mean since the last point",
    ),
}
VALIDATION_GAUGES = {"recall@20": ("gtc_recall_at_20", "Recall@20 of the last validation")}


class RunGauges:
    """Gauges of one run, set by its rank 0. They end with the process.

    Args:
        run: value of their tag `run`.
    """

    def __init__(self, run: str):
        self.gauges = {}
        for name, (gauge, description) in (STEP_GAUGES | VALIDATION_GAUGES).items():
            self.gauges[name] = Gauge(gauge, description, tag_keys=("run",))
            self.gauges[name].set_default_tags({"run": run})

    def set(self, values: dict[str, float]) -> None:
        """Set the gauges of those values that have one."""
        for name in values.keys() & self.gauges.keys():
            self.gauges[name].set(float(values[name]))
