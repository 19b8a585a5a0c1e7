"""MLflow: curves, parameters, texts and the result, in the run of that name on the server of MLFLOW_TRACKING_URI.

A thread of its own sends everything, so that a step never waits for the server. The experiment is that of
MLFLOW_EXPERIMENT_NAME, by default `gtc-dist`. A resumed run continues its run there; MLflow keeps the points of steps
that are repeated a second time.
"""

import os
import time
from concurrent.futures import Future, ThreadPoolExecutor

import mlflow
import numpy as np
import yaml
from mlflow.entities import Metric, Param

from gtc_dist.evaluation.metrics import flat_metrics
from gtc_dist.tracking.charts import chart_tag, quality_metrics
from gtc_dist.tracking.metric_logger import Histogram, RunDescription, result_summary

URI_TAG = "gtc.run"
SENT_AT_ONCE = 500  # metrics of a request; MLflow takes 1,000
MOST_PARAMS = 100  # of a request


class MlflowLogger:
    """Sends a run to MLflow; a `MetricLogger`."""

    def __init__(self, run: RunDescription):
        self.quality = quality_metrics(run.config.eval.metric)
        self.client = mlflow.MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "gtc-dist")
        found = self.client.get_experiment_by_name(name)
        experiment = self.client.create_experiment(name) if found is None else found.experiment_id
        value = run.uri.replace("'", "")
        before = self.client.search_runs([experiment], f"tags.`{URI_TAG}` = '{value}'") if run.done else []
        if before:
            self.run_id = before[0].info.run_id
            self.client.update_run(self.run_id, status="RUNNING")
        else:
            tags = {URI_TAG: value}
            self.run_id = self.client.create_run(experiment, run_name=run.config.run.name, tags=tags).info.run_id
            params = [Param(key, str(value)) for key, value in run.hyperparameters.items()]
            for start in range(0, len(params), MOST_PARAMS):
                self.client.log_batch(self.run_id, params=params[start : start + MOST_PARAMS])
            self.client.log_text(self.run_id, yaml.safe_dump(run.config.model_dump(), sort_keys=False), "config.yaml")
            self.client.log_text(self.run_id, run.data_summary, "data.md")
        self.sender = ThreadPoolExecutor(1, thread_name_prefix="mlflow")
        self.waiting: list[Metric] = []
        self.sent: list[Future] = []

    def scalars(self, values: dict[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        names = {name: chart_tag(name, self.quality).replace("@", "_at_") for name in values}  # MLflow forbids @
        self.waiting += [Metric(names[name], value, now, step) for name, value in values.items()]
        if len(self.waiting) >= SENT_AT_ONCE:
            self._send()

    def histograms(self, values: dict[str, Histogram], step: int) -> None:
        """Nothing: MLflow has no histograms."""

    def projector(self, vectors: np.ndarray, labels: list[str], step: int) -> None:
        """Nothing: MLflow has no projector."""

    def result(self, result: dict, step: int) -> None:
        now = int(time.time() * 1000)
        test = flat_metrics(result["test"])
        self.waiting += [Metric(f"test/{name.replace('@', '_at_')}", test[name], now, step) for name in self.quality]
        self.sent.append(self.sender.submit(self.client.log_text, self.run_id, result_summary(result), "result.md"))
        self.sent.append(self.sender.submit(self.client.set_terminated, self.run_id))

    def flush(self) -> None:
        self._send()
        done = [future for future in self.sent if future.done()]
        self.sent = [future for future in self.sent if future not in done]
        for future in done:
            future.result()

    def close(self) -> None:
        self._send()
        self.sender.shutdown()
        for future in self.sent:
            future.result()

    def _send(self) -> None:
        for start in range(0, len(self.waiting), SENT_AT_ONCE):
            part = self.waiting[start : start + SENT_AT_ONCE]
            self.sent.append(self.sender.submit(self.client.log_batch, self.run_id, metrics=part))
        self.waiting = []
